"""Looking at a layer's weight and bias, whatever type it is."""

from __future__ import annotations

from torch import Tensor, nn

from ovsprune.core.records import Axis

__all__ = ["bias_of", "input_axis", "is_channelwise", "weight_axis", "weight_of"]


def weight_axis(axis: Axis) -> int:
    """Return the axis of a weight that a slice's axis means: 0 for rows, 1 for columns."""
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
    """The layer's bias, or None."""
    bias = getattr(layer, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def is_channelwise(layer: nn.Module) -> bool:
    """Whether every channel passes on its own: a norm, or a convolution of as many groups."""
    weight = weight_of(layer)
    groups = int(getattr(layer, "groups", 1))
    return weight.ndim == 1 or (groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1)


def input_axis(layer: nn.Module) -> int:
    """Axis of the layer's input along which its weight's columns lie.

    The last for a matrix [out, in], the second for the kernels [out, in, ...] of a convolution.
    """
    return -1 if weight_of(layer).ndim == 2 else 1
