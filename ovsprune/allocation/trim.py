"""Helpers shared by all allocators: allowed widths, costs, bisection and final adjustment."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from ovsprune.core.errors import BudgetError
from ovsprune.core.protocols import AllocationContext, Budget
from ovsprune.core.records import Group

__all__ = [
    "SharedCosts",
    "cost",
    "floor_of",
    "largest_fit",
    "minimum_widths",
    "round_width",
    "shared_costs",
    "spare_budget",
    "step_cost",
    "trim",
    "widths_of",
]

Widths = dict[str, int]
SharedCosts = Mapping[str, Sequence[tuple[Group, float]]]
"""Group name to (other group, cost shared by one unit of each) for all groups it shares with."""


def widths_of(group: Group, round_to: int) -> list[int]:
    """Return the allowed widths, ascending: multiples of ``round_to``, and the dense width.

    Rounding applies to units of one column; units of several columns (heads) take every width. In
    a group that was pruned before, the present width is allowed only if it is a multiple, too.
    """
    step = round_to if group.columns.shape[1] == 1 else 1
    widths = {*range(floor_of(group, round_to), group.units, step)}
    if not widths or not group.cut_before or group.units % step == 0:
        widths.add(group.units)
    return sorted(widths)


def floor_of(group: Group, round_to: int) -> int:
    """Return the minimum width, a multiple of ``round_to`` for units of one column."""
    step = round_to if group.columns.shape[1] == 1 else 1
    return min(group.units, -(-group.min_units // step) * step)


def minimum_widths(ctx: AllocationContext) -> Widths:
    """Return the minimum width of every group."""
    return {g.name: floor_of(g, ctx.round_to) for g in ctx.groups}


def cost(ctx: AllocationContext, widths: Mapping[str, int]) -> float:
    """Return the cost of the tower with these widths, in the unit of the budget.

    The cost that two groups share is saved once, not once per group.
    """
    saved = sum(
        ctx.budget.price(g, g.units) - ctx.budget.price(g, widths[g.name]) for g in ctx.groups
    )
    removed = {g.name: g.units - widths[g.name] for g in ctx.groups}
    twice = sum(
        removed[name] * removed[other.name] * price
        for name, pairs in shared_costs(ctx).items()
        for other, price in pairs
    )
    # Each pair is listed from both sides, hence the half.
    return ctx.budget.dense - saved + twice / 2


def shared_costs(ctx: AllocationContext) -> SharedCosts:
    """Return the pairs of groups that share costs, each pair listed from both sides."""
    groups = {g.name: g for g in ctx.groups}
    pairs: dict[str, list[tuple[Group, float]]] = {}
    for group in ctx.groups:
        for other in (groups[name] for name in group.shared if name in groups):
            price = ctx.budget.shared_cost(group, other)
            pairs.setdefault(group.name, []).append((other, price))
            pairs.setdefault(other.name, []).append((group, price))
    return pairs


def step_cost(
    budget: Budget, group: Group, to: int, widths: Mapping[str, int], shared: SharedCosts
) -> float:
    """Return the cost of changing one group's width to ``to`` with all others unchanged."""
    now = widths[group.name]
    discount = sum((g.units - widths[g.name]) * price for g, price in shared.get(group.name, ()))
    return budget.price(group, to) - budget.price(group, now) - (to - now) * discount


def spare_budget(ctx: AllocationContext) -> float:
    """Return the budget left when every group has its minimum width.

    Raises:
        BudgetError: The minimum widths cost more than the budget.
    """
    least = cost(ctx, minimum_widths(ctx))
    left = ctx.budget.target - least
    if left < -1e-9 * ctx.budget.dense:
        asked = 1 - ctx.budget.target / ctx.budget.dense
        nearest = 1 - least / ctx.budget.dense
        raise BudgetError(
            f"a ratio of {asked:.3f} of the {ctx.budget.kind} is out of reach: the layers "
            f"that may be pruned allow at most {nearest:.3f}. Lower the ratio, protect fewer "
            "layers, or reduce the minimum numbers of units."
        )
    return max(left, 0.0)


def round_width(group: Group, options: Sequence[int], share: float) -> int:
    """Return the allowed width for a fraction of the units.

    Heads round to the nearest width, other units down. Rounding heads down, too, could leave more
    budget than the other groups can use.
    """
    if group.columns.shape[1] > 1:
        return min(options, key=lambda width: abs(width - share * group.units))
    return options[max(0, bisect_right(options, share * group.units) - 1)]


def largest_fit(
    ctx: AllocationContext, widths_at: Callable[[float], Widths]
) -> tuple[float, Widths]:
    """Bisect for the largest part in [0, 1] whose widths fit the budget.

    Args:
        ctx: Allocation context.
        widths_at: Maps a part to widths, non-decreasing in the part; ``widths_at(0)`` must fit.

    Returns:
        The part and its widths.
    """
    low, high = 0.0, 1.0
    for _ in range(60):  # beyond the 53 bits of a float64
        middle = (low + high) / 2
        if cost(ctx, widths_at(middle)) <= ctx.budget.target:
            low = middle
        else:
            high = middle
    return low, widths_at(low)


def trim(
    ctx: AllocationContext, widths: Widths, worth: Callable[[Group, int, int], float]
) -> Widths:
    """Widen the group of highest worth, step by step, until no step fits the budget.

    Args:
        ctx: Allocation context.
        widths: Widths within the budget; modified and returned.
        worth: Maps (group, width, next width) to the benefit of the step per cost.
    """
    left = ctx.budget.target - cost(ctx, widths)
    slack = 1e-9 * ctx.budget.dense
    shared = shared_costs(ctx)
    options: Mapping[str, Sequence[int]] = {g.name: widths_of(g, ctx.round_to) for g in ctx.groups}
    while True:
        best: tuple[float, Group, int, float] | None = None
        for group in ctx.groups:
            now, steps = widths[group.name], options[group.name]
            index = bisect_right(steps, now)
            if index == len(steps):  # the group is at its full width
                continue
            wider = steps[index]
            price = step_cost(ctx.budget, group, wider, widths, shared)
            if price > left + slack:
                continue
            value = worth(group, now, wider)
            if best is None or value > best[0]:
                best = (value, group, wider, price)
        if best is None:
            return widths
        _, group, wider, price = best
        widths[group.name] = wider
        left -= price
