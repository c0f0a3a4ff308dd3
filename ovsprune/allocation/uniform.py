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

    def widths(self, ctx: AllocationContext) -> dict[str, int]:
        """Bisect the share that fits, then spend what rounding left, narrowest share first.

        Raises:
            BudgetError: The floors cost more than the budget.
        """
        spare(ctx)
        options = {g.name: widths_of(g, ctx.round_to) for g in ctx.groups}
        _, widths = fill(
            ctx, lambda share: {g.name: place(g, options[g.name], share) for g in ctx.groups}
        )
        return trim(ctx, widths, lambda g, now, wider: 1 - now / g.units)
