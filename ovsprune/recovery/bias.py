"""Bias: the mean of what the cut units gave goes into the consumer's bias."""

from __future__ import annotations

import torch
from torch import Tensor

from ovsprune.calibration.refit import row_weights
from ovsprune.core.protocols import RecoveryContext
from ovsprune.graph.layers import bias_of
from ovsprune.graph.rows import output_rows
from ovsprune.recovery import RECOVERIES
from ovsprune.recovery.dense import consumers_of

__all__ = ["Bias"]


@RECOVERIES.register("bias")
class Bias:
    """The mean of what the cut units gave goes into the consumer's bias, as in FLAP."""

    trains = False
    after: str | None = None

    @torch.no_grad()
    def recover(self, ctx: RecoveryContext) -> None:
        """Add ``W_cut E[a_cut]`` to each bias (An et al., FLAP, AAAI 2024).

        The mean is that of the dense consumer's output less the slim consumer's on the dense kept
        activations, which is the same for a tower that was only cut, and what is still missing for
        one that was repaired before. Rows are weighted as in ``closed-form``. A consumer without a
        bias is left as it is, and the progress is told.
        """
        sums: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        for seen in consumers_of(ctx, "bias compensation"):
            name = seen.site.consumer
            layer = ctx.slim.get_submodule(name)
            residual = seen.output - output_rows(layer, layer(seen.kept))
            weight = row_weights(seen.target, seen.median)
            total = (residual * weight[..., None]).flatten(0, -2).sum(0, dtype=torch.float64)
            sums[name] = sums[name] + total if name in sums else total
            weights[name] = weights.get(name, 0.0) + float(weight.sum(dtype=torch.float64))
        for name, total in sums.items():
            bias = bias_of(ctx.slim.get_submodule(name))
            if bias is None:
                ctx.progress.note(f"{name} has no bias: nothing makes up for what was cut there")
            else:
                bias.copy_((bias.double() + total / weights[name]).to(bias))
