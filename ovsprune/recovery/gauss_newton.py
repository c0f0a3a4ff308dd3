"""Gauss-Newton recovery: closed form, and linearised least squares for the producers.

Letters: Jacobian J of the consumer's output with respect to the producers' parameters, change D of
these parameters, residual r [images, ..., m], row weights w [images, ...].
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from ovsprune.calibration.activation_cache import ActivationCache, allocate
from ovsprune.calibration.linearised import (
    InputPreconditioner,
    Segment,
    Tensors,
    add_scaled,
    conjugate_gradients,
)
from ovsprune.calibration.refit import capped_weights, positive_median
from ovsprune.core.protocols import RecoveryContext
from ovsprune.graph.layers import weight_of
from ovsprune.graph.rows import input_rows, output_from_rows
from ovsprune.recovery import RECOVERIES
from ovsprune.recovery.pair import BlockPair, block_pairs
from ovsprune.recovery.refit_targets import RefitTarget, find_refit_targets

__all__ = ["GaussNewton"]

ROUNDS = 2
"""Maximum number of alternations between producers and consumer, per consumer."""
PRODUCTS = 3
"""Number of conjugate gradient steps, that is of products with the normal matrix, per round."""
CURVATURE_IMAGES = 128
"""Approximate number of images for products with the normal matrix.

The curvature needs fewer images than the residual (subsampled Newton, Byrd et al. 2011).
"""
STEPS = (1.0, 0.5)
"""Step lengths to try on held-out images: the linearisation only holds to first order."""


@RECOVERIES.register("gauss-newton")
class GaussNewton:
    """Closed form, then the layers that make the units by linearised least squares."""

    trains = False
    after: str | None = None

    @torch.no_grad()
    def recover(self, ctx: RecoveryContext) -> None:
        """Refit as ``closed-form`` does, then alternate between producers and consumer.

        ``closed-form`` restores the kept units of the dense tower. However, the kept units can take
        over part of the function of the removed ones if the producers change. Therefore the
        residual that the consumer could not explain is explained by a change of the producers, by
        linearised least squares (:mod:`ovsprune.calibration.linearised`). The step length is
        selected on held-out images; it is zero if the change increases the error.
        """
        for pair in block_pairs(ctx, "Gauss-Newton refit"):
            for target in find_refit_targets(ctx, pair.name):
                pair.refit_producers(target)
                pair.refit_consumer(target)
                for _ in range(ROUNDS if target.direct_producers else 0):
                    if not _ProducerStep(pair, target).run():
                        break
                    pair.refit_consumer(target)


class _ProducerStep:
    """Gauss-Newton step of the producers towards the residual of their consumer.

    Gating layers stay fixed. A gate acts on all positions of an image at once, so its curvature has
    a different scale from that of the other producers, and three steps of conjugate gradients are
    too few to resolve both.
    """

    def __init__(self, pair: BlockPair, target: RefitTarget) -> None:
        self.pair, self.target = pair, target
        self.layer = pair.ctx.slim.get_submodule(target.consumer)
        self.segment = Segment(
            pair.slim,
            [pair.local_name(name) for name in target.direct_producers],
            pair.local_name(target.consumer),
        )
        self.weights: list[Tensor] = []  # w [b, ...] of each batch, 0 for held-out images
        self.channel_weights = torch.ones(())  # [m], limits massive output channels

    def run(self) -> bool:
        """Change the producers in place; return True if anything was changed."""
        residuals, preconditioner = self._collect()
        change = conjugate_gradients(
            self._normal_product, self._right_side(residuals), preconditioner.precondition, PRODUCTS
        )
        return self._line_search(change)

    def _collect(self) -> tuple[ActivationCache, InputPreconditioner]:
        """Return the residuals [images, ..., m] and the preconditioner; store the weights."""
        layer_of, producers = self.pair.ctx.slim.get_submodule, tuple(self.target.direct_producers)
        preconditioner = InputPreconditioner(self.pair.ctx.ridge)
        residuals: ActivationCache | None = None
        power = torch.zeros((), dtype=torch.float64)
        for part, weight, residual, captured in self.pair.residuals(self.target, producers):
            if residuals is None:
                shape = (len(self.pair.held_out), *residual.shape[1:])  # [images, ..., m]
                residuals = ActivationCache(allocate(shape))
            residuals[part] = residual.cpu()
            power = power + _power(weight, residual)  # [m]
            # Held-out images get weight 0: they are not fitted.
            fitted = (~self.pair.held_out[part]).to(weight)  # [b]
            weight = weight * fitted.view(-1, *[1] * (weight.ndim - 1))  # [b, ...]
            self.weights.append(weight.cpu())
            preconditioner.update(
                {
                    self.pair.local_name(name): input_rows(layer_of(name), captured[name, "input"])
                    for name in producers
                },
                # The producers may have other positions than the consumer (strides, pooling), so
                # each image gets the mean weight of its rows.
                weight.flatten(1).mean(1),  # [b]
            )
        assert residuals is not None
        self.channel_weights = capped_weights(power, positive_median(power))  # [m]
        return residuals, preconditioner

    def _right_side(self, residuals: ActivationCache) -> Tensors:
        """Return ``J^T w r``, summed over batches."""
        parts = (
            self.segment.transposed_product(
                stream, self._weighted(weight, residuals[part].to(stream))
            )
            for part, stream, weight in self._batches()
        )
        return reduce(add_scaled, parts)

    def _normal_product(self, change: Tensors) -> Tensors:
        """Return ``J^T w J D``, estimated from a subset of the batches."""
        every = max(1, len(self.pair.held_out) // CURVATURE_IMAGES)
        totals = [float(weight.sum()) for weight in self.weights]
        # Scale the sum over the subset up to the total weight of all batches.
        scale = sum(totals) / sum(totals[::every])
        parts = (
            self.segment.normal_product(stream, self._weighted(scale * weight), change)
            for _, stream, weight in self._batches(every)
        )
        return reduce(add_scaled, parts)

    def _batches(self, every: int = 1) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield image indices, slim inputs and row weights [b, ...] of every n-th batch."""
        # Batches have the size of those in _collect(), to which self.weights belong.
        device, size = weight_of(self.layer).device, self.pair.batch_size
        for number in range(0, len(self.weights), every):
            weight = self.weights[number]
            part = slice(number * size, number * size + len(weight))
            yield part, self.pair.slim_cache[part].to(device), weight.to(device)

    def _weighted(self, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return w, or w times rows [b, ..., m], in the layout of the consumer's output."""
        scale = weight.unsqueeze(-1) * self.channel_weights.to(weight)  # [b, ..., m]
        return output_from_rows(self.layer, scale if rows is None else scale * rows)

    def _line_search(self, change: Tensors) -> bool:
        """Set the step length with the least held-out error; return True if it is not zero."""
        # A step of 0 is the first candidate, so the error cannot increase.
        best, least = 0.0, self._held_out_error()
        for step in STEPS:
            self.segment.set_parameters(change, step)
            error = self._held_out_error()
            if error < least:
                best, least = step, error
        self.segment.set_parameters(change, best)
        return best > 0

    def _held_out_error(self) -> float:
        # A single image is both fitted and used for validation.
        held_out = self.pair.held_out
        images = (held_out if held_out.any() else ~held_out).nonzero().flatten()
        batches = self.pair.residuals(self.target, images=images)
        return float(sum((_power(w, r) * self.channel_weights).sum() for _, w, r, _ in batches))


def _power(weight: Tensor, residual: Tensor) -> Tensor:
    """Return the weighted sum of squares of rows [b, ..., m], float64 [m]."""
    squares = weight.unsqueeze(-1) * residual.square()
    return squares.flatten(0, -2).sum(0, dtype=torch.float64).cpu()
