"""Streaming first and second moments in float64.

Letters: inputs x [n] and residuals e [m], each row with a weight w; means mu, covariance Sigma.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import ActivationCache, run_block
from ovsprune.core.protocols import Moments
from ovsprune.graph.layers import weight_of
from ovsprune.graph.rows import input_rows

__all__ = ["CrossMoments", "JointMoments", "SecondMoments", "advance_with_moments"]


class SecondMoments:
    """Weighted mean and centred covariance of rows that arrive in batches.

    The products of a batch are computed in the precision of the batch, after subtracting a shift
    near the mean (the mean of the first batch), and are summed in float64. The shift avoids
    cancellation, so float64 matrix products, which are half as fast, are not needed.

    Args:
        width: Length n of a row.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.total = 0.0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(width, dtype=torch.float64)  # sum of w (x - shift)
        self._square = torch.zeros(width, width, dtype=torch.float64)  # of w (x-shift) (x-shift)^T

    def update(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Add rows [..., n] with weights [...], 1 by default.

        Returns:
            The rows minus the shift, times their weights, [rows, n].
        """
        rows = rows.flatten(0, -2)  # [rows, n]
        if self._shift is None:
            self._shift = rows.mean(0)  # [n]
        rows = rows - self._shift
        self.count += len(rows)
        if weight is None:
            self.total += len(rows)
            weighted = rows
        else:
            self.total += float(weight.sum(dtype=torch.float64))
            weighted = rows * weight.reshape(-1, 1)  # [rows, n]
        self._sum += weighted.sum(0, dtype=torch.float64).cpu()
        self._square += (rows.T @ weighted).cpu().double()  # [n, n]
        return weighted

    def result(self) -> Moments:
        """Return the moments of all rows so far."""
        mean = self.shifted_mean()  # [n]
        # Sigma does not depend on the shift: E[z z^T] - E[z] E[z]^T for z = x - shift.
        covariance = self._square / self.total - torch.outer(mean, mean)  # [n, n]
        assert self._shift is not None
        return Moments(self.count, mean + self._shift.cpu().double(), covariance)

    def shifted_mean(self) -> Tensor:
        """Return the mean of all rows so far, minus the shift, float64 [n]."""
        return self._sum / self.total


def advance_with_moments(
    block: nn.Module,
    layers: Mapping[str, nn.Module],
    cache: ActivationCache,
    batch_size: int,
    name: str,
) -> dict[str, SecondMoments]:
    """Advance the cache by the block ``name``; return the moments of the inputs of its layers.

    ``layers`` maps dotted names to linear layers or convolutions; one that does not run has a count
    of 0.
    """
    moments = {
        n: SecondMoments(weight_of(layer).flatten(1).shape[1]) for n, layer in layers.items()
    }
    points = [(n, "input") for n in layers]
    for _, captured in run_block(block, cache, batch_size, points, name, advance=True):
        for (n, _), read in captured.items():
            moments[n].update(input_rows(layers[n], read))  # [b, ..., n]
    return moments


@dataclass(frozen=True, eq=False)
class JointMoments:
    """Joint weighted moments of inputs x [n] and residuals e [m].

    Attributes:
        total: Sum of the weights.
        inputs: Moments of x: mean mu_x [n] and covariance Sigma [n, n].
        mean: mu_e, float64 [m].
        cross: Centred cross moment E[(x - mu_x)(e - mu_e)^T], float64 [n, m].
        power: Variance of each entry of e, float64 [m].
    """

    total: float
    inputs: Moments
    mean: Tensor
    cross: Tensor
    power: Tensor

    def __add__(self, other: JointMoments) -> JointMoments:
        """Return the moments of both sets of rows together (Chan, Golub and LeVeque 1983)."""
        total = self.total + other.total
        a, b = self.total / total, other.total / total
        # Differences of the means, [n] and [m].
        x, e = other.inputs.mean - self.inputs.mean, other.mean - self.mean

        def merged(first: Tensor, second: Tensor, between: Tensor) -> Tensor:
            # Second moments within the sets, plus the part between the two means.
            return a * first + b * second + a * b * between

        return JointMoments(
            total=total,
            inputs=Moments(
                self.inputs.count + other.inputs.count,
                self.inputs.mean + b * x,
                merged(self.inputs.covariance, other.inputs.covariance, torch.outer(x, x)),
            ),
            mean=self.mean + b * e,
            cross=merged(self.cross, other.cross, torch.outer(x, e)),
            power=merged(self.power, other.power, e.square()),
        )

    def about_zero(self) -> JointMoments:
        """Return second moments about zero instead of the mean, for layers without a bias."""
        x, e = self.inputs.mean, self.mean
        return JointMoments(
            total=self.total,
            inputs=Moments(
                self.inputs.count, torch.zeros_like(x), self.inputs.covariance + torch.outer(x, x)
            ),
            mean=torch.zeros_like(e),
            cross=self.cross + torch.outer(x, e),
            power=self.power + e.square(),
        )

    def error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Return ``E[(e - W x - b)^2]`` for each output, a quadratic form of the moments.

        No activations are needed, so many candidates can be compared cheaply.

        Args:
            weight: W, float64 [m, n].
            bias: b, float64 [m].
        """
        linear = 2 * (weight * self.cross.T).sum(1)  # [m], 2 w_i^T E[x e_i]
        quadratic = ((weight @ self.inputs.covariance) * weight).sum(1)  # [m], w_i^T Sigma w_i
        offset = self.mean - weight @ self.inputs.mean - bias  # [m], error of the means
        # The variance part cannot be negative except by rounding.
        return (self.power - linear + quadratic).clamp_min(0.0) + offset.square()


class CrossMoments:
    """Accumulator of :class:`JointMoments` over batches, for inputs x [n] and outputs e [m]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self._x = SecondMoments(inputs)
        self._e = torch.zeros(outputs, dtype=torch.float64)
        self._square = torch.zeros(outputs, dtype=torch.float64)
        self._cross = torch.zeros(inputs, outputs, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Number of rows so far."""
        return self._x.count

    def update(self, x: Tensor, e: Tensor, weight: Tensor | None = None) -> None:
        """Add rows: inputs [..., n], residuals [..., m] and weights [...], 1 by default."""
        e = e.flatten(0, -2)  # [rows, m]
        self._cross += (self._x.update(x, weight).T @ e).cpu().double()  # [n, m]
        weighted = e if weight is None else e * weight.reshape(-1, 1)
        self._e += weighted.sum(0, dtype=torch.float64).cpu()
        self._square += (weighted * e).sum(0, dtype=torch.float64).cpu()

    def result(self) -> JointMoments:
        """Return the moments of all rows so far."""
        # x is shifted (see SecondMoments); e is a residual, near zero already, and is not.
        total, mean_x = self._x.total, self._x.shifted_mean()
        mean = self._e / total  # [m]
        return JointMoments(
            total=total,
            inputs=self._x.result(),
            mean=mean,
            cross=self._cross / total - torch.outer(mean_x, mean),
            power=self._square / total - mean.square(),
        )
