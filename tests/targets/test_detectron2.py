"""FC-CLIP and Mask2Former of their repositories: slim equals masked, live and on disk.

``OVSPRUNE_FC_CLIP_REPO``, ``OVSPRUNE_MASK2FORMER_REPO`` and (for its CLIP backbone)
``OVSPRUNE_OPENTRANS_REPO`` name the checkouts; detectron2 must be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ovsprune
from ovsprune.core.errors import TargetError
from ovsprune.graph.costs import macs, on_meta
from ovsprune.jobs.transfer import transfer
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.cutting import cut_state
from ovsprune.targets import TARGETS, Target, load_into
from ovsprune.targets.layout import Layout
from tests.targets.by_hand import (
    error,
    lively_resnet,
    masked,
    saved,
    slim_convnext,
    slim_resnet,
    small_of_kind,
    snapshot,
    unchanged,
)
from tests.targets.detectron2_models import batch, fc_clip, mask2former, run

pytestmark = pytest.mark.upstream

BOUND = 1e-4
STAGES = [1, 1, 1, 1]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Build of a framework: its constructor, and the parts of a base that its tower lacks."""

    name: str
    target: str
    make: Callable[..., Any]
    kind: str

    def build(self, seed: int = 0) -> Any:
        return self.make(self.kind, seed=seed)

    @property
    def mask_only(self) -> bool:
        return self.kind == "plain"

    def base(self, model: Any) -> State:
        """Return CLIP's tower, with the framework's weights in the parts that it has."""
        own = layout_of(self, model).tower_state(model.state_dict())
        own = {name: tensor.clone() for name, tensor in own.items()}
        if self.kind == "plain":
            return lively_resnet(STAGES, width=64)
        if self.target == "fc-clip":
            return own
        whole = lively_resnet(STAGES, width=64)  # with an attention pool for another resolution
        return {**whole, **{k: v for k, v in own.items() if k != "attnpool.positional_embedding"}}

    def slim(self, model: Any, seed: int = 0) -> SlimCheckpoint:
        made = slim_convnext if self.kind == "convnext" else slim_resnet
        return made(self.base(model), seed=seed)


CASES = (
    Case("fc-clip on RN50", "fc-clip", fc_clip, "resnet"),
    Case("fc-clip on ConvNeXt", "fc-clip", fc_clip, "convnext"),
    Case("mask2former on CLIP", "mask2former", mask2former, "clip"),
    Case("mask2former on CLIP without its pool", "mask2former", mask2former, "unpooled"),
    Case("mask2former on a plain ResNet", "mask2former", mask2former, "plain"),
)


def target_of(case: Case) -> Target:
    return TARGETS.get(case.target)


def layout_of(case: Case, model: Any) -> Layout:
    return target_of(case).layout(model.state_dict(), 0)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def built(request: pytest.FixtureRequest) -> tuple[Case, Any, SlimCheckpoint]:
    model = request.param.build()
    return request.param, model, request.param.slim(model)


@pytest.fixture
def given(
    built: tuple[Case, Any, SlimCheckpoint],
) -> Iterator[tuple[Case, Any, SlimCheckpoint]]:
    """Return one model for all tests of a case, and check that none changes it."""
    case, model, slim = built
    before, own = snapshot(model), dict(model.backbone.__dict__)
    yield case, model, slim
    assert unchanged(model, before) and model.backbone.__dict__ == own


def dense(case: Case, model: Any, side: int = 64) -> State:
    with target_of(case).apply_compat(model):
        return run(model, side)


def dense_masked(case: Case, model: Any, slim: SlimCheckpoint, side: int = 64) -> State:
    with masked(model, slim, layout_of(case, model)):
        return dense(case, model, side)


@pytest.mark.parametrize("side", [64, 96])
def test_slim_equals_dense_masked(given: Any, side: int) -> None:
    case, model, slim = given
    wanted, whole = dense_masked(case, model, slim, side), dense(case, model, side)
    with target_of(case).attach(model, slim) as attached:
        assert attached.weights == ("target" if case.mask_only else "slim")
        errors = error(run(model, side), wanted)
    print(case.name, errors)
    assert max(errors.values()) <= BOUND
    assert min(error(whole, wanted).values()) > 100 * BOUND


def gradients(case: Case, model: Any) -> State:
    """Return gradients of the losses, and of FC-CLIP's features, which its losses do not reach."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # the losses are taken at drawn points
    torch.set_default_dtype(torch.float64)
    model.training = True  # the root alone: statistics stay as they are
    pictures = batch(targets=True)
    try:
        losses = model([{**p, "image": p["image"].double()} for p in pictures])
    finally:
        model.training = False
        torch.set_default_dtype(torch.float32)
    sum(losses.values()).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if case.target == "fc-clip":
        images = torch.stack([p["image"].double() for p in pictures]) / 60 - 2
        features = model.backbone.extract_features(images)
        sum(value.square().mean() for value in features.values()).backward()
        found |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found


def test_gradients_are_those_of_dense_masked(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # in float64: ReLUs turn a rounding error into another gradient. The frameworks ask for float32
    # where half precision would not do
    case, _, _ = given
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = case.build().double()
    layout, slim = layout_of(case, model), case.slim(model)
    tower = {name for name in model.state_dict() if layout.canonical(name) is not None}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in tower or "clip_model" not in name)
    with target_of(case).apply_compat(model):
        whole = gradients(case, model)
        with masked(model, slim, layout):
            for name, parameter in model.named_parameters():  # masked puts frozen consumers in
                parameter.requires_grad_(name in tower or "clip_model" not in name)
            wanted = gradients(case, model)
    with target_of(case).attach(model, slim):
        found = gradients(case, model)
    here = layout.tower_state(wanted)
    cut = cut_state(here, slim.spec, slim.mask) if not case.mask_only else _cut_there(here, slim)
    errors = error(layout.tower_state(found), cut)
    rest = [name for name in wanted if name not in tower]
    errors |= error({n: found[n] for n in rest}, {n: wanted[n] for n in rest})
    print(case.name, len(cut), len(rest), max(errors.values()))
    assert len(cut) >= 12 and len(rest) > 50
    assert max(errors.values()) <= BOUND
    assert max(error({n: whole[n] for n in rest}, {n: wanted[n] for n in rest}).values()) > 0.01


def _cut_there(state: State, slim: SlimCheckpoint) -> State:
    """Cut the gradients; a frozen norm has none."""
    known = {name.rpartition(".")[0] for name in state}
    layers = tuple(
        replace(layer, slices=tuple(part for part in layer.slices if part.module in known))
        for layer in slim.spec.layers
    )
    return cut_state(state, replace(slim.spec, layers=layers), slim.mask)


def test_a_swapped_unit_is_caught(given: Any) -> None:
    case, model, slim = given
    wanted = dense_masked(case, model, slim)
    for layer in slim.spec.layers[1::3]:
        kept = slim.mask[layer.name].tolist()
        reader = next(part.module for part in layer.slices if part.axis == "in")
        weight = model.get_submodule(layout_of(case, model).name(reader)).weight.detach()
        reach = weight.flatten(2).norm(dim=(0, 2)) if weight.ndim == 4 else weight.norm(dim=0)
        other = max(set(range(layer.units)) - set(kept), key=lambda unit: float(reach[unit]))
        swapped = torch.tensor(sorted({*kept[1:], other}))
        wrong = replace(slim, mask={**slim.mask, layer.name: swapped})
        with target_of(case).attach(model, wrong, weights="target"):
            errors = error(run(model), wanted)
        print(case.name, layer.name, errors)
        assert max(errors.values()) >= 30 * BOUND


def test_rolled_channels_are_caught(given: Any) -> None:
    """Statistics of norms and biases are cut with their channels."""
    case, model, slim = given
    wanted = dense_masked(case, model, slim)
    made = next(part.module for part in slim.spec.layers[1].slices if part.axis == "out")
    norm = made if case.kind == "convnext" else made.replace("conv", "bn")
    with target_of(case).attach(model, slim):
        module = model.get_submodule(layout_of(case, model).name(norm))
        rolled = module.bias if case.kind == "convnext" else module.running_mean
        assert len(rolled) == len(slim.mask[slim.spec.layers[1].name])
        with torch.no_grad():
            rolled.copy_(rolled.roll(1))
        assert max(error(run(model), wanted).values()) >= 100 * BOUND


def test_attach_detach_attach(given: Any) -> None:
    case, model, slim = given
    before, modules, whole = snapshot(model), dict(model.named_modules()), dense(case, model)
    own, states = dict(model.backbone.__dict__), []
    for _ in range(2):
        attached = target_of(case).attach(model, slim)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        assert all(name.startswith("backbone.") for name in attached.replaced)
        attached.detach()
        assert unchanged(model, before) and model.backbone.__dict__ == own
        now = dict(model.named_modules())
        assert list(now) == list(modules) and all(now[name] is modules[name] for name in modules)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    after = dense(case, model)
    assert all(torch.equal(after[name], whole[name]) for name in whole)


def test_framework_costs_drop_by_the_tower_costs(given: Any) -> None:
    case, model, slim = given
    image = torch.zeros(1, 3, 512, 512, device="meta")
    backbone, size = macs(on_meta(model.backbone), image), _count(model.backbone)
    with transfer(model, slim) as attached:
        assert attached.target == case.target
        assert attached.macs_before is not None and attached.macs_after is not None
        lost = backbone - macs(on_meta(model.backbone), image)
        assert attached.macs_before - attached.macs_after == lost > 100_000_000
        lost = size - _count(model.backbone)
        assert attached.params_before - attached.params_after == lost > 1_000_000
        print(case.name, attached.macs_before, attached.macs_after, attached.counted_on)


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_round_trip_on_disk(tmp_path: Path, given: Any) -> None:
    """Compares a transferred checkpoint of detectron2 with the attached model, and loads it."""
    from detectron2.checkpoint import DetectionCheckpointer

    case, model, slim = given
    written = saved(slim, tmp_path / "slim")
    DetectionCheckpointer(model, str(tmp_path)).save("dense", iteration=3)
    out = tmp_path / "out"
    record = transfer(
        slim=written, target=case.target, checkpoint=tmp_path / "dense.pth", output=out
    )
    keys = model.state_dict().keys()
    assert record["replaced"].keys() | record["kept"].keys() == keys
    assert not record["replaced"].keys() & record["kept"].keys()
    assert record["dropped"]["iteration"]
    fresh = case.build(seed=9)
    assert load_into(fresh, out) == []
    wanted = run_attached(case, model, slim)
    state, expected = fresh.state_dict(), wanted[0]
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    found = run(fresh)
    assert all(torch.equal(found[name], wanted[1][name]) for name in found)
    # a slim one of the training itself loads as usual, a dense one is refused
    DetectionCheckpointer(fresh, str(tmp_path)).save("slim-trained")
    again = case.build(seed=5)
    load_into(again, out)
    with torch.no_grad():
        again.sem_seg_head.predictor.query_feat.weight.zero_()
    DetectionCheckpointer(again).load(str(tmp_path / "slim-trained.pth"))
    assert all(torch.equal(again.state_dict()[name], state[name]) for name in state)
    with pytest.raises(TargetError, match=r"not of the slim model.*detectron2 drops"):
        DetectionCheckpointer(again).load(str(tmp_path / "dense.pth"))
    assert all(torch.equal(again.state_dict()[name], state[name]) for name in state)


def run_attached(case: Case, model: Any, slim: SlimCheckpoint) -> tuple[State, State]:
    with target_of(case).attach(model, slim):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return state, run(model)


def test_a_tuned_tower_keeps_its_own_weights(given: Any) -> None:
    case, model, _ = given
    layout, names = layout_of(case, model), model.state_dict()
    tuned = slim_resnet if case.kind != "convnext" else slim_convnext
    base = {k: v * 1.05 if v.is_floating_point() else v for k, v in case.base(model).items()}
    other = tuned(base)
    with target_of(case).attach(model, other) as attached:
        assert attached.weights == "target"
        cut = cut_state(layout.tower_state(names), other.spec, other.mask)
        found = layout.tower_state(model.state_dict())
        assert found.keys() == cut.keys() and len(cut) > 20
        assert all(torch.equal(found[name], tensor) for name, tensor in cut.items())


def _wider(case: Case, slim: SlimCheckpoint) -> SlimCheckpoint:
    return slim_resnet(lively_resnet(STAGES, width=32))


def _vit(case: Case, slim: SlimCheckpoint) -> SlimCheckpoint:
    return small_of_kind("vit")[1]


def _untrained(case: Case, slim: SlimCheckpoint) -> SlimCheckpoint:
    base = replace(slim.spec.base, trained=False)
    return replace(slim, spec=replace(slim.spec, base=base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_wider, r"is not built on RN-by-hand: (its .* has shape|it lacks)"),
        (_vit, r"holds a open_clip-vit tower .* needs"),
        (_untrained, "random weights .*--force"),
    ],
)
def test_refused_model_is_unchanged(given: Any, change: Any, message: str) -> None:
    case, model, slim = given
    modules = dict(model.named_modules())
    with pytest.raises(TargetError, match=message):
        target_of(case).attach(model, change(case, slim))
    assert dict(model.named_modules()) == modules  # the fixture compares the tensors


def test_slim_already_is_refused(given: Any) -> None:
    case, model, slim = given
    with target_of(case).attach(model, slim), pytest.raises(TargetError, match="slim already"):
        target_of(case).attach(model, slim)


def test_fc_clip_needs_the_fix_with_current_open_clip() -> None:
    """FC-CLIP's own encode_text fails; after the fix it returns the result of open_clip."""
    model = fc_clip("resnet")
    tokens = model.backbone.tokenize_text(["a photo of a cat", "sky"])
    with pytest.raises(RuntimeError, match="attn_mask"):
        model.backbone.encode_text(tokens)
    as_many = model.backbone.tokenize_text([f"number {i}" for i in range(tokens.shape[1])])
    own = model.backbone.encode_text(as_many)  # not even an error, with as many texts as tokens
    assert not torch.allclose(own, model.backbone.clip_model.encode_text(as_many), atol=1e-2)
    with TARGETS.get("fc-clip").apply_compat(model):
        found = model.backbone.encode_text(tokens)
        assert torch.equal(found, model.backbone.clip_model.encode_text(tokens))
    with pytest.raises(RuntimeError, match="attn_mask"):
        model.backbone.encode_text(tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("fc-clip on RN50", "fc-clip", fc_clip, "resnet"),
        Case("fc-clip on ConvNeXt-L", "fc-clip", fc_clip, "convnext"),
        Case("mask2former on CLIP", "mask2former", mask2former, "clip"),
    ],
    ids=lambda case: case.name,
)
def test_full_size_configurations(case: Case) -> None:
    model = case.make(case.kind, full=True)
    layout = layout_of(case, model)
    tower = {k: v.clone() for k, v in layout.tower_state(model.state_dict()).items()}
    slim = (slim_convnext if case.kind == "convnext" else slim_resnet)(tower)
    wanted, whole = dense_masked(case, model, slim, 128), dense(case, model, 128)
    with transfer(model, slim) as attached:
        assert attached.target == case.target and attached.weights == "slim"
        found = run(model, 128)
    # FC-CLIP pools features where a mask is positive: a pixel that rounding turns moves its query
    signs = [(outputs["pred_masks"] > 0).flatten(2) for outputs in (found, wanted)]
    same = (signs[0] == signs[1]).all(-1)
    assert same.float().mean() > 0.99
    errors = error(*({**o, "pred_logits": o["pred_logits"][same]} for o in (found, wanted)))
    print(case.name, int((~same).sum()), errors, attached)
    assert max(errors.values()) <= BOUND
    assert min(error(whole, wanted).values()) > 100 * BOUND


def test_a_schedule_reaches_the_slim_tower(given: Any) -> None:
    """Trains with the framework's losses; the plan enables the gradients that FC-CLIP disables."""
    case, model, slim = given
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with target_of(case).attach(model, slim):
        plan = ovsprune.schedule(model, "last-k", fraction=0.5, target=case.target)
        tower = target_of(case).tower_names(model)
        assert {layer.name for layer in plan.layers} <= tower
        model.training = True
        try:
            sum(model(batch(targets=True)).values()).backward()
        finally:
            model.training = False
        parameters = dict(model.named_parameters())
        reached = [name for name in plan.chosen if parameters[name].grad is not None]
        # the pool classifies masks without gradients, or is not run
        left = {n for n in plan.chosen if n not in reached}
        assert len(reached) >= 4 and all("attnpool" in n or ".head." in n for n in left)
        assert all(parameters[name].grad is None for name in plan.frozen)
        plan.release()
        model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
