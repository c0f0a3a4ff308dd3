"""Power laws fitted to the tail of a spectrum: three ways to choose where the tail begins.

The density of the tail is ``p(x) ~ x^-alpha`` for ``x >= xmin``. Given xmin, the maximum
likelihood estimate is ``alpha = 1 + n / sum(log(x_i / xmin))`` over the n values from xmin on
(Clauset, Shalizi and Newman 2009, eq. 3.1; Hill 1975), with a standard error of
``(alpha - 1) / sqrt(n)``. A heavy tail has a small alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FITS", "PowerLaw", "hill", "least_ks", "peak"]

_CHUNK = 256
"""Candidates for xmin whose distances are taken at once: 8 MiB for a spectrum of 4,096 values."""
_BINS = 100


@dataclass(frozen=True)
class PowerLaw:
    """A fitted tail.

    Attributes:
        alpha: Exponent of the density, > 1; infinite where all values of the tail are equal.
        xmin: Value at which the tail begins.
        ks_distance: Largest distance of the tail's empirical distribution from the fit, in [0, 1].
        n_tail: Values in the tail, xmin among them.
    """

    alpha: float
    xmin: float
    ks_distance: float
    n_tail: int


def hill(values: Tensor) -> PowerLaw:
    """The tail begins at the middle: the upper half of the values (AlphaPruning's PL_Alpha_Hill).

    Args:
        values: [n], ascending, positive; n >= 2.

    Raises:
        ValueError: ``values`` are not like that.
    """
    values = _checked(values)
    return _best(values, torch.tensor([len(values) // 2]).clamp_max(len(values) - 2))


def peak(values: Tensor) -> PowerLaw:
    """The tail begins near the peak of the log10 histogram of 100 bins.

    Of the values in [0.95, 1.5] times the peak's lower edge, the one of least Kolmogorov-Smirnov
    distance (OpenTrans, Xu et al. 2024, as TempBalance, Zhou et al. 2023); where there are none,
    the first value from the edge on.

    Args:
        values: [n], ascending, positive; n >= 2.

    Raises:
        ValueError: ``values`` are not like that.
    """
    values = _checked(values)
    logs = values.log10()
    low, high = float(logs[0]), float(logs[-1])
    if low == high:
        return _best(values, torch.tensor([0]))
    counts = torch.histc(logs, _BINS, low, high)
    edge = 10 ** (low + (high - low) * int(counts.argmax()) / _BINS)
    near = ((values >= 0.95 * edge) & (values <= 1.5 * edge)).nonzero().flatten()
    if not len(near):
        near = torch.searchsorted(values, torch.tensor([edge], dtype=values.dtype))
    return _best(values, near.clamp_max(len(values) - 2))


def least_ks(values: Tensor) -> PowerLaw:
    """The tail begins where its Kolmogorov-Smirnov distance is least (Clauset et al. 2009, 3.3).

    Args:
        values: [n], ascending, positive; n >= 2.

    Raises:
        ValueError: ``values`` are not like that.
    """
    values = _checked(values)
    return _best(values, torch.arange(len(values) - 1))


FITS: Mapping[str, Callable[[Tensor], PowerLaw]] = {
    "hill": hill,
    "peak": peak,
    "least-ks": least_ks,
}
"""The fits by name."""


def _checked(values: Tensor) -> Tensor:
    values = values.detach().double().cpu()
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"a power law needs a row of at least 2 values, not shape {tuple(values.shape)}"
        )
    if not (bool(torch.isfinite(values).all()) and float(values[0]) > 0):
        raise ValueError("a power law needs finite values above 0")
    if bool((values.diff() < 0).any()):
        raise ValueError("a power law needs values in ascending order")
    return values


def _best(values: Tensor, starts: Tensor) -> PowerLaw:
    """Of the tails that begin at the indices ``starts`` [k], the one of least distance."""
    logs = values.log()
    counts = len(values) - starts
    above = logs.flip(0).cumsum(0).flip(0)[starts] - counts * logs[starts]
    alphas = 1 + counts / above.clamp_min(0)
    parts = [slice(at, at + _CHUNK) for at in range(0, len(starts), _CHUNK)]
    distances = torch.cat([_distances(logs, starts[part], alphas[part]) for part in parts])
    best = int(distances.argmin())
    return PowerLaw(
        float(alphas[best]),
        float(values[starts[best]]),
        float(distances[best]),
        int(counts[best]),
    )


def _distances(logs: Tensor, starts: Tensor, alphas: Tensor) -> Tensor:
    """Distance [k] of each tail: ``max |i / n - (1 - (x_i / xmin)^(1 - alpha))|``, i from 0.

    A tail of equal values, whose alpha is infinite, is at distance 1.
    """
    first = int(starts.min())
    at = torch.arange(first, len(logs)) - starts[:, None]  # Place in the tail; below 0 before it.
    exponent = (1 - alphas)[:, None] * (logs[first:] - logs[starts][:, None]).clamp_min(0)
    gap = (at / (len(logs) - starts)[:, None] + torch.expm1(exponent)).abs()
    return gap.masked_fill(at < 0, 0.0).amax(1).nan_to_num(1.0, posinf=1.0)
