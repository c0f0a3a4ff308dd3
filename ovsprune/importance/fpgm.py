"""FPGM: units near the geometric median of their group can be told by the others."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.importance import CRITERIA
from ovsprune.importance.slices import weights

__all__ = ["Fpgm"]


@CRITERIA.register("fpgm")
class Fpgm:
    """Distance of a unit's weights to those of all other units (geometric median, FPGM)."""

    needs: frozenset[str] = frozenset()

    def score(self, ctx: GroupContext) -> Ranking:
        """``sum over v of |u - v|``, u and v being the weights that make the units.

        He, Liu, Wang, Hu and Yang, CVPR 2019: the filters nearest to the geometric median are the
        ones that the others can replace. A unit of several channels or layers (a head's
        rows of q, k and v) is one long vector. Costs of different groups are not comparable.
        """
        rows = torch.cat(list(weights(ctx, "out")), 1)
        costs = torch.cdist(rows, rows).sum(1)
        return Ranking(costs, torch.argsort(costs, stable=True))
