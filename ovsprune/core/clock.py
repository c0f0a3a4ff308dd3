"""Stopwatch for the steps of a pruning run."""

from __future__ import annotations

import time

__all__ = ["Clock"]


class Clock:
    """Stopwatch that adds up the seconds of named steps.

    Attributes:
        seconds: Name of a step to its total time in seconds.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        """Add the time since the previous lap to ``step``, and start a new lap."""
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._last
        self._last = now

    def add(self, step: str, seconds: float) -> None:
        """Add ``seconds``, measured elsewhere, to ``step``, and start a new lap."""
        self.seconds[step] = self.seconds.get(step, 0.0) + seconds
        # The measured seconds may lie in the present lap, which must not count them again.
        self._last = time.perf_counter()
