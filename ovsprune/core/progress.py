"""How long work reports itself, without any room knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Something that shows work: a progress bar in the terminal, or nothing at all."""

    def stage(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open one stage of ``total`` steps; the callable advances it by the number given."""
        ...

    def note(self, message: str) -> None:
        """Say one line that a reader should see (a skipped file, a choice that was made)."""
        ...


class Silent:
    """The progress that shows nothing; keeps the notes, for whoever asks."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextmanager
    def stage(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A stage that nobody sees."""
        yield lambda steps: None

    def note(self, message: str) -> None:
        """Keep ``message`` in :attr:`notes`."""
        self.notes.append(message)
