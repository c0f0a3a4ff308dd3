"""FLAP: fluctuation of a unit's activation, weighted by the consumer's weights."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.importance import CRITERIA
from ovsprune.importance.slices import consumer_weight

__all__ = ["Activation"]


@CRITERIA.register("activation")
class Activation:
    """Variance of a unit's activation times its consumer's squared weights (FLAP)."""

    needs = frozenset({"moments"})
    comparable = True

    def score(self, ctx: GroupContext) -> Ranking:
        """Score units by ``exp(z)``, z being the standardised ``s_j = Var(a_j) |W_j|^2``.

        An, Zhao, Yu, Tang and Wang, AAAI 2024 (FLAP). ``z = (s - mean s) / std s`` within the group
        makes scores of all layers comparable. A head's z is the mean over its columns, as in the
        authors' code. exp makes costs positive and keeps the order of z. A unit's mean activation
        does not count, because the consumer's bias can absorb it.
        """
        assert ctx.moments is not None
        weight, units = consumer_weight(ctx)
        variance = ctx.moments.covariance.diagonal().clamp_min(0)
        s = (variance * weight.square().sum(0))[units]  # [n] -> [units, k]
        std = s.std(correction=0)
        centred = s - s.mean()
        # A group of equal scores has std 0; centred is then 0, too.
        z = (centred / std if std > 0 else centred).mean(1)  # [units]
        return Ranking(z.exp(), torch.argsort(z, stable=True))
