"""Tests of applied masks: other weights, training, and equality with torch's pruning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ovsprune.masks import apply_masks
from tests.masks.towers import Tower, holding, random_masks


def test_masks_apply_to_other_weights() -> None:
    tower, masks = Tower(7), random_masks(Tower(0))
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    applied = apply_masks(tower, masks)
    for name, after in tower.state_dict().items():
        mask = masks.get(name, torch.ones_like(after, dtype=torch.bool))
        assert torch.equal(after, before[name] * mask)
    gone = sum(int((~m).sum()) for m in masks.values())
    assert (applied.zeros, applied.weights) == (gone, sum(m.numel() for m in masks.values()))
    assert applied.sparsity == gone / applied.weights and applied.held == ()


def test_equals_torch_prune() -> None:
    ours, theirs, masks = Tower(3), Tower(3), random_masks(Tower())
    apply_masks(ours, masks)
    for name, mask in masks.items():
        layer, _, parameter = name.rpartition(".")
        prune.custom_from_mask(theirs.get_submodule(layer), parameter, mask)
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(ours(images), theirs(images))


def test_masked_nan_becomes_zero() -> None:
    tower, masks = Tower(), {"stem.weight": torch.zeros(4, 3, 2, 2, dtype=torch.bool)}
    with torch.no_grad():
        tower.stem.weight.fill_(float("nan"))
    assert apply_masks(tower, masks).sparsity == 1.0


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_held_masks_persist_in_training(
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    model, masks = holding("backbone", Tower(1)), random_masks(Tower())
    model.backbone.stem.weight.requires_grad_(False)
    applied = apply_masks(model, masks, hold=True)
    assert set(applied.held) == {f"backbone.{n}" for n in masks if n != "stem.weight"}
    assert {n.removeprefix("backbone."): m for n, m in applied.masks.items()} == masks
    parameters = list(model.parameters())
    steps = optimizer([p for p in parameters if p.requires_grad])

    def train() -> None:
        for _ in range(3):
            steps.zero_grad()
            model.backbone(torch.randn(2, 3, 4, 4)).square().mean().backward()
            steps.step()

    start = model.backbone.blocks[0][0].weight.detach().clone()
    train()
    held = model.backbone.blocks[0][0].weight.detach().clone()
    kept = masks["blocks.0.0.weight"]
    assert (held[~kept] == 0).all() and not torch.equal(held[kept], start[kept])
    applied.release()
    train()
    assert (model.backbone.blocks[0][0].weight[~kept] != 0).any()


def test_half_precision_and_fused_attention() -> None:
    attention = nn.MultiheadAttention(8, 2).half()
    mask = torch.rand(24, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    apply_masks(attention, {"in_proj_weight": mask})
    assert attention.in_proj_weight.dtype == torch.float16
    assert torch.equal(attention.in_proj_weight == 0, ~mask)
