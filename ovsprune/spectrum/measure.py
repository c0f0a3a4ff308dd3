"""Spectral metrics of a model's layers: alpha, stable rank, spectral norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ovsprune.core.errors import OptionError, UnknownNameError, WeightsError
from ovsprune.core.progress import Progress, Silent
from ovsprune.spectrum.eigenvalues import CONVOLUTIONS, spectra_of
from ovsprune.spectrum.fits import FITS, PowerLaw
from ovsprune.spectrum.matrices import Matrix

__all__ = ["Spectrum", "check_options", "spectra"]

_STEP = 16
"""Number of matrices between two progress updates; it also bounds the memory."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Spectrum of a weight matrix and metrics of it.

    Attributes:
        name: Name of the matrix.
        kind: Kind of the matrix (:class:`~ovsprune.spectrum.matrices.Matrix`).
        shape: Shape of the weight.
        alpha: Power-law exponent of the tail, > 1; infinite if there are fewer than two
            eigenvalues, or all are equal.
        ks_distance: Kolmogorov-Smirnov distance between tail and fit, in [0, 1]; nan without a fit.
        xmin: Eigenvalue at which the tail begins; nan without a fit.
        n_tail: Number of eigenvalues in the tail.
        n_eigenvalues: Number of positive eigenvalues.
        alpha_hat: Weighted alpha, ``alpha * log10(lambda_max)`` (Martin and Mahoney 2021).
        stable_rank: ``sum(lambda) / lambda_max``, the squared Frobenius norm over the squared
            spectral norm; 0 for a zero weight.
        spectral_norm: ``sqrt(lambda_max)``; for slices of a convolution, after their scaling.
        eigenvalues: float64 [n_eigenvalues], ascending.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    alpha: float
    ks_distance: float
    xmin: float
    n_tail: int
    n_eigenvalues: int
    alpha_hat: float
    stable_rank: float
    spectral_norm: float
    eigenvalues: Tensor = field(repr=False)

    def record(self) -> dict[str, Any]:
        """Return everything except the eigenvalues as plain JSON data."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if name != "eigenvalues"
        }


def spectra(
    weight_matrices: Sequence[Matrix],
    *,
    fit: str = "peak",
    convolution: str = "slices",
    progress: Progress | None = None,
) -> list[Spectrum]:
    """Compute the spectrum of each matrix; matrices of one shape are decomposed together.

    Args:
        weight_matrices: Result of :func:`~ovsprune.spectrum.matrices.matrices`.
        fit: Method that chooses the start of the tail, a name in
            :data:`~ovsprune.spectrum.fits.FITS`: ``"peak"`` (OpenTrans), ``"least-ks"``
            (Clauset et al.) or ``"hill"`` (the median).
        convolution: ``"slices"`` or ``"unfolded"``, see
            :func:`~ovsprune.spectrum.eigenvalues.eigenvalues`.
        progress: Progress reporter.

    Raises:
        UnknownNameError: ``fit`` is unknown.
        OptionError: ``convolution`` is unknown.
        WeightsError: A weight has values that are not finite.
    """
    check_options(fit, convolution)
    for matrix in weight_matrices:
        if not bool(torch.isfinite(matrix.weight).all()):
            raise WeightsError(
                f"{matrix.parameter} has values that are not finite, so its spectrum is undefined; "
                "load undamaged weights"
            )
    # Sort by shape, so that matrices of one shape come in one step.
    shapes = [tuple(matrix.weight.shape) for matrix in weight_matrices]
    order = sorted(range(len(shapes)), key=lambda i: shapes[i])
    measured: dict[int, Spectrum] = {}
    with (progress or Silent()).stage("spectra of the weights", len(weight_matrices)) as advance:
        for start in range(0, len(order), _STEP):
            indices = order[start : start + _STEP]
            values = spectra_of([weight_matrices[i].weight for i in indices], convolution)
            for i, row in zip(indices, values, strict=True):
                measured[i] = _spectrum(weight_matrices[i], row, fit)
            advance(len(indices))
    return [measured[i] for i in range(len(weight_matrices))]


def check_options(fit: str, convolution: str) -> None:
    """Check the options of :func:`spectra`.

    Raises:
        UnknownNameError: ``fit`` is unknown.
        OptionError: ``convolution`` is unknown.
    """
    if fit not in FITS:
        raise UnknownNameError("fit", fit, FITS)
    if convolution not in CONVOLUTIONS:
        raise OptionError(f"convolution is {convolution!r}, expected {' or '.join(CONVOLUTIONS)}")


def _spectrum(matrix: Matrix, values: Tensor, fit: str) -> Spectrum:
    """Fit the tail of ascending eigenvalues [k] and compute the metrics."""
    if len(values) > 1:
        law = FITS[fit](values)
    else:
        law = PowerLaw(alpha=math.inf, xmin=math.nan, ks_distance=math.nan, n_tail=0)
    lambda_max = float(values[-1]) if len(values) else 0.0
    return Spectrum(
        name=matrix.name,
        kind=matrix.kind,
        shape=tuple(matrix.weight.shape),
        alpha=law.alpha,
        ks_distance=law.ks_distance,
        xmin=law.xmin,
        n_tail=law.n_tail,
        n_eigenvalues=len(values),
        alpha_hat=law.alpha * math.log10(lambda_max) if lambda_max else math.nan,
        stable_rank=float(values.sum()) / lambda_max if lambda_max else 0.0,
        spectral_norm=math.sqrt(lambda_max),
        eigenvalues=values,
    )
