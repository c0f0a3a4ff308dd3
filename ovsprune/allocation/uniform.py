"""Uniform: the same fraction of units in every group."""

from __future__ import annotations

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.trim import largest_fit, round_width, spare_budget, trim, widths_of
from ovsprune.core.protocols import AllocationContext

__all__ = ["Uniform"]


@ALLOCATIONS.register("uniform")
class Uniform:
    """Same fraction of units in every group."""

    needs_curves = False
    needs_spectra = False

    def widths(self, ctx: AllocationContext) -> dict[str, int]:
        """Bisect for the fraction that fits, then add single units, narrowest group first."""
        spare_budget(ctx)
        options = {g.name: widths_of(g, ctx.round_to) for g in ctx.groups}
        _, widths = largest_fit(
            ctx, lambda share: {g.name: round_width(g, options[g.name], share) for g in ctx.groups}
        )
        return trim(ctx, widths, lambda g, now, wider: 1 - now / g.units)
