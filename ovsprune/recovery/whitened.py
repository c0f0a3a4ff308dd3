"""Whitened parametrisation of linear layers, for training.

Letters: weight W [m, n], input covariance Sigma [n, n], whitening factor S [n, n], trained
parameter V [m, n] with W = V S.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import ActivationCache
from ovsprune.calibration.moments import advance_with_moments
from ovsprune.calibration.ridge import mean_variance, regularised

__all__ = ["Whitened", "whiten"]

_RIDGE = 0.01
"""Ridge relative to the mean variance; bounds the amplification of directions of low variance."""


class Whitened:
    """Weight of a linear layer as the product W = V S, of which V is trained.

    ``S = (Sigma / mean_variance)^(-1/2)``, where Sigma is the regularised covariance of the layer's
    input (:mod:`ovsprune.calibration.ridge`). A step of V in any direction changes the output by
    the same amount. A step of W would change it mostly along the few input directions of high
    variance. S is the right factor of K-FAC (Martens and Grosse 2015), computed once from the
    calibration images.

    Attributes:
        weight: W, float32 [m, n]; updated by :meth:`write_weight`.
        free: V, float32 [m, n]; the parameter for the optimiser.

    Args:
        weight: Weight of a linear layer, [m, n].
        covariance: Covariance of its input, [n, n].
    """

    def __init__(self, weight: Tensor, covariance: Tensor) -> None:
        Sigma = regularised(covariance, _RIDGE)  # [n, n]
        # Division by the mean variance keeps V on the scale of W, so learning rates carry over.
        eigenvalues, Q = torch.linalg.eigh(Sigma / mean_variance(Sigma))  # [n], [n, n]
        roots = eigenvalues.sqrt()
        self.weight = weight
        self._S = ((Q / roots) @ Q.T).to(weight)  # [n, n]
        S_inverse = ((Q * roots) @ Q.T).to(weight)  # [n, n]
        self.free = nn.Parameter(weight.detach() @ S_inverse)  # V = W S^-1

    def write_weight(self) -> None:
        """Set W to V S."""
        with torch.no_grad():
            self.weight.copy_(self.free @ self._S)

    def read_gradient(self) -> None:
        """Set the gradient of V from the gradient of W, by the chain rule ``dV = dW S^T``."""
        grad = self.weight.grad
        # S is symmetric, so S^T = S.
        self.free.grad = None if grad is None else grad @ self._S


def whiten(
    blocks: Mapping[str, nn.Module], cache: ActivationCache, batch_size: int
) -> list[Whitened]:
    """Whiten the linear layers of the blocks by the covariances of their inputs, in one pass.

    Args:
        blocks: Blocks of a tower, by dotted name.
        cache: Input of the first block for some images. Contains the output of the last block
            afterwards.
        batch_size: Images per batch.
    """
    whitened = []
    for name, block in blocks.items():
        layers = {
            f"{name}.{inner}": layer
            for inner, layer in block.named_modules()
            if isinstance(layer, nn.Linear) and layer.in_features
        }
        moments = advance_with_moments(block, layers, cache, batch_size, name)
        whitened += [
            Whitened(layers[n].weight, sums.result().covariance)
            for n, sums in moments.items()
            if sums.count  # layers that never ran have no moments
        ]
    return whitened
