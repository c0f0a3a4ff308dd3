"""Linear layers, trained in coordinates in which what they read varies alike in every direction."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import Stream, walk
from ovsprune.calibration.moments import SecondMoments
from ovsprune.calibration.ridge import level, regularised

__all__ = ["Whitened", "whiten"]

_RIDGE = 0.01
"""Least variance of a direction, in the mean variance: what hardly varies is not blown up."""


class Whitened:
    """The weight W [m, n] of a linear layer as V S, of which V is trained.

    ``S = (C / level)^(-1/2)``, C being the regularised covariance of what the layer reads and level
    its mean variance (:mod:`ovsprune.calibration.ridge`). A step of V, in whatever direction,
    moves what the layer gives by as much; a step of W moves it mostly along the few directions in
    which the input is strong. It is the right factor of KFAC (Martens and Grosse 2015), taken once
    and from the pictures.

    Attributes:
        weight: W, float32; written by :meth:`write`.
        free: V, float32 [m, n]; what an optimiser is given.

    Args:
        weight: Of a linear layer.
        covariance: [n, n], of what it reads.
    """

    def __init__(self, weight: Tensor, covariance: Tensor) -> None:
        regular = regularised(covariance, _RIDGE)
        values, vectors = torch.linalg.eigh(regular / level(regular))
        scales = values.sqrt()
        self.weight = weight
        self._factor = ((vectors / scales) @ vectors.T).to(weight)
        inverse = ((vectors * scales) @ vectors.T).to(weight)
        self.free = nn.Parameter(weight.detach() @ inverse)

    def write(self) -> None:
        """Make W what V says."""
        with torch.no_grad():
            self.weight.copy_(self.free @ self._factor)

    def read(self) -> None:
        """Make V's gradient what W's says."""
        grad = self.weight.grad
        self.free.grad = None if grad is None else grad @ self._factor


def whiten(blocks: Mapping[str, nn.Module], stream: Stream, batch_size: int) -> list[Whitened]:
    """The linear layers of the blocks, whitened by what they read in one walk.

    Args:
        blocks: Of a tower, by dotted name.
        stream: What some pictures are before the first block; it ends up behind the last one.
        batch_size: Pictures at a time.
    """
    found = []
    for name, block in blocks.items():
        layers = {
            (f"{name}.{inner}", "input"): layer
            for inner, layer in block.named_modules()
            if isinstance(layer, nn.Linear) and layer.in_features
        }
        sums = {tap: SecondMoments(layer.in_features) for tap, layer in layers.items()}
        for _, seen in walk(block, stream, batch_size, list(layers), name, advance=True):
            for tap, read in seen.items():
                sums[tap].update(read)
        found += [
            Whitened(layers[tap].weight, moments.result().covariance)
            for tap, moments in sums.items()
            if moments.count
        ]
    return found
