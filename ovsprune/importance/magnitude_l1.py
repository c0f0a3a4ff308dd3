"""Group magnitude in the L1 norm."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.importance import CRITERIA
from ovsprune.importance.slices import weights

__all__ = ["MagnitudeL1"]


@CRITERIA.register("magnitude-l1")
class MagnitudeL1:
    """L1 norm of all slices of a unit (Li et al., 2017, over the whole group)."""

    needs: frozenset[str] = frozenset()

    def score(self, ctx: GroupContext) -> Ranking:
        """Sum of ``|w|`` over every weight of the unit.

        Li, Kadav, Durdanovic, Samet and Graf, ICLR 2017, section 3.1, take it over a filter; here
        it is over all that goes with the unit, as :class:`Magnitude` does.
        """
        costs = torch.zeros(ctx.group.units, dtype=torch.float64)
        for rows in weights(ctx):
            costs += rows.abs().sum(1)
        return Ranking(costs, torch.argsort(costs, stable=True))
