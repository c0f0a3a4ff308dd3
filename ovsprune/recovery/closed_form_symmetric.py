"""Closed form, symmetric: every consumer refitted to itself, inside the dense tower."""

from __future__ import annotations

import torch

from ovsprune.calibration.refit import Refit, held_out, row_weights
from ovsprune.core.protocols import RecoveryContext
from ovsprune.graph.rows import input_rows, output_rows
from ovsprune.recovery import RECOVERIES
from ovsprune.recovery.dense import consumers_of

__all__ = ["ClosedFormSymmetric"]


@RECOVERIES.register("closed-form-symmetric")
class ClosedFormSymmetric:
    """Ridge refit from the dense model's kept activations to the dense consumer's own output."""

    trains = False
    after: str | None = None

    @torch.no_grad()
    def recover(self, ctx: RecoveryContext) -> None:
        """Refit every consumer on its own: ``min E|W a + b - (W' a_kept + b')|^2``.

        ``a`` is what the dense consumer reads and ``a_kept`` its kept columns, so inputs and goal
        come from one tower, as in He, Zhang and Sun (ICCV 2017). The prior is
        the slim consumer's present weight; rows are weighted and the result is checked on held-out
        pictures as in ``closed-form``. What the blocks before do wrong is not seen.
        """
        refits: dict[str, Refit] = {}
        block = None
        held = held_out(len(ctx.pictures))
        for seen in consumers_of(ctx, "symmetric closed-form refit"):
            if seen.block != block:
                _apply(refits)  # The moments of one block at a time are held.
                block = seen.block
            layer = ctx.slim.get_submodule(seen.site.consumer)
            refit = refits.setdefault(seen.site.consumer, Refit(layer, held, ctx.ridge))
            residual = seen.output - output_rows(layer, layer(seen.kept))
            read = input_rows(layer, seen.kept)
            refit.update(seen.part, read, residual, row_weights(seen.target, seen.median))
        _apply(refits)


def _apply(refits: dict[str, Refit]) -> None:
    for refit in refits.values():
        refit.apply()
    refits.clear()
