"""Interface for progress reports of long work, independent of their display."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["NoteOnce", "Progress", "Silent"]


class Progress(Protocol):
    """Progress reporter, for example a progress bar in the terminal."""

    def stage(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Begin a stage of ``total`` steps; the callable advances it by the given number."""
        ...

    def note(self, message: str) -> None:
        """Report one line that the user should see (a skipped file, an automatic choice)."""
        ...


class Silent:
    """Progress reporter that shows nothing and collects the notes in :attr:`notes`."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextmanager
    def stage(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Return a callable that ignores the steps."""
        yield lambda steps: None

    def note(self, message: str) -> None:
        """Append ``message`` to :attr:`notes`."""
        self.notes.append(message)


class NoteOnce:
    """Progress reporter that passes every note on once, however often it is reported.

    Args:
        inner: Reporter that shows the stages and the notes.
    """

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self._reported: set[str] = set()

    def stage(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Begin a stage of the inner reporter."""
        return self._inner.stage(description, total)

    def note(self, message: str) -> None:
        """Report ``message`` unless it was reported before."""
        if message not in self._reported:
            self._reported.add(message)
            self._inner.note(message)
