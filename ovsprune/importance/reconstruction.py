"""Reconstruction: the optimal brain surgeon's order on the consumer's input."""

from __future__ import annotations

from ovsprune.calibration.ridge import regularised
from ovsprune.calibration.surgeon import eliminate
from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.importance import CRITERIA
from ovsprune.importance.slices import consumer

__all__ = ["Reconstruction"]


@CRITERIA.register("reconstruction")
class Reconstruction:
    """What the consumer's output loses when the unit goes and all others are re-fitted."""

    needs = frozenset({"moments"})

    def score(self, item: GroupContext) -> Ranking:
        """Order of :func:`ovsprune.calibration.surgeon.eliminate`; costs as it found them."""
        assert item.moments is not None
        weight, columns = consumer(item)
        found = eliminate(
            weight,
            regularised(item.moments.covariance, item.ridge),
            columns,
            snapshots=item.snapshots,
        )
        return Ranking(found.costs, found.order, found.weights)
