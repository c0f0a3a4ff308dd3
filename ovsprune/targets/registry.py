"""Registry of the targets, and the fixes of a target by its name."""

from __future__ import annotations

from ovsprune.core.registry import Registry
from ovsprune.targets.hooks import install
from ovsprune.targets.protocol import Target

__all__ = ["TARGETS", "apply_compat"]

TARGETS: Registry[Target] = Registry("target", "ovsprune.targets")


def apply_compat(target: str) -> None:
    """Make a framework run with current libraries in this process; a second call does nothing.

    The page of the target lists the fixes; most targets have none. Call this before the framework
    builds its model (``ovsprune launch`` calls it).

    Args:
        target: Name of the target.

    Raises:
        UnknownNameError: There is no such target.
    """
    install(TARGETS.get(target).hooks)
