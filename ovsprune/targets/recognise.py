"""Recognition of the target that a live model belongs to."""

from __future__ import annotations

from torch import nn

from ovsprune.core.errors import TargetError
from ovsprune.targets.registry import TARGETS

__all__ = ["recognise"]


def recognise(model: nn.Module, target: str = "auto") -> str | None:
    """Return the name of the target that recognises ``model``, or None.

    Args:
        model: A live model.
        target: Name of the only target to ask; ``"auto"`` asks all of them. A fallback target
            counts only if no other recognises the model.

    Raises:
        UnknownNameError: There is no such target.
        TargetError: Several targets recognise the model.
    """
    if target != "auto":
        return target if TARGETS.get(target).detect(model) else None
    names = [name for name in TARGETS if TARGETS.get(name).detect(model)]
    names = [name for name in names if not TARGETS.get(name).fallback] or names
    if len(names) > 1:
        raise TargetError(
            f"{type(model).__name__} matches several targets ({', '.join(names)}); name "
            f"one of them (target={names[0]!r}, or --target {names[0]})"
        )
    return names[0] if names else None
