"""Timing of the steps of a job."""

from __future__ import annotations

import time

__all__ = ["Clock"]


class Clock:
    """Accumulates seconds per step.

    Attributes:
        seconds: Seconds by name of the step.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        """Add the time since the last lap to ``step``."""
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._last
        self._last = now

    def add(self, step: str, seconds: float) -> None:
        """Add ``seconds`` to ``step``, and start the next lap now."""
        self.seconds[step] = self.seconds.get(step, 0.0) + seconds
        self._last = time.perf_counter()
