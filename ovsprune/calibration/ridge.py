"""Ridge regression of a consumer's weight, shrunk towards the weight it has."""

from __future__ import annotations

import torch
from torch import Tensor

from ovsprune.core.protocols import Moments

__all__ = ["correction", "level", "regularised"]

_MASSIVE = 10.0
"""Variances above this many times the median count as this many in the mean variance."""
_FLOOR = 1e-5
"""Least that is added to a variance, relative to itself.

Products are summed in float32 first, which leaves rounding of about 1e-7 of the geometric mean of
two variances in every entry, and up to sqrt(n) times that in an eigenvalue of the correlations.
"""


def regularised(covariance: Tensor, ridge: float) -> Tensor:
    """``C + diag(max(ridge * level, 1e-5 diag C))`` in float64, positive definite.

    :func:`level` is a mean variance: a few channels of massive norm must not flatten all the
    others. For them, and for a ridge near zero, the second term is a floor under the eigenvalues of
    the correlations, so that a covariance of fewer rows than columns, or one rounded, can be
    factored. One without entries stays so.

    Args:
        covariance: [n, n].
        ridge: Relative to the mean variance.
    """
    out = covariance.double().clone()
    if not out.numel():
        return out
    variance = out.diagonal().clone().clamp_min(0.0)
    out.diagonal().add_((_FLOOR * variance).clamp_min(ridge * level(covariance)))
    return out


def level(covariance: Tensor) -> Tensor:
    """The mean variance, one counting as at most 10 times the median; 1 where all are zero.

    Args:
        covariance: [n, n], n at least 1.

    Returns:
        float64 scalar, above 0.
    """
    variance = covariance.diagonal().double().clamp_min(0.0)
    cap = _MASSIVE * variance.median()
    mean = variance.clamp_max(cap).mean() if cap > 0 else variance.mean()
    return mean if mean > 0 else torch.ones_like(mean)


def correction(moments: Moments, cross: Tensor, ridge: float) -> Tensor:
    """What to add to a weight so that it explains the residual as well.

    Minimises ``E|e - x D|^2 + sum_j lambda_j |D_j|^2`` for centred x and e, lambda being what
    :func:`regularised` adds, ``ridge`` times the mean variance of x: ridge regression whose prior
    is the present weight (Hoerl and Kennard 1970). A residual of zero gives a correction of zero.

    Args:
        moments: Of x [n].
        cross: Centred cross moment of x and e, float64 [n, m].
        ridge: Relative to the mean variance of x; > 0.

    Returns:
        D transposed, float64 [m, n]: the weight's form in ``nn.Linear``.
    """
    factor = torch.linalg.cholesky(regularised(moments.covariance, ridge))
    return torch.cholesky_solve(cross.double(), factor).T
