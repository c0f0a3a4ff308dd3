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
        """Run the optimal brain surgeon, :func:`ovsprune.calibration.obs.prune_columns`."""
        assert ctx.moments is not None
        W, columns = consumer_weight(ctx)  # [m, n], [units, k]
        H = regularised(ctx.moments.covariance, ctx.ridge)  # [n, n]
        return prune_columns(W, H, columns, snapshots=ctx.snapshots)
