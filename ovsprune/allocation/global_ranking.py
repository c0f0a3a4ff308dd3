"""Global: one ranking over the units of all groups."""

from __future__ import annotations

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.ranking import select_steps, width_steps
from ovsprune.core.protocols import AllocationContext

__all__ = ["Global"]


@ALLOCATIONS.register("global")
class Global:
    """Ranking over the units of all groups together, by importance per MAC (or other cost)."""

    needs_curves = False
    needs_spectra = False

    def widths(self, ctx: AllocationContext) -> dict[str, int]:
        """Keep the units of highest importance per price, over all groups.

        Comparable scores (``ctx.comparable``: an estimated change of one loss) are used unchanged,
        as in Molchanov et al. 2019. Other scores (a norm of weights, an error of one layer's
        output) have a different scale in each group. They are divided by the group's mean score
        per price, the ``mean`` normaliser of DepGraph's code (Fang et al. 2023) applied per price.
        The L2 norm of Molchanov et al. 2017 (eq. 8) would favour groups of few units (heads) over
        groups of thousands (MLPs).
        """
        steps = {g.name: width_steps(ctx, g) for g in ctx.groups}
        worths = {
            name: s.worths / (1.0 if ctx.comparable or s.mean <= 0 else s.mean)
            for name, s in steps.items()
        }
        return select_steps(ctx, steps, worths)
