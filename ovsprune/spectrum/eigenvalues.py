"""The empirical spectral density of a weight: eigenvalues of its Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["CONVOLUTIONS", "eigenvalues", "spectra_of"]

CONVOLUTIONS = ("slices", "unfolded")
"""How a convolution is a matrix: one for each tap of its kernel, or one with all of them."""

_BATCH = 2**19
"""Numbers of the weights that are decomposed at once."""
_BLOCK = 192
"""Rows of a Gram matrix that are taken at once."""

_CONV_SCALE = 0.5
"""Of the eigenvalues of a convolution's slices: each slice is scaled by sqrt(0.5)."""


def eigenvalues(weight: Tensor, convolution: str = "slices") -> Tensor:
    """Positive eigenvalues of ``W^T W``, from the smaller of the two Gram matrices.

    Args:
        weight: [out, in] or [out, in, *kernel].
        convolution: ``"slices"``: a convolution's kernel positions are a matrix [out, in] each,
            scaled by sqrt(0.5), and their eigenvalues are taken together (Martin and Mahoney 2021;
            OpenTrans, Xu et al. 2024). ``"unfolded"``: it is one matrix [out, in * taps].

    Returns:
        float64 [k] on the CPU, ascending; those that are zero to rounding are left out, so that k
        is the rank where the weight has none to spare.

    Raises:
        ValueError: ``weight`` has fewer than two axes, or ``convolution`` is unknown.
    """
    return spectra_of([weight], convolution)[0]


@torch.no_grad()
def spectra_of(weights: Sequence[Tensor], convolution: str = "slices") -> list[Tensor]:
    """The eigenvalues of several weights; those of one shape are decomposed together.

    Args:
        weights: Each [out, in] or [out, in, *kernel].
        convolution: As of :func:`eigenvalues`, which this does for each.

    Raises:
        ValueError: A weight has fewer than two axes, or ``convolution`` is unknown.
    """
    if convolution not in CONVOLUTIONS:
        raise ValueError(f"convolution is {convolution!r}, expected {' or '.join(CONVOLUTIONS)}")
    for weight in weights:
        if weight.ndim < 2:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} is no matrix")
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, weight in enumerate(weights):
        alike.setdefault((*weight.shape, weight.ndim), []).append(i)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        # A batch spares small ones the calls; of large ones it only moves more memory about.
        many = max(1, _BATCH // max(1, weights[places[0]].numel()))
        for at in range(0, len(places), many):
            some = places[at : at + many]
            found |= zip(some, _batch([weights[i] for i in some], convolution), strict=True)
    return [found[i] for i in range(len(weights))]


def _batch(weights: Sequence[Tensor], convolution: str) -> list[Tensor]:
    """The eigenvalues of weights of one shape."""
    parts = [_matrices(weight, convolution) for weight in weights]
    matrices = torch.stack(parts) if len(parts) > 1 else parts[0][None]  # a large one, not copied
    values = torch.linalg.eigvalsh(_lower_grams(matrices)).flatten(1).cpu()
    if weights[0].ndim > 2 and convolution == "slices":
        values = values * _CONV_SCALE
    # Rounding of a Gram matrix leaves eigenvalues of zero at about n eps times the largest.
    zero = max(matrices.shape[2:]) * torch.finfo(torch.float64).eps
    return [
        row[(row > (float(row.max()) if len(row) else 0.0) * zero) & (row > 0)].sort().values
        for row in values
    ]


def _lower_grams(matrices: Tensor) -> Tensor:
    """``A^T A`` [b, k, n, n] of A [b, k, m, n]: the lower triangle, which is all that is read.

    By blocks of rows, which spares nearly half of the products.
    """
    flat = matrices.flatten(0, 1)
    size = flat.shape[2]
    grams = flat.new_zeros(len(flat), size, size)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        rows = flat[:, :, start:end].transpose(1, 2)
        grams[:, start:end, :end] = torch.bmm(rows, flat[:, :, :end])
    return grams.view(*matrices.shape[:2], size, size)


def _matrices(weight: Tensor, convolution: str) -> Tensor:
    """The weight's matrices, whichever way round they are taller: float64 [matrices, m, n]."""
    matrix = weight.detach().double()
    if convolution == "unfolded":
        matrix = matrix.flatten(1)
    slices = matrix.flatten(2).movedim(-1, 0) if matrix.ndim > 2 else matrix[None]
    return slices if slices.shape[1] >= slices.shape[2] else slices.transpose(1, 2)
