"""Uniform: the same share of every group."""

from __future__ import annotations

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.trim import fill, place, spare, trim, widths_of
from ovsprune.core.protocols import AllocationContext

__all__ = ["Uniform"]


@ALLOCATIONS.register("uniform")
class Uniform:
    """The same share of units in every group."""

    needs_curves = False
    needs_spectra = False

    def widths(self, item: AllocationContext) -> dict[str, int]:
        """Bisect the share that fits, then spend what rounding left, narrowest share first.

        Raises:
            BudgetError: The floors cost more than the budget.
        """
        spare(item)
        options = {g.name: widths_of(g, item.round_to) for g in item.groups}
        _, widths = fill(
            item, lambda share: {g.name: place(g, options[g.name], share) for g in item.groups}
        )
        return trim(item, widths, lambda g, now, wider: 1 - now / g.units)
