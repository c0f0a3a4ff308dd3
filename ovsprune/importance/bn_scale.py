"""Network slimming: the scale of the norm behind a unit."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.graph.layers import weight_of
from ovsprune.importance import CRITERIA

__all__ = ["BnScale"]


@CRITERIA.register("bn-scale")
class BnScale:
    """Scale |gamma| of the norm between a unit and its consumer (towers that have such norms)."""

    needs = frozenset({"norms"})
    comparable = True

    def score(self, ctx: GroupContext) -> Ranking:
        """``sum of |gamma|`` over the unit's channels in every norm between units and consumer.

        Liu, Li, Shen, Huang, Yan and Zhang, ICCV 2017, section 3. Costs are comparable across
        groups (the paper ranks all scales of a network together), as far as a tower was trained to
        have sparse scales.
        """
        costs = torch.zeros(ctx.group.units, dtype=torch.float64)
        for part in ctx.group.slices:
            if part.module in ctx.group.norms:
                scale = weight_of(ctx.layers[part.module]).detach().double().cpu()
                costs += scale.abs()[part.rows].sum(1)
        return Ranking(costs, torch.argsort(costs, stable=True))
