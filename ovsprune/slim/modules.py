"""Slim copies of single modules, the building blocks of targets.

A copy has its own tensors and shares every other attribute with the original, so its class, hooks
and flags are the same. The original is not modified.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.slim.attention import SlimAttention
from ovsprune.slim.cutting import AXIS_TENSORS
from ovsprune.slim.norms import ZeroPaddedLayerNorm
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
# Attributes that hold the width of a layer, by axis.
_WIDTH_ATTRIBUTES = {
    "out": ("out_features", "out_channels", "num_features"),
    "in": ("in_features", "in_channels"),
}


def slim_attention(
    mha: nn.Module, kept_heads: Sequence[int] | Tensor
) -> SlimAttention | TimmAttention:
    """Build a slim replacement of ``mha`` with the weights of some heads, its hooks and flags.

    Args:
        mha: ``nn.MultiheadAttention``, a module with its parameters, or an attention of timm.
        kept_heads: Dense indices of the kept heads, strictly ascending.

    Raises:
        TargetError: ``mha`` has a component that does not support removing heads.
        OptionError: ``kept_heads`` are not valid.
    """
    heads = kept_heads.tolist() if isinstance(kept_heads, Tensor) else list(kept_heads)
    build = TimmAttention if is_timm_attention(mha) else SlimAttention.from_dense
    slim: SlimAttention | TimmAttention = build(mha, heads)
    flags = {name: p.requires_grad for name, p in mha.named_parameters()}
    for name, parameter in slim.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    for name in _HOOKS:
        if name in mha.__dict__:
            slim.__dict__[name] = mha.__dict__[name]
    return slim


def slim_module(module: nn.Module, index: Mapping[str, Tensor]) -> nn.Module:
    """Copy a linear layer, convolution or norm with a subset of its channels.

    Args:
        module: The dense module.
        index: Axis (``"out"``: rows, bias, statistics; ``"in"``: columns) -> int64 [kept], the
            channels to keep.

    Raises:
        TargetError: The module has no plain weight or has groups of several channels, or an
            index exceeds the size of the weight.
    """
    weight, depthwise = _check_sliceable(module, index)
    for axis, kept in index.items():
        dim = 0 if axis == "out" else 1
        if weight.dim() <= dim or (kept.numel() and int(kept.max()) >= weight.shape[dim]):
            raise TargetError(
                f"{type(module).__name__} has a weight of shape {tuple(weight.shape)}, too small "
                f"for index {int(kept.max())} on axis {dim}; check that the mask belongs to this "
                "model"
            )
    # copy.copy shares the tables of nn.Module, so each is replaced by a new one below.
    slim = copy.copy(module)
    slim._parameters = {
        n: None if p is None else nn.Parameter(_select(n, p.detach(), index), p.requires_grad)
        for n, p in module._parameters.items()
    }
    slim._buffers = {
        n: None if b is None else _select(n, b, index) for n, b in module._buffers.items()
    }
    slim._modules = dict(module._modules)
    for axis, kept in index.items():
        for name in (*_WIDTH_ATTRIBUTES[axis], *(("in_channels", "groups") if depthwise else ())):
            if hasattr(slim, name):
                slim.__dict__[name] = kept.numel()
        if axis == "out" and isinstance(slim, nn.LayerNorm):
            slim.normalized_shape = (kept.numel(),)
    return _zero_padded(module, slim) if isinstance(module, nn.LayerNorm) else slim


def _check_sliceable(module: nn.Module, index: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
    """Return the weight of ``module``, and true if it is a depthwise convolution."""
    # frozen norms (torchvision's FrozenBatchNorm2d) keep their weight in a buffer
    weight = {**module._buffers, **module._parameters}.get("weight")
    if weight is None:
        raise TargetError(
            f"{type(module).__name__} has no parameter named weight, which is needed to remove "
            "channels; first remove its wrapper (quantisation, LoRA, parametrisation)"
        )
    groups = getattr(module, "groups", 1)
    depthwise = groups > 1 and weight.shape[:2] == (groups, 1) and set(index) == {"out"}
    if groups != 1 and not depthwise:
        raise TargetError(
            f"{type(module).__name__} has {groups} groups of several channels; single channels can "
            "be removed only with one group, or with one channel per group; protect this layer"
        )
    return weight, depthwise


def _zero_padded(dense: nn.LayerNorm, slim: Any) -> ZeroPaddedLayerNorm:
    """Convert a slim layer norm to one that counts the removed channels as zeros."""
    padded = ZeroPaddedLayerNorm(slim)
    # The dense module may be padded already; its width counts the channels cut earlier, too.
    padded.dense_width = ZeroPaddedLayerNorm(dense).dense_width
    for name in _HOOKS:
        padded.__dict__[name] = slim.__dict__[name]
    return padded


def _select(name: str, tensor: Tensor, index: Mapping[str, Tensor]) -> Tensor:
    """Return a copy of a parameter or buffer with the kept channels, [kept, ...] or [out, kept]."""
    copied = tensor
    for axis, kept in index.items():
        if name in AXIS_TENSORS[axis]:
            copied = copied.index_select(0 if axis == "out" else 1, kept.to(tensor.device))
    # index_select copies; a tensor that was not cut still needs a copy
    return tensor.clone() if copied is tensor else copied
