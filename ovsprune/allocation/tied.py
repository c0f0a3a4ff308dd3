"""Heads kept equal in all layers, around any allocator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ovsprune.allocation.curves import curve
from ovsprune.allocation.trim import cost, floor_of, spare
from ovsprune.core.protocols import AllocationContext, Allocator, Budget
from ovsprune.core.records import Group

__all__ = ["tied_widths"]

Widths = dict[str, int]


@dataclass(frozen=True, eq=False)
class _Tie:
    """Groups that get one width: ``mean`` when they were free, within ``lowest`` ... ``units``."""

    names: tuple[str, ...]
    lowest: int
    units: int
    mean: float


def tied_widths(allocator: Allocator, ctx: AllocationContext) -> Widths:
    """Widths by ``allocator``, with as many heads in each group of heads as in all others.

    The allocator runs free first. The mean head count that it gave, and its neighbours, are fixed
    in turn, and it runs again on the other groups with what is left of the budget. Of the counts
    with which the budget is used up, the one of least total measured error is taken, or without
    curves the nearest to the mean. Where layers have lost heads before, the one with the fewest
    decides how many all can have. Groups of heads with different unit costs are tied apart;
    protected ones are in no list and stay as they are.

    Raises:
        BudgetError: The floors, the highest of all tied groups being that of each, cost more than
            the budget; names the nearest ratio.
    """
    classes: dict[tuple[float, float], list[Group]] = {}
    for group in ctx.groups:
        if group.kind == "heads":
            classes.setdefault((group.macs, group.params), []).append(group)
    lowest = {
        g.name: max(m.min_units for m in members) for members in classes.values() for g in members
    }
    ctx = replace(
        ctx, groups=[replace(g, min_units=lowest.get(g.name, g.min_units)) for g in ctx.groups]
    )
    spare(ctx)
    free = allocator.widths(ctx)
    ties = []
    for members in classes.values():
        names, most = tuple(g.name for g in members), min(g.units for g in members)
        mean = sum(free[name] for name in names) / len(names)
        ties.append(_Tie(names, min(lowest[names[0]], most), most, mean))
    found = [_fixed(allocator, ctx, heads) for heads in _candidates(ctx, ties)]
    # Candidates come nearest first, and min() keeps the first of equals.
    return min(found, key=lambda widths: (_missing(ctx, widths), _error(ctx, widths)))


def _candidates(ctx: AllocationContext, ties: Iterable[_Tie]) -> list[Widths]:
    """The three head counts nearest to the means that leave room for the other groups' floors."""
    ties = list(ties)
    least = {g.name: floor_of(g, ctx.round_to) for g in ctx.groups}
    found: dict[tuple[int, ...], Widths] = {}
    offsets = sorted(range(-max((t.units for t in ties), default=0), 2), key=lambda o: (abs(o), o))
    for offset in offsets:
        counts = tuple(min(t.units, max(t.lowest, round(t.mean) + offset)) for t in ties)
        heads = {name: n for tie, n in zip(ties, counts, strict=True) for name in tie.names}
        if cost(ctx, {**least, **heads}) <= ctx.budget.target:
            found.setdefault(counts, heads)
        if len(found) == 3:
            break
    return list(found.values())


def _fixed(allocator: Allocator, ctx: AllocationContext, heads: Mapping[str, int]) -> Widths:
    """Widths with these heads, the other groups by the allocator."""
    rest = [g for g in ctx.groups if g.name not in heads]
    if not rest:
        return dict(heads)
    price = ctx.budget.price
    gone = sum(price(g, g.units) - price(g, heads[g.name]) for g in ctx.groups if g.name in heads)
    budget: Budget = replace(ctx.budget, dense=ctx.budget.dense - gone)
    return {**heads, **allocator.widths(replace(ctx, groups=rest, budget=budget))}


def _missing(ctx: AllocationContext, widths: Mapping[str, int]) -> float:
    """Share of the cost, above half a percent, that the other groups could not take up."""
    left = (ctx.budget.target - cost(ctx, widths)) / ctx.budget.dense
    return max(0.0, round(left - 0.005, 3))


def _error(ctx: AllocationContext, widths: Mapping[str, int]) -> float:
    """Total measured error; 0 where nothing was measured."""
    if ctx.curves is None:
        return 0.0
    return sum(float(curve(ctx, g)[widths[g.name]]) for g in ctx.groups)
