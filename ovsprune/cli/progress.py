"""Progress on stderr: bars in a terminal, otherwise one line per long stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ovsprune.report.numbers import duration

__all__ = ["Bars"]

LONG = 1.0
"""Seconds; shorter stages leave no line."""


class Bars:
    """Progress reporter of the command line (:class:`ovsprune.core.progress.Progress`).

    Args:
        console: Console that writes to stderr.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.notes: list[str] = []
        self._bars: Progress | None = None
        self._depth = 0

    @contextmanager
    def stage(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show one stage of ``total`` steps; stages may be nested."""
        start = time.perf_counter()
        bars = self._open()
        self._depth += 1
        indent = "  " * (self._depth - 1)
        task = bars.add_task(indent + description, total=max(total, 1))
        try:
            yield lambda steps: bars.advance(task, steps)
        finally:
            bars.remove_task(task)
            self._depth -= 1
            if not self._depth:
                bars.stop()
                self._bars = None
        # Not reached after an error, so a failed stage leaves no line.
        seconds = time.perf_counter() - start
        if seconds >= LONG:
            self._line(f"{indent}{description}: {duration(seconds)}", "dim")

    def note(self, message: str) -> None:
        """Print one line above the bars, and keep it in :attr:`notes`."""
        self.notes.append(message)
        self._line(f"note: {message}", "yellow")

    def _line(self, message: str, style: str) -> None:
        # Text: brackets in a message are no markup. soft_wrap: paths stay on one line.
        self.console.print(Text(message, style=style), soft_wrap=True)

    def _open(self) -> Progress:
        # rich allows one live display per console, so nested stages share it.
        if self._bars is None:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
                # Without a terminal only the lines of finished stages are printed.
                disable=not self.console.is_terminal,
            )
            self._bars.start()
        return self._bars
