"""Group magnitude: the norm of everything that goes with a unit."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.graph.layers import weight_of
from ovsprune.importance import CRITERIA

__all__ = ["Magnitude"]


@CRITERIA.register("magnitude")
class Magnitude:
    """L2 norm of all slices of a unit, as group magnitude in DepGraph."""

    needs_moments = False

    def score(self, item: GroupContext) -> Ranking:
        """Sum of squares over every weight slice of the unit (Fang et al., CVPR 2023, eq. 4)."""
        costs = torch.zeros(item.group.units, dtype=torch.float64)
        for part in item.group.slices:
            weight = weight_of(item.layers[part.module]).detach()
            axis = 0 if part.axis == "out" else 1
            if weight.ndim == 1:
                continue  # Norm scales are no measure of the unit's own size.
            squares = weight.double().square().sum([d for d in range(weight.ndim) if d != axis])
            costs += squares.cpu()[part.rows].sum(1)
        costs = costs.sqrt()
        return Ranking(costs, torch.argsort(costs, stable=True))
