"""Fidelity: agreement of a slim tower's dense features with the dense tower's, on unseen images."""

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
        cosine: Mean cosine similarity of corresponding dense tokens, in [-1, 1].
        relative_error: Norm of the difference, relative to the norm of the dense tokens minus their
            mean. 0 means equal; 1 is the error of a constant prediction of the mean token.
    """

    cosine: float
    relative_error: float


class Agreement:
    """Accumulator of :class:`Fidelity` over batches."""

    def __init__(self) -> None:
        self._cosine = self._error = self._square = 0.0
        self._total: Tensor | None = None
        self._count = 0

    def update(self, dense: Tensor, slim: Tensor) -> None:
        """Add the dense tokens [B, C, h, w] of both towers for the same images."""
        a = dense.flatten(2).transpose(1, 2).flatten(0, 1).double()  # [B * h * w, C]
        b = slim.flatten(2).transpose(1, 2).flatten(0, 1).double()  # [B * h * w, C]
        self._cosine += float(F.cosine_similarity(a, b, dim=1).sum())
        self._error += float((a - b).square().sum())
        self._square += float(a.square().sum())
        self._total = a.sum(0) if self._total is None else self._total + a.sum(0)  # [C]
        self._count += len(a)

    def result(self) -> Fidelity:
        """Return the fidelity over all batches so far."""
        assert self._total is not None
        # Sum of |a - mean|^2, from the sums of |a|^2 and of a.
        variation = max(self._square - float(self._total.square().sum()) / self._count, 1e-30)
        return Fidelity(self._cosine / self._count, float((self._error / variation) ** 0.5))


@torch.no_grad()
def fidelity(
    dense: Callable[[Tensor], Tensor],
    slim: Callable[[Tensor], Tensor],
    pictures: Pictures,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Fidelity:
    """Compare the dense tokens of two towers.

    Args:
        dense: Maps images [B, 3, H, W] to the dense tower's tokens [B, C, h, w].
        slim: Same for the slim tower.
        pictures: Images to compare on.
        batch_size: Images per batch.
        device: Device of both towers.
    """
    agreement = Agreement()
    for images in pictures.batches(batch_size):
        agreement.update(dense(images.to(device)), slim(images.to(device)))
    return agreement.result()
