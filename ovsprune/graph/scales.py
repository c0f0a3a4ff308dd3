"""Fold a layer scale into the layer before it while the tower is pruned, and undo it afterwards.

``gamma * (W x + b) = (gamma W) x + gamma b``. The output of the folded layer is what is added to
the residual stream, so a refit can use the stream as its target. Unfolding leaves a row that was
not changed bit for bit as it was. A changed row keeps its gamma, unless the row of W would become
many times longer: layer scales start at 1e-6 (Touvron et al., CaiT, ICCV 2021) and many stay
small, and dividing a refitted row by such a gamma would exceed the range of half precision. Such a
row keeps its length instead, and gamma is increased.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FoldedScale", "fold_scale", "unfold_scale"]

_MAX_GROWTH = 4.0
"""Factor by which the norm of a row may grow before gamma is changed instead."""


class FoldedScale(nn.Module):
    """Identity in place of a layer scale; holds the scale and the layer before folding.

    Args:
        layer: Layer before folding.
        gamma: Scale, [m] or [m, 1, ...].
    """

    def __init__(self, layer: nn.Module, gamma: nn.Parameter) -> None:
        super().__init__()
        self.layer, self.gamma = layer, gamma

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


@torch.no_grad()
def fold_scale(layer: nn.Module, gamma: nn.Parameter) -> tuple[nn.Module, FoldedScale]:
    """Fold a layer scale into ``layer``.

    Args:
        layer: Linear layer or convolution with m outputs, with or without a bias.
        gamma: Factor of its output, [m] or [m, 1, ...].

    Returns:
        The folded layer, of the same type, with new tensors; and the module to put in the place of
        the scale, which holds the originals.
    """
    folded = deepcopy(layer)
    for name, tensor in _tensors(layer).items():
        _set_parameter(folded, name, _scale_rows(tensor, gamma.detach()))
    return folded, FoldedScale(layer, gamma)


@torch.no_grad()
def unfold_scale(
    layer: nn.Module, place: FoldedScale, columns: Tensor | None = None
) -> tuple[nn.Module, nn.Parameter]:
    """Separate a folded layer into the layer and the scale, including changes made since.

    Args:
        layer: The folded layer in its current state.
        place: Second result of :func:`fold_scale`.
        columns: int64, input channels that were kept; None for all.

    Returns:
        The layer without the scale, and the scale in its original shape, both with new tensors.
    """
    old, current = _tensors(place.layer), _tensors(layer)  # weight [m, n, ...], bias [m]
    if columns is not None:
        old["weight"] = old["weight"].index_select(1, columns.to(old["weight"].device))
    gamma = place.gamma.detach().double().flatten()  # [m]
    folded = {name: _scale_rows(tensor, place.gamma.detach()) for name, tensor in old.items()}
    # Rows in which the weight or the bias differs from what folding gave: [tensors, m]
    changed = torch.stack([(current[n] != t).reshape(len(t), -1).any(1) for n, t in folded.items()])
    before, after = _row_norms(old), _row_norms(current)  # [m], [m]
    before = torch.where(before > 0, before, 1.0)
    rescaled = changed.any(0) & (after > _MAX_GROWTH * gamma.abs() * before)  # [m]
    # Round the new gamma to its stored type first, so that the product below is exact for it.
    new = torch.where(rescaled, after / before, gamma).to(place.gamma)
    # A rescaled row is current / new; any other changed row is old + (current - folded) / gamma.
    keep_old = torch.where(rescaled, 0.0, 1.0)
    inverse = torch.where(changed.any(0), 1 / new.double(), 0.0)
    unfolded = deepcopy(layer)
    for name, tensor in current.items():
        delta = tensor.double() - _scale_rows(folded[name].double(), keep_old)
        rows = _scale_rows(old[name].double(), keep_old) + _scale_rows(delta, inverse)
        unchanged = _scale_rows(torch.ones_like(rows), (~changed.any(0)).double()).bool()
        _set_parameter(unfolded, name, torch.where(unchanged, old[name], rows.to(tensor)))
    new = new.view_as(place.gamma)
    return unfolded, nn.Parameter(new, requires_grad=place.gamma.requires_grad)


def _tensors(layer: Any) -> dict[str, Tensor]:
    """Return the weight and, if there is one, the bias."""
    tensors = {"weight": layer.weight, "bias": layer.bias}
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}


def _scale_rows(tensor: Tensor, factor: Tensor) -> Tensor:
    """Return ``tensor`` [m, ...] with row r multiplied by ``factor[r]``."""
    return tensor * factor.view(-1, *[1] * (tensor.ndim - 1))


def _row_norms(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the Euclidean norm of each output's weights and bias, float64 [m]."""
    rows = [tensor.double().reshape(len(tensor), -1) for tensor in tensors.values()]
    norms: Tensor = torch.linalg.vector_norm(torch.cat(rows, 1), dim=1)
    return norms


def _set_parameter(layer: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter, with the ``requires_grad`` flag of the old one."""
    flag = layer.get_parameter(name).requires_grad
    layer._parameters[name] = nn.Parameter(value, requires_grad=flag)
