"""MACs of a framework's complete model on a given example input."""

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
    """Count the MACs of ``model`` on ``example`` in evaluation mode, without running it.

    A copy on meta tensors is run; if that fails (the framework reads values), a normal copy.

    Args:
        model: Model of a framework.
        example: Argument of the model, a tuple of arguments, or a mapping by name.
        prepare: Modifies the copy in place before it is run.

    Raises:
        OptionError: The model cannot be run on the example.
    """
    try:
        # Not above, because a framework may run on an older torch.
        from ovsprune.graph.copies import copy_model
        from ovsprune.graph.costs import on_meta
    except ImportError as error:
        raise OptionError(
            f"torch has no FLOP counter ({error}); install torch 2.1 or later"
        ) from None
    # Meta tensors have shapes only: counting needs neither memory nor time.
    try:
        shell = on_meta(model)
        prepare(shell)
        return _counted(shell, example, lambda t: t.to("meta"))
    except Exception:  # frameworks fail on meta tensors in many ways; try a real copy
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        copy = copy_model(model).eval()
        prepare(copy)
        return _counted(copy, example, lambda t: t.to(device))
    except Exception as error:
        raise OptionError(
            f"{type(model).__name__} cannot be run on the example ({describe(example)}): "
            f"{type(error).__name__}: {error}; give the arguments of its forward (example=...)"
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
        return {key: _moved(inner, move) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(inner, move) for inner in value)
    return value


def describe(example: Any) -> str:
    """Describe the shapes of the tensors in an example.

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
