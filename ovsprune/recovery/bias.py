"""Bias compensation: add the mean contribution of the cut units to the consumer's bias."""

from __future__ import annotations

import torch
from torch import Tensor

from ovsprune.core.protocols import RecoveryContext
from ovsprune.graph.layers import bias_of
from ovsprune.recovery import RECOVERIES
from ovsprune.recovery.dense import consumer_batches

__all__ = ["Bias"]


@RECOVERIES.register("bias")
class Bias:
    """Add the mean contribution of the cut units to the consumer's bias, as in FLAP."""

    trains = False
    after: str | None = None

    @torch.no_grad()
    def recover(self, ctx: RecoveryContext) -> None:
        """Add ``W_cut E[x_cut]`` to each bias (An et al., FLAP, AAAI 2024).

        The mean is computed as the output of the dense consumer minus the output of the slim
        consumer on the kept dense activations. For a tower that was only cut, both definitions are
        equal. For a tower that was repaired before, the difference is the part that is still
        missing. Rows are weighted as in ``closed-form``. A consumer without a bias is not changed,
        and a note reports it.
        """
        sums: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        for batch in consumer_batches(ctx, "bias compensation"):
            name, e, w = batch.consumer, batch.residual, batch.weight  # [b, ..., m], [b, ...]
            total = (e * w[..., None]).flatten(0, -2).sum(0, dtype=torch.float64)  # [m]
            sums[name] = sums[name] + total if name in sums else total
            weights[name] = weights.get(name, 0.0) + float(w.sum(dtype=torch.float64))
        for name, total in sums.items():
            bias = bias_of(ctx.slim.get_submodule(name))
            if bias is None:
                ctx.progress.note(f"{name} has no bias, so the cut units are not compensated there")
            else:
                bias.copy_((bias.double() + total / weights[name]).to(bias))
