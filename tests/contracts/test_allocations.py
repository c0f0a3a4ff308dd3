"""What every allocation must keep: the budget, the floors, the steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.trim import cost
from ovsprune.core.errors import BudgetError
from ovsprune.core.protocols import AllocationContext, Budget
from ovsprune.core.records import Curves, Group, Scores, Slice


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


def item(ratio: float, round_to: int = 1, kind: str = "macs", floor: int = 1) -> AllocationContext:
    found = [replace(g, floor=floor) for g in groups()]
    generator = torch.Generator().manual_seed(0)
    costs = {g.name: torch.rand(g.units, generator=generator) for g in found}
    widths = {g.name: torch.arange(1, g.units + 1) for g in found}
    errors = {
        g.name: (1 - widths[g.name] / g.units).double() ** 2 * (1 + i) for i, g in enumerate(found)
    }
    free = sum(g.units * (g.macs if kind == "macs" else g.params) for g in found)
    dense = 1.05 * free
    return AllocationContext(
        found,
        Scores.from_costs(costs),
        Budget(kind, dense, dense * (1 - ratio)),
        Curves(widths, errors),
        round_to,
    )


@pytest.mark.parametrize("name", ALLOCATIONS.names())
@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("ratio", [0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.85])
def test_the_budget_is_met_within_one_unit(name: str, kind: str, ratio: float) -> None:
    context = item(ratio, kind=kind)
    widths = ALLOCATIONS.get(name).widths(context)
    spent = cost(context, widths)
    assert spent <= context.budget.target + 1e-6
    wider = [context.budget.unit(g) for g in context.groups if widths[g.name] < g.units]
    assert context.budget.target - spent < min(wider)
    assert all(1 <= widths[g.name] <= g.units for g in context.groups)


@pytest.mark.parametrize("ratio", [0.02, 0.05, 0.1, 0.13])
def test_uniform_leaves_fine_units_to_fill_what_heads_cannot(ratio: float) -> None:
    context = item(ratio)
    left = context.budget.target - cost(context, ALLOCATIONS.get("uniform").widths(context))
    assert left <= min(context.budget.unit(g) for g in context.groups)


@pytest.mark.parametrize("name", ALLOCATIONS.names())
def test_widths_are_multiples(name: str) -> None:
    context = item(0.5, round_to=8)
    widths = ALLOCATIONS.get(name).widths(context)
    assert all(widths[g.name] % 8 == 0 for g in context.groups if g.kind == "mlp")


@pytest.mark.parametrize("name", ALLOCATIONS.names())
def test_floors_hold(name: str) -> None:
    context = item(0.5, floor=3)
    assert min(ALLOCATIONS.get(name).widths(context).values()) >= 3


@pytest.mark.parametrize("name", ALLOCATIONS.names())
def test_out_of_reach_names_the_nearest(name: str) -> None:
    context = item(0.99)
    floors = {g.name: 1 for g in context.groups}
    nearest = 1 - cost(context, floors) / context.budget.dense
    with pytest.raises(BudgetError, match=rf"0\.990 .* out of reach.* at most {nearest:.3f}"):
        ALLOCATIONS.get(name).widths(context)


def test_sensitivity_is_the_best_that_enumeration_finds() -> None:
    """On a problem small enough to enumerate, nothing that fits has a smaller error."""
    context = item(0.6)
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
    context = item(0.5)
    widths = ALLOCATIONS.get("sensitivity").widths(context)
    heads = [widths[g.name] for g in context.groups if g.kind == "heads"]
    assert heads == sorted(heads)
    assert heads[0] < heads[-1]
