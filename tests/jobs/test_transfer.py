"""transfer, live and on disk: what it returns, what it writes, what it refuses."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ovsprune.core.errors import (
    CheckpointError,
    OptionError,
    OutputError,
    TargetError,
    UnknownNameError,
)
from ovsprune.core.progress import Silent
from ovsprune.jobs.transfer import newest_slim, transfer
from ovsprune.slim import SlimAttention
from ovsprune.targets import load
from tests.targets.by_hand import MiniSan, saved, small_slim, small_tower

KEYS = {"target", "slim", "weights", "replaced", "kept", "dropped", "output"}


@pytest.fixture
def slim(tmp_path: Path) -> Path:
    return saved(small_slim(), tmp_path / "slim" / "small-r0.5")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    state = MiniSan.with_tower(small_tower()).state_dict()
    torch.save({"model": state, "optimizer": {"lr": 1}, "iteration": 4}, tmp_path / "san.pth")
    return tmp_path / "san.pth"


def test_on_disk(tmp_path: Path, slim: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    record = transfer(slim=slim, target="san", checkpoint=checkpoint, output=out)
    assert set(record) >= KEYS
    assert record["target"] == "san" and record["weights"] == "slim"
    assert record["output"] == str(out) and record["slim"] == str(slim)
    assert sorted(p.name for p in out.iterdir()) == [
        "lines.py",
        "model.safetensors",
        "transfer.json",
    ]
    state = MiniSan().state_dict()
    assert record["replaced"].keys() | record["kept"].keys() == state.keys()
    assert {"optimizer", "iteration"} < record["dropped"].keys()
    written = json.loads((out / "transfer.json").read_text())
    assert all(written[key] == record[key] for key in KEYS)
    fresh = MiniSan.with_tower(small_tower(seed=9))
    assert load(fresh, out) == []
    assert any(isinstance(module, SlimAttention) for module in fresh.modules())


def test_lines_are_python_that_loads_the_output(tmp_path: Path, slim: Path) -> None:
    for name in ("san", "mmseg-san"):
        record = transfer(slim=slim, target=name, output=tmp_path / name)
        lines = (tmp_path / name / "lines.py").read_text()
        assert record["lines"] == lines
        compile(lines, "lines.py", "exec")
        assert "ovsprune.targets.load(" in lines and repr(str(tmp_path / name)) in lines


def test_dry_run_writes_nothing(tmp_path: Path, slim: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    record = transfer(slim=slim, target="san", checkpoint=checkpoint, output=out, dry_run=True)
    assert record["output"] is None and record["replaced"]
    assert list(out.iterdir()) == []


def test_newest_slim_is_taken_and_said(
    tmp_path: Path, slim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = saved(small_slim(seed=2), tmp_path / "slim" / "older")
    os.utime(older / "config.json", (1, 1))
    monkeypatch.chdir(tmp_path)
    progress = Silent()
    record = transfer(target="san", progress=progress)
    assert record["slim"].endswith("small-r0.5")
    assert record["output"] == str(tmp_path / "transfer" / "san-small-r0.5")
    assert any("taking the newest, slim/small-r0.5" in note for note in progress.notes)


def test_without_a_slim_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="`ovsprune prune` first, or name one"):
        newest_slim()


def test_live_model_is_recognised(slim: Path) -> None:
    model = MiniSan.with_tower(small_tower())
    attached = transfer(model, slim)
    assert attached.target == "san" and set(attached.record()) >= KEYS
    assert any(isinstance(module, SlimAttention) for module in model.modules())
    attached.detach()
    assert not any(isinstance(module, SlimAttention) for module in model.modules())


def test_unknown_live_model(slim: Path) -> None:
    with pytest.raises(TargetError, match="Linear is none of the frameworks .*mmseg-san, san"):
        transfer(nn.Linear(2, 2), slim)


def test_unknown_target_names_the_closest(slim: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown target 'mmsegsan'. Did you mean 'mmseg-s"):
        transfer(slim=slim, target="mmsegsan")


def test_options_of_the_other_way(tmp_path: Path, slim: Path) -> None:
    with pytest.raises(OptionError, match="output cannot go with a live model"):
        transfer(MiniSan(), slim, output=tmp_path)  # type: ignore[call-overload]
    with pytest.raises(OptionError, match="needs a live model; on disk name one of mmseg-san, san"):
        transfer(slim=slim)


def test_existing_output(tmp_path: Path, slim: Path) -> None:
    out = tmp_path / "out"
    transfer(slim=slim, target="san", output=out)
    with pytest.raises(OutputError, match="exists already.*--overwrite"):
        transfer(slim=slim, target="san", output=out)
    before = (out / "transfer.json").read_bytes()
    transfer(slim=slim, target="mmseg-san", output=out, overwrite=True)
    assert (out / "transfer.json").read_bytes() != before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not what `ovsprune transfer` wrote"):
        transfer(slim=slim, target="san", output=out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_full_disk_leaves_nothing(
    tmp_path: Path, slim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ovsprune.targets.output.save_tensors", full)
    with pytest.raises(OutputError, match="disk is full"):
        transfer(slim=slim, target="san", output=tmp_path / "deep" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["slim"]


def test_bad_checkpoint_writes_nothing(tmp_path: Path, slim: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"bad.pth cannot be read"):
        transfer(slim=slim, target="san", checkpoint=tmp_path / "bad.pth", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_weights_option(slim: Path) -> None:
    with pytest.raises(OptionError, match="weights is 'all', expected 'slim', 'target' or 'auto'"):
        transfer(slim=slim, target="san", weights="all", dry_run=True)
