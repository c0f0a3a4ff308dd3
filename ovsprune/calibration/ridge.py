"""Ridge regression of a consumer's weight, shrunk towards the weight it has."""

from __future__ import annotations

import torch
from torch import Tensor

from ovsprune.core.protocols import Moments

__all__ = ["correction", "regularised"]


def regularised(covariance: Tensor, ridge: float) -> Tensor:
    """``C + ridge * mean(diag C) I`` in float64; a covariance of zeros becomes ``ridge * I``."""
    c = covariance.double()
    level = float(c.diagonal().mean())
    out = c.clone()
    out.diagonal().add_(ridge * (level if level > 0 else 1.0))
    return out


def correction(moments: Moments, cross: Tensor, ridge: float) -> Tensor:
    """What to add to a weight so that it explains the residual as well.

    Minimises ``E|e - x D|^2 + lambda |D|^2`` for centred x and e, lambda being ``ridge`` times the
    mean variance of x: ridge regression whose prior is the present weight. A residual of zero
    gives a correction of zero.

    Args:
        moments: Of x [n].
        cross: Centred cross moment of x and e, float64 [n, m].
        ridge: Relative to the mean variance of x; > 0.

    Returns:
        D transposed, float64 [m, n]: the weight's form in ``nn.Linear``.
    """
    factor = torch.linalg.cholesky(regularised(moments.covariance, ridge))
    return torch.cholesky_solve(cross.double(), factor).T
