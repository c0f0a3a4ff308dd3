"""Closed form: every consumer re-fitted by ridge regression, block after block, no gradient."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import RecoveryContext
from ovsprune.recovery import RECOVERIES
from ovsprune.recovery.pair import pairs
from ovsprune.recovery.refit_targets import sites

__all__ = ["ClosedForm"]


@RECOVERIES.register("closed-form")
class ClosedForm:
    """Ridge refit from the slim model's own activations to the dense residual stream."""

    trains = False
    after: str | None = None

    @torch.no_grad()
    def recover(self, ctx: RecoveryContext) -> None:
        """Refit in the order of the blocks, the consumers of a block in the order of its groups.

        First the layers that make a group's units are refitted, from what they read in the slim
        tower to what the kept units are in the dense tower; then the layer that reads the units,
        towards the dense residual stream (:class:`ovsprune.recovery.pair.Pair`). Each time the
        residual is regressed on the slim activations with the present weight as the prior, rows
        weighted and the result checked on held-out pictures
        (:class:`ovsprune.calibration.refit.Refit`); if nothing was cut it is zero, and so is the
        correction.
        """
        for pair in pairs(ctx, "closed-form refit"):
            for site in sites(ctx, pair.name):
                pair.refit_producers(site)
                pair.refit_consumer(site)
