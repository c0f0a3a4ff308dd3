"""Access to the weight and bias of a layer, independent of its type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ovsprune.core.records import Axis

__all__ = [
    "bias_of",
    "input_axis",
    "is_channelwise",
    "requires_grad_as",
    "weight_axis",
    "weight_of",
]


def weight_axis(axis: Axis) -> int:
    """Return the axis of a weight that corresponds to a slice's axis: 0 (rows) or 1 (columns)."""
    return 0 if axis == "out" else 1


def weight_of(layer: nn.Module) -> Tensor:
    """Return the layer's weight.

    Raises:
        TypeError: The layer has none.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight")
    return weight


def bias_of(layer: nn.Module) -> Tensor | None:
    """Return the layer's bias, or None."""
    bias = getattr(layer, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def is_channelwise(layer: nn.Module) -> bool:
    """Return True if every channel is processed separately: a norm or a depthwise convolution."""
    weight = weight_of(layer)
    groups = int(getattr(layer, "groups", 1))
    return weight.ndim == 1 or (groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1)


def input_axis(layer: nn.Module) -> int:
    """Return the axis of the layer's input that its weight's columns multiply.

    It is the last axis for a linear layer (weight [out, in]) and the second for a convolution
    (weight [out, in, ...]).
    """
    return -1 if weight_of(layer).ndim == 2 else 1


@contextmanager
def requires_grad_as(tower: nn.Module, flag: bool) -> Iterator[None]:
    """Set ``requires_grad`` of all parameters to ``flag`` while the context is open."""
    # Integer parameters (of quantised layers) cannot have gradients.
    changed = [p for p in tower.parameters() if p.is_floating_point() and p.requires_grad != flag]
    try:
        for parameter in changed:
            parameter.requires_grad_(flag)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not flag)
