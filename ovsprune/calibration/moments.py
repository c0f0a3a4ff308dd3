"""Streaming first and second moments in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ovsprune.core.protocols import Moments

__all__ = ["CrossMoments", "Joint", "SecondMoments"]


class SecondMoments:
    """Mean and centred covariance of rows that arrive in chunks.

    Products of a chunk are taken in the chunk's own precision about a shift near the mean (the
    first chunk's mean), and summed in float64: the sums do not cancel, and float64 matrix products,
    at half the speed, are not needed.

    Args:
        width: Length of a row.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.total = 0.0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._square = torch.zeros(width, width, dtype=torch.float64)

    def update(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Add rows [..., width], each with a weight [...] if they do not all count the same.

        Returns:
            The rows less the shift, times their weight, [rows, width].
        """
        rows = rows.flatten(0, -2)
        if self._shift is None:
            self._shift = rows.mean(0)
        rows = rows - self._shift
        self.count += len(rows)
        if weight is None:
            self.total += len(rows)
            weighted = rows
        else:
            self.total += float(weight.sum(dtype=torch.float64))
            weighted = rows * weight.reshape(-1, 1)
        self._sum += weighted.sum(0, dtype=torch.float64).cpu()
        self._square += (rows.T @ weighted).cpu().double()
        return weighted

    def result(self) -> Moments:
        """Moments of everything seen."""
        mean = self.shifted_mean()
        covariance = self._square / self.total - torch.outer(mean, mean)
        assert self._shift is not None
        return Moments(self.count, mean + self._shift.cpu().double(), covariance)

    def shifted_mean(self) -> Tensor:
        """Mean of everything seen, less the shift, float64 [width]."""
        return self._sum / self.total


@dataclass(frozen=True, eq=False)
class Joint:
    """Moments of inputs x [n] together with residuals e [m], each row with its weight.

    Attributes:
        total: Sum of the weights.
        inputs: Moments of x.
        mean: float64 [m], of e.
        cross: float64 [n, m], E[(x - mx)(e - me)^T].
        power: float64 [m], the variance of e.
    """

    total: float
    inputs: Moments
    mean: Tensor
    cross: Tensor
    power: Tensor

    def __add__(self, other: Joint) -> Joint:
        """Moments of both sets of rows (Chan, Golub and LeVeque 1983, pairwise updates)."""
        total = self.total + other.total
        a, b = self.total / total, other.total / total
        x, e = other.inputs.mean - self.inputs.mean, other.mean - self.mean

        def spread(mine: Tensor, theirs: Tensor, between: Tensor) -> Tensor:
            return a * mine + b * theirs + a * b * between

        return Joint(
            total,
            Moments(
                self.inputs.count + other.inputs.count,
                self.inputs.mean + b * x,
                spread(self.inputs.covariance, other.inputs.covariance, torch.outer(x, x)),
            ),
            self.mean + b * e,
            spread(self.cross, other.cross, torch.outer(x, e)),
            spread(self.power, other.power, e.square()),
        )

    def about_zero(self) -> Joint:
        """The same as second moments about zero: for layers that have no bias."""
        x, e = self.inputs.mean, self.mean
        return Joint(
            self.total,
            Moments(
                self.inputs.count, torch.zeros_like(x), self.inputs.covariance + torch.outer(x, x)
            ),
            torch.zeros_like(e),
            self.cross + torch.outer(x, e),
            self.power + e.square(),
        )

    def error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """``E[(e - weight x - bias)^2]`` by output, a quadratic form of the moments.

        Args:
            weight: float64 [m, n].
            bias: float64 [m].

        Returns:
            float64 [m].
        """
        explained = 2 * (weight * self.cross.T).sum(1)
        spent = ((weight @ self.inputs.covariance) * weight).sum(1)
        offset = self.mean - weight @ self.inputs.mean - bias
        return (self.power - explained + spent).clamp_min(0.0) + offset.square()


class CrossMoments:
    """Moments of inputs x [n] together with residuals e [m], for a ridge refit.

    Args:
        inputs: Length n of x.
        outputs: Length m of e.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self._x = SecondMoments(inputs)
        self._e = torch.zeros(outputs, dtype=torch.float64)
        self._square = torch.zeros(outputs, dtype=torch.float64)
        self._cross = torch.zeros(inputs, outputs, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Rows seen."""
        return self._x.count

    def update(self, x: Tensor, e: Tensor, weight: Tensor | None = None) -> None:
        """Add rows x [..., n] with residuals e [..., m] and, if given, weights [...]."""
        e = e.flatten(0, -2)
        self._cross += (self._x.update(x, weight).T @ e).cpu().double()
        weighted = e if weight is None else e * weight.reshape(-1, 1)
        self._e += weighted.sum(0, dtype=torch.float64).cpu()
        self._square += (weighted * e).sum(0, dtype=torch.float64).cpu()

    def result(self) -> Joint:
        """Moments of everything seen."""
        total, mean_x = self._x.total, self._x.shifted_mean()
        mean = self._e / total
        return Joint(
            total,
            self._x.result(),
            mean,
            self._cross / total - torch.outer(mean_x, mean),
            self._square / total - mean.square(),
        )
