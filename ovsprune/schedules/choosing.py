"""What the policies have in common: how many layers train, and being asked once."""

from __future__ import annotations

import math
from collections.abc import Callable

from ovsprune.core.protocols import Layer, ScheduleContext

__all__ = ["Once", "highest", "wanted"]


class Once:
    """The times of a policy that decides at the start: its first question is the only one."""

    current = False

    def moments(self, total_steps: int, every: int) -> tuple[int, ...]:
        """Step 0."""
        return (0,)


def wanted(item: ScheduleContext, fraction: float | None = None) -> int:
    """How many layers train: the count that was asked, or the share, rounded up.

    Half of an odd number includes the middle one, as "at or above the median" does.

    Example:
        >>> from types import SimpleNamespace
        >>> wanted(SimpleNamespace(layers=range(7), fraction=0.5, count=None))
        4
    """
    n = len(item.layers)
    if item.count is not None and fraction is None:
        return min(item.count, n)
    share = item.fraction if fraction is None else fraction
    return min(n, math.ceil(n * share - 1e-9))


def highest(item: ScheduleContext, count: int, key: Callable[[Layer], float]) -> set[str]:
    """Names of the ``count`` layers with the largest ``key``; of equals, those that come first."""
    ranked = sorted(item.layers, key=key, reverse=True)
    return {layer.name for layer in ranked[:count]}
