"""Network slimming: scale of the norm layer that follows a unit."""

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
        """Sum ``|gamma|`` over the unit's channels in every norm between units and consumer.

        Liu, Li, Shen, Huang, Yan and Zhang, ICCV 2017, section 3. The paper ranks all scales of a
        network together, so costs are comparable across groups. It trains with a sparsity penalty
        on the scales; a tower trained without it has less informative scales.
        """
        costs = torch.zeros(ctx.group.units, dtype=torch.float64)
        for part in ctx.group.slices:
            if part.module in ctx.group.norms:
                scale = weight_of(ctx.layers[part.module]).detach().double().cpu()
                costs += scale.abs()[part.rows].sum(1)
        return Ranking(costs, torch.argsort(costs, stable=True))
