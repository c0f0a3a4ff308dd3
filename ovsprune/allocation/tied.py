"""Equal numbers of heads in all layers, for any allocator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ovsprune.allocation.curves import error_curve
from ovsprune.allocation.trim import cost, minimum_widths, spare_budget
from ovsprune.core.protocols import AllocationContext, Allocator, Budget
from ovsprune.core.records import Group

__all__ = ["tied_widths"]

Widths = dict[str, int]


@dataclass(frozen=True, eq=False)
class _Tie:
    """Groups that get one common width."""

    names: tuple[str, ...]
    lowest: int  # minimum common width
    units: int  # maximum common width
    mean: float  # mean width that the allocator chose without the constraint


def tied_widths(allocator: Allocator, ctx: AllocationContext) -> Widths:
    """Return widths chosen by ``allocator`` with equal head counts in all groups of heads.

    The allocator first runs without the constraint. The head counts nearest to the mean of its
    answer are then fixed in turn, and the allocator runs on the other groups with the remaining
    budget. Among the counts that use up the budget, the one of least total measured error is
    chosen, or without error curves the one nearest to the mean. If layers have lost heads before,
    the layer with the fewest limits the count. Groups of heads with different unit costs are tied
    separately; protected groups do not take part.

    Raises:
        BudgetError: The minimum widths cost more than the budget. The highest minimum of the tied
            groups applies to all of them.
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
    spare_budget(ctx)
    free = allocator.widths(ctx)
    ties = []
    for members in classes.values():
        names, most = tuple(g.name for g in members), min(g.units for g in members)
        mean = sum(free[name] for name in names) / len(names)
        ties.append(_Tie(names, min(lowest[names[0]], most), most, mean))
    results = [_with_heads(allocator, ctx, heads) for heads in _candidates(ctx, ties)]
    # Candidates are sorted by distance to the mean, and min() keeps the first of equals.
    return min(results, key=lambda widths: (_missing(ctx, widths), _error(ctx, widths)))


def _candidates(ctx: AllocationContext, ties: Iterable[_Tie]) -> list[Widths]:
    """Return the three affordable head counts nearest to the means, nearest first."""
    ties = list(ties)
    least = minimum_widths(ctx)
    candidates: dict[tuple[int, ...], Widths] = {}
    offsets = sorted(range(-max((t.units for t in ties), default=0), 2), key=lambda o: (abs(o), o))
    for offset in offsets:
        counts = tuple(min(t.units, max(t.lowest, round(t.mean) + offset)) for t in ties)
        heads = {name: n for tie, n in zip(ties, counts, strict=True) for name in tie.names}
        if cost(ctx, {**least, **heads}) <= ctx.budget.target:
            candidates.setdefault(counts, heads)
        if len(candidates) == 3:
            break
    return list(candidates.values())


def _with_heads(allocator: Allocator, ctx: AllocationContext, heads: Mapping[str, int]) -> Widths:
    """Fix the head counts and allocate the other groups with the remaining budget."""
    rest = [g for g in ctx.groups if g.name not in heads]
    if not rest:
        return dict(heads)
    price = ctx.budget.price
    saved = sum(price(g, g.units) - price(g, heads[g.name]) for g in ctx.groups if g.name in heads)
    budget: Budget = replace(ctx.budget, dense=ctx.budget.dense - saved)
    return {**heads, **allocator.widths(replace(ctx, groups=rest, budget=budget))}


def _missing(ctx: AllocationContext, widths: Mapping[str, int]) -> float:
    """Return the unused fraction of the dense cost above a tolerance of 0.5%, in steps of 0.1%."""
    left = (ctx.budget.target - cost(ctx, widths)) / ctx.budget.dense
    return max(0.0, round(left - 0.005, 3))


def _error(ctx: AllocationContext, widths: Mapping[str, int]) -> float:
    """Return the total measured error, 0 without error curves."""
    if ctx.curves is None:
        return 0.0
    return sum(float(error_curve(ctx, g)[widths[g.name]]) for g in ctx.groups)
