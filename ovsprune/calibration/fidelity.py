"""How close a slim tower's dense features are to the dense tower's, on pictures it never saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ovsprune.core.protocols import Pictures

__all__ = ["Fidelity", "fidelity"]


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


@torch.no_grad()
def fidelity(
    dense: Callable[[Tensor], Tensor],
    slim: Callable[[Tensor], Tensor],
    pictures: Pictures,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Fidelity:
    """Compare two towers' dense tokens [B, C, h, w] over ``pictures``."""
    cosine = error = square = 0.0
    total: Tensor | None = None
    count = 0
    for images in pictures.batches(batch_size):
        a = dense(images.to(device)).flatten(2).transpose(1, 2).flatten(0, 1).double()
        b = slim(images.to(device)).flatten(2).transpose(1, 2).flatten(0, 1).double()
        cosine += float(F.cosine_similarity(a, b, dim=1).sum())
        error += float((a - b).square().sum())
        square += float(a.square().sum())
        total = a.sum(0) if total is None else total + a.sum(0)
        count += len(a)
    assert total is not None
    spread = max(square - float(total.square().sum()) / count, 1e-30)
    return Fidelity(cosine / count, float((error / spread) ** 0.5))
