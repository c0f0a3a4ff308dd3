"""What every allocation shares: floors, steps, and single units up to the exact count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ovsprune.core.errors import BudgetError
from ovsprune.core.protocols import AllocationContext
from ovsprune.core.records import Group

__all__ = ["cost", "floor_of", "spare", "trim", "widths_of"]


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
    """What the tower costs with these widths, by the linear model of unit costs."""
    gone = sum(item.budget.unit(g) * (g.units - widths[g.name]) for g in item.groups)
    return item.budget.dense - gone


def spare(item: AllocationContext) -> float:
    """What may be spent on units above every group's floor.

    Raises:
        BudgetError: The floors alone cost more than the budget.
    """
    floors = {g.name: floor_of(g, item.round_to) for g in item.groups}
    least = cost(item, floors)
    left = item.budget.target - least
    if left < 0:
        asked = 1 - item.budget.target / item.budget.dense
        nearest = 1 - least / item.budget.dense
        raise BudgetError(
            f"a ratio of {asked:.3f} of the {item.budget.kind} is out of reach: what may be cut "
            f"gives at most {nearest:.3f}. Ask for less, protect fewer layers, or lower the floors."
        )
    return left


def trim(
    item: AllocationContext,
    widths: dict[str, int],
    gain: Callable[[Group, int, int], float],
) -> dict[str, int]:
    """Spend what is left of the budget, best gain for the cost first, until no unit fits.

    Args:
        item: The allocation.
        widths: Widths within the budget; changed and returned.
        gain: (group, width, wider) -> what the wider width is worth.
    """
    left = item.budget.target - cost(item, widths)
    options: Mapping[str, Sequence[int]] = {
        g.name: widths_of(g, item.round_to) for g in item.groups
    }
    while True:
        best: tuple[float, Group, int, float] | None = None
        for group in item.groups:
            now = widths[group.name]
            wider = next((w for w in options[group.name] if w > now), None)
            if wider is None:
                continue
            price = item.budget.unit(group) * (wider - now)
            if price > left + 1e-9 * item.budget.dense:
                continue
            worth = gain(group, now, wider) / max(price, 1e-12)
            if best is None or worth > best[0]:
                best = (worth, group, wider, price)
        if best is None:
            return widths
        _, group, wider, price = best
        widths[group.name] = wider
        left -= price
