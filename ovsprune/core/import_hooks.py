"""Import hooks: call a function after a module was imported and before it is used.

This file uses the standard library only. It runs at the start of every Python process of a launched
command (:mod:`ovsprune.launching.command`), and most of these processes import no framework.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader, SourcelessFileLoader
from types import ModuleType
from typing import Any

__all__ = ["ImportCallback", "ImportWatcher", "watch"]

ImportCallback = Callable[[ModuleType], None]


class ImportWatcher(MetaPathFinder):
    """Finder that delegates to the other finders and reports modules after their code has run.

    Args:
        patterns: ``fnmatch`` patterns of full module names.
        callback: Called with each matching module.
    """

    def __init__(self, patterns: Iterable[str], callback: ImportCallback) -> None:
        self.patterns = tuple(dict.fromkeys(patterns))
        self.callback = callback

    def matches(self, name: str) -> bool:
        """Return True if a module of this name is watched; modules of ovsprune never are."""
        if name.partition(".")[0] == "ovsprune":
            return False
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of another finder with a patched loader; None for other names."""
        if not self.matches(fullname):
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)  # finders for old Pythons lack it
            if find is None or finder is self:
                continue
            spec: ModuleSpec | None = find(fullname, path, target)
            if spec is not None:
                self._report_after(spec.loader)
                return spec
        return None

    def _report_after(self, loader: Any) -> None:
        """Patch ``loader``, made for one module, to call the callback after the module has run."""
        if not isinstance(loader, SourceFileLoader | SourcelessFileLoader):
            return  # a loader that is shared by modules, or loads no Python code
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)  # a reload runs unpatched
            run(module)
            self.callback(module)

        vars(loader)["exec_module"] = exec_module

    def remove(self) -> None:
        """Stop watching; a second call does nothing."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


def watch(patterns: Iterable[str], callback: ImportCallback) -> ImportWatcher:
    """Call a function with every matching module: those already imported, and later ones.

    Args:
        patterns: ``fnmatch`` patterns of full module names.
        callback: Called once per module, after its code has run.

    Returns:
        The watcher; its ``remove()`` stops it.
    """
    finder = ImportWatcher(patterns, callback)
    # A copy, because the callback may import modules. Entries that are no modules also occur: None
    # stops an import.
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and finder.matches(name):
            callback(module)
    sys.meta_path.insert(0, finder)  # before the finders that it delegates to
    return finder
