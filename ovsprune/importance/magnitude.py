"""Group magnitude: the norm of everything that goes with a unit."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.importance import CRITERIA
from ovsprune.importance.slices import square_norms

__all__ = ["Magnitude"]


@CRITERIA.register("magnitude")
class Magnitude:
    """L2 norm of all slices of a unit, as group magnitude in DepGraph."""

    needs: frozenset[str] = frozenset()

    def score(self, ctx: GroupContext) -> Ranking:
        """Root of the squares over every weight of the unit (Fang et al., CVPR 2023, eq. 4)."""
        costs = square_norms(ctx).sqrt()
        return Ranking(costs, torch.argsort(costs, stable=True))
