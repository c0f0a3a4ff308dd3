"""Groups whose costs multiply: the exact cost meets the budget with near-optimal widths."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.curves import error_curve
from ovsprune.allocation.shared import SharedCostAllocator
from ovsprune.allocation.tied import tied_widths
from ovsprune.allocation.trim import cost, shared_costs, step_cost, widths_of
from ovsprune.core.errors import BudgetError
from ovsprune.core.protocols import AllocationContext, Budget
from ovsprune.core.records import Costs, Curves, Group, Scores, Slice

BLOCKS = [(64, 9, 64, 256), (64, 9, 256, 256), (96, 4, 128, 128)]
"""Per block: units of both groups, cost per pair of units, cost per unit of either group."""


def groups(blocks: list[tuple[int, int, int, int]]) -> list[Group]:
    found = []
    for i, (units, both, first, second) in enumerate(blocks):
        rows = torch.arange(units)[:, None]
        for name, own, shared in (("a", first, {}), ("b", second, {f"{i}.a": Costs(both, 2)})):
            consumer = f"{i}.{name}.out"
            found.append(
                Group(
                    f"{i}.{name}", "channels", units, (Slice(consumer, "in", rows),), consumer,
                    f"{i}", macs=float(own + both * units), params=float(1 + 2 * units),
                    shared=shared,
                )
            )  # fmt: skip
    return found


def true_cost(blocks: list[tuple[int, int, int, int]], widths: dict[str, int]) -> int:
    return sum(
        first * widths[f"{i}.a"] + both * widths[f"{i}.a"] * widths[f"{i}.b"]
        + second * widths[f"{i}.b"]
        for i, (_, both, first, second) in enumerate(blocks)
    )  # fmt: skip


def ctx(
    share: float, seed: int = 0, blocks: list[tuple[int, int, int, int]] = BLOCKS, **options: int
) -> AllocationContext:
    found = groups(blocks)
    generator = torch.Generator().manual_seed(seed)
    widths, errors, costs = {}, {}, {}
    for group in found:
        gone = torch.linspace(1, 0, group.units + 1, dtype=torch.float64)
        scale, power = torch.rand(2, generator=generator).tolist()
        widths[group.name] = torch.arange(group.units + 1)
        errors[group.name] = (0.1 + scale) * gone ** (1 + 2 * power)
        costs[group.name] = torch.rand(group.units, generator=generator)
    dense = float(true_cost(blocks, {g.name: g.units for g in found})) + 1000.0
    spectra = {g.name: 2 + 0.1 * i for i, g in enumerate(found)}
    return AllocationContext(
        found, Scores.from_costs(costs), Budget("macs", dense, share * dense),
        Curves(widths, errors), spectra=spectra, **options,
    )  # fmt: skip


def test_cost_multiplies_the_widths_of_both_groups() -> None:
    context = ctx(0.5)
    generator = np.random.default_rng(0)
    for _ in range(5):
        widths = {g.name: int(generator.integers(1, g.units + 1)) for g in context.groups}
        assert cost(context, widths) == true_cost(BLOCKS, widths) + 1000
        group = context.groups[3]
        wider = {**widths, group.name: group.units}
        step = step_cost(context.budget, group, group.units, widths, shared_costs(context))
        assert step == cost(context, wider) - cost(context, widths)


@pytest.mark.parametrize("name", ALLOCATIONS.names())
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("round_to", [1, 8])
def test_budget_is_met_within_one_unit(name: str, share: float, round_to: int) -> None:
    context = ctx(share, round_to=round_to)
    widths = SharedCostAllocator(ALLOCATIONS.get(name)).widths(context)
    spent, found = cost(context, widths), shared_costs(context)
    assert spent <= context.budget.target
    for group in context.groups:
        assert group.min_units <= widths[group.name] <= group.units
        wider = next((w for w in widths_of(group, round_to) if w > widths[group.name]), None)
        if wider is not None:
            step = step_cost(context.budget, group, wider, widths, found)
            assert spent + step > context.budget.target
    assert all(width % round_to == 0 for width in widths.values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.35, 0.5, 0.8])
def test_widths_are_near_the_exhaustive_optimum(seed: int, share: float) -> None:
    blocks = [(10, 9, 30, 40), (9, 12, 60, 40)]
    context = ctx(share, seed, blocks)
    found = SharedCostAllocator(ALLOCATIONS.get("sensitivity")).widths(context)
    curves = {g.name: error_curve(context, g) for g in context.groups}
    best = min(
        sum(float(curves[n][w]) for n, w in widths.items())
        for choice in product(*(range(1, g.units + 1) for g in context.groups))
        if cost(context, widths := dict(zip(curves, choice, strict=True))) <= context.budget.target
    )
    ours = sum(float(curves[n][w]) for n, w in found.items())
    assert best <= ours + 1e-12 <= 1.02 * best + 1e-9


def test_uniform_keeps_the_same_fraction_of_all_groups() -> None:
    widths = SharedCostAllocator(ALLOCATIONS.get("uniform")).widths(ctx(0.5))
    shares = [widths[g.name] / g.units for g in ctx(0.5).groups]
    assert max(shares) - min(shares) < 2 / 64
    # 0.7 of both widths leaves half of a product; an additive cost would need 0.5.
    assert 0.5 < min(shares) < 0.7


def test_without_shared_costs_the_allocator_decides() -> None:
    context = ctx(0.6)
    context = replace(context, groups=[replace(g, shared={}) for g in context.groups])
    for name in ALLOCATIONS.names():
        allocator = ALLOCATIONS.get(name)
        assert SharedCostAllocator(allocator).widths(context) == allocator.widths(context)
        assert SharedCostAllocator(allocator).needs_curves == allocator.needs_curves
        assert SharedCostAllocator(allocator).needs_spectra == allocator.needs_spectra


def test_protected_groups_share_no_costs() -> None:
    """Protect the first group of each pair, so that it is not in the list."""
    context = ctx(0.6)
    context = replace(context, groups=[g for g in context.groups if g.shared])
    assert not shared_costs(context)
    widths = SharedCostAllocator(ALLOCATIONS.get("uniform")).widths(context)
    assert cost(context, widths) <= context.budget.target


def test_tied_heads_support_shared_costs() -> None:
    context = ctx(0.5)
    widths = tied_widths(SharedCostAllocator(ALLOCATIONS.get("uniform")), context)
    assert 0.99 * context.budget.target < cost(context, widths) <= context.budget.target


def test_shared_part_of_measured_times_is_saved_once() -> None:
    """Read the savings of a group alone from a table; the shared part follows the ratio of MACs."""
    context = ctx(0.7)
    tables = {g.name: [2e-3 * g.macs * w for w in range(g.units + 1)] for g in context.groups}
    budget = Budget("latency", 2e-3 * context.budget.dense, 1.4e-3 * context.budget.dense, tables)
    timed = replace(context, budget=budget)
    widths = {g.name: g.units // 2 for g in context.groups}
    assert cost(timed, widths) == pytest.approx(2e-3 * cost(context, widths))
    for name in ALLOCATIONS.names():
        found = SharedCostAllocator(ALLOCATIONS.get(name)).widths(timed)
        assert 0.99 * budget.target < cost(timed, found) <= budget.target


def test_unreachable_ratio_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"a ratio of 0\.990 .* at most 0\.9"):
        SharedCostAllocator(ALLOCATIONS.get("uniform")).widths(ctx(0.01))
