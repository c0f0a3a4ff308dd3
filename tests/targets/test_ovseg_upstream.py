"""OVSeg's code with a slim tower: outputs, training loss and checkpointer.

Runs where ``OVSPRUNE_OVSEG_REPO`` names a checkout, with a Python that has detectron2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ovsprune.core.errors import TargetError
from ovsprune.targets import TARGETS
from tests.targets import proofs
from tests.targets.by_hand import random_kept, slim_by_hand
from tests.targets.ovseg_models import (
    SMALL,
    VIT_B,
    Shape,
    install,
    loss,
    losses_of_training,
    ovseg,
    pictures,
    run,
    seen_by_clip,
)
from tests.targets.proofs import Case

pytestmark = pytest.mark.upstream

CLIP = "clip_adapter.clip_model"
PROMPTS = f"{CLIP}.visual.mask_embedding"


def case_of(shape: Shape, build: Any) -> Case:
    tower = shape.tower()
    kept = random_kept(shape.depth, shape.heads, 4 * shape.width, seed=1)
    return Case(
        name="ovseg",
        tower=tower,
        slim=slim_by_hand(tower, kept, heads=shape.heads, size=shape.size),
        build=build,
        run=run,
        loss=loss,
        heads=shape.heads,
        size=shape.size,
        counted=(shape.size, shape.size),
        example=lambda model: {"batched_inputs": pictures(model)},
        times=lambda model: len(seen_by_clip(model)[0][1]),
    )


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Case:
    install(monkeypatch)  # skips before anything is drawn
    return case_of(SMALL, lambda tower: ovseg(monkeypatch, tmp_path, SMALL, tower))


@pytest.fixture
def model(case: Case) -> Any:
    return case.build(case.tower)


def test_is_recognised(case: Case, model: Any) -> None:
    knowing = [name for name in TARGETS if TARGETS.get(name).detect(model)]
    assert [name for name in knowing if not TARGETS.get(name).fallback] == ["ovseg"]
    assert case.target.check(model, case.slim)[0] == "slim"


def test_slim_equals_masked(case: Case, model: Any) -> None:
    proofs.slim_equals_masked(case, model)
    for layer in ("transformer.resblocks.1.attn", "transformer.resblocks.3.mlp"):
        proofs.swapped_unit_is_caught(case, model, layer)


def test_mask_prompts_matter(case: Case, model: Any) -> None:
    """Changed mask prompts change the output of the slim model."""
    wanted = case.masked(model)
    with torch.no_grad(), case.target.attach(model, case.slim):
        model.get_parameter(PROMPTS).mul_(0.9)
        errors = proofs.error(run(model), wanted)
    assert errors["regions"] > 100 * proofs.BOUND >= errors["plain"]


def test_gradients_equal_masked(case: Case, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # its norms cast to float32 by themselves, which float64 weights do not allow
    norm = type(model.get_submodule(f"{CLIP}.visual.ln_pre"))
    monkeypatch.setattr(norm, "forward", nn.LayerNorm.forward)
    # and so does what a mask is pooled by
    monkeypatch.setattr(torch, "float", torch.float64)
    proofs.gradients_equal_masked(case, model)


def test_training_losses_are_those_of_the_dense_model(case: Case, model: Any) -> None:
    """Losses do not run CLIP on images; a step trains the same parameters but CLIP."""
    assert not [
        name for name in proofs.trained_parameters_stay(case, model) if name.startswith(CLIP)
    ]
    wanted = losses_of_training(model)
    assert len(wanted) > 2 and all(torch.isfinite(value) for value in wanted.values())
    with case.target.attach(model, case.slim):
        found = losses_of_training(model)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        torch.stack(list(found.values())).sum().backward()
        touched = {n for n, p in model.named_parameters() if p.grad is not None}
    assert touched and not [name for name in touched if name.startswith(CLIP)]


def test_attach_detach_attach(case: Case, model: Any) -> None:
    proofs.attach_detach_attach(case, model)


def test_costs_drop_by_the_tower_costs(case: Case, model: Any) -> None:
    proofs.costs_drop_by_the_tower_costs(case, model)


def test_tuned_weights_are_cut(case: Case, model: Any) -> None:
    proofs.tuned_weights_are_cut(case, model)


@pytest.mark.parametrize("weights", ["auto", "target"])
def test_round_trip_with_its_own_checkpointer(
    case: Case, model: Any, tmp_path: Path, weights: str
) -> None:
    from detectron2.checkpoint import DetectionCheckpointer

    DetectionCheckpointer(model, str(tmp_path)).save("dense", iteration=7)
    fresh = case.build(SMALL.tower(seed=9))
    record = proofs.round_trip_on_disk(
        case, model, fresh, tmp_path, weights, file=tmp_path / "dense.pth"
    )
    assert record["weights"] == {"auto": "slim", "target": "target"}[weights]
    assert record["kept"][PROMPTS] == "no part of the image tower"
    with pytest.raises(TargetError, match="not of the slim model"):
        DetectionCheckpointer(fresh, str(tmp_path)).load(str(tmp_path / "dense.pth"))
    DetectionCheckpointer(fresh, str(tmp_path)).save("slim")
    from ovsprune.targets import load_into

    again = case.build(SMALL.tower(seed=4))
    load_into(again, tmp_path / "out")
    with torch.no_grad():
        again.get_parameter(PROMPTS).zero_()
    DetectionCheckpointer(again, str(tmp_path)).load(str(tmp_path / "slim.pth"))
    assert all(torch.equal(again.state_dict()[k], v) for k, v in fresh.state_dict().items())


def test_vit_b_16_at_its_real_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Covers ResNet-101 and ViT-B/16 of the framework's configuration, with few queries."""
    install(monkeypatch)
    case = case_of(VIT_B, lambda tower: ovseg(monkeypatch, tmp_path, VIT_B, tower))
    model = case.build(case.tower)
    proofs.slim_equals_masked(case, model)
    proofs.costs_drop_by_the_tower_costs(case, model)
