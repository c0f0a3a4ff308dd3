"""DeepLabV3 of torchvision with a CLIP ResNet's mask: slim equals masked, live and on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation import deeplabv3_resnet50
from torchvision.models.segmentation.deeplabv3 import _deeplabv3_resnet

from ovsprune.core.errors import TargetError
from ovsprune.graph.costs import macs
from ovsprune.jobs.transfer import transfer
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.cutting import cut_state
from ovsprune.slim.write import write
from ovsprune.targets import TARGETS, load_into
from tests.targets.by_hand import (
    error,
    lively,
    lively_resnet,
    load_pictures,
    masked,
    slim_resnet,
    small_slim,
    snapshot,
    unchanged,
)

pytestmark = pytest.mark.framework

BOUND = 1e-4
TARGET = TARGETS.get("deeplabv3")
STAGES = [1, 1, 1, 1]
State = dict[str, Tensor]


def deeplab(seed: int = 3, **options: Any) -> Any:
    """Build torchvision's network with one bottleneck per stage and random parameters."""
    backbone = ResNet(
        Bottleneck, STAGES, replace_stride_with_dilation=[False, True, True], **options
    )
    return lively(_deeplabv3_resnet(backbone, 5, aux=True), seed)


@pytest.fixture(scope="module")
def slim() -> SlimCheckpoint:
    """Build a slim ResNet of CLIP with the widths of RN50 and one bottleneck per stage."""
    return slim_resnet(lively_resnet(STAGES, width=64))


@torch.no_grad()
def run(model: Any, side: int = 64) -> State:
    return dict(model(load_pictures(2, side)))


def dense_masked(model: Any, slim: SlimCheckpoint, side: int = 64) -> State:
    with masked(model, slim, TARGET.layout(model.state_dict(), 0)):
        return run(model, side)


def test_deeplabv3_resnet50_slim_equals_masked_and_costs_less() -> None:
    """Covers torchvision's full network, with a mask of the widths of CLIP's RN50."""
    model = lively(deeplabv3_resnet50(weights=None, weights_backbone=None, aux_loss=True))
    tower = lively_resnet([3, 4, 6, 3], width=64)
    slim = slim_resnet(tower)
    wanted, dense = dense_masked(model, slim), run(model)
    image = torch.zeros(1, 3, 520, 520)
    backbone = macs(_meta(model.backbone), image.to("meta"))
    with transfer(model, slim) as attached:
        assert attached.target == "deeplabv3" and attached.weights == "target"
        errors = error(run(model), wanted)
        lost = sum(t.numel() for n, t in tower.items() if _counts(n)) - sum(
            t.numel() for n, t in slim.tower().items() if _counts(n)
        )
        assert attached.params_before - attached.params_after == lost > 5_000_000
        assert attached.macs_before is not None and attached.macs_after is not None
        of_backbone = backbone - macs(_meta(model.backbone), image.to("meta"))
        assert attached.macs_before - attached.macs_after == of_backbone > 10_000_000_000
        print(attached.macs_before, attached.macs_after, errors)
    assert max(errors.values()) <= BOUND
    assert min(error(dense, wanted).values()) > 100 * BOUND


def _meta(module: nn.Module) -> nn.Module:
    from ovsprune.graph.costs import on_meta

    return on_meta(module)


def _counts(name: str) -> bool:
    return name.endswith(("weight", "bias"))


@pytest.mark.parametrize("side", [64, 96])
def test_slim_equals_dense_masked(slim: SlimCheckpoint, side: int) -> None:
    model = deeplab()
    wanted, dense = dense_masked(model, slim, side), run(model, side)
    with TARGET.attach(model, slim):
        errors = error(run(model, side), wanted)
    print(errors)
    assert max(errors.values()) <= BOUND
    assert min(error(dense, wanted).values()) > 100 * BOUND


def gradients(model: Any) -> State:
    model.zero_grad()
    found = model(load_pictures(2, 64).double())
    labels = torch.arange(2 * 64 * 64).view(2, 64, 64) % 5
    loss = nn.functional.cross_entropy
    (loss(found["out"], labels) + 0.5 * loss(found["aux"], labels)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_dense_masked(slim: SlimCheckpoint) -> None:
    # in float64: ReLUs turn a rounding error into another gradient
    model = deeplab().double()
    layout, dense = TARGET.layout(model.state_dict(), 0), gradients(model)
    with masked(model, slim, layout):
        for parameter in model.parameters():  # masked puts frozen consumers in
            parameter.requires_grad_(True)
        wanted = gradients(model)
    with TARGET.attach(model, slim):
        found = gradients(model)
    tower = layout.tower_state(wanted)
    cut = cut_state(tower, slim.spec, slim.mask)
    assert len(cut) > 30
    errors = error(layout.tower_state(found), cut)
    rest = [name for name in wanted if layout.canonical(name) is None]
    assert {n.partition(".")[0] for n in rest} == {"backbone", "classifier", "aux_classifier"}
    errors |= error({n: found[n] for n in rest}, {n: wanted[n] for n in rest})
    print(max(errors.values()))
    assert max(errors.values()) <= BOUND
    assert max(error({n: dense[n] for n in rest}, {n: wanted[n] for n in rest}).values()) > 0.01


@pytest.mark.parametrize("layer", ["layer1.0.conv1", "layer3.0.conv2"])
def test_swapped_unit_is_caught(slim: SlimCheckpoint, layer: str) -> None:
    model = deeplab()
    wanted = dense_masked(model, slim)
    kept = slim.mask[layer].tolist()
    weight = model.get_parameter(f"backbone.{layer[:-1]}{int(layer[-1]) + 1}.weight").detach()
    reach = (
        weight.flatten(2).norm(dim=(0, 2))
        * model.get_parameter(f"backbone.{layer.replace('conv', 'bn')}.weight").detach()
    )
    other = sorted(set(range(len(reach))) - set(kept), key=lambda u: float(reach[u]))[-1]
    swapped = torch.tensor(sorted({*kept[1:], other}))
    wrong = replace(slim, mask={**slim.mask, layer: swapped})
    with TARGET.attach(model, wrong):
        errors = error(run(model), wanted)
    print(layer, errors)
    assert errors["out"] >= 100 * BOUND


def test_statistics_of_another_norm_are_caught(slim: SlimCheckpoint) -> None:
    """Running statistics are cut with their channels."""
    model = deeplab()
    wanted = dense_masked(model, slim)
    with TARGET.attach(model, slim):
        norm: Any = model.backbone.layer2[0].bn2
        assert norm.num_features == len(norm.running_var) == len(slim.mask["layer2.0.conv2"])
        norm.running_mean.copy_(norm.running_mean.roll(1))
        assert error(run(model), wanted)["out"] >= 100 * BOUND


def test_attach_detach_attach(slim: SlimCheckpoint) -> None:
    model = deeplab()
    before, modules, dense = snapshot(model), dict(model.named_modules()), run(model)
    states = []
    for _ in range(2):
        attached = TARGET.attach(model, slim)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        assert not any(name.startswith(("classifier", "aux")) for name in attached.replaced)
        assert "another stem than CLIP's" in attached.reason
        attached.detach()
        assert unchanged(model, before)
        now = dict(model.named_modules())
        assert list(now) == list(modules) and all(now[name] is modules[name] for name in modules)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    after = run(model)
    assert all(torch.equal(after[name], dense[name]) for name in dense)


def test_training_mode_and_frozen_parameters_stay(slim: SlimCheckpoint) -> None:
    model = deeplab().train()
    model.backbone.layer1.eval().requires_grad_(False)
    with TARGET.attach(model, slim):
        first, second = model.backbone.layer1[0], model.backbone.layer2[0]
        assert not first.bn1.training and second.bn1.training
        learning = {n.split(".")[1] for n, p in model.named_parameters() if not p.requires_grad}
        assert learning == {"layer1"}


def _wider(slim: SlimCheckpoint) -> SlimCheckpoint:
    return slim_resnet(lively_resnet(STAGES, width=32))


def _deeper(slim: SlimCheckpoint) -> SlimCheckpoint:
    return slim_resnet(lively_resnet([1, 2, 1, 1], width=64))


def _vit(slim: SlimCheckpoint) -> SlimCheckpoint:
    return small_slim()


def _untrained(slim: SlimCheckpoint) -> SlimCheckpoint:
    base = replace(slim.spec.base, trained=False)
    return replace(slim, spec=replace(slim.spec, base=base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_wider, r"is not built on RN-by-hand: its layer1.0.* has shape"),
        (_deeper, "is not built on RN-by-hand: it lacks layer2.1.bn1.bias"),
        (_vit, r"holds a open_clip-vit tower .*DeepLabV3 .* needs CLIP's residual network"),
        (_untrained, "random weights .*--force"),
    ],
)
def test_refused_model_is_unchanged(
    slim: SlimCheckpoint, change: Callable[[SlimCheckpoint], SlimCheckpoint], message: str
) -> None:
    model = deeplab()
    before, modules = snapshot(model), dict(model.named_modules())
    with pytest.raises(TargetError, match=message):
        TARGET.attach(model, change(slim))
    assert unchanged(model, before) and dict(model.named_modules()) == modules


def test_slim_weights_are_refused(slim: SlimCheckpoint) -> None:
    model = deeplab()
    with pytest.raises(TargetError, match="only the mask can be used: .*--weights target"):
        TARGET.attach(model, slim, weights="slim")
    with pytest.raises(TargetError, match="no checkpoint of it was given; give one"):
        TARGET.convert(None, slim)
    with TARGET.attach(model, slim), pytest.raises(TargetError, match="slim already"):
        TARGET.attach(model, slim)


def test_other_networks_of_torchvision_are_not_taken(slim: SlimCheckpoint) -> None:
    plain = torchvision.models.resnet50(weights=None)
    fcn = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None)
    for model in (plain, fcn):
        assert not TARGET.detect(model)
        with pytest.raises(TargetError, match="is not torchvision's DeepLabV3"):
            TARGET.attach(model, slim)


def test_wide_resnet_is_refused(slim: SlimCheckpoint) -> None:
    with pytest.raises(TargetError, match=r"its layer1.0.* has shape"):
        TARGET.attach(deeplab(width_per_group=128), slim)


def test_round_trip_on_disk(tmp_path: Path, slim: SlimCheckpoint) -> None:
    written = write(tmp_path / "slim", slim.spec, slim.tensors, slim.mask, card="# by hand\n")
    model = deeplab()
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "deeplab.pth")
    out = tmp_path / "out"
    record = transfer(
        slim=written, target="deeplabv3", checkpoint=tmp_path / "deeplab.pth", output=out
    )
    assert record["weights"] == "target" and record["dropped"]["epoch"]
    keys = model.state_dict().keys()
    assert record["replaced"].keys() | record["kept"].keys() == keys
    assert not record["replaced"].keys() & record["kept"].keys()
    cut = {name.split(".")[3] for name in record["replaced"]}
    assert cut == {"conv1", "bn1", "conv2", "bn2", "conv3"}
    assert "another stem" not in record["dropped"]["slim: visual.attnpool.c_proj.weight"]
    fresh = deeplab(seed=9)
    assert load_into(fresh, out) == []
    with TARGET.attach(model, slim):
        wanted, state = model.state_dict(), fresh.state_dict()
        assert list(wanted) == list(state)
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
        model.load_state_dict(state, strict=True)
        found, expected = run(fresh), run(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(TargetError, match="not of the slim model"):
        fresh.load_state_dict(deeplab().state_dict(), strict=False)
