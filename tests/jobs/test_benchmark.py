"""Benchmark of a slim tower against another one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import ovsprune
from ovsprune import backbones
from ovsprune.core.errors import OptionError, WeightsError
from ovsprune.jobs.benchmark import benchmark
from ovsprune.jobs.prune import prune
from ovsprune.profiling import towers as module
from ovsprune.profiling.timing import peak_memory


@pytest.fixture(scope="module")
def slimmer(small_clip, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("slim") / "less"
    prune(small_clip, 0.2, samples=4, criterion="magnitude", allocation="uniform",
          recovery="none", output=output)  # fmt: skip
    return output


def test_one_row_per_tower_and_batch_size(slim, slimmer):
    record = benchmark(
        str(slim), against=str(slimmer), batch_sizes=(1, 3), pairs=2, threads=1, memory=False
    )
    assert [(row["role"], row["batch"]) for row in record["rows"]] == [
        ("against", 1), ("model", 1), ("against", 3), ("model", 3),
    ]  # fmt: skip
    for row in record["rows"]:
        assert row["throughput"] == pytest.approx(row["batch"] / row["latency"])
        assert row["peak_memory"] is None
        assert (row["speedup"] == 1.0) == (row["role"] == "against")
    against, model = record["rows"][:2]
    assert against["macs"] > model["macs"]
    assert against["params"] > model["params"]
    assert (record["pairs"], record["threads"], record["against"]) == (2, 1, str(slimmer))


def test_reference_of_a_slim_directory_is_its_base(slim, small_clip, monkeypatch):
    asked = []
    load = backbones.load_backbone

    def spy(name, *, pretrained=None, **options):
        asked.append((name, pretrained))
        return small_clip if name == "small" else load(name, pretrained=pretrained, **options)

    monkeypatch.setattr(backbones, "load_backbone", spy)
    record = benchmark(str(slim), batch_sizes=(1,), pairs=1, memory=False)
    assert [row["name"] for row in record["rows"]] == ["small dense", "small slim"]
    # Speed needs no trained weights, so no hub is asked for them.
    assert asked == [(str(slim), None), ("small", "none")]


def test_dense_model_without_reference_has_one_row(small_clip, monkeypatch):
    monkeypatch.setattr(backbones, "load_backbone", lambda name, pretrained: small_clip)
    record = benchmark("small", batch_sizes=(2,), pairs=1, memory=False)
    assert [(row["role"], row["speedup"]) for row in record["rows"]] == [("model", 1.0)]
    assert record["against"] is None


@pytest.mark.skipif(sys.platform == "win32", reason="no high-water mark there")
def test_peak_memory_is_measured_in_a_new_process(slim):
    little = peak_memory(str(slim), 1, threads=1)
    much = peak_memory(str(slim), 96, threads=1)
    weights = 4 * ovsprune.read(slim).spec.slim.params
    queries_keys_values = 96 * 37 * 3 * 64 * 4 // 2
    assert weights < little
    assert much - little > queries_keys_values


def test_failure_of_the_memory_process_is_reported(slim):
    with pytest.raises(WeightsError, match=r"memory of 'nothing' failed \(.*unknown model"):
        peak_memory("nothing", 1)


@pytest.mark.parametrize("options", [{"pairs": 0}, {"batch_sizes": (4, 0)}, {"batch_sizes": ()}])
def test_numbers_out_of_range_are_refused(slim, options):
    with pytest.raises(OptionError, match="must be 1 or more each"):
        benchmark(str(slim), **options)


def test_towers_with_different_input_sizes_are_refused(slim, small_clip, monkeypatch):
    tower = module._load(str(slim), "model")
    other = module._load(str(slim), "against")
    other.backbone.preprocess = type(other.backbone.preprocess)((64, 64))
    monkeypatch.setattr(module, "_load", lambda source, role: {"m": tower, "a": other}[source])
    with pytest.raises(OptionError, match=r"of \(48, 48\) .* of \(64, 64\); choose an"):
        benchmark("m", against="a", pairs=1, memory=False)
