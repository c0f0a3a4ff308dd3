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

import ovsprune
from ovsprune.core.errors import (
    CheckpointError,
    OptionError,
    OutputError,
    TargetError,
    UnknownNameError,
)
from ovsprune.core.progress import Silent
from ovsprune.graph.costs import macs
from ovsprune.jobs.transfer import transfer
from ovsprune.slim import SlimAttention
from ovsprune.slim.read import newest_slim
from ovsprune.targets import load_into
from ovsprune.targets.key_map import KeyMap
from tests.targets.by_hand import (
    MiniSan,
    saved,
    small_slim,
    small_tower,
    snapshot,
    unchanged,
)

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
    assert load_into(fresh, out) == []
    assert any(isinstance(module, SlimAttention) for module in fresh.modules())


def test_lines_are_python_that_loads_the_output(tmp_path: Path, slim: Path) -> None:
    for name in ("san", "mmseg-san"):
        record = transfer(slim=slim, target=name, output=tmp_path / name)
        lines = (tmp_path / name / "lines.py").read_text()
        assert record["lines"] == lines
        compile(lines, "lines.py", "exec")
        assert "ovsprune.targets.load_into(" in lines and repr(str(tmp_path / name)) in lines


def test_a_schedule_is_made_by_the_lines(tmp_path: Path, slim: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    record = transfer(
        slim=slim, target="san", checkpoint=checkpoint, output=out, policy="last-k", fraction=0.25
    )
    assert record["schedule"] == {"policy": "last-k", "fraction": 0.25}
    assert json.loads((out / "transfer.json").read_text())["schedule"] == record["schedule"]
    model = MiniSan.with_tower(small_tower(seed=9))
    load_into(model, out)
    space = {"model": model, "total_steps": 8}
    exec(record["lines"][record["lines"].index("# Schedule:") :], space)
    plan: Any = space["plan"]
    assert (plan.name, plan.total_steps) == ("last-k", 8)
    assert 0 < len(plan.chosen) <= len(plan.layers) / 4 + 1
    assert transfer(slim=slim, target="san", output=tmp_path / "bare")["schedule"] is None
    with pytest.raises(UnknownNameError, match="Did you mean 'alpha'"):
        transfer(slim=slim, target="san", policy="alfa", output=tmp_path / "no")
    with pytest.raises(OptionError, match="fraction 2 is outside"):
        transfer(slim=slim, target="san", policy="alpha", fraction=2, output=tmp_path / "no")
    with pytest.raises(OptionError, match="policy cannot be used with a live model"):
        transfer(model, slim, policy="alpha")


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
    assert any("using the newest, slim/small-r0.5" in note for note in progress.notes)


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


@pytest.mark.parametrize("form", ["path", "text", "read", "load"])
def test_three_lines(slim: Path, form: str) -> None:
    """Transfer takes a directory, a path and a loaded checkpoint alike."""
    given: Any = {
        "path": slim, "text": str(slim), "read": ovsprune.read(slim), "load": ovsprune.load(slim)
    }[form]  # fmt: skip
    model = MiniSan.with_tower(small_tower())
    wanted = MiniSan.with_tower(small_tower())
    before = snapshot(model)
    report = ovsprune.transfer(model, given)
    with transfer(wanted, slim):
        found, expected = model.state_dict(), wanted.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert report.slim == slim and report.weights == "slim"
    text = str(report)
    assert text.startswith("san: ") and "parameters: " in text and " -> " in text
    assert all(f"replaced {name}: {what}" in text for name, what in report.replaced.items())
    assert all(f"protected {name}: {why}" in text for name, why in report.protected.items())
    report.detach()
    assert unchanged(model, before)


def test_slim_tower_that_was_trained_on_is_taken_as_it_is(slim: Path) -> None:
    tower = ovsprune.load(slim)
    with torch.no_grad():
        tower.tower.get_parameter("transformer.resblocks.0.mlp.c_fc.weight").mul_(2)
    model = MiniSan.with_tower(small_tower())
    with ovsprune.transfer(model, tower):
        found = model.get_parameter("clip_visual_extractor.resblocks.0.mlp.c_fc.weight")
        mine = ovsprune.read(slim).tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"]
        assert torch.equal(found.detach(), 2 * mine)


class Runs(MiniSan):
    """SAN whose forward takes what the example gives."""

    def forward(self, images: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        tokens = (images.shape[-1] // 8) ** 2 + 1
        if float(scale) != 1.0:
            raise ValueError("only 1")
        return self.run(images, torch.zeros(4 * len(images), tokens, tokens))


class ReadsValues(Runs):
    """Model that reads the values of its input, which meta tensors do not have."""

    def forward(self, images: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self.seen = float(images.sum())
        return super().forward(images, scale)


@pytest.mark.parametrize("kind", [Runs, ReadsValues])
@pytest.mark.parametrize("form", ["argument", "tuple", "mapping"])
def test_macs_of_the_whole_framework_on_an_example(slim: Path, kind: Any, form: str) -> None:
    image = torch.ones(1, 3, 32, 32)
    example = {"argument": image, "tuple": (image, 1.0), "mapping": {"images": image}}[form]
    model = kind.with_tower(small_tower()).train()
    dense = macs(model, image)
    before = dict(vars(model))
    report = ovsprune.transfer(model, slim, example=example)
    assert model.training and vars(model).keys() == before.keys(), "it was run itself"
    assert report.macs_before == dense
    assert report.macs_after == macs(model, image) < dense
    assert f"MACs: {dense:,} -> {report.macs_after:,}" in str(report)
    assert report.record()["macs_after"] == report.macs_after
    report.detach()
    assert macs(model, image) == dense


def test_without_an_example_the_report_says_so(slim: Path) -> None:
    report = ovsprune.transfer(MiniSan.with_tower(small_tower()), slim)
    assert report.macs_before is None and report.macs_after is None
    assert "pass example=" in report.counted_on and "pass example=" in str(report)


def test_example_that_cannot_be_run_changes_nothing(slim: Path) -> None:
    model = Runs.with_tower(small_tower())
    before, modules = snapshot(model), dict(model.named_modules())
    with pytest.raises(OptionError, match=r"cannot be run on the example .*ValueError: only 1"):
        ovsprune.transfer(model, slim, example=(torch.ones(1, 3, 32, 32), 2.0))
    assert unchanged(model, before) and dict(model.named_modules()) == modules


def test_model_that_looks_like_several(slim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MiniSan.with_tower(small_tower())
    monkeypatch.setattr(KeyMap, "missing", lambda self, names: [])
    with pytest.raises(TargetError, match="matches several targets .*clipseg, deeplabv3.*name one"):
        transfer(model, slim)


def test_unknown_live_model(slim: Path) -> None:
    with pytest.raises(
        TargetError, match="Linear belongs to none of the known frameworks .*mmseg-san, .*san"
    ):
        transfer(nn.Linear(2, 2), slim)


def test_unknown_target_names_the_closest(slim: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown target 'mmsegsan'. Did you mean 'mmseg-s"):
        transfer(slim=slim, target="mmsegsan")


def test_options_of_the_other_way(tmp_path: Path, slim: Path) -> None:
    with pytest.raises(OptionError, match="output cannot be used with a live model"):
        transfer(MiniSan(), slim, output=tmp_path)  # type: ignore[call-overload]
    with pytest.raises(OptionError, match="needs a live model; on disk name one of .*san"):
        transfer(slim=slim)
    with pytest.raises(OptionError, match="example is only used with a live model"):
        transfer(slim=slim, target="san", example=1)  # type: ignore[call-overload]


def test_existing_output(tmp_path: Path, slim: Path) -> None:
    out = tmp_path / "out"
    transfer(slim=slim, target="san", output=out)
    with pytest.raises(OutputError, match="exists already.*--overwrite"):
        transfer(slim=slim, target="san", output=out)
    before = (out / "transfer.json").read_bytes()
    transfer(slim=slim, target="mmseg-san", output=out, overwrite=True)
    assert (out / "transfer.json").read_bytes() != before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not part of the output of `ovsprune transfer`"):
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
