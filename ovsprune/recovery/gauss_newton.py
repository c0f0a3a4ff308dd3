"""Gauss-Newton: closed form, and what makes the units refitted through what reads them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from ovsprune.calibration.activation_cache import Stream, allocate
from ovsprune.calibration.linearised import (
    Metric,
    Segment,
    Tensors,
    added,
    conjugate_gradients,
)
from ovsprune.calibration.refit import capped, median_of
from ovsprune.core.protocols import RecoveryContext
from ovsprune.graph.layers import weight_of
from ovsprune.graph.rows import input_rows, output_from_rows
from ovsprune.recovery import RECOVERIES
from ovsprune.recovery.pair import Pair, pairs
from ovsprune.recovery.refit_targets import RefitTarget, sites

__all__ = ["GaussNewton"]

ROUNDS = 2
"""How often, for each layer that reads units, what makes them and then it is refitted."""
PRODUCTS = 3
"""Products with the normal matrix, each time."""
PICTURES = 128
"""Products are taken over about as many pictures: the curvature needs fewer than the residual does
(subsampled Newton, Byrd et al. 2011)."""
STEPS = (1.0, 0.5)
"""Shares of the solution that are tried on held-out pictures: it holds to first order only."""


@RECOVERIES.register("gauss-newton")
class GaussNewton:
    """Closed form, then the layers that make the units by linearised least squares."""

    trains = False
    after: str | None = None

    @torch.no_grad()
    def recover(self, ctx: RecoveryContext) -> None:
        """Refit as ``closed-form`` does; then what makes the units, and again what reads them.

        ``closed-form`` makes the kept units what they were in the dense tower. But what the cut
        units did can be done in part by the kept ones, if they change: what the consumer could not
        explain of the residual is explained by a change of the producers, linearised
        (:mod:`ovsprune.calibration.linearised`). How much of it is taken is decided on held-out
        pictures: nothing, if it does harm.
        """
        for pair in pairs(ctx, "Gauss-Newton refit"):
            for site in sites(ctx, pair.name):
                pair.refit_producers(site)
                pair.refit_consumer(site)
                for _ in range(ROUNDS if site.makers else 0):
                    if not _Refinement(pair, site).run():
                        break
                    pair.refit_consumer(site)


class _Refinement:
    """A change of the layers that make units, towards what their consumer lacks.

    Gates stay: they act at all positions of a picture at once, so that they and what makes the
    units at each position are of other scales, which the few products do not bring together.

    Args:
        pair: The block.
        site: The layer that reads the units.
    """

    def __init__(self, pair: Pair, site: RefitTarget) -> None:
        self.pair, self.site = pair, site
        self.layer = pair.item.slim.get_submodule(site.consumer)
        self.segment = Segment(
            pair.slim, [pair.inside(name) for name in site.makers], pair.inside(site.consumer)
        )
        self.weights: list[Tensor] = []
        self.share = torch.ones(())

    def run(self) -> bool:
        """Change the layers in place; whether anything was changed."""
        residuals, metric = self._look()
        change = conjugate_gradients(
            self._normal, self._target(residuals), metric.precondition, PRODUCTS
        )
        return self._take(change)

    def _look(self) -> tuple[Stream, Metric]:
        """The residuals, rows [pictures, ..., m], and the metric of what the producers read."""
        find, makers = self.pair.item.slim.get_submodule, tuple(self.site.makers)
        metric = Metric(self.pair.item.ridge)
        found: Stream | None = None
        power = torch.zeros((), dtype=torch.float64)
        for part, weight, residual, seen in self.pair.compared(self.site, makers):
            if found is None:
                found = Stream(allocate((len(self.pair.held), *residual.shape[1:])))
            found[part] = residual.cpu()
            power = power + _power(weight, residual)
            # What is held out has no weight.
            fitted = (~self.pair.held[part]).to(weight)
            weight = weight * fitted.view(-1, *[1] * (weight.ndim - 1))
            self.weights.append(weight.cpu())
            metric.update(
                {
                    self.pair.inside(name): input_rows(find(name), seen[name, "input"])
                    for name in makers
                },
                # There may be other positions in between: a picture's mean stands for them all.
                weight.flatten(1).mean(1),
            )
        assert found is not None
        self.share = capped(power, median_of(power))  # A massive output counts as one, too.
        return found, metric

    def _target(self, residuals: Stream) -> Tensors:
        """What the residuals say of each parameter."""
        parts = (
            self.segment.transposed(stream, self._weighted(weight, residuals[part].to(stream)))
            for part, stream, weight in self._batches()
        )
        return reduce(added, parts)

    def _normal(self, change: Tensors) -> Tensors:
        """What a change explains of itself."""
        every = max(1, len(self.pair.held) // PICTURES)
        totals = [float(weight.sum()) for weight in self.weights]
        scale = sum(totals) / sum(totals[::every])
        parts = (
            self.segment.normal(stream, self._weighted(scale * weight), change)
            for _, stream, weight in self._batches(every)
        )
        return reduce(added, parts)

    def _batches(self, every: int = 1) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which pictures, the stream before the block, and the weights of the rows behind it."""
        device, size = weight_of(self.layer).device, self.pair.size
        for number in range(0, len(self.weights), every):
            weight = self.weights[number]
            part = slice(number * size, number * size + len(weight))
            yield part, self.pair.slim_stream[part].to(device), weight.to(device)

    def _weighted(self, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        """Weights [b, ...], times rows [b, ..., m] if given, laid out as what the layer gives."""
        scale = weight.unsqueeze(-1) * self.share.to(weight)
        return output_from_rows(self.layer, scale if rows is None else scale * rows)

    def _take(self, change: Tensors) -> bool:
        """Take the share of a change that is best on held-out pictures; whether it is any."""
        best, least = 0.0, self._error()
        for step in STEPS:
            self.segment.put(change, step)
            error = self._error()
            if error < least:
                best, least = step, error
        self.segment.put(change, best)
        return best > 0

    def _error(self) -> float:
        held = self.pair.held
        which = (held if held.any() else ~held).nonzero().flatten()
        found = self.pair.compared(self.site, which=which)
        return float(sum((_power(w, e) * self.share).sum() for _, w, e, _ in found))


def _power(weight: Tensor, residual: Tensor) -> Tensor:
    """Weighted sum of squares of rows [b, ..., m], float64 [m]."""
    squares = weight.unsqueeze(-1) * residual.square()
    return squares.flatten(0, -2).sum(0, dtype=torch.float64).cpu()
