"""Streaming first and second moments in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ovsprune.core.protocols import Moments

__all__ = ["CrossMoments", "SecondMoments"]


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
        self._shift: Tensor | None = None
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._square = torch.zeros(width, width, dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        """Add rows [..., width]."""
        rows = rows.reshape(-1, rows.shape[-1])
        if self._shift is None:
            self._shift = rows.mean(0)
        rows = rows - self._shift
        self.count += len(rows)
        self._sum += rows.sum(0, dtype=torch.float64).cpu()
        self._square += (rows.T @ rows).cpu().double()

    def result(self) -> Moments:
        """Moments of everything seen."""
        assert self._shift is not None
        mean = self._sum / self.count
        covariance = self._square / self.count - torch.outer(mean, mean)
        return Moments(self.count, mean + self._shift.cpu().double(), covariance)


class CrossMoments:
    """Moments of inputs x [n] together with residuals e [m], for a ridge refit.

    Args:
        inputs: Length n of x.
        outputs: Length m of e.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self._x = SecondMoments(inputs)
        self._e = torch.zeros(outputs, dtype=torch.float64)
        self._cross = torch.zeros(inputs, outputs, dtype=torch.float64)
        self._shifted = torch.zeros(inputs, dtype=torch.float64)

    def update(self, x: Tensor, e: Tensor) -> None:
        """Add rows x [..., n] with residuals e [..., m]."""
        x, e = x.reshape(-1, x.shape[-1]), e.reshape(-1, e.shape[-1])
        self._x.update(x)
        assert self._x._shift is not None
        self._cross += ((x - self._x._shift).T @ e).cpu().double()
        self._e += e.sum(0, dtype=torch.float64).cpu()

    def result(self) -> tuple[Moments, Tensor, Tensor]:
        """Moments of x, mean of e [m], and centred cross moment E[(x - mx)(e - me)^T] [n, m]."""
        moments = self._x.result()
        assert self._x._shift is not None
        mean_e = self._e / moments.count
        mean_x = moments.mean - self._x._shift.cpu().double()
        return moments, mean_e, self._cross / moments.count - torch.outer(mean_x, mean_e)
