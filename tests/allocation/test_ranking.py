"""Allocators that rank units, on cases small enough to compute by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.ranking import width_steps
from ovsprune.core.protocols import AllocationContext, Budget
from ovsprune.core.records import Group, Scores, Slice


def group(name: str, units: int, macs: float, kind: str = "mlp") -> Group:
    rows = torch.arange(units)[:, None]
    return Group(name, kind, units, (Slice(name, "in", rows),), name, name, macs=macs, params=macs)


def ctx(
    groups: Sequence[Group], costs: Mapping[str, Sequence[float]], target: float, **rest: object
) -> AllocationContext:
    dense = sum(g.units * g.macs for g in groups)
    scores = Scores.from_costs({k: torch.tensor(v) for k, v in costs.items()})
    context = AllocationContext(groups, scores, Budget("macs", dense, target), None)
    return replace(context, **rest)  # type: ignore[arg-type]


def test_global_keeps_the_highest_score_per_price_over_all_groups() -> None:
    # Per MAC: a is 1, 2, 3, 4; b, at 2 MACs a unit, 0.5, 1.5, 2.5, 5.
    groups = [group("a", 4, 1.0), group("b", 4, 2.0)]
    context = ctx(groups, {"a": [1, 2, 3, 4], "b": [1, 3, 5, 10]}, 6.0, comparable=True)
    # The minimum widths cost 3. Then one more of a (1 MAC) and one more of b (2 MACs) fit.
    assert ALLOCATIONS.get("global").widths(context) == {"a": 2, "b": 2}


def test_global_normalises_scores_that_are_not_comparable() -> None:
    groups = [group("a", 4, 1.0), group("b", 4, 1.0)]
    costs = {"a": [1.0, 1.0, 1.0, 1.0], "b": [100.0, 100.0, 100.0, 500.0]}
    # Divided by their means, a is 1, 1, 1, 1 and b is 0.5, 0.5, 0.5, 2.5.
    assert ALLOCATIONS.get("global").widths(ctx(groups, costs, 5.0)) == {"a": 4, "b": 1}
    comparable = ctx(groups, costs, 5.0, comparable=True)
    assert ALLOCATIONS.get("global").widths(comparable) == {"a": 1, "b": 4}


def test_scores_are_made_monotone_along_the_order_of_removal() -> None:
    """Give a unit of low score that is removed late the running maximum of the scores before."""
    groups = [group("a", 4, 1.0), group("b", 4, 1.0)]
    costs = {"a": torch.tensor([9.0, 1.0, 1.0, 9.0]), "b": torch.tensor([2.0, 3.0, 4.0, 5.0])}
    orders = {"a": torch.tensor([0, 1, 2, 3]), "b": torch.tensor([0, 1, 2, 3])}
    context = replace(ctx(groups, {}, 6.0, comparable=True), scores=Scores(costs, orders))
    assert width_steps(context, groups[0]).worths.tolist() == [9.0, 9.0, 9.0]
    assert ALLOCATIONS.get("global").widths(context) == {"a": 4, "b": 2}


def test_isomorphic_keeps_the_same_fraction_of_every_class() -> None:
    # Two MLPs of one structure; two groups of heads whose scores have another scale.
    groups = [
        group("a.mlp", 4, 1.0), group("b.mlp", 4, 1.0),
        group("a.attn", 4, 3.0, "heads"), group("b.attn", 4, 3.0, "heads"),
    ]  # fmt: skip
    costs = {
        "a.mlp": [1.0, 2.0, 3.0, 4.0], "b.mlp": [10.0, 20.0, 30.0, 40.0],
        "a.attn": [8e6, 7e6, 6e6, 5e6], "b.attn": [1e6, 2e6, 3e6, 4e6],
    }  # fmt: skip
    context = ctx(groups, costs, 20.0)
    # 5 of 8 units of each class: the minimum (1 each), then the four of highest score.
    assert ALLOCATIONS.get("isomorphic").widths(context) == {
        "a.mlp": 1, "b.mlp": 4, "a.attn": 4, "b.attn": 1
    }  # fmt: skip
    # In one common class the larger scores of the heads win.
    one = [replace(g, kind="x", macs=1.0, params=1.0) for g in groups]
    same = replace(context, groups=one, budget=Budget("macs", 16.0, 10.0))
    assert ALLOCATIONS.get("isomorphic").widths(same) == {
        "a.mlp": 1, "b.mlp": 1, "a.attn": 4, "b.attn": 4
    }  # fmt: skip


def test_spectral_removes_a_fraction_linear_in_alpha() -> None:
    groups = [group(name, 1000, 1.0) for name in "abc"]
    context = ctx(groups, {}, 1500.0, spectra={"a": 2.0, "b": 3.0, "c": 4.0})
    # Fractions removed: 0.7, 1.0 and 1.3 times one half.
    widths = ALLOCATIONS.get("spectral").widths(context)
    assert widths == {"a": 650, "b": 500, "c": 350}
    # A group of twice the cost: eta (0.7 + 1.0 + 2 x 1.3) = 2, eta = 2 / 4.3.
    uneven = [*groups[:2], replace(groups[2], macs=2.0)]
    context = replace(context, groups=uneven, budget=Budget("macs", 4000.0, 2000.0))
    widths = ALLOCATIONS.get("spectral").widths(context)
    gone = {name: (1000 - width) / 1000 for name, width in widths.items()}
    eta = 2 / 4.3
    expected = {"a": 0.7 * eta, "b": 1.0 * eta, "c": 1.3 * eta}
    assert gone == {name: pytest.approx(value, abs=2e-3) for name, value in expected.items()}


def test_spectral_equals_uniform_for_equal_alphas() -> None:
    groups = [group("a", 50, 1.0), group("b", 80, 2.0)]
    context = ctx(groups, {}, 100.0, spectra={"a": 2.5, "b": 2.5})
    assert ALLOCATIONS.get("spectral").widths(context) == ALLOCATIONS.get("uniform").widths(context)


def test_spectral_treats_infinite_alpha_as_the_largest() -> None:
    groups = [group(name, 100, 1.0) for name in "abc"]
    spectra = {"a": 2.0, "b": 4.0, "c": float("inf")}
    widths = ALLOCATIONS.get("spectral").widths(ctx(groups, {}, 150.0, spectra=spectra))
    assert widths["a"] > widths["b"]
    assert abs(widths["b"] - widths["c"]) <= 1


def test_steps_on_a_price_plateau_are_merged() -> None:
    """Price the fourth unit at 3 and the fifth and sixth at 0: all three are worth the same."""
    only = group("a", 6, 1.0)
    context = ctx([only, group("b", 6, 1.0)], {n: [1.0, 1, 1, 1, 1, 1] for n in "ab"}, 0.0)
    table = [0.0, 1.0, 2.0, 3.0, 6.0, 6.0, 6.0]
    budget = Budget("latency", 12.0, 8.0, {"a": table})
    found = width_steps(replace(context, budget=budget), only)
    assert found.worths.tolist() == pytest.approx([1.0] * 5)
