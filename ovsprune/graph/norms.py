"""Fold a batch norm into the layer before it while the tower is pruned, and undo it afterwards.

In evaluation mode ``norm(W x + b) = s (W x + b) + t``, with ``s = gamma / sqrt(var + eps)`` and
``t = beta - s mean``. The folded layer is ``(s W) x + (s b + t)``. Its output is the activation
that the network uses, and it has a bias, to which a recovery can add the mean of removed units.
Unfolding keeps gamma and the statistics: a change of the folded weight goes to W, a change of the
folded bias to beta.
"""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FoldedNorm", "fold_norm", "unfold_norm"]

_MIN_RELATIVE_SCALE = 1e-6
"""A channel whose scale s is at most this fraction of the largest counts as switched off."""


class FoldedNorm(nn.Module):
    """Identity in place of a norm that was folded into the layer before it.

    It holds the norm's tensors under their names, so that they are cut with the channels and the
    scale can be read. Its bias is a buffer, because the folded layer has the bias as a parameter.

    Args:
        layer: Layer before folding.
        norm: Norm with a scale and a bias.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.num_features: Any = norm.num_features
        self.weight: Any = norm.weight
        self._buffers.update(norm._buffers, bias=norm.get_parameter("bias").detach())
        template = copy(norm)
        template._parameters = dict.fromkeys(norm._parameters)
        template._buffers = dict.fromkeys(norm._buffers)
        self._template = (template,)  # The tuple keeps it out of the tower's modules.

    def forward(self, x: Tensor) -> Tensor:
        """Return a copy of ``x``: the next layer may modify a norm's output in place."""
        return x.clone()

    def norm(self) -> nn.Module:
        """Return the norm, with copies of the current tensors."""
        norm = deepcopy(self._template[0])
        tensors = {name: getattr(self, name) for name in (*norm._parameters, *norm._buffers)}
        norm._parameters = {
            name: nn.Parameter(tensors[name].detach().clone(), self.weight.requires_grad)
            for name in norm._parameters
        }
        norm._buffers = {
            name: None if tensors[name] is None else tensors[name].clone() for name in norm._buffers
        }
        norm.num_features = self.num_features
        return norm


@torch.no_grad()
def fold_norm(layer: nn.Module, norm: nn.Module) -> tuple[nn.Module, FoldedNorm]:
    """Fold ``norm`` into ``layer``.

    Args:
        layer: Convolution or linear layer, with or without a bias.
        norm: Batch norm of its outputs, with running statistics, in evaluation mode.

    Returns:
        The folded layer, of the same type, with new tensors; and the module to put in the place of
        the norm, which holds the originals.
    """
    weight, bias = _folded(*_kept(layer, None, None), norm)
    return _with(layer, weight, bias), FoldedNorm(layer, norm)


@torch.no_grad()
def unfold_norm(
    layer: nn.Module, place: FoldedNorm, columns: Tensor | None = None, rows: Tensor | None = None
) -> tuple[nn.Module, nn.Module]:
    """Separate a folded layer into the layer and the norm, including changes made since.

    Entries that were not changed are bit for bit those before folding.

    Args:
        layer: The folded layer in its current state.
        place: Second result of :func:`fold_norm`; its own tensors were cut with the layer.
        columns: int64, input channels that were kept; None for all.
        rows: int64, output channels that were kept; None for all.

    Returns:
        The layer without the norm, and the norm, both with new tensors.
    """
    folded: Any = layer
    norm: Any = place.norm()
    W, b = _kept(place.layer, columns, rows)  # [m, n, ...], [m]
    sW, sb_t = _folded(W, b, norm)  # [m, n, ...], [m]
    # Difference to what folding alone would give now: the change made by pruning and recovery.
    delta = folded.weight.detach().double() - sW.double()  # [m, n, ...]
    s = _scale(norm)  # [m]
    # A scale of about 0 would need an infinite W to express the change: it is set to 1 instead.
    reset = (s.abs() <= _MIN_RELATIVE_SCALE * s.abs().max()) & delta.flatten(1).any(1)  # [m]
    step = delta / torch.where(reset | (s == 0), 1.0, s).view(-1, *[1] * (W.ndim - 1))
    new = (W.double() + step).to(W)
    norm.bias.add_((folded.bias.detach().double() - sb_t.double()).to(norm.bias))
    if reset.any():
        # With gamma = sqrt(var + eps), s is 1 and the layer takes the folded weight as it is.
        new[reset] = folded.weight.detach()[reset]
        norm.weight[reset] = (norm.running_var[reset].double() + norm.eps).sqrt().to(norm.weight)
        dense_bias = 0.0 if b is None else b[reset].double()
        shift = dense_bias - norm.running_mean[reset].double()
        norm.bias[reset] = (folded.bias.detach()[reset].double() - shift).to(norm.bias)
    return _with(layer, new, None if b is None else b.clone()), norm


def _kept(layer: Any, columns: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the kept part of a layer's weight and bias."""
    weight, bias = layer.weight.detach(), layer.bias
    bias = None if bias is None else bias.detach()
    if columns is not None:
        weight = weight.index_select(1, columns.to(weight.device))
    if rows is not None:
        weight = weight.index_select(0, rows.to(weight.device))
        bias = None if bias is None else bias.index_select(0, rows.to(weight.device))
    return weight, bias


def _scale(norm: Any) -> Tensor:
    """Return s = gamma / sqrt(var + eps), float64 [m]."""
    s: Tensor = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return s


def _folded(W: Tensor, b: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """Return s W [m, n, ...] and s b + t = beta + s (b - mean) [m], in the type of W."""
    s = _scale(norm)  # [m]
    bias = 0.0 if b is None else b.double()
    shift = norm.bias.detach().double() + s * (bias - norm.running_mean.double())  # [m]
    weight = W.double() * s.view(-1, *[1] * (W.ndim - 1))
    return weight.to(W), shift.to(W)


def _with(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a copy of the layer with new parameters and its ``requires_grad`` flag."""
    copied = deepcopy(layer)
    flag = next(layer.parameters()).requires_grad
    copied._parameters["weight"] = nn.Parameter(weight, requires_grad=flag)
    copied._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=flag)
    return copied
