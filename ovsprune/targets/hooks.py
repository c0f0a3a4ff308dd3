"""Wrapping of a framework's functions, given by import path, when their modules are imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

from ovsprune.core.import_hooks import watch

__all__ = ["Hook", "Wrap", "install", "wrap_functions"]

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Function that returns the replacement of a function."""

_MARK = "_ovsprune_hook"


@dataclass(frozen=True)
class Hook:
    """Function of a framework, and its replacement.

    Attributes:
        module: Pattern (``fnmatch``) of the full name of its module.
        name: Dotted name in the module (``"build_model"``, ``"Checkpointer._load_model"``).
        wrap: Receives the function and returns its replacement.
        requires: Names that the module must also have, if the pattern alone is ambiguous.
    """

    module: str
    name: str
    wrap: Wrap
    requires: tuple[str, ...] = ()


def wrap_functions(hooks: Iterable[Hook], module: ModuleType) -> None:
    """Wrap the functions of ``module`` that hooks name; missing functions are skipped."""
    for hook in hooks:
        required = all(hasattr(module, name) for name in hook.requires)
        if required and fnmatchcase(module.__name__, hook.module):
            _wrap(hook, module)


def _wrap(hook: Hook, module: ModuleType) -> None:
    """Wrap one function, unless it is missing or wrapped already."""
    path, _, leaf = hook.name.rpartition(".")
    owner: Any = module  # becomes the class that defines a method
    for name in filter(None, path.split(".")):
        owner = getattr(owner, name, None)
    # vars and not getattr, which would bind a classmethod
    entry = vars(owner).get(leaf) if owner is not None else None
    kind = type(entry) if isinstance(entry, classmethod | staticmethod) else None
    function = entry.__func__ if isinstance(entry, classmethod | staticmethod) else entry
    if not callable(function) or getattr(function, _MARK, None) is hook:
        return
    wrapper = hook.wrap(function)
    setattr(wrapper, _MARK, hook)
    setattr(owner, leaf, wrapper if kind is None else kind(wrapper))


_installed: set[Hook] = set()


def install(hooks: Iterable[Hook]) -> None:
    """Install hooks in this process: at once, or when their modules are imported.

    Hooks that are installed already are skipped.
    """
    new = tuple(hook for hook in hooks if hook not in _installed)
    _installed.update(new)
    if new:
        watch([hook.module for hook in new], lambda module: wrap_functions(new, module))
