"""Fluctuation of a unit's activation, as the consumer weighs it."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.importance import CRITERIA
from ovsprune.importance.slices import consumer

__all__ = ["Activation"]


@CRITERIA.register("activation")
class Activation:
    """Variance of a unit's activation times its consumer's squared weights (FLAP)."""

    needs = frozenset({"moments"})
    comparable = True

    def score(self, ctx: GroupContext) -> Ranking:
        """``s_j = Var(a_j) |W_j|^2`` for each column, standardised in the group, averaged, in exp.

        An, Zhao, Yu, Tang and Wang, AAAI 2024 (FLAP): the weighted fluctuation, and the
        standardisation ``z = (s - mean s) / std s`` that makes scores of all layers comparable. A
        head's z is the mean over its columns, as in the authors' code. The cost is ``exp(z)``: it
        is not negative, and the order, within a group and across groups, is that of z. What a unit
        is on average costs nothing, because the consumer's bias can take it over.
        """
        assert ctx.moments is not None
        weight, units = consumer(ctx)
        variance = ctx.moments.covariance.diagonal().clamp_min(0)
        columns = (variance * weight.square().sum(0))[units]
        spread = columns.std(correction=0)
        level = columns - columns.mean()
        z = (level / spread if spread > 0 else level).mean(1)
        return Ranking(z.exp(), torch.argsort(z, stable=True))
