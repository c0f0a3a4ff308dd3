"""Torch-Pruning through its own API: selected units and measured MACs."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from ovsprune.backbones import FAMILIES
from ovsprune.baselines.torch_pruning import TORCH_PRUNING_METHODS, TorchPruning, feature_gradients
from ovsprune.calibration.pictures import RenderedPictures
from ovsprune.core.errors import BudgetError
from ovsprune.graph.costs import count_costs
from ovsprune.graph.cut import cut
from ovsprune.graph.groups import find_groups
from tests.contracts.conftest import open_clip_vit
from tests.tiers import by_default

SIZE = (48, 48)


@pytest.fixture(scope="module")
def forms():
    """Return the original and the rewritten tower of the small CLIP, and its groups."""
    backbone = open_clip_vit()
    family = FAMILIES.get(backbone.family)
    dense = deepcopy(backbone.tower).eval().requires_grad_(False)
    family.rewrite(dense)
    groups = find_groups(dense, [s for s in family.prunable_layers(dense) if not s.protected], SIZE)
    return {"original": backbone.tower, "rewritten": dense}, groups, family


def gradients(forms, form, seed=0):
    towers, _, family = forms
    pictures = RenderedPictures(4, open_clip_vit().preprocess, seed)
    return feature_gradients(towers[form], family.stages, pictures, 2, seed)


def stock(forms, name, form):
    towers, groups, _ = forms
    found = gradients(forms, form) if TORCH_PRUNING_METHODS[name].taylor else None
    return TorchPruning(name, TORCH_PRUNING_METHODS[name], towers[form], groups, SIZE, found)


@pytest.mark.parametrize("name", by_default(TORCH_PRUNING_METHODS, {"torch-pruning"}))
@pytest.mark.parametrize(("form", "ratio"), [("original", 0.25), ("rewritten", 0.5)])
def test_the_measured_macs_are_reached_and_the_plan_matches_the_tower(forms, name, form, ratio):
    towers, groups, _ = forms
    found = stock(forms, name, form).reach(ratio)
    dense, slim = count_costs(towers[form], SIZE), count_costs(found.tower, SIZE)
    assert 1 - slim.macs / dense.macs == pytest.approx(ratio, abs=0.01)
    assert found.achieved == pytest.approx(1 - slim.macs / dense.macs)
    # Our own cut by the plan gives the tower that the library cut, to the last tensor.
    ours = deepcopy(towers[form])
    cut(ours, [g for g in groups if g.name in found.plan.kept], found.plan)
    theirs = found.tower.state_dict()
    assert set(ours.state_dict()) == set(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.state_dict().items())


def test_heads_are_cut_on_the_rewritten_tower_only(forms):
    heads = {g.name for g in forms[1] if g.kind == "heads"}
    original = stock(forms, "torch-pruning", "original")
    assert set(original.not_cut) == heads
    assert not heads & set(original.reach(0.2).plan.kept)
    kept = stock(forms, "torch-pruning", "rewritten").reach(0.5).plan.kept
    assert any(kept[name].numel() < 4 for name in heads)


def test_an_unreachable_ratio_names_the_largest_one(forms):
    with pytest.raises(
        BudgetError,
        match=r"uniform removed at most 0\.3\d\d of the MACs, not the requested 0\.600"
        r"\. It cannot cut 2 of the groups on this tower \(transformer\.resblocks\.0\.attn",
    ):
        stock(forms, "torch-pruning-uniform", "original").reach(0.6)


def test_the_plan_does_not_depend_on_earlier_budgets(forms):
    fresh = stock(forms, "torch-pruning", "rewritten").reach(0.3).plan.kept
    used = stock(forms, "torch-pruning", "rewritten")
    used.reach(0.5)
    again = used.reach(0.3).plan.kept
    assert all(torch.equal(fresh[name], again[name]) for name in fresh)


def test_pruning_does_not_change_the_tower_and_later_pruners(forms):
    towers, groups, _ = forms
    before = {k: v.clone() for k, v in towers["rewritten"].state_dict().items()}
    trained = [p.requires_grad for p in towers["rewritten"].parameters()]
    one = stock(forms, "torch-pruning", "rewritten")
    first = one.prune(0.5, 0.5).plan
    second = one.prune(0.5, 0.5).plan
    assert all(torch.equal(first.kept[g.name], second.kept[g.name]) for g in groups)
    after = towers["rewritten"].state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert [p.requires_grad for p in towers["rewritten"].parameters()] == trained
    assert all(p.grad is None for p in towers["rewritten"].parameters())


def test_the_feature_loss_has_a_gradient_and_depends_on_the_seed_only(forms):
    found = gradients(forms, "rewritten")
    for group in forms[1]:
        for part in group.slices:
            assert float(found[f"{part.module}.weight"].abs().max()) > 0
    again = gradients(forms, "rewritten")
    assert all(torch.equal(value, again[key]) for key, value in found.items())
    other = gradients(forms, "rewritten", seed=1)
    assert not torch.equal(other["conv1.weight"], found["conv1.weight"])
