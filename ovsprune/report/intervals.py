"""Means over seeds, and 95% intervals of means and differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Difference", "Spread", "pooled_difference", "spread"]

LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """Statistics of one figure over seeds.

    Attributes:
        count: Number of seeds.
        mean: Mean.
        sd: Sample standard deviation (n - 1); None for one value.
        half: Half-width of the 95% interval of the mean; None for one value.
    """

    count: int
    mean: float
    sd: float | None
    half: float | None


@dataclass(frozen=True)
class Difference:
    """Difference of the means of two samples.

    Attributes:
        mean: The difference.
        half: Half-width of its 95% interval; None if both samples have one value.
    """

    mean: float
    half: float | None

    @property
    def clear(self) -> bool:
        """True if there is an interval and it excludes zero."""
        return self.half is not None and abs(self.mean) > self.half


def spread(values: Sequence[float]) -> Spread:
    """Return mean, standard deviation s, and the interval ``mean ± t(0.975, n - 1) s / sqrt(n)``.

    >>> spread([1.0, 3.0]).mean
    2.0

    Raises:
        ValueError: ``values`` is empty.
    """
    if not values:
        raise ValueError("values is empty, expected at least one value")
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return Spread(1, mean, None, None)
    sd = statistics.stdev(values)
    half = _quantile(count - 1) * sd / math.sqrt(count)
    return Spread(count=count, mean=mean, sd=sd, half=half)


def pooled_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Return ``mean(a) - mean(b)`` with the interval of the pooled two-sample t-test.

    ``s² = ((n_a - 1) s_a² + (n_b - 1) s_b²) / (n_a + n_b - 2)`` and
    ``half = t(0.975, n_a + n_b - 2) · s · sqrt(1/n_a + 1/n_b)``: the samples are assumed
    independent with equal variance. Shared seeds are not treated as pairs.

    Raises:
        ValueError: A sample is empty.
    """
    first, second = spread(a), spread(b)
    freedom = len(a) + len(b) - 2  # degrees of freedom of the pooled variance
    if freedom < 1:
        return Difference(first.mean - second.mean, None)
    # sd is None for one value, whose weight is 0.
    squares = sum((s.count - 1) * (s.sd or 0.0) ** 2 for s in (first, second))
    pooled = math.sqrt(squares / freedom)
    half = _quantile(freedom) * pooled * math.sqrt(1 / len(a) + 1 / len(b))
    return Difference(first.mean - second.mean, half)


def _quantile(freedom: int) -> float:
    """Return the two-sided 95% quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))  # 0.975, as 2.5% lie in each tail
