"""Target Mask2Former on small models with its names; test_detectron2.py has the real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ovsprune.core.errors import TargetError
from ovsprune.jobs.transfer import transfer
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.cutting import cut_state
from ovsprune.targets import TARGETS, load_into
from ovsprune.targets.output import write_output
from tests.targets.by_hand import error, lively_resnet, masked, slim_resnet, snapshot, unchanged
from tests.targets.mini_detectron2 import RESNET, MiniMask2Former, load_as_detectron2, run

BOUND = 1e-4
TARGET = TARGETS.get("mask2former")
POSITIONS = "attnpool.positional_embedding"
KINDS = pytest.mark.parametrize("kind", ["clip", "unpooled", "plain"])


def made(kind: str) -> tuple[MiniMask2Former, SlimCheckpoint]:
    """Build the framework with the tower that was pruned, if it can hold it."""
    model, tower = MiniMask2Former.lively(kind), lively_resnet(RESNET)
    if kind != "plain":
        own = TARGET.layout(model.state_dict(), 0).tower_state(model.state_dict())
        tower |= {k: v.clone() for k, v in own.items() if k != POSITIONS}
    return model, slim_resnet(tower)


@KINDS
def test_slim_equals_dense_masked(kind: str) -> None:
    model, slim = made(kind)
    whole = run(model)
    with masked(model, slim, TARGET.layout(model.state_dict(), 0)):
        wanted = run(model)
    with TARGET.attach(model, slim) as attached:
        assert attached.weights == ("target" if kind == "plain" else "slim")
        assert error(run(model), wanted)["sem_seg"] <= BOUND
    assert error(whole, wanted)["sem_seg"] > 100 * BOUND


@KINDS
def test_detach_restores_everything(kind: str) -> None:
    model, slim = made(kind)
    before, modules, whole = snapshot(model), dict(model.named_modules()), run(model)
    for weights in ("target",) if kind == "plain" else ("target", "slim"):
        attached = TARGET.attach(model, slim, weights=weights)
        assert attached.replaced and not attached.notes
        attached.detach()
        assert unchanged(model, before)
        now = dict(model.named_modules())
        assert list(now) == list(modules) and all(now[name] is modules[name] for name in modules)
    assert torch.equal(run(model)["sem_seg"], whole["sem_seg"])


def test_norms_inside_convolutions_are_cut_with_them() -> None:
    """Norms that are not cut stay the same objects inside new convolutions."""
    model, slim = made("plain")
    block = model.backbone.res3[0]
    dense, norm = block.conv3, block.conv3.norm
    with TARGET.attach(model, slim) as attached:
        kept = len(slim.mask["layer2.0.conv2"])
        assert block.conv2.norm.num_features == len(block.conv2.norm.running_var) == kept
        assert len(block.conv2.norm.weight) == block.conv2.out_channels == kept
        assert block.conv3 is not dense and block.conv3.norm is norm
        assert attached.kept["backbone.res3.0.conv3.norm.bias"] == "the framework's own"
        assert "backbone.res3.0.conv2.norm" in attached.replaced
        assert not {n for n in attached.kept if n not in model.state_dict()}
    assert block.conv3 is dense


def test_one_units_statistics_in_another_place_are_caught() -> None:
    model, slim = made("plain")
    with masked(model, slim, TARGET.layout(model.state_dict(), 0)):
        wanted = run(model)
    with TARGET.attach(model, slim):
        norm = model.backbone.res3[0].conv2.norm
        norm.running_mean.copy_(norm.running_mean.roll(1))
        assert error(run(model), wanted)["sem_seg"] > 100 * BOUND


@KINDS
def test_costs_go_down(kind: str) -> None:
    model, slim = made(kind)
    with transfer(model, slim) as attached:
        assert attached.target == "mask2former"
        assert attached.macs_before is not None and attached.macs_after is not None
        assert attached.macs_after < attached.macs_before
        assert attached.params_after < attached.params_before


@KINDS
def test_round_trip_on_disk(tmp_path: Path, kind: str) -> None:
    model, slim = made(kind)
    names = model.state_dict()
    result = TARGET.convert(names, slim)
    assert result.replaced.keys() | result.kept.keys() == names.keys()
    assert result.weights == ("target" if kind == "plain" else "slim")
    if kind == "clip":
        kept = result.kept[f"backbone.{POSITIONS}"]
        assert kept == "the framework resizes its positions"
    write_output(tmp_path / "out", result, {"target": "mask2former"}, "")
    fresh = MiniMask2Former.lively(kind, seed=9)
    assert load_into(fresh, tmp_path / "out") == []
    with TARGET.attach(model, slim):
        wanted, state = model.state_dict(), fresh.state_dict()
        assert list(wanted) == list(state)
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
        model.load_state_dict(dict(result.state), strict=True)
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    with pytest.raises(TargetError, match=r"not of the slim model.*detectron2 drops"):
        load_as_detectron2(fresh, names)
    assert all(torch.equal(before[k], v) for k, v in fresh.state_dict().items())


def test_clip_alone_keeps_the_positions_of_the_framework(tmp_path: Path) -> None:
    """Positions of the framework differ from CLIP's and keep their initial values."""
    model, slim = made("clip")
    write_output(tmp_path / "out", TARGET.convert(None, slim), {"target": "mask2former"}, "")
    own = model.backbone.attnpool.positional_embedding.clone()
    missing = load_into(model, tmp_path / "out")
    assert f"backbone.{POSITIONS}" in missing
    assert not [n for n in missing if n.startswith("backbone.") and not n.endswith(POSITIONS)]
    assert torch.equal(model.backbone.attnpool.positional_embedding, own)
    unpooled = MiniMask2Former.lively("unpooled")
    with pytest.raises(TargetError, match=r"the model has no backbone.attnpool"):
        load_into(unpooled, tmp_path / "out")


def test_the_attention_pool_may_be_missing_and_no_more() -> None:
    model, slim = made("unpooled")
    del model.backbone.layer3
    with pytest.raises(TargetError, match=r"is not Mask2Former .*backbone.layer1.*; or .*\.res2\."):
        TARGET.attach(model, slim)


def test_slim_weights_of_clip_are_refused_by_a_plain_network() -> None:
    model, slim = made("plain")
    with pytest.raises(TargetError, match="only the mask can be used: .*another stem"):
        TARGET.attach(model, slim, weights="slim")


def test_every_block_is_cut_by_its_own_mask() -> None:
    model, slim = made("plain")
    layout = TARGET.layout(model.state_dict(), 0)
    own = {k: v.clone() for k, v in layout.tower_state(model.state_dict()).items()}
    cut = cut_state(own, slim.spec, slim.mask)
    with TARGET.attach(model, slim):
        found = layout.tower_state(model.state_dict())
        assert found.keys() == cut.keys() and len(cut) == 4 * 4 * 5
        assert all(torch.equal(found[name], tensor) for name, tensor in cut.items())
