"""Slim copies of single modules: the parts from which a target builds its own attachment.

A copy has tensors of its own and shares every other attribute with its original, so subclass,
hooks and flags stay; the original is not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.slim.attention import SlimAttention
from ovsprune.slim.norms import CountedLayerNorm
from ovsprune.slim.timm_attention import TimmAttention, is_timm_attention

__all__ = ["slim_attention", "slim_module"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# Which attribute says how wide a layer is, by axis.
_WIDTHS = {
    "out": ("out_features", "out_channels", "num_features"),
    "in": ("in_features", "in_channels"),
}


def slim_attention(
    mha: nn.Module, kept_heads: Sequence[int] | Tensor
) -> SlimAttention | TimmAttention:
    """A slim attention to stand where ``mha`` stood, with its weights, hooks, and flags.

    Args:
        mha: ``nn.MultiheadAttention`` or a module with its parameters, or one of timm's.
        kept_heads: Dense indices, strictly ascending.

    Raises:
        TargetError: ``mha`` has something that a cut by heads would not leave as it was.
        OptionError: ``kept_heads`` are not valid.
    """
    heads = kept_heads.tolist() if isinstance(kept_heads, Tensor) else list(kept_heads)
    slim: SlimAttention | TimmAttention
    if is_timm_attention(mha):
        slim = TimmAttention(mha, heads)
    else:
        slim = SlimAttention.from_dense(mha, heads)
    flags = {name: p.requires_grad for name, p in mha.named_parameters()}
    for name, parameter in slim.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    for name in _HOOKS:
        if name in mha.__dict__:
            slim.__dict__[name] = mha.__dict__[name]
    return slim


def slim_module(module: nn.Module, index: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a linear map, convolution, or norm with some of its channels.

    Args:
        module: The dense module.
        index: Axis (``"out"``: rows, bias, statistics; ``"in"``: columns) to int64 indices.

    Raises:
        TargetError: It has no plain weight, or an index reaches beyond it.
    """
    # norms that never learn have their weight among the statistics
    weight = {**module._buffers, **module._parameters}.get("weight")
    if weight is None:
        raise TargetError(
            f"{type(module).__name__} has no plain weight to cut; take off what wraps it "
            "(quantisation, LoRA, parametrisation) first"
        )
    groups = getattr(module, "groups", 1)
    depthwise = groups > 1 and weight.shape[:2] == (groups, 1) and set(index) == {"out"}
    if groups != 1 and not depthwise:
        raise TargetError(
            f"{type(module).__name__} has {groups} groups of several channels, which a mask cannot "
            "cut"
        )
    slim = copy.copy(module)
    slim._parameters = {
        name: None if p is None else nn.Parameter(p.detach().clone(), p.requires_grad)
        for name, p in module._parameters.items()
    }
    slim._buffers = {n: None if b is None else b.clone() for n, b in module._buffers.items()}
    slim._modules = dict(module._modules)
    for axis, chosen in index.items():
        dim = 0 if axis == "out" else 1
        if weight.dim() <= dim or (chosen.numel() and int(chosen.max()) >= weight.shape[dim]):
            raise TargetError(
                f"{type(module).__name__} has a weight of shape {tuple(weight.shape)}, too small "
                f"for index {int(chosen.max())} on axis {dim}"
            )
        for name in ("weight", "bias") if axis == "out" else ("weight",):
            old = slim._parameters.get(name)
            if old is not None:
                slim._parameters[name] = nn.Parameter(_chosen(old, dim, chosen), old.requires_grad)
        for name in ("weight", "bias", "running_mean", "running_var") if axis == "out" else ():
            statistics = slim._buffers.get(name)
            if statistics is not None:
                slim._buffers[name] = _chosen(statistics, 0, chosen)
        for name in (*_WIDTHS[axis], *(("in_channels", "groups") if depthwise else ())):
            if hasattr(slim, name):
                slim.__dict__[name] = chosen.numel()
        if axis == "out" and isinstance(slim, nn.LayerNorm):
            slim.normalized_shape = (chosen.numel(),)
    return _counted(module, slim) if isinstance(module, nn.LayerNorm) else slim


def _counted(dense: nn.LayerNorm, slim: Any) -> CountedLayerNorm:
    """The slim norm with the dense one's statistics."""
    counted = CountedLayerNorm(slim)
    counted.dense_width = CountedLayerNorm(dense).dense_width
    for name in _HOOKS:
        counted.__dict__[name] = slim.__dict__[name]
    return counted


@torch.no_grad()
def _chosen(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    return tensor.detach().index_select(dim, index.to(tensor.device))
