"""Rounds: ratios, coordinates of plans, and a prune in several rounds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from ovsprune.core.errors import BudgetError
from ovsprune.core.records import Plan
from ovsprune.graph.cut import cut
from ovsprune.graph.groups import find_groups
from ovsprune.jobs.prune import prune
from ovsprune.pruning.rounds import compose, keep_all, ratios, reindex_groups
from tests.contracts.conftest import Case, open_clip_vit, prepared

QUICK: dict[str, Any] = {"samples": 8, "batch_size": 8, "probe": 4}


@pytest.fixture(scope="module")
def case() -> Case:
    return prepared(open_clip_vit())


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_each_round_removes_the_same_fraction_of_the_rest(rounds: int) -> None:
    found = ratios(0.7, rounds)
    assert len(found) == rounds
    assert found[-1] == 0.7
    left = [1.0, *(1 - r for r in found)]
    shares = [after / before for before, after in pairwise(left)]
    assert shares == pytest.approx([0.3 ** (1 / rounds)] * rounds)


def test_plans_compose() -> None:
    first = Plan({"a": torch.tensor([1, 4, 6, 9]), "b": torch.tensor([0, 2])})
    then = Plan({"a": torch.tensor([0, 2]), "b": torch.tensor([1])})
    both = compose(first, then)
    assert {k: v.tolist() for k, v in both.kept.items()} == {"a": [1, 6], "b": [2]}


def test_two_cuts_equal_the_composed_cut(case: Case) -> None:
    first = case.random_plan(0, 0.8)
    here = reindex_groups(case.groups, first)
    generator = torch.Generator().manual_seed(5)
    then = Plan(
        {
            g.name: torch.randperm(g.units, generator=generator)[: max(1, g.units // 2)]
            .sort()
            .values
            for g in here
        }
    )
    twice = case.cut(first)
    cut(twice, here, then)
    once = case.cut(compose(first, then))
    one, two = once.state_dict(), twice.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_reindexed_groups_are_those_of_the_cut_tower(case: Case) -> None:
    """Compare with the groups that the dependency graph finds in the cut tower."""
    plan = case.random_plan(0, 0.6)
    slim = case.cut(plan)
    family_seeds = [s for s in _seeds(case, slim) if not s.protected]
    for mine, found in zip(
        reindex_groups(case.groups, plan),
        find_groups(slim, family_seeds, case.backbone.preprocess.size),
        strict=True,
    ):
        assert (mine.name, mine.units, mine.consumer) == (found.name, found.units, found.consumer)
        assert (mine.macs, mine.params) == (found.macs, found.params)
        rows = {(s.module, s.axis): s.rows for s in found.slices}
        assert all(torch.equal(s.rows, rows[s.module, s.axis]) for s in mine.slices)


def _seeds(case: Case, tower: torch.nn.Module) -> Any:
    from ovsprune.backbones import FAMILIES

    return FAMILIES.get(case.backbone.family).prunable_layers(tower)


def test_a_plan_that_keeps_everything_changes_no_group(case: Case) -> None:
    found = reindex_groups(case.groups, keep_all(case.groups))
    assert all(a is b for a, b in zip(found, case.groups, strict=True))


@pytest.mark.parametrize(
    ("budget", "recovery"),
    [
        ("macs", "none"),
        pytest.param("macs", "bias", marks=pytest.mark.slow),
        ("macs", "closed-form"),
        pytest.param("macs", "closed-form-symmetric", marks=pytest.mark.slow),
        ("params", "closed-form"),
        *(
            pytest.param("params", recovery, marks=pytest.mark.slow)
            for recovery in ("none", "bias", "closed-form-symmetric")
        ),
    ],
)
def test_rounds_reach_the_exact_ratio(recovery: str, budget: str) -> None:
    small = open_clip_vit()
    result = prune(small, 0.5, rounds=3, recovery=recovery, budget=budget, **QUICK)
    assert abs(result.achieved - 0.5) <= 0.01
    assert result.record()["rounds"] == 3
    assert result.spec.provenance["rounds"] == 3
    for name, kept in result.plan.kept.items():
        assert torch.equal(kept, kept.unique()), name  # Ascending, each once.
    units = {layer.name: layer.units for layer in result.spec.layers}
    assert all(kept.max() < units[name] for name, kept in result.plan.kept.items())


def test_without_recovery_rounds_equal_one_cut_by_the_plan() -> None:
    """Compare with one cut by the plan in base coordinates."""
    from ovsprune.backbones import FAMILIES

    small = open_clip_vit()
    result = prune(small, 0.5, rounds=3, recovery="none", criterion="magnitude", **QUICK)
    case = prepared(small)
    slim = case.cut(result.plan)
    FAMILIES.get(small.family).finish(slim, case.groups, result.plan)
    one, two = slim.state_dict(), result.tower.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_rounds_are_reproducible() -> None:
    small = open_clip_vit()
    first, second = (prune(small, 0.5, rounds=2, seed=3, **QUICK) for _ in range(2))
    assert all(torch.equal(first.plan.kept[k], second.plan.kept[k]) for k in first.plan.kept)
    one, two = first.tower.state_dict(), second.tower.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_later_rounds_measure_the_repaired_tower() -> None:
    """Expect other plans with recovery, because a refit changes the magnitudes."""
    small = open_clip_vit()
    options: dict[str, Any] = {"criterion": "magnitude", "allocation": "uniform", **QUICK}
    plans = [
        prune(small, 0.5, rounds=2, recovery=name, **options).plan.kept
        for name in ("none", "closed-form")
    ]
    assert any(not torch.equal(plans[0][k], plans[1][k]) for k in plans[0])


def test_a_ratio_out_of_reach_names_the_round() -> None:
    with pytest.raises(BudgetError, match=r"^round \d of 2, as fractions .* is out of reach"):
        prune(open_clip_vit(), 0.97, rounds=2, **QUICK)
