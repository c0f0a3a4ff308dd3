"""Registries of plug-ins: one per kind, filled by a decorator.

A registry imports its package (one plug-in per file) on the first look-up, so that
``import ovsprune`` stays fast. Import errors are not caught: a plug-in that cannot be imported is a
bug. Other packages register plug-ins with an entry point in the group ``ovsprune.plugins``, whose
value is a module that registers them on import.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from ovsprune.core.errors import UnknownNameError

__all__ = ["ENTRY_POINT_GROUP", "Registry"]

ENTRY_POINT_GROUP = "ovsprune.plugins"

T = TypeVar("T")
C = TypeVar("C", bound=Callable[[], Any])


class Registry(Generic[T]):
    """Registry of the plug-ins of one kind, by name.

    Args:
        kind: Kind of plug-in in the singular, for messages (``"criterion"``).
        room: Package whose modules register plug-ins; imported on the first look-up.
    """

    def __init__(self, kind: str, room: str) -> None:
        self.kind = kind
        self.room = room
        self._entries: dict[str, T] = {}
        self._summaries: dict[str, str] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """Return a decorator that registers a class or function, called without arguments.

        Raises:
            ValueError: ``name`` is taken already.
        """

        def decorate(make: C) -> C:
            self.add(name, make(), make.__doc__)
            return make

        return decorate

    def add(self, name: str, entry: T, doc: str | None) -> None:
        """Register an object under ``name``; the first line of ``doc`` is its summary.

        Raises:
            ValueError: ``name`` is taken already.
        """
        if name in self._entries:
            taken = type(self._entries[name])
            raise ValueError(
                f"{self.kind} {name!r} is registered already by "
                f"{taken.__module__}.{taken.__qualname__}; choose another name"
            )
        self._entries[name] = entry
        self._summaries[name] = (doc or "").strip().partition("\n")[0]

    def get(self, name: str) -> T:
        """Return the plug-in with the given name.

        Raises:
            UnknownNameError: No plug-in has this name; the message lists the known and the closest.
        """
        self._load()
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(self.kind, name, self._entries) from None

    def names(self) -> tuple[str, ...]:
        """Return all registered names, sorted."""
        self._load()
        return tuple(sorted(self._entries))

    def summary(self, name: str) -> str:
        """Return the first line of the plug-in's docstring."""
        self.get(name)
        return self._summaries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self.room)
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
        self._loaded = True  # before the entry points, which may look up names
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            entry.load()
