"""Empirical spectral density of a weight: the eigenvalues of its Gram matrix ``W^T W``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["CONVOLUTIONS", "eigenvalues", "spectra_of"]

CONVOLUTIONS = ("slices", "unfolded")
"""Ways to read a convolution as matrices: one per kernel position, or one for all positions."""

_BATCH_NUMEL = 2**19
"""Number of weight elements that are decomposed in one batch."""
_BLOCK_ROWS = 192
"""Number of rows of a Gram matrix that are computed in one product."""

_CONV_SCALE = 0.5
"""Factor of the eigenvalues of a convolution's slices: WeightWatcher scales slices by sqrt(0.5)."""


def eigenvalues(weight: Tensor, convolution: str = "slices") -> Tensor:
    """Return the positive eigenvalues of ``W^T W``.

    They are computed from the smaller of the two Gram matrices, ``W^T W`` or ``W W^T``, which have
    the same positive eigenvalues.

    Args:
        weight: [out, in] or [out, in, *kernel].
        convolution: ``"slices"`` reads each kernel position as a matrix [out, in], scaled by
            sqrt(0.5), and pools the eigenvalues of all positions (Martin and Mahoney 2021;
            OpenTrans, Xu et al. 2024). ``"unfolded"`` reads the convolution as one matrix
            [out, in * positions].

    Returns:
        float64 [k] on the CPU, ascending. Eigenvalues that are zero up to rounding are dropped, so
        k is the numerical rank of a matrix.

    Raises:
        ValueError: ``weight`` has fewer than two axes, or ``convolution`` is unknown.
    """
    return spectra_of([weight], convolution)[0]


@torch.no_grad()
def spectra_of(weights: Sequence[Tensor], convolution: str = "slices") -> list[Tensor]:
    """Return the eigenvalues of several weights; weights of one shape are decomposed together.

    Args:
        weights: Each [out, in] or [out, in, *kernel].
        convolution: See :func:`eigenvalues`.

    Raises:
        ValueError: A weight has fewer than two axes, or ``convolution`` is unknown.
    """
    if convolution not in CONVOLUTIONS:
        raise ValueError(f"convolution is {convolution!r}, expected {' or '.join(CONVOLUTIONS)}")
    for weight in weights:
        if weight.ndim < 2:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} is not a matrix")
    same_shape: dict[tuple[int, ...], list[int]] = {}
    for i, weight in enumerate(weights):
        same_shape.setdefault(tuple(weight.shape), []).append(i)
    spectra: dict[int, Tensor] = {}
    for indices in same_shape.values():
        # Batches save call overhead for small matrices; for large ones they only cost memory.
        batch_size = max(1, _BATCH_NUMEL // max(1, weights[indices[0]].numel()))
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            spectra |= zip(batch, _batch([weights[i] for i in batch], convolution), strict=True)
    return [spectra[i] for i in range(len(weights))]


def _batch(weights: Sequence[Tensor], convolution: str) -> list[Tensor]:
    """Return the eigenvalues of weights of one shape, b of them."""
    parts = [_matrices(weight, convolution) for weight in weights]  # b times [k, m, n], m >= n
    matrices = torch.stack(parts) if len(parts) > 1 else parts[0][None]  # [b, k, m, n]
    grams = _lower_grams(matrices)  # [b, k, n, n]; eigvalsh reads the lower triangle only
    values = torch.linalg.eigvalsh(grams).flatten(1).cpu()  # [b, k * n]
    if weights[0].ndim > 2 and convolution == "slices":
        values = values * _CONV_SCALE
    # Rounding in the Gram matrix turns a zero eigenvalue into about n * eps * lambda_max.
    tolerance = max(matrices.shape[2:]) * torch.finfo(torch.float64).eps
    return [
        row[(row > (float(row.max()) if len(row) else 0.0) * tolerance) & (row > 0)].sort().values
        for row in values
    ]


def _lower_grams(matrices: Tensor) -> Tensor:
    """Return the lower triangle of ``A^T A`` [b, k, n, n] for A [b, k, m, n].

    It is computed in blocks of rows, which saves nearly half of the multiplications.
    """
    flat = matrices.flatten(0, 1)  # [b * k, m, n]
    size = flat.shape[2]
    grams = flat.new_zeros(len(flat), size, size)
    for start in range(0, size, _BLOCK_ROWS):
        end = min(start + _BLOCK_ROWS, size)
        rows = flat[:, :, start:end].transpose(1, 2)  # [b * k, rows, m]
        grams[:, start:end, :end] = torch.bmm(rows, flat[:, :, :end])
    return grams.view(*matrices.shape[:2], size, size)


def _matrices(weight: Tensor, convolution: str) -> Tensor:
    """Return the matrices of a weight as float64 [k, m, n], transposed if needed so that m >= n."""
    matrix = weight.detach().double()
    if convolution == "unfolded":
        matrix = matrix.flatten(1)
    # [out, in, *kernel] -> [positions, out, in]
    slices = matrix.flatten(2).movedim(-1, 0) if matrix.ndim > 2 else matrix[None]
    return slices if slices.shape[1] >= slices.shape[2] else slices.transpose(1, 2)
