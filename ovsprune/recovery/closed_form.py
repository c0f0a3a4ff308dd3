"""Closed form: refit producers and consumers by ridge regression, block by block, no gradient."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import RecoveryContext
from ovsprune.recovery import RECOVERIES
from ovsprune.recovery.pair import block_pairs
from ovsprune.recovery.refit_targets import find_refit_targets

__all__ = ["ClosedForm"]


@RECOVERIES.register("closed-form")
class ClosedForm:
    """Ridge refit from the slim model's own activations to the dense residual stream."""

    trains = False
    after: str | None = None

    @torch.no_grad()
    def recover(self, ctx: RecoveryContext) -> None:
        """Refit in the order of the blocks, and in a block in the order of its groups.

        For each group, first the producers are refitted, from their inputs in the slim tower to the
        kept units of the dense tower. Then the consumer is refitted towards the dense residual
        stream (:class:`ovsprune.recovery.pair.BlockPair`). Each refit regresses the residual on the
        slim activations, with the present weight as the prior mean, weighted rows, and validation
        on held-out images (:class:`ovsprune.calibration.refit.Refit`). If nothing was cut, the
        residual is zero, and so is the correction.
        """
        for pair in block_pairs(ctx, "closed-form refit"):
            for target in find_refit_targets(ctx, pair.name):
                pair.refit_producers(target)
                pair.refit_consumer(target)
