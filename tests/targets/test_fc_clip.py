"""Target FC-CLIP on a small model with its names; test_detectron2.py has the real one."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ovsprune.core.errors import TargetError
from ovsprune.graph.costs import macs, on_meta
from ovsprune.jobs.transfer import transfer
from ovsprune.slim import SlimCheckpoint
from ovsprune.targets import TARGETS, load_into
from ovsprune.targets.output import write_output
from tests.targets.by_hand import error, masked, slim_convnext, slim_resnet, snapshot, unchanged
from tests.targets.mini_detectron2 import MiniFcClip, load_as_detectron2, run, tower_of

BOUND = 1e-4
TARGET = TARGETS.get("fc-clip")
KINDS = pytest.mark.parametrize("kind", ["resnet", "convnext"])


def made(kind: str) -> tuple[MiniFcClip, SlimCheckpoint]:
    tower = tower_of(kind)
    slim = slim_convnext(tower) if kind == "convnext" else slim_resnet(tower)
    return MiniFcClip.with_tower(kind, tower), slim


@KINDS
def test_slim_equals_dense_masked(kind: str) -> None:
    model, slim = made(kind)
    with TARGET.apply_compat(model):
        whole = run(model)
        with masked(model, slim, TARGET.layout(model.state_dict(), 0)):
            wanted = run(model)
    with TARGET.attach(model, slim) as attached:
        assert attached.weights == "slim" and attached.target == "fc-clip"
        assert error(run(model), wanted)["sem_seg"] <= BOUND
    assert error(whole, wanted)["sem_seg"] > 100 * BOUND


@KINDS
def test_detach_restores_everything(kind: str) -> None:
    model, slim = made(kind)
    before, modules, own = snapshot(model), dict(model.named_modules()), dict(vars(model.backbone))
    for _ in range(2):
        attached = TARGET.attach(model, slim)
        assert all(name.startswith("backbone.clip_model.visual.") for name in attached.replaced)
        assert "adapted to current libraries: backbone.encode_text" in attached.notes
        attached.detach()
        assert unchanged(model, before) and vars(model.backbone) == own
        now = dict(model.named_modules())
        assert list(now) == list(modules) and all(now[name] is modules[name] for name in modules)


def test_encode_text_is_fixed_while_attached() -> None:
    model, slim = made("resnet")
    text = torch.tensor([[1, 5, 31, 0, 0, 0, 0, 0]])
    with pytest.raises(RuntimeError, match="attn_mask"):
        model.backbone.encode_text(text)
    with TARGET.attach(model, slim):
        found = model.backbone.encode_text(text)
        assert torch.equal(found, model.backbone.clip_model.encode_text(text))
        unit = model.backbone.encode_text(text, normalize=True)
        assert torch.allclose(unit.norm(dim=-1), torch.ones(1))
    with pytest.raises(RuntimeError, match="attn_mask"):
        model.backbone.encode_text(text)


def test_replaced_encode_text_is_kept() -> None:
    model, slim = made("resnet")
    fixed = TARGET.apply_compat(model)
    assert fixed.replaced == ("backbone.encode_text",)
    assert TARGET.apply_compat(model).replaced == ()
    with TARGET.attach(model, slim) as attached:
        assert not attached.notes
    assert "encode_text" in vars(model.backbone)
    fixed.detach()
    assert "encode_text" not in vars(model.backbone)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_a_copy_encodes_with_its_own_weights(again: Any) -> None:
    model, slim = made("resnet")
    text = torch.tensor([[1, 5, 31, 0, 0, 0, 0, 0]])
    TARGET.attach(model, slim)
    other = again(model)
    found = other.backbone.encode_text(text)
    assert torch.equal(found, model.backbone.encode_text(text))
    with torch.no_grad():
        model.backbone.clip_model.text_projection.zero_()
    assert torch.equal(other.backbone.encode_text(text), found)


@KINDS
def test_costs_are_counted_per_image(kind: str) -> None:
    """Class names are encoded once, so their cost is not counted per image."""
    model, slim = made(kind)
    image = torch.zeros(1, 3, 512, 512, device="meta")
    backbone = macs(on_meta(model.backbone), image)
    with transfer(model, slim) as attached:
        assert attached.target == "fc-clip"
        assert attached.macs_before is not None and attached.macs_after is not None
        lost = backbone - macs(on_meta(model.backbone), image)
        assert attached.macs_before - attached.macs_after == lost > 0
        assert attached.macs_before < 1.5 * backbone
    assert model.test_text_classifier is None


@KINDS
@pytest.mark.parametrize("weights", ["slim", "target"])
def test_round_trip_on_disk(tmp_path: Path, kind: str, weights: str) -> None:
    model, slim = made(kind)
    result = TARGET.convert(model.state_dict(), slim, weights=weights)
    assert result.replaced.keys() | result.kept.keys() == model.state_dict().keys()
    text = "backbone.clip_model.transformer.resblocks.0.ln_1.weight"
    assert result.kept[text] == "the text tower was not pruned"
    write_output(tmp_path / "out", result, {"target": "fc-clip"}, "")
    fresh = MiniFcClip.with_tower(kind, {k: v * 0 for k, v in tower_of(kind).items()})
    dense = {k: v.clone() for k, v in fresh.state_dict().items()}
    assert load_into(fresh, tmp_path / "out") == []
    with TARGET.attach(model, slim, weights=weights):
        wanted, state = model.state_dict(), fresh.state_dict()
        assert list(wanted) == list(state)
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
        assert torch.equal(run(fresh)["sem_seg"], run(model)["sem_seg"])  # fixed, too
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    with pytest.raises(TargetError, match=r"not of the slim model.*detectron2 drops"):
        load_as_detectron2(fresh, dense)
    assert all(torch.equal(before[k], v) for k, v in fresh.state_dict().items())
    load_as_detectron2(fresh, before)
    load_as_detectron2(fresh, {"void_embedding.weight": dense["void_embedding.weight"]})


def test_clip_alone_contains_the_text_tower(tmp_path: Path) -> None:
    model, slim = made("convnext")
    text = {"token_embedding.weight": torch.full((32, 16), 0.25), "logit_scale": torch.tensor(4.6)}
    alone = SlimCheckpoint(slim.path, slim.spec, slim.mask, {**slim.tensors, **text})
    result = TARGET.convert(None, alone)
    assert not result.complete and not result.dropped
    write_output(tmp_path / "out", result, {"target": "fc-clip"}, "")
    missing = load_into(model, tmp_path / "out")
    assert "void_embedding.weight" in missing
    assert not any("visual" in name for name in missing)
    assert torch.equal(
        model.backbone.clip_model.token_embedding.weight, text["token_embedding.weight"]
    )


def test_another_tower_is_refused_untouched() -> None:
    for kind, other in (("resnet", "convnext"), ("convnext", "resnet")):
        model, (_, slim) = made(kind)[0], made(other)
        before = snapshot(model)
        with pytest.raises(TargetError, match="is not built on .*: it lacks"):
            TARGET.attach(model, slim)
        assert unchanged(model, before) and "encode_text" not in vars(model.backbone)


def test_another_activation_is_refused() -> None:
    model, slim = made("convnext")
    for block in model.backbone.clip_model.visual["trunk"].stages[0].blocks:
        block.mlp.act = torch.nn.ReLU()
    with pytest.raises(TargetError, match=r"mlp.act is relu, but .* was pruned with gelu"):
        TARGET.attach(model, slim)


def test_error_states_the_expected_paths() -> None:
    with pytest.raises(TargetError, match=r"is not FC-CLIP: expected .*layer1.*; or .*trunk"):
        TARGET.towers(torch.nn.Linear(2, 2))
