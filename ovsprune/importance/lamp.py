"""LAMP: magnitude, scaled so that layers can be compared."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.importance import CRITERIA
from ovsprune.importance.slices import square_norms

__all__ = ["Lamp"]


@CRITERIA.register("lamp")
class Lamp:
    """Squared norm of a unit over that of all units which are at least as large (LAMP)."""

    needs: frozenset[str] = frozenset()
    comparable = True

    def score(self, ctx: GroupContext) -> Ranking:
        """``|u|^2 / sum of |v|^2 over v`` that are not smaller than u, ties in the order of units.

        Lee, Park, Mo, Ahn and Shin, ICLR 2021 (the LAMP score), with units in the place of single
        weights. Costs lie in [0, 1] and are comparable across groups; the largest unit has 1.
        """
        squares = square_norms(ctx)
        order = torch.argsort(squares, stable=True)
        ascending = squares[order]
        rest = ascending.flip(0).cumsum(0).flip(0)
        costs = torch.empty_like(squares)
        # A group of zeros has nothing to lose.
        costs[order] = ascending / rest.clamp_min(torch.finfo(rest.dtype).tiny)
        return Ranking(costs, order)
