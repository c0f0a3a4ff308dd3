"""Symmetric closed form: refit every consumer to its own dense output, inside the dense tower."""

from __future__ import annotations

import torch

from ovsprune.calibration.refit import Refit, held_out_mask
from ovsprune.core.protocols import RecoveryContext
from ovsprune.graph.rows import input_rows
from ovsprune.recovery import RECOVERIES
from ovsprune.recovery.dense import consumer_batches

__all__ = ["ClosedFormSymmetric"]


@RECOVERIES.register("closed-form-symmetric")
class ClosedFormSymmetric:
    """Ridge refit from the kept dense activations to the dense consumer's own output."""

    trains = False
    after: str | None = None

    @torch.no_grad()
    def recover(self, ctx: RecoveryContext) -> None:
        """Refit every consumer separately: ``min E|W x + b - (W' x_kept + b')|^2``.

        x is the input of the dense consumer and x_kept its kept columns, so inputs and reference
        come from the same tower, as in He, Zhang and Sun (ICCV 2017). The prior mean is the slim
        consumer's present weight. Rows are weighted and the result is validated on held-out images
        as in ``closed-form``. Errors of the blocks before are not corrected.
        """
        refits: dict[str, Refit] = {}
        block = None
        held_out = held_out_mask(len(ctx.pictures))
        for batch in consumer_batches(ctx, "symmetric closed-form refit"):
            if batch.block != block:
                _apply(refits)  # Only the moments of one block are in memory at a time.
                block = batch.block
            layer = ctx.slim.get_submodule(batch.consumer)
            refit = refits.setdefault(batch.consumer, Refit(layer, held_out, ctx.ridge))
            x = input_rows(layer, batch.kept_input)  # [b, ..., n]
            refit.update(batch.part, x, batch.residual, batch.weight)
        _apply(refits)


def _apply(refits: dict[str, Refit]) -> None:
    for refit in refits.values():
        refit.apply()
    refits.clear()
