"""Reconstruction: order of removal by the optimal brain surgeon on the consumer's input."""

from __future__ import annotations

from ovsprune.calibration.obs import prune_columns
from ovsprune.calibration.ridge import regularised
from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.importance import CRITERIA
from ovsprune.importance.slices import consumer_weight

__all__ = ["Reconstruction"]


@CRITERIA.register("reconstruction")
class Reconstruction:
    """Increase of the consumer's output error when a unit is removed and the others refitted."""

    needs = frozenset({"moments"})

    def score(self, ctx: GroupContext) -> Ranking:
        """Run :func:`ovsprune.calibration.obs.prune_columns` and return its order and costs."""
        assert ctx.moments is not None
        weight, columns = consumer_weight(ctx)
        result = prune_columns(
            weight,
            regularised(ctx.moments.covariance, ctx.ridge),
            columns,
            snapshots=ctx.snapshots,
        )
        return Ranking(result.costs, result.order, result.weights)
