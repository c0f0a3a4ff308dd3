"""Exchanging functions of a framework, each named by its import path, when it gets imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

from ovsprune.core.import_hooks import watch

__all__ = ["Hook", "Wrap", "apply_compat", "install", "put"]

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes of a function the one that takes its place."""

_MARK = "_ovsprune_hook"


@dataclass(frozen=True)
class Hook:
    """One function of a framework, and what takes its place.

    Attributes:
        module: Pattern (``fnmatch``) of the full name of its module.
        name: Its dotted name there (``"build_model"``, ``"Checkpointer._load_model"``).
        wrap: The function, to the one that takes its place.
        beside: Names that the module must have, too, where the pattern says little.
    """

    module: str
    name: str
    wrap: Wrap
    beside: tuple[str, ...] = ()


def put(hooks: Iterable[Hook], module: ModuleType) -> list[Hook]:
    """Put the hooks that belong to ``module`` in place; those that are in place already stay.

    Returns:
        The hooks that were put; one whose function the module lacks is left out.
    """
    return [
        hook
        for hook in hooks
        if fnmatchcase(module.__name__, hook.module)
        and all(hasattr(module, name) for name in hook.requires)
        and _put(hook, module)
    ]


def _put(hook: Hook, module: ModuleType) -> bool:
    path, _, leaf = hook.name.rpartition(".")
    owner: Any = module
    for name in filter(None, path.split(".")):
        owner = getattr(owner, name, None)
    found = vars(owner).get(leaf) if owner is not None else None
    kind = type(found) if isinstance(found, classmethod | staticmethod) else None
    function = found.__func__ if isinstance(found, classmethod | staticmethod) else found
    if not callable(function) or getattr(function, _MARK, None) is hook:
        return False
    wrapper = hook.wrap(function)
    setattr(wrapper, _MARK, hook)
    setattr(owner, leaf, wrapper if kind is None else kind(wrapper))
    return True


_installed: set[Hook] = set()


def install(hooks: Iterable[Hook]) -> None:
    """Put hooks in place for this process: at once, or when their modules are imported.

    What is installed already stays as it is.
    """
    new = tuple(hook for hook in hooks if hook not in _installed)
    _installed.update(new)

    def told(module: ModuleType) -> None:
        put(new, module)

    if new:
        watch([hook.module for hook in new], told)


def apply_compat(target: str) -> None:
    """Let a framework run with the libraries of today, for this process; twice does nothing.

    The target's page lists the fixes; most targets have none. Call it before the framework builds
    its model (``ovsprune launch`` does it by itself).

    Args:
        target: Name of the target.

    Raises:
        UnknownNameError: There is no such target.
    """
    from ovsprune.targets import TARGETS

    install(TARGETS.get(target).hooks)
