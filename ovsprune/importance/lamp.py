"""LAMP: magnitude, scaled to be comparable across layers."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.importance import CRITERIA
from ovsprune.importance.slices import square_norms

__all__ = ["Lamp"]


@CRITERIA.register("lamp")
class Lamp:
    """Squared norm of a unit divided by that of all units at least as large (LAMP)."""

    needs: frozenset[str] = frozenset()
    comparable = True

    def score(self, ctx: GroupContext) -> Ranking:
        """Divide ``|u|^2`` by the sum of ``|v|^2`` over the units v not smaller than u.

        Lee, Park, Mo, Ahn and Shin, ICLR 2021 (the LAMP score), for units instead of single
        weights. Ties follow the order of the units. Costs lie in [0, 1] and are comparable across
        groups; the largest unit has 1.
        """
        squares = square_norms(ctx)
        order = torch.argsort(squares, stable=True)
        ascending = squares[order]
        rest = ascending.flip(0).cumsum(0).flip(0)  # rest[i] = sum of ascending[i:]
        costs = torch.empty_like(squares)
        # The clamp gives a group of all-zero weights cost 0 instead of NaN.
        costs[order] = ascending / rest.clamp_min(torch.finfo(rest.dtype).tiny)
        return Ranking(costs, order)
