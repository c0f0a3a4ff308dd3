"""Uniform: the same share of every group."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.trim import cost, spare, trim, widths_of
from ovsprune.core.protocols import AllocationContext
from ovsprune.core.records import Group

__all__ = ["Uniform"]


@ALLOCATIONS.register("uniform")
class Uniform:
    """The same share of units in every group."""

    needs_curves = False

    def widths(self, item: AllocationContext) -> dict[str, int]:
        """Bisect the share that fits, then spend what rounding left, narrowest share first.

        Raises:
            BudgetError: The floors cost more than the budget.
        """
        spare(item)
        options = {g.name: widths_of(g, item.round_to) for g in item.groups}

        def at(share: float) -> dict[str, int]:
            return {g.name: _place(g, options[g.name], share) for g in item.groups}

        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            if cost(item, at(middle)) <= item.budget.target:
                low = middle
            else:
                high = middle
        # Worth per cost falls with the share that a group has already.
        return trim(
            item,
            at(low),
            lambda g, now, wider: item.budget.unit(g) * (wider - now) * (1 - now / g.units),
        )


def _place(group: Group, options: Sequence[int], share: float) -> int:
    """The width for a share: the nearest for coarse units (heads), rounded down for fine ones.

    Rounding heads down, too, would leave more of the budget than the fine units can take.
    """
    if group.columns.shape[1] > 1:
        return min(options, key=lambda width: abs(width - share * group.units))
    return options[max(0, bisect_right(options, share * group.units) - 1)]
