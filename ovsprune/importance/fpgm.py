"""FPGM: units near the geometric median of their group are redundant."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.importance import CRITERIA
from ovsprune.importance.slices import unit_weights

__all__ = ["Fpgm"]


@CRITERIA.register("fpgm")
class Fpgm:
    """Distance of a unit's weights to those of all other units (geometric median, FPGM)."""

    needs: frozenset[str] = frozenset()

    def score(self, ctx: GroupContext) -> Ranking:
        """Sum the distances ``|u - v|`` from a unit's weights u to those of every unit v.

        He, Liu, Wang, Hu and Yang, CVPR 2019: filters nearest to the geometric median can be
        replaced by the others. The weights are those that compute the unit; a unit of several
        channels or layers (a head's rows of q, k and v) is one long vector. Costs of different
        groups are not comparable.
        """
        rows = torch.cat(list(unit_weights(ctx, "out")), 1)  # [units, k]
        costs = torch.cdist(rows, rows).sum(1)
        return Ranking(costs, torch.argsort(costs, stable=True))
