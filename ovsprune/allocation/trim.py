"""What every allocation shares: floors, steps, shares, and single units up to the exact count."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from ovsprune.core.errors import BudgetError
from ovsprune.core.protocols import AllocationContext, Budget
from ovsprune.core.records import Group

__all__ = [
    "Partners",
    "cost",
    "fill",
    "floor_of",
    "partners",
    "place",
    "spare",
    "step_price",
    "trim",
    "widths_of",
]

Widths = dict[str, int]
Partners = Mapping[str, Sequence[tuple[Group, float]]]
"""Group name to the groups that it shares costs with, and what a unit of each costs together."""


def widths_of(group: Group, round_to: int) -> list[int]:
    """Widths that ``group`` may have, ascending: multiples of ``round_to``, and the dense width.

    Rounding is for the widths of matrices: units of several columns (heads) take every width. What
    an earlier prune left is no dense width, and stays only if it is a multiple, too.
    """
    step = round_to if group.columns.shape[1] == 1 else 1
    found = {*range(floor_of(group, round_to), group.units, step)}
    if not found or not group.cut_before or group.units % step == 0:
        found.add(group.units)
    return sorted(found)


def floor_of(group: Group, round_to: int) -> int:
    """Fewest units that may stay, a multiple of ``round_to`` for units of one column."""
    step = round_to if group.columns.shape[1] == 1 else 1
    return min(group.units, -(-group.min_units // step) * step)


def cost(ctx: AllocationContext, widths: Mapping[str, int]) -> float:
    """What the tower costs with these widths: dense, less what each group alone saves.

    What groups share is saved once.
    """
    saved = sum(
        ctx.budget.price(g, g.units) - ctx.budget.price(g, widths[g.name]) for g in ctx.groups
    )
    gone = {g.name: g.units - widths[g.name] for g in ctx.groups}
    twice = sum(
        gone[name] * gone[other.name] * price
        for name, found in partners(ctx).items()
        for other, price in found
    )
    return ctx.budget.dense - saved + twice / 2


def partners(ctx: AllocationContext) -> Partners:
    """Which of the groups share costs; each pair is listed from both sides."""
    groups = {g.name: g for g in ctx.groups}
    found: dict[str, list[tuple[Group, float]]] = {}
    for group in ctx.groups:
        for other in (groups[name] for name in group.shared if name in groups):
            price = ctx.budget.together(group, other)
            found.setdefault(group.name, []).append((other, price))
            found.setdefault(other.name, []).append((group, price))
    return found


def step_price(
    budget: Budget, group: Group, to: int, widths: Mapping[str, int], shared: Partners
) -> float:
    """What it costs to go from a group's present width to another, all others as they are."""
    now = widths[group.name]
    away = sum((g.units - widths[g.name]) * price for g, price in shared.get(group.name, ()))
    return budget.price(group, to) - budget.price(group, now) - (to - now) * away


def spare(ctx: AllocationContext) -> float:
    """What may be spent on units above every group's floor.

    Raises:
        BudgetError: The floors alone cost more than the budget.
    """
    floors = {g.name: floor_of(g, ctx.round_to) for g in ctx.groups}
    least = cost(ctx, floors)
    left = ctx.budget.target - least
    if left < -1e-9 * ctx.budget.dense:
        asked = 1 - ctx.budget.target / ctx.budget.dense
        nearest = 1 - least / ctx.budget.dense
        raise BudgetError(
            f"a ratio of {asked:.3f} of the {ctx.budget.kind} is out of reach: what may be cut "
            f"gives at most {nearest:.3f}. Ask for less, protect fewer layers, or lower the floors."
        )
    return max(left, 0.0)


def place(group: Group, options: Sequence[int], share: float) -> int:
    """The width for a share of the units: the nearest for coarse units (heads), else rounded down.

    Rounding heads down, too, would leave more of the budget than the fine units can take.
    """
    if group.columns.shape[1] > 1:
        return min(options, key=lambda width: abs(width - share * group.units))
    return options[max(0, bisect_right(options, share * group.units) - 1)]


def fill(ctx: AllocationContext, at: Callable[[float], Widths]) -> tuple[float, Widths]:
    """The largest part in [0, 1] whose widths fit the budget, and these widths.

    Args:
        ctx: The allocation.
        at: Part -> widths, wider with the part; ``at(0)`` must fit.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if cost(ctx, at(middle)) <= ctx.budget.target:
            low = middle
        else:
            high = middle
    return low, at(low)


def trim(
    ctx: AllocationContext,
    widths: Widths,
    worth: Callable[[Group, int, int], float],
) -> Widths:
    """Spend what is left of the budget, what is worth most first, until no unit fits.

    Args:
        ctx: The allocation.
        widths: Widths within the budget; changed and returned.
        worth: (group, width, wider) -> what the wider width is worth, for its cost.
    """
    left = ctx.budget.target - cost(ctx, widths)
    slack = 1e-9 * ctx.budget.dense
    shared = partners(ctx)
    options: Mapping[str, Sequence[int]] = {g.name: widths_of(g, ctx.round_to) for g in ctx.groups}
    while True:
        best: tuple[float, Group, int, float] | None = None
        for group in ctx.groups:
            now, steps = widths[group.name], options[group.name]
            at = bisect_right(steps, now)
            if at == len(steps):
                continue
            price = step_price(ctx.budget, group, steps[at], widths, shared)
            if price > left + slack:
                continue
            value = worth(group, now, steps[at])
            if best is None or value > best[0]:
                best = (value, group, steps[at], price)
        if best is None:
            return widths
        _, group, wider, price = best
        widths[group.name] = wider
        left -= price
