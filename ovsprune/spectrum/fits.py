"""Power laws fitted to the tail of a spectrum, with three ways to choose xmin.

The density of the tail is ``p(x) ~ x^-alpha`` for ``x >= xmin``. Given xmin, the maximum
likelihood estimate over the n values of the tail is ``alpha = 1 + n / sum(log(x_i / xmin))``
(Clauset, Shalizi and Newman 2009, eq. 3.1; Hill 1975). Its standard error is
``(alpha - 1) / sqrt(n)``. A heavy tail has a small alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FITS", "PowerLaw", "hill", "least_ks", "peak"]

_CHUNK = 256
"""Number of xmin candidates per batch; the work matrix of 4,096 eigenvalues takes 8 MiB."""
_BINS = 100
"""Bins of the histogram in :func:`peak`."""


@dataclass(frozen=True)
class PowerLaw:
    """Power law fitted to a tail.

    Attributes:
        alpha: Exponent of the density, > 1; infinite if all values of the tail are equal.
        xmin: Value at which the tail begins.
        ks_distance: Kolmogorov-Smirnov distance between the tail and the fit, in [0, 1].
        n_tail: Number of values in the tail, including xmin.
    """

    alpha: float
    xmin: float
    ks_distance: float
    n_tail: int


def hill(values: Tensor) -> PowerLaw:
    """Fit the upper half of the values (PL_Alpha_Hill in AlphaPruning, Lu et al. 2024).

    Args:
        values: [n], ascending, positive; n >= 2.

    Raises:
        ValueError: ``values`` violate these conditions.
    """
    values = _check_values(values)
    return _best(values, torch.tensor([len(values) // 2]).clamp_max(len(values) - 2))


def peak(values: Tensor) -> PowerLaw:
    """Fit a tail that begins near the peak of the log10 histogram with 100 bins.

    Candidates for xmin are the values in [0.95, 1.5] times the lower edge of the fullest bin; the
    one with the least Kolmogorov-Smirnov distance is used (OpenTrans, Xu et al. 2024, after
    TempBalance, Zhou et al. 2023). Without candidates, xmin is the first value above the edge.

    Args:
        values: [n], ascending, positive; n >= 2.

    Raises:
        ValueError: ``values`` violate these conditions.
    """
    values = _check_values(values)
    logs = values.log10()
    low, high = float(logs[0]), float(logs[-1])
    if low == high:
        return _best(values, torch.tensor([0]))
    counts = torch.histc(logs, _BINS, low, high)  # [bins]
    edge = 10 ** (low + (high - low) * int(counts.argmax()) / _BINS)
    near = ((values >= 0.95 * edge) & (values <= 1.5 * edge)).nonzero().flatten()  # [k] indices
    if not len(near):
        near = torch.searchsorted(values, torch.tensor([edge], dtype=values.dtype))
    # A tail needs two values: the last start is n - 2.
    return _best(values, near.clamp_max(len(values) - 2))


def least_ks(values: Tensor) -> PowerLaw:
    """Fit the tail with the least Kolmogorov-Smirnov distance (Clauset et al. 2009, section 3.3).

    Args:
        values: [n], ascending, positive; n >= 2.

    Raises:
        ValueError: ``values`` violate these conditions.
    """
    values = _check_values(values)
    return _best(values, torch.arange(len(values) - 1))


FITS: Mapping[str, Callable[[Tensor], PowerLaw]] = {
    "hill": hill,
    "peak": peak,
    "least-ks": least_ks,
}
"""Fit functions by name."""


def _check_values(values: Tensor) -> Tensor:
    """Return the values as float64 on the CPU.

    Raises:
        ValueError: They are not a vector of at least two positive, finite, ascending values.
    """
    values = values.detach().double().cpu()
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"a power law needs a vector of at least 2 values, not shape {tuple(values.shape)}"
        )
    if not (bool(torch.isfinite(values).all()) and float(values[0]) > 0):
        raise ValueError("a power law needs finite values above 0")
    if bool((values.diff() < 0).any()):
        raise ValueError("a power law needs values in ascending order")
    return values


def _best(values: Tensor, starts: Tensor) -> PowerLaw:
    """Return the fit with the least distance among the tails that begin at ``starts`` [k]."""
    logs = values.log()  # [n]
    counts = len(values) - starts  # [k], number of values in each tail
    # sum(log(x_i / xmin)) of every tail from one reversed cumulative sum.
    log_sums = logs.flip(0).cumsum(0).flip(0)[starts] - counts * logs[starts]  # [k]
    alphas = 1 + counts / log_sums.clamp_min(0)  # [k], Clauset et al. 2009, eq. 3.1
    chunks = [slice(i, i + _CHUNK) for i in range(0, len(starts), _CHUNK)]
    distances = torch.cat([_distances(logs, starts[c], alphas[c]) for c in chunks])  # [k]
    best = int(distances.argmin())
    return PowerLaw(
        alpha=float(alphas[best]),
        xmin=float(values[starts[best]]),
        ks_distance=float(distances[best]),
        n_tail=int(counts[best]),
    )


def _distances(logs: Tensor, starts: Tensor, alphas: Tensor) -> Tensor:
    """Return the Kolmogorov-Smirnov distance of each tail [k].

    It is ``max |i / n - (1 - (x_i / xmin)^(1 - alpha))|`` over the ranks i = 0 ... n - 1 in the
    tail. A tail of equal values has an infinite alpha and the distance 1.

    Args:
        logs: Logarithms of all values [N], ascending.
        starts: Index of the first value of each tail [k].
        alphas: Exponent of each tail [k].
    """
    first = int(starts.min())
    ranks = torch.arange(first, len(logs)) - starts[:, None]  # [k, N - first]; < 0 before the tail
    exponent = (1 - alphas)[:, None] * (logs[first:] - logs[starts][:, None]).clamp_min(0)
    # expm1(exponent) = -(1 - (x / xmin)^(1 - alpha)), the negative CDF of the fit.
    gap = (ranks / (len(logs) - starts)[:, None] + torch.expm1(exponent)).abs()
    return gap.masked_fill(ranks < 0, 0.0).amax(1).nan_to_num(1.0, posinf=1.0)  # [k]
