"""The empirical spectral density of a weight: eigenvalues of its Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["eigenvalues"]

_CONV_SCALE = 0.5
"""Of the eigenvalues of a convolution's slices: each slice is scaled by sqrt(0.5)."""


@torch.no_grad()
def eigenvalues(weight: Tensor) -> Tensor:
    """Positive eigenvalues of ``W^T W``, from the smaller of the two Gram matrices.

    A convolution's kernel positions are a matrix each, scaled by sqrt(0.5), and their eigenvalues
    are taken together (Martin and Mahoney 2021; OpenTrans, Xu et al. 2024).

    Args:
        weight: [out, in] or [out, in, *kernel].

    Returns:
        float64 [k] on the CPU, ascending; those that are zero to rounding are left out, so that k
        is the rank where the weight has none to spare.

    Raises:
        ValueError: ``weight`` has fewer than two axes.
    """
    if weight.ndim < 2:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is no matrix")
    matrix = weight.detach().double()
    slices = matrix.flatten(2).movedim(-1, 0) if weight.ndim > 2 else matrix[None]
    if slices.shape[1] < slices.shape[2]:
        slices = slices.transpose(1, 2)
    found: Tensor = torch.linalg.eigvalsh(slices.transpose(1, 2) @ slices).flatten().cpu()
    if weight.ndim > 2:
        found = found * _CONV_SCALE
    # Rounding of a Gram matrix leaves eigenvalues of zero at about n eps times the largest.
    size = max(slices.shape[1:])
    positive = found > float(found.max()) * size * torch.finfo(torch.float64).eps
    values: Tensor = found[positive & (found > 0)].sort().values
    return values
