"""Timing, threads and devices."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ovsprune.core.errors import OptionError
from ovsprune.profiling import timing as measure
from ovsprune.profiling.timing import alternate, device_and_dtype, paired_speedup, thread_limit


def test_passes_alternate_in_rotating_order():
    called = []
    passes = {name: (lambda name=name: called.append(name)) for name in ("dense", "slim", "other")}
    times = alternate(passes, rounds=6, warmup=3)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys(passes, 6)
    rounds = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert all(sorted(one) == sorted(passes) for one in rounds)
    assert Counter(one[0] for one in rounds) == {"dense": 3, "slim": 3, "other": 3}


def test_passes_are_timed_separately(monkeypatch):
    now = 0.0
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)

    def takes(seconds):
        def run():
            nonlocal now
            now += seconds

        return run

    times = alternate({"dense": takes(4.0), "slim": takes(1.0)}, rounds=3, warmup=1)
    assert times == {"dense": [4.0] * 3, "slim": [1.0] * 3}
    assert paired_speedup(times["dense"], times["slim"]) == 4.0


def test_paired_speedup_is_robust_to_slow_rounds():
    assert paired_speedup([1.0, 10.0, 1.0], [0.5, 5.0, 0.25]) == 2.0


def test_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with thread_limit(1) as used:
        assert used == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with thread_limit(None) as used:
        assert used == before


def test_threads_out_of_range_are_refused():
    with pytest.raises(OptionError, match="--threads 0 is out of range"), thread_limit(0):
        pass


@pytest.mark.parametrize("device", ["cuda:99", "meter", "cpu:x"])
def test_missing_device_is_refused(device):
    with pytest.raises(OptionError, match=f"--device '{device}' cannot be used here"):
        device_and_dtype(device, "float32")


def test_unknown_dtype_is_refused():
    with pytest.raises(OptionError, match="--dtype 'float8' is unknown; give one of float32"):
        device_and_dtype("cpu", "float8")
    assert device_and_dtype("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
