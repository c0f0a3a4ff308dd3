"""Ridge regression of a consumer's weight with its present weight as the prior mean.

Letters: inputs x [n], residuals e [m], covariance Sigma [n, n] of x, correction D [n, m], and the
ridge lambda, which is given relative to the mean variance of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovsprune.core.protocols import Moments

__all__ = ["mean_variance", "regularised", "ridge_correction"]

_MASSIVE = 10.0
"""Variances are capped at this multiple of the median before they are averaged."""
_FLOOR = 1e-5
"""Least value added to a variance, relative to the variance.

Products are first summed in float32. This leaves a rounding error of about 1e-7 of the geometric
mean of two variances in each entry, and of up to sqrt(n) times that in an eigenvalue of the
correlation matrix.
"""


def regularised(covariance: Tensor, ridge: float) -> Tensor:
    """Return ``Sigma + diag(max(ridge * mean_variance, 1e-5 diag Sigma))``, positive definite.

    The first term is the ridge. It is relative to a capped mean (:func:`mean_variance`), because
    otherwise a few channels of massive norm would shrink all other channels to zero. The second
    term bounds the eigenvalues of the correlation matrix from below, for massive channels and for
    ridges near zero. With it, the Cholesky decomposition succeeds for a rank-deficient or rounded
    covariance.

    Args:
        covariance: Sigma [n, n]; n may be 0.
        ridge: Relative to the mean variance.

    Returns:
        float64 [n, n].
    """
    Sigma = covariance.double().clone()  # [n, n]
    if not Sigma.numel():
        return Sigma
    variance = Sigma.diagonal().clone().clamp_min(0.0)  # [n]; rounding may make a zero negative
    Sigma.diagonal().add_((_FLOOR * variance).clamp_min(ridge * mean_variance(covariance)))
    return Sigma


def mean_variance(covariance: Tensor) -> Tensor:
    """Return the mean variance, with each variance capped at 10 times the median.

    Args:
        covariance: Sigma [n, n], n at least 1.

    Returns:
        float64 scalar, above 0; 1 if all variances are zero.
    """
    variance = covariance.diagonal().double().clamp_min(0.0)  # [n]
    cap = _MASSIVE * variance.median()
    # The median is 0 if more than half of the channels are constant: then there is no cap.
    mean = variance.clamp_max(cap).mean() if cap > 0 else variance.mean()
    return mean if mean > 0 else torch.ones_like(mean)


def ridge_correction(moments: Moments, cross: Tensor, ridge: float) -> Tensor:
    """Return the change of a weight that best explains a residual.

    Solves ``min_D E|e - D^T x|^2 + sum_j lambda_j |D_j|^2`` for centred x and e, with the solution
    ``D = (Sigma + diag(lambda))^-1 E[x e^T]``. The values lambda_j are those that
    :func:`regularised` adds. This is ridge regression whose prior mean is the present weight (Hoerl
    and Kennard 1970), so a residual of zero gives a correction of zero.

    Args:
        moments: Moments of x [n].
        cross: Centred cross moment E[x e^T], float64 [n, m].
        ridge: Relative to the mean variance of x, above 0.

    Returns:
        D^T, float64 [m, n], in the layout of ``nn.Linear.weight``.
    """
    L = torch.linalg.cholesky(regularised(moments.covariance, ridge))  # [n, n]
    D = torch.cholesky_solve(cross.double(), L)  # [n, m]
    return D.T
