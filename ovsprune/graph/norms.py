"""A norm behind a layer, folded into it while the tower is pruned, and taken out again.

``norm(W x + b) = s (W x + b) + t`` in evaluation mode, with ``s = gamma / sqrt(var + eps)`` and
``t = beta - s mean``. Folded, the layer is ``(s W) x + (s b + t)``: its output is what the network
sees, and it has a bias, into which a repair can put the mean of what was cut. Taken out, gamma and
the statistics are as before: changes of the weight go to the layer, those of the bias to beta.
"""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FoldedNorm", "fold_norm", "unfold_norm"]

_LEAST = 1e-6
"""A channel whose scale is below this share of the largest is as good as switched off."""


class FoldedNorm(nn.Module):
    """Stands where a norm stood that was folded into the layer before it; changes nothing.

    It has the norm's tensors under their own names, so that they are cut, and the scale can be
    read, as if the norm were there. Its bias is no parameter, for the layer has one now.

    Args:
        layer: The layer as it was.
        norm: The norm, with a scale and a bias.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.num_features: Any = norm.num_features
        self.weight: Any = norm.weight
        self._buffers.update(norm._buffers, bias=norm.get_parameter("bias").detach())
        form = copy(norm)
        form._parameters = dict.fromkeys(norm._parameters)
        form._buffers = dict.fromkeys(norm._buffers)
        self._form = (form,)  # In a tuple: it is no module of the tower.

    def forward(self, x: Tensor) -> Tensor:
        """``x``, of any shape; as of a norm, in memory of its own: who comes next may write."""
        return x.clone()

    def norm(self) -> nn.Module:
        """The norm, with copies of the tensors as they are now."""
        made = deepcopy(self._form[0])
        own = {name: getattr(self, name) for name in (*made._parameters, *made._buffers)}
        made._parameters = {
            name: nn.Parameter(own[name].detach().clone(), self.weight.requires_grad)
            for name in made._parameters
        }
        made._buffers = {
            name: None if own[name] is None else own[name].clone() for name in made._buffers
        }
        made.num_features = self.num_features
        return made


@torch.no_grad()
def fold_norm(layer: nn.Module, norm: nn.Module) -> tuple[nn.Module, FoldedNorm]:
    """The layer with the norm in it, and what takes the norm's place.

    Args:
        layer: A convolution or a matrix, with or without a bias.
        norm: A batch norm over its outputs, with running statistics, in evaluation mode.

    Returns:
        A layer of the same type with tensors of its own, and a place-holder that keeps both.
    """
    weight, bias = _folded(*_kept(layer, None, None), norm)
    return _with(layer, weight, bias), FoldedNorm(layer, norm)


@torch.no_grad()
def unfold_norm(
    layer: nn.Module,
    place: FoldedNorm,
    columns: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[nn.Module, nn.Module]:
    """The layer and the norm again, with what was changed since; what was not is bit for bit as is.

    Args:
        layer: The layer with the norm in it, as it is now.
        place: Second result of :func:`fold_norm`; its own tensors are cut like the layer's.
        columns: int64, the input channels that were kept; None for all.
        rows: int64, the output channels that were kept; None for all.

    Returns:
        The layer without the norm, and the norm, both with tensors of their own.
    """
    now: Any = layer
    norm: Any = place.norm()
    raw, own = _kept(place.layer, columns, rows)
    weight, bias = _folded(raw, own, norm)
    more = now.weight.detach().double() - weight.double()
    scale = _scale(norm)
    # No weight gets through a norm that multiplies by nothing: such a one is made to let it.
    shut = (scale.abs() <= _LEAST * scale.abs().max()) & more.flatten(1).any(1)
    step = more / torch.where(shut | (scale == 0), 1.0, scale).view(-1, *[1] * (raw.ndim - 1))
    new = (raw.double() + step).to(raw)
    norm.bias.add_((now.bias.detach().double() - bias.double()).to(norm.bias))
    if shut.any():
        new[shut] = now.weight.detach()[shut]
        norm.weight[shut] = (norm.running_var[shut].double() + norm.eps).sqrt().to(norm.weight)
        before = 0.0 if own is None else own[shut].double()
        shift = before - norm.running_mean[shut].double()
        norm.bias[shut] = (now.bias.detach()[shut].double() - shift).to(norm.bias)
    return _with(layer, new, None if own is None else own.clone()), norm


def _kept(layer: Any, columns: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of what is left of a layer."""
    weight, bias = layer.weight.detach(), layer.bias
    bias = None if bias is None else bias.detach()
    if columns is not None:
        weight = weight.index_select(1, columns.to(weight.device))
    if rows is not None:
        weight = weight.index_select(0, rows.to(weight.device))
        bias = None if bias is None else bias.index_select(0, rows.to(weight.device))
    return weight, bias


def _scale(norm: Any) -> Tensor:
    scale: Tensor = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale


def _folded(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    scale = _scale(norm)
    own = 0.0 if bias is None else bias.double()
    shift = norm.bias.detach().double() + scale * (own - norm.running_mean.double())
    folded = weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))
    return folded.to(weight), shift.to(weight)


def _with(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of the layer with other parameters, which need gradients as the old ones did."""
    copied = deepcopy(layer)
    flag = next(layer.parameters()).requires_grad
    copied._parameters["weight"] = nn.Parameter(weight, requires_grad=flag)
    copied._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=flag)
    return copied
