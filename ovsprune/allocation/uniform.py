"""Uniform: the same share of every group."""

from __future__ import annotations

from bisect import bisect_right

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.trim import cost, spare, trim, widths_of
from ovsprune.core.protocols import AllocationContext

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
            return {
                g.name: options[g.name][max(0, bisect_right(options[g.name], share * g.units) - 1)]
                for g in item.groups
            }

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
