"""The spectra of a model's layers: how heavy their tails are, and what else they tell."""

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

_TOGETHER = 16
"""Matrices that are decomposed at a time, for the bar and the memory."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What a layer's spectrum tells.

    Attributes:
        name: The matrix's name.
        kind: Its kind (:class:`~ovsprune.spectrum.matrices.Matrix`).
        shape: Its shape.
        alpha: Exponent of the power law of the tail, > 1; infinite where fewer than two
            eigenvalues are left to fit, or all are equal.
        ks_distance: Kolmogorov-Smirnov distance of the tail from the fit, in [0, 1]; nan without a
            fit.
        xmin: Eigenvalue at which the tail begins; nan without a fit.
        n_tail: Eigenvalues in the tail.
        n_eigenvalues: Eigenvalues above zero.
        alpha_hat: ``alpha log10(lambda_max)`` (Martin and Mahoney 2021, weighted alpha).
        stable_rank: ``sum(lambda) / lambda_max``, the squared Frobenius norm over the squared
            spectral norm; 0 of a weight of zeros.
        spectral_norm: ``sqrt(lambda_max)``; of a convolution's slices with their scale.
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
        """All but the eigenvalues, as plain JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if name != "eigenvalues"
        }


def spectra(
    found: Sequence[Matrix],
    *,
    fit: str = "peak",
    convolution: str = "slices",
    progress: Progress | None = None,
) -> list[Spectrum]:
    """The spectrum of each matrix; those of one shape are decomposed together.

    Args:
        found: From :func:`~ovsprune.spectrum.matrices.matrices`.
        fit: Where the tail begins: ``"peak"`` (OpenTrans), ``"least-ks"`` (Clauset et al.) or
            ``"hill"`` (the middle); a name of :data:`~ovsprune.spectrum.fits.FITS`.
        convolution: ``"slices"`` or ``"unfolded"``, as of
            :func:`~ovsprune.spectrum.eigenvalues.eigenvalues`.
        progress: Shows the walk.

    Raises:
        UnknownNameError: There is no such fit.
        OptionError: ``convolution`` is unknown.
        WeightsError: A weight has values that are not finite.
    """
    check_options(fit, convolution)
    for matrix in found:
        if not bool(torch.isfinite(matrix.weight).all()):
            raise WeightsError(
                f"{matrix.parameter} has values that are not finite, and so no spectrum; load "
                "weights that are whole"
            )
    order = sorted(range(len(found)), key=lambda i: tuple(found[i].weight.shape))
    measured: dict[int, Spectrum] = {}
    with (progress or Silent()).stage("spectra of the weights", len(found)) as advance:
        for start in range(0, len(order), _TOGETHER):
            places = order[start : start + _TOGETHER]
            values = spectra_of([found[i].weight for i in places], convolution)
            for i, row in zip(places, values, strict=True):
                measured[i] = _spectrum(found[i], row, fit)
            advance(len(places))
    return [measured[i] for i in range(len(found))]


def check_options(fit: str, convolution: str) -> None:
    """Refuse unknown options.

    Raises:
        UnknownNameError: There is no such fit.
        OptionError: ``convolution`` is unknown.
    """
    if fit not in FITS:
        raise UnknownNameError("fit", fit, FITS)
    if convolution not in CONVOLUTIONS:
        raise OptionError(f"convolution is {convolution!r}, expected {' or '.join(CONVOLUTIONS)}")


def _spectrum(matrix: Matrix, values: Tensor, fit: str) -> Spectrum:
    law = FITS[fit](values) if len(values) > 1 else PowerLaw(math.inf, math.nan, math.nan, 0)
    most = float(values[-1]) if len(values) else 0.0
    return Spectrum(
        name=matrix.name,
        kind=matrix.kind,
        shape=tuple(matrix.weight.shape),
        alpha=law.alpha,
        ks_distance=law.ks_distance,
        xmin=law.xmin,
        n_tail=law.n_tail,
        n_eigenvalues=len(values),
        alpha_hat=law.alpha * math.log10(most) if most else math.nan,
        stable_rank=float(values.sum()) / most if most else 0.0,
        spectral_norm=math.sqrt(most),
        eigenvalues=values,
    )
