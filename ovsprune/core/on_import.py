"""Being told when a module has been imported, before anybody can use what is in it.

The standard library only: this runs at the start of every Python process that a launched command
starts (:mod:`ovsprune.jobs.launch`), and most of those never see a framework.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader, SourcelessFileLoader
from types import ModuleType
from typing import Any

__all__ = ["Told", "Watch", "watch"]

Told = Callable[[ModuleType], None]


class Watch(MetaPathFinder):
    """Finds what the other finders find, and tells once a module has run.

    Args:
        patterns: ``fnmatch`` patterns of full module names.
        told: Called with each such module.
    """

    def __init__(self, patterns: Iterable[str], told: Told) -> None:
        self.patterns = tuple(dict.fromkeys(patterns))
        self.told = told

    def matches(self, name: str) -> bool:
        """Whether a module of that name is waited for; our own never are."""
        if name.partition(".")[0] == "ovsprune":
            return False
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that another finder gives, with a loader that tells; None for other names."""
        if not self.matches(fullname):
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if find is None or finder is self:
                continue
            spec: ModuleSpec | None = find(fullname, path, target)
            if spec is not None:
                self._tell_after(spec.loader)
                return spec
        return None

    def _tell_after(self, loader: Any) -> None:
        """Have ``loader``, made for this one module, tell after it ran the module."""
        if not isinstance(loader, SourceFileLoader | SourcelessFileLoader):
            return  # a loader that serves several modules, or no Python code
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)
            run(module)
            self.told(module)

        vars(loader)["exec_module"] = exec_module

    def remove(self) -> None:
        """Watch no more; twice does nothing."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


def watch(patterns: Iterable[str], told: Told) -> Watch:
    """Have ``told`` called with every module of such a name: those that are here, and to come.

    Args:
        patterns: ``fnmatch`` patterns of full module names.
        told: Called once a module, after its code ran.

    Returns:
        The watch; its ``remove()`` ends it.
    """
    finder = Watch(patterns, told)
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and finder.matches(name):
            told(module)
    sys.meta_path.insert(0, finder)
    return finder
