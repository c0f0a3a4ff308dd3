"""Unstructured masks on towers whose framework renames, splits or fuses layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.targets import TARGETS, mask_tower
from tests.targets.by_hand import needs_mmseg, small_tower
from tests.targets.clipseg_models import clipseg

pytestmark = pytest.mark.framework


def masks_of(tower: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draw masks that keep half of every matrix of every block."""
    torch.manual_seed(0)
    names = [n for n in tower if ".resblocks." in n and tower[n].ndim == 2]
    return {name: torch.rand(tower[name].shape) < 0.5 for name in names}


def mmseg_san(tower: dict[str, Tensor]) -> nn.Module:
    needs_mmseg()
    from ovsprune.targets.mmseg_build import SanShape, build_san, load_tower

    shape = SanShape.small(tower, heads=4, size=32, activation="quick_gelu")
    model = build_san(["a", "b"], shape)
    load_tower(model, tower)
    return model


@pytest.mark.parametrize(("target", "build"), [("clipseg", clipseg), ("mmseg-san", mmseg_san)])
def test_masked_weights_are_zero(target: str, build: Any) -> None:
    tower = small_tower()
    masks, model = masks_of(tower), build(tower)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    applied = mask_tower(model, masks, target, hold=True)
    assert applied.weights == sum(mask.numel() for mask in masks.values())
    assert applied.sparsity == pytest.approx(0.5, abs=0.02)

    found = TARGETS.get(target).layout(model.state_dict(), 4).tower_state(model.state_dict())
    for name, tensor in tower.items():
        if name in masks:
            assert torch.equal(found[name], tensor * masks[name]), name
    touched = set(applied.placement.names.values())
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items() if n not in touched)
    if target == "clipseg":
        assert any(name.endswith("self_attn.k_proj.weight") for name in touched)


def test_model_of_another_kind_is_refused_unchanged() -> None:
    tower = small_tower()
    model = clipseg(tower)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = masks_of(tower)
    with pytest.raises(TargetError):
        mask_tower(model, masks, "mmseg-san")
    masks["transformer.resblocks.0.mlp.c_fc.weight"] = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(TargetError, match="do not fit"):
        mask_tower(model, masks, "clipseg")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
