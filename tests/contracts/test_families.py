"""Contract of families: rewriting, cutting and finishing keep the outputs."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from ovsprune.allocation.trim import cost
from ovsprune.backbones import FAMILIES
from ovsprune.core.progress import Silent
from ovsprune.core.protocols import AllocationContext, Budget
from ovsprune.core.records import Scores
from ovsprune.graph.costs import count_costs
from ovsprune.graph.cut import cut, mask, removed_units
from ovsprune.spectrum import group_alphas
from tests.contracts.conftest import REPRESENTATIVES, Case


def test_every_family_has_a_representative() -> None:
    assert set(REPRESENTATIVES) == set(FAMILIES.names())


def test_rewriting_keeps_the_outputs(case: Case) -> None:
    images = case.images()
    before = case.outputs(case.backbone.tower, images)
    torch.testing.assert_close(case.outputs(case.dense, images), before, atol=1e-5, rtol=1e-4)


def test_the_stages_are_the_tower(case: Case) -> None:
    images = case.images()
    pooled = case.backbone.pooled(images)
    torch.testing.assert_close(pooled, case.backbone.tower(images), atol=1e-5, rtol=1e-4)
    dense = case.backbone.dense(images)
    assert dense.shape[0] == len(images)
    assert dense.shape[1] == pooled.shape[1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.25, 0.6])
def test_cut_equals_masked(case: Case, seed: int, share: float) -> None:
    plan = case.random_plan(seed, share)
    slim, masked = deepcopy(case.dense), deepcopy(case.dense)
    cut(slim, case.groups, plan)
    mask(masked, case.groups, plan)
    FAMILIES.get(case.backbone.family).finish(slim, case.groups, plan)
    images = case.images()
    expected = case.outputs(masked, images)
    error = (case.outputs(slim, images) - expected).abs().max() / expected.std()
    assert error < 1e-4


def test_the_equivalence_can_fail(case: Case) -> None:
    plan = case.random_plan(0)
    group = case.groups[-1]
    other = case.random_plan(0)
    swapped = plan.kept[group.name].clone()
    swapped[0] = removed_units(group, plan)[0]
    other.kept[group.name] = swapped.sort().values  # type: ignore[index]
    slim, masked = deepcopy(case.dense), deepcopy(case.dense)
    cut(slim, case.groups, plan)
    mask(masked, case.groups, other)
    images = case.images()
    expected = case.outputs(masked, images)
    assert (case.outputs(slim, images) - expected).abs().max() / expected.std() > 1e-2


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_the_unit_costs_add_up(case: Case, kind: str) -> None:
    """Count the cost that groups share once."""
    size = case.backbone.preprocess.size
    plan = case.random_plan(1)
    slim = deepcopy(case.dense)
    cut(slim, case.groups, plan)
    dense = float(count_costs(case.dense, size).of(kind))
    ctx = AllocationContext(case.groups, Scores({}, {}), Budget(kind, dense, dense), None)
    assert cost(ctx, {g.name: plan.width(g.name) for g in case.groups}) == count_costs(
        slim, size
    ).of(kind)


def test_every_group_has_a_spectrum(case: Case) -> None:
    """Index that goes along with the units has none, and is left out."""
    found = group_alphas(case.dense, case.groups, Silent())
    assert list(found) == [g.name for g in case.groups]
    assert all(0 < alpha < float("inf") for alpha in found.values())
