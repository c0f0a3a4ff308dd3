"""Looking at a layer's weight and bias, whatever type it is."""

from __future__ import annotations

from torch import Tensor, nn

from ovsprune.core.records import Axis
from ovsprune.slim.cutting import bare_axis

__all__ = ["bias_of", "find", "input_axis", "is_channelwise", "weight_axis", "weight_of"]


def find(tower: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """The layer of that dotted name, or the parameter, where it is no layer's.

    Raises:
        AttributeError: There is neither.
    """
    parent, _, own = name.rpartition(".")
    parameter = tower.get_submodule(parent)._parameters.get(own)
    return tower.get_submodule(name) if parameter is None else parameter


def weight_axis(layer: nn.Module | Tensor, axis: Axis) -> int:
    """Axis of the weight that an axis of a slice means (:class:`ovsprune.core.records.Slice`)."""
    if isinstance(layer, Tensor):
        return bare_axis(axis)
    return 0 if axis == "out" else 1


def weight_of(layer: nn.Module | Tensor) -> Tensor:
    """The layer's weight; a parameter that is no layer's is its own.

    Raises:
        TypeError: It has none.
    """
    if isinstance(layer, Tensor):
        return layer
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight")
    return weight


def bias_of(layer: nn.Module | Tensor) -> Tensor | None:
    """The layer's bias, or None."""
    bias = getattr(layer, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def is_channelwise(layer: nn.Module | Tensor) -> bool:
    """Whether every channel passes on its own: a norm, or a convolution of as many groups."""
    weight = weight_of(layer)
    groups = int(getattr(layer, "groups", 1))
    return weight.ndim == 1 or (groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1)


def input_axis(layer: nn.Module) -> int:
    """Axis of the layer's input along which its weight's columns lie.

    The last for a matrix [out, in], the second for the kernels [out, in, ...] of a convolution.
    """
    return -1 if weight_of(layer).ndim == 2 else 1
