"""Contract of allocations: the budget, the floors, the steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.tied import tied_widths
from ovsprune.allocation.trim import cost, widths_of
from ovsprune.core.errors import BudgetError
from ovsprune.core.protocols import AllocationContext, Budget
from ovsprune.core.records import Curves, Group, Scores, Slice

KINDS = ["macs", "params", "latency"]


def groups() -> list[Group]:
    """Heads and MLPs of uneven costs."""
    found = []
    for i in range(4):
        for kind, units, width, macs in (("heads", 6, 16, 700.0), ("mlp", 96, 1, 31.0 + i)):
            rows = torch.arange(units * width).view(units, width)
            found.append(
                Group(
                    f"{i}.{kind}",
                    kind,
                    units,
                    (Slice("out", "in", rows),),
                    "out",
                    f"{i}",
                    macs=macs,
                    params=macs / 3,
                )
            )
    return found


def milliseconds(group: Group) -> list[float]:
    """Hand-made table: a fixed cost, a plateau in the middle, steeper above than below."""
    full = group.units * group.macs / 1e4
    points = np.array([0.1, 0.5, 0.6, 0.6, 1.0]) * full
    at = np.array([0.0, 0.4, 0.5, 0.6, 1.0]) * group.units
    return [float(v) for v in np.interp(np.arange(group.units + 1), at, points)]


def budget(found: list[Group], kind: str, ratio: float) -> Budget:
    tables = {g.name: milliseconds(g) for g in found} if kind == "latency" else {}
    free = Budget(kind, 1.0, 1.0, tables)
    dense = 1.05 * sum(free.price(g, g.units) for g in found)
    return Budget(kind, dense, dense * (1 - ratio), tables)


def ctx(ratio: float, round_to: int = 1, kind: str = "macs", floor: int = 1) -> AllocationContext:
    found = [replace(g, min_units=floor) for g in groups()]
    generator = torch.Generator().manual_seed(0)
    costs = {g.name: torch.rand(g.units, generator=generator) for g in found}
    widths = {g.name: torch.arange(1, g.units + 1) for g in found}
    errors = {
        g.name: (1 - widths[g.name] / g.units).double() ** 2 * (1 + i) for i, g in enumerate(found)
    }
    return AllocationContext(
        found,
        Scores.from_costs(costs),
        budget(found, kind, ratio),
        Curves(widths, errors),
        round_to,
        {g.name: 2.0 + 0.3 * i for i, g in enumerate(found)},
    )


def check(context: AllocationContext, widths: dict[str, int], free: list[Group]) -> None:
    """Within the budget, and no unit of ``free`` more fits."""
    price, target = context.budget.price, context.budget.target
    spent = cost(context, widths)
    assert spent <= target * (1 + 1e-9)
    assert all(g.min_units <= widths[g.name] <= g.units for g in context.groups)
    for group in free:
        now = widths[group.name]
        wider = next((w for w in widths_of(group, context.round_to) if w > now), None)
        if wider is not None:
            assert spent + price(group, wider) - price(group, now) > target, group.name


@pytest.mark.parametrize("name", ALLOCATIONS.names())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.85])
def test_the_budget_is_met_within_one_unit(name: str, kind: str, ratio: float) -> None:
    if kind == "latency":
        ratio = min(ratio, 0.75)  # A tenth of the table's time is fixed.
    context = ctx(ratio, kind=kind)
    check(context, ALLOCATIONS.get(name).widths(context), list(context.groups))


@pytest.mark.parametrize("name", ALLOCATIONS.names())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.6])
@pytest.mark.parametrize("measured", [False, True])
def test_heads_can_be_tied(name: str, kind: str, ratio: float, measured: bool) -> None:
    context = ctx(ratio, kind=kind)
    allocator = ALLOCATIONS.get(name)
    if not (measured or allocator.needs_curves):
        context = replace(context, curves=None)
    widths = tied_widths(allocator, context)
    assert len({widths[g.name] for g in context.groups if g.kind == "heads"}) == 1
    check(context, widths, [g for g in context.groups if g.kind == "mlp"])
    assert cost(context, widths) > context.budget.target - 0.01 * context.budget.dense


@pytest.mark.parametrize("name", ALLOCATIONS.names())
def test_tied_heads_keep_floors_and_steps(name: str) -> None:
    context = ctx(0.3, round_to=8)
    # The highest floor of one is the floor of all.
    context = replace(
        context,
        groups=[replace(g, min_units=5) if g.name == "2.heads" else g for g in context.groups],
    )
    widths = tied_widths(ALLOCATIONS.get(name), context)
    assert min(widths[g.name] for g in context.groups if g.kind == "heads") >= 5
    assert all(widths[g.name] % 8 == 0 for g in context.groups if g.kind == "mlp")


@pytest.mark.parametrize("name", ALLOCATIONS.names())
def test_tied_heads_out_of_reach_name_the_nearest(name: str) -> None:
    context = ctx(0.8)
    context = replace(
        context,
        groups=[replace(g, min_units=6) if g.name == "2.heads" else g for g in context.groups],
    )
    least = {g.name: 6 if g.kind == "heads" else 1 for g in context.groups}
    nearest = 1 - cost(context, least) / context.budget.dense
    assert nearest < 0.8
    with pytest.raises(BudgetError, match=rf"0\.800 .* out of reach.* at most {nearest:.3f}"):
        tied_widths(ALLOCATIONS.get(name), context)


@pytest.mark.parametrize("ratio", [0.02, 0.05, 0.1, 0.13])
def test_uniform_leaves_fine_units_to_fill_what_heads_cannot(ratio: float) -> None:
    context = ctx(ratio)
    left = context.budget.target - cost(context, ALLOCATIONS.get("uniform").widths(context))
    assert left <= min(context.budget.price(g, 1) for g in context.groups)


@pytest.mark.parametrize("name", ALLOCATIONS.names())
@pytest.mark.parametrize("kind", KINDS)
def test_widths_are_multiples(name: str, kind: str) -> None:
    context = ctx(0.5, round_to=8, kind=kind)
    widths = ALLOCATIONS.get(name).widths(context)
    assert all(widths[g.name] % 8 == 0 for g in context.groups if g.kind == "mlp")


@pytest.mark.parametrize("name", ALLOCATIONS.names())
@pytest.mark.parametrize("kind", KINDS)
def test_floors_hold(name: str, kind: str) -> None:
    context = ctx(0.4, floor=3, kind=kind)
    context = replace(
        context,
        groups=[replace(g, min_units=80) if g.name == "3.mlp" else g for g in context.groups],
    )
    widths = ALLOCATIONS.get(name).widths(context)
    assert min(widths.values()) >= 3
    assert widths["3.mlp"] >= 80


@pytest.mark.parametrize("name", ALLOCATIONS.names())
def test_the_same_twice(name: str) -> None:
    assert ALLOCATIONS.get(name).widths(ctx(0.5)) == ALLOCATIONS.get(name).widths(ctx(0.5))


@pytest.mark.parametrize("name", ALLOCATIONS.names())
def test_out_of_reach_names_the_nearest(name: str) -> None:
    context = ctx(0.99)
    floors = {g.name: 1 for g in context.groups}
    nearest = 1 - cost(context, floors) / context.budget.dense
    with pytest.raises(BudgetError, match=rf"0\.990 .* out of reach.* at most {nearest:.3f}"):
        ALLOCATIONS.get(name).widths(context)


def test_sensitivity_is_the_best_that_enumeration_finds() -> None:
    """On a problem small enough to enumerate, nothing that fits has a smaller error."""
    context = ctx(0.6)
    few = [g for g in context.groups if g.kind == "heads"]
    dense = sum(g.units * g.macs for g in few)
    context = replace(context, groups=few, budget=Budget("macs", dense, dense * 0.4))
    assert context.curves is not None
    widths = ALLOCATIONS.get("sensitivity").widths(context)

    def error(choice: dict[str, int]) -> float:
        assert context.curves is not None
        return sum(float(context.curves.errors[n][w - 1]) for n, w in choice.items())

    names = [g.name for g in few]
    every = torch.cartesian_prod(*[torch.arange(1, 7)] * len(few))
    fits = [
        error(choice)
        for row in every.tolist()
        if cost(context, choice := dict(zip(names, row, strict=True))) <= context.budget.target
    ]
    assert error(widths) == pytest.approx(min(fits), rel=0.02)


def test_sensitivity_spends_where_it_hurts() -> None:
    context = ctx(0.5)
    widths = ALLOCATIONS.get("sensitivity").widths(context)
    heads = [widths[g.name] for g in context.groups if g.kind == "heads"]
    assert heads == sorted(heads)
    assert heads[0] < heads[-1]
