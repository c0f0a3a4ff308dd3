"""Global: one ranking over the units of all groups."""

from __future__ import annotations

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.ranking import ladder, spend
from ovsprune.core.protocols import AllocationContext

__all__ = ["Global"]


@ALLOCATIONS.register("global")
class Global:
    """One ranking over all groups, by removal cost for what keeping a unit costs."""

    needs_curves = False
    needs_spectra = False

    def widths(self, ctx: AllocationContext) -> dict[str, int]:
        """Keep the units whose removal costs most for their price, whatever group they are in.

        Costs that mean the same everywhere (``ctx.comparable``: an estimated change of one loss)
        are taken as they are, as in Molchanov et al. 2019. Others (a norm of weights, an error of
        one layer's output) have scales of their own: a group's costs per price are divided by
        their mean, so that the tower's MACs are worth the same in every group on average. This is
        the ``mean`` normaliser of DepGraph's code (Fang et al. 2023), per price; the norm by which
        Molchanov et al. 2017 (eq. 8) divide would make the dozen units of a group of heads look
        larger than thousands of MLP units only because they are few.

        Raises:
            BudgetError: The floors cost more than the budget.
        """
        ladders = {g.name: ladder(ctx, g) for g in ctx.groups}
        worths = {
            name: found.worths / (1.0 if ctx.comparable or found.mean <= 0 else found.mean)
            for name, found in ladders.items()
        }
        return spend(ctx, ladders, worths)
