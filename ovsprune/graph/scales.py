"""A layer scale behind a layer, folded into it while the tower is pruned, and taken out again.

``gamma * (W x + b)`` is ``(gamma W) x + gamma b``: folded, the layer's output is what is added to
the residual stream, so that a refit can be aimed at the stream. Taken out, a row that was not
changed is bit for bit as it was. One that was changed keeps its gamma, unless the row would have to
be many times as long as it was: scales start at 1e-6 (Touvron et al., CaiT, ICCV 2021) and many
stay small, and what a refit puts into such a channel would not fit half precision. Its gamma is
opened then: the row keeps its length, and gamma takes the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FoldedScale", "fold_scale", "unfold_scale"]

_LONGEST = 4.0
"""A row of the layer may become so many times as long before its gamma is opened."""


class FoldedScale(nn.Module):
    """Keeps a layer and the scale that was folded into it; changes nothing that goes through.

    Args:
        layer: The layer as it was.
        gamma: The scale, of m numbers.
    """

    def __init__(self, layer: nn.Module, gamma: nn.Parameter) -> None:
        super().__init__()
        self.layer, self.gamma = layer, gamma

    def forward(self, x: Tensor) -> Tensor:
        """``x``, of any shape."""
        return x


@torch.no_grad()
def fold_scale(layer: nn.Module, gamma: nn.Parameter) -> tuple[nn.Module, FoldedScale]:
    """The layer with the scale in it, and what keeps both as they were.

    Args:
        layer: A matrix or convolution of m outputs, with or without a bias.
        gamma: [m] or [m, 1, ...], multiplied with its output.

    Returns:
        A layer of the same type with tensors of its own.
    """
    folded = deepcopy(layer)
    for name, tensor in _tensors(layer).items():
        _put(folded, name, _times(tensor, gamma.detach()))
    return folded, FoldedScale(layer, gamma)


@torch.no_grad()
def unfold_scale(
    layer: nn.Module, place: FoldedScale, columns: Tensor | None = None
) -> tuple[nn.Module, nn.Parameter]:
    """The layer and the scale again, with what was changed since.

    Args:
        layer: The layer with the scale in it, as it is now.
        place: The other half of what :func:`fold_scale` gave.
        columns: int64, the input channels that were kept; None for all.

    Returns:
        The layer without the scale, and the scale in its own shape, both with tensors of their own.
    """
    old, now = _tensors(place.layer), _tensors(layer)
    if columns is not None:
        old["weight"] = old["weight"].index_select(1, columns.to(old["weight"].device))
    gamma = place.gamma.detach().double().flatten()
    folded = {name: _times(tensor, place.gamma.detach()) for name, tensor in old.items()}
    changed = torch.stack([(now[n] != t).reshape(len(t), -1).any(1) for n, t in folded.items()])
    before, after = _lengths(old), _lengths(now)
    before = torch.where(before > 0, before, 1.0)
    opened = changed.any(0) & (after > _LONGEST * gamma.abs() * before)
    # as it will be stored: the product is to be what it is now
    new = torch.where(opened, after / before, gamma).to(place.gamma)
    kept = torch.where(opened, 0.0, 1.0)
    inverse = torch.where(changed.any(0), 1 / new.double(), 0.0)
    bare = deepcopy(layer)
    for name, tensor in now.items():
        more = tensor.double() - _times(folded[name].double(), kept)
        row = _times(old[name].double(), kept) + _times(more, inverse)
        same = _times(torch.ones_like(row), (~changed.any(0)).double()).bool()
        _put(bare, name, torch.where(same, old[name], row.to(tensor)))
    new = new.view_as(place.gamma)
    return bare, nn.Parameter(new, requires_grad=place.gamma.requires_grad)


def _tensors(layer: Any) -> dict[str, Tensor]:
    found = {"weight": layer.weight, "bias": layer.bias}
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


def _times(tensor: Tensor, factor: Tensor) -> Tensor:
    """Row r of the tensor times factor r."""
    return tensor * factor.view(-1, *[1] * (tensor.ndim - 1))


def _lengths(tensors: Mapping[str, Tensor]) -> Tensor:
    """Length of each output's weights and bias, float64 [m]."""
    rows = [tensor.double().reshape(len(tensor), -1) for tensor in tensors.values()]
    lengths: Tensor = torch.linalg.vector_norm(torch.cat(rows, 1), dim=1)
    return lengths


def _put(layer: nn.Module, name: str, value: Tensor) -> None:
    flag = layer.get_parameter(name).requires_grad
    layer._parameters[name] = nn.Parameter(value, requires_grad=flag)
