"""Reconstruction: the optimal brain surgeon's order on the consumer's input."""

from __future__ import annotations

from ovsprune.calibration.obs import prune_columns
from ovsprune.calibration.ridge import regularised
from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.importance import CRITERIA
from ovsprune.importance.slices import consumer

__all__ = ["Reconstruction"]


@CRITERIA.register("reconstruction")
class Reconstruction:
    """What the consumer's output loses when the unit goes and all others are re-fitted."""

    needs = frozenset({"moments"})

    def score(self, ctx: GroupContext) -> Ranking:
        """Order of :func:`ovsprune.calibration.obs.prune_columns`; costs as it found them."""
        assert ctx.moments is not None
        weight, columns = consumer(ctx)
        found = prune_columns(
            weight,
            regularised(ctx.moments.covariance, ctx.ridge),
            columns,
            snapshots=ctx.snapshots,
        )
        return Ranking(found.costs, found.order, found.weights)
