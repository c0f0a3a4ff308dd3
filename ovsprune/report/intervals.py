"""Means over seeds, and 95% intervals of means and of differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Difference", "Spread", "pooled_difference", "spread"]

LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        count: Seeds.
        mean: Mean.
        sd: Sample standard deviation (n - 1); None of one value.
        half: Half-width of the 95% interval of the mean; None of one value.
    """

    count: int
    mean: float
    sd: float | None
    half: float | None


@dataclass(frozen=True)
class Difference:
    """Mean of one sample less the mean of another.

    Attributes:
        mean: The difference.
        half: Half-width of its 95% interval; None where neither sample says how much it varies.
    """

    mean: float
    half: float | None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out; False where there is none."""
        return self.half is not None and abs(self.mean) > self.half


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation s, and the interval ``mean ± t(0.975, n - 1) s / sqrt(n)``.

    >>> spread([1.0, 3.0]).mean
    2.0

    Raises:
        ValueError: ``values`` is empty.
    """
    if not values:
        raise ValueError("no value to average")
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return Spread(1, mean, None, None)
    sd = statistics.stdev(values)
    return Spread(count, mean, sd, _quantile(count - 1) * sd / math.sqrt(count))


def pooled_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """``mean(a) - mean(b)`` with the interval of Student's two-sample t with pooled variance.

    ``s² = ((n_a - 1) s_a² + (n_b - 1) s_b²) / (n_a + n_b - 2)`` and
    ``half = t(0.975, n_a + n_b - 2) · s · sqrt(1/n_a + 1/n_b)``: the samples are taken as
    independent and of one variance. Seeds that both share would make the difference of pairs less
    spread; that they do is not assumed.

    Raises:
        ValueError: A sample is empty.
    """
    first, second = spread(a), spread(b)
    freedom = len(a) + len(b) - 2
    if freedom < 1:
        return Difference(first.mean - second.mean, None)
    squares = sum((s.count - 1) * (s.sd or 0.0) ** 2 for s in (first, second))
    pooled = math.sqrt(squares / freedom)
    half = _quantile(freedom) * pooled * math.sqrt(1 / len(a) + 1 / len(b))
    return Difference(first.mean - second.mean, half)


def _quantile(freedom: int) -> float:
    """The two-sided 95% quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))
