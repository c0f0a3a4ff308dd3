"""MACs of a framework's whole model, on inputs that its target or the user gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import OptionError

__all__ = ["describe", "whole_macs"]


def whole_macs(
    model: nn.Module, example: Any, prepare: Callable[[nn.Module], None] = lambda copied: None
) -> int:
    """MACs of ``model`` on ``example``, in evaluation mode; the model itself is never run.

    Counted on meta tensors; where the framework reads values on its way, on a copy of the model.

    Args:
        model: The framework's model.
        example: Its argument, a tuple of them, or a mapping of them by name.
        prepare: Done to the copy, in place, before it is run.

    Raises:
        OptionError: The model cannot be run on it.
    """
    try:
        from ovsprune.graph.copies import copied
        from ovsprune.graph.costs import on_meta
    except ImportError as error:
        raise OptionError(f"this torch has no FLOP counter ({error}); 2.1 or later has") from None
    try:
        shell = on_meta(model)
        prepare(shell)
        return _counted(shell, example, lambda t: t.to("meta"))
    except Exception:  # a framework may do anything with its input; the copy below is the test
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        same = copied(model).eval()
        prepare(same)
        return _counted(same, example, lambda t: t.to(device))
    except Exception as error:
        raise OptionError(
            f"{type(model).__name__} cannot be run on the example ({describe(example)}): "
            f"{type(error).__name__}: {error}; give what its forward takes (example=...)"
        ) from error


def _counted(model: nn.Module, example: Any, move: Callable[[Tensor], Tensor]) -> int:
    from ovsprune.graph.costs import macs

    example = _moved(example, move)
    if isinstance(example, Mapping):
        return macs(model, **example)
    return macs(model, *(example if isinstance(example, tuple) else (example,)))


def _moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, Mapping):
        return {key: _moved(item, move) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, move) for item in value)
    return value


def describe(example: Any) -> str:
    """Shapes of the tensors in an example, for people.

    Example:
        >>> describe({"images": torch.zeros(1, 3, 8, 8), "mode": "tensor"})
        'images [1, 3, 8, 8], mode tensor'
    """
    if isinstance(example, Tensor):
        return str(list(example.shape))
    if isinstance(example, Mapping):
        return ", ".join(f"{key} {describe(value)}" for key, value in example.items())
    if isinstance(example, (list, tuple)):
        return ", ".join(describe(value) for value in example)
    return str(example)[:40]
