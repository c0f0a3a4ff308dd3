"""How close a slim tower's dense features are to the dense tower's, on pictures it never saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ovsprune.core.protocols import Pictures

__all__ = ["Agreement", "Fidelity", "fidelity"]


@dataclass(frozen=True)
class Fidelity:
    """Agreement of dense features.

    Attributes:
        cosine: Mean cosine of corresponding dense tokens, in [-1, 1].
        relative_error: Norm of the difference over the norm of the dense tokens about their mean;
            0 is equal, 1 is as bad as answering with the mean token everywhere.
    """

    cosine: float
    relative_error: float


class Agreement:
    """Sums over corresponding tokens of two towers, a batch at a time."""

    def __init__(self) -> None:
        self._cosine = self._error = self._square = 0.0
        self._total: Tensor | None = None
        self._count = 0

    def update(self, dense: Tensor, slim: Tensor) -> None:
        """Add dense tokens [B, C, h, w] of both towers for the same pictures."""
        a = dense.flatten(2).transpose(1, 2).flatten(0, 1).double()
        b = slim.flatten(2).transpose(1, 2).flatten(0, 1).double()
        self._cosine += float(F.cosine_similarity(a, b, dim=1).sum())
        self._error += float((a - b).square().sum())
        self._square += float(a.square().sum())
        self._total = a.sum(0) if self._total is None else self._total + a.sum(0)
        self._count += len(a)

    def result(self) -> Fidelity:
        """The agreement over everything that was added."""
        assert self._total is not None
        spread = max(self._square - float(self._total.square().sum()) / self._count, 1e-30)
        return Fidelity(self._cosine / self._count, float((self._error / spread) ** 0.5))


@torch.no_grad()
def fidelity(
    dense: Callable[[Tensor], Tensor],
    slim: Callable[[Tensor], Tensor],
    pictures: Pictures,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Fidelity:
    """Compare two towers' dense tokens [B, C, h, w] over ``pictures``."""
    sums = Agreement()
    for images in pictures.batches(batch_size):
        sums.update(dense(images.to(device)), slim(images.to(device)))
    return sums.result()
