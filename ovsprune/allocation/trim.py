"""What every allocation shares: floors, steps, shares, and single units up to the exact count."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from ovsprune.core.errors import BudgetError
from ovsprune.core.protocols import AllocationContext, Budget
from ovsprune.core.records import Group

__all__ = ["cost", "fill", "floor_of", "kept_price", "place", "spare", "trim", "widths_of"]

Widths = dict[str, int]


def widths_of(group: Group, round_to: int) -> list[int]:
    """Widths that ``group`` may have, ascending: multiples of ``round_to``, and the dense width.

    Rounding is for the widths of matrices: units of several columns (heads) take every width.
    """
    step = round_to if group.columns.shape[1] == 1 else 1
    lowest = floor_of(group, round_to)
    return sorted({*range(lowest, group.units, step), group.units})


def floor_of(group: Group, round_to: int) -> int:
    """Fewest units that may stay, a multiple of ``round_to`` for units of one column."""
    step = round_to if group.columns.shape[1] == 1 else 1
    return min(group.units, -(-group.floor // step) * step)


def cost(item: AllocationContext, widths: Mapping[str, int]) -> float:
    """What the tower costs with these widths: dense, less what each group alone saves.

    A group of heads and the directions inside them save together.
    """
    inner: dict[str, list[Group]] = {}
    for group in item.groups:
        if group.inside is not None:
            inner.setdefault(group.inside, []).append(group)
    return item.budget.dense - sum(
        item.budget.price(g, g.units) - kept_price(item.budget, g, inner.get(g.name, ()), widths)
        for g in item.groups
        if g.inside is None
    )


def kept_price(
    budget: Budget, group: Group, inner: Sequence[Group], widths: Mapping[str, int]
) -> float:
    """What the kept units of ``group`` cost, each without what is cut inside it.

    Args:
        budget: Prices of a unit of each group while all others are whole.
        group: The outer group.
        inner: Groups inside it; each of their units has an equal part in each of its units.
        widths: Of all of them.
    """
    gone = sum((g.units - widths[g.name]) * budget.price(g, 1) for g in inner) / group.units
    return budget.price(group, widths[group.name]) - widths[group.name] * gone


def spare(item: AllocationContext) -> float:
    """What may be spent on units above every group's floor.

    Raises:
        BudgetError: The floors alone cost more than the budget.
    """
    floors = {g.name: floor_of(g, item.round_to) for g in item.groups}
    least = cost(item, floors)
    left = item.budget.target - least
    if left < -1e-9 * item.budget.dense:
        asked = 1 - item.budget.target / item.budget.dense
        nearest = 1 - least / item.budget.dense
        raise BudgetError(
            f"a ratio of {asked:.3f} of the {item.budget.kind} is out of reach: what may be cut "
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


def fill(item: AllocationContext, at: Callable[[float], Widths]) -> tuple[float, Widths]:
    """The largest part in [0, 1] whose widths fit the budget, and these widths.

    Args:
        item: The allocation.
        at: Part -> widths, wider with the part; ``at(0)`` must fit.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if cost(item, at(middle)) <= item.budget.target:
            low = middle
        else:
            high = middle
    return low, at(low)


def trim(
    item: AllocationContext,
    widths: Widths,
    worth: Callable[[Group, int, int], float],
) -> Widths:
    """Spend what is left of the budget, what is worth most first, until no unit fits.

    Args:
        item: The allocation.
        widths: Widths within the budget; changed and returned.
        worth: (group, width, wider) -> what the wider width is worth, for its cost.
    """
    left = item.budget.target - cost(item, widths)
    slack = 1e-9 * item.budget.dense
    options: Mapping[str, Sequence[int]] = {
        g.name: widths_of(g, item.round_to) for g in item.groups
    }
    while True:
        best: tuple[float, Group, int, float] | None = None
        for group in item.groups:
            now, steps = widths[group.name], options[group.name]
            at = bisect_right(steps, now)
            if at == len(steps):
                continue
            price = item.budget.price(group, steps[at]) - item.budget.price(group, now)
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
