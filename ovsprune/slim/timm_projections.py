"""Projections of timm's attention modules, and copies of their parts.

timm stores queries, keys and values in one linear layer ``qkv`` or in three (``q_proj``,
``k_proj``, ``v_proj``), and their biases in these layers or as parameters of the attention
(``q_bias``, ``v_bias``; keys then have no bias).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.slim.linear import linear
from ovsprune.slim.norms import ZeroPaddedLayerNorm

__all__ = [
    "BIASES",
    "PROJECTIONS",
    "check_supported",
    "copy_with",
    "frozen_linear",
    "frozen_parameter",
    "is_timm_attention",
    "projection_tensors",
    "slice_norm",
]

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""Layers of an attention that does not fuse queries, keys and values."""

BIASES = ("q_bias", "k_bias", "v_bias")
"""Biases that are parameters of the attention, next to a ``qkv`` without bias."""


def is_timm_attention(module: nn.Module) -> bool:
    """Return true if ``module`` has the projections of an attention by timm's names."""
    names = dict(module.named_children())
    return (
        hasattr(module, "num_heads")
        and isinstance(names.get("proj"), nn.Linear)
        and any(isinstance(names.get(name), nn.Linear) for name in ("qkv", "q_proj"))
    )


def check_supported(module: nn.Module) -> None:
    """Check that heads can be removed from an attention.

    Raises:
        TargetError: ``module`` is no attention of timm, has a gate, or shares keys and values
            between heads.
    """
    if not is_timm_attention(module):
        raise TargetError(
            f"{type(module).__name__} has no layers by timm's names; expected num_heads, proj, and "
            "qkv or q_proj"
        )
    unsupported = ["a gate"] if getattr(module, "gate", None) is not None else []
    if getattr(module, "num_kv_heads", module.num_heads) != module.num_heads:
        unsupported.append("keys and values shared by several heads")
    if unsupported:
        raise TargetError(
            f"{type(module).__name__} uses {' and '.join(unsupported)}, from which single heads "
            "cannot be removed; protect this block"
        )


def projection_tensors(attention: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return W_q, W_k and W_v of an attention of timm, and their biases, detached.

    Returns:
        Three weights [heads * head_dim, C]; three biases [heads * head_dim] or None.
    """
    if attention.qkv is None:
        layers = [getattr(attention, name) for name in PROJECTIONS]
        biases = [None if m.bias is None else m.bias.detach() for m in layers]
        return [m.weight.detach() for m in layers], biases
    weights = list(attention.qkv.weight.detach().chunk(3))  # each [heads * head_dim, C]
    if getattr(attention, "q_bias", None) is not None:
        return weights, [attention.q_bias.detach(), None, attention.v_bias.detach()]
    bias = attention.qkv.bias
    return weights, [None] * 3 if bias is None else list(bias.detach().chunk(3))


def copy_with(attention: nn.Module, entries: Mapping[str, Any]) -> Any:
    """Copy a module with some submodules and parameters exchanged; unknown names are ignored."""
    other = copy.copy(attention)
    other._modules = {n: entries.get(n, old) for n, old in attention._modules.items()}
    other._parameters = {n: entries.get(n, old) for n, old in attention._parameters.items()}
    return other


def frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Build a linear layer with copies of ``weight`` [out, in] and ``bias`` [out], frozen."""
    # On meta: the random weights would only be replaced.
    layer = linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = frozen_parameter(weight)
    if bias is not None:
        layer.bias = frozen_parameter(bias)
    return layer


def frozen_parameter(tensor: Tensor) -> nn.Parameter:
    """Copy ``tensor`` to a parameter without gradient."""
    return nn.Parameter(tensor.clone(memory_format=torch.contiguous_format), requires_grad=False)


def slice_norm(norm: nn.Module | None, channels: Tensor) -> nn.Module | None:
    """Keep some channels of a layer norm and count the removed ones as zeros.

    Args:
        norm: Norm before the output projection. Anything but a layer norm is returned unchanged.
        channels: int64 [kept], channels of ``norm``.
    """
    # None and nn.Identity have no channels to keep.
    if not isinstance(norm, nn.LayerNorm):
        return norm
    padded = ZeroPaddedLayerNorm(copy.copy(norm))
    for name, tensor in norm._parameters.items():
        value = None if tensor is None else frozen_parameter(tensor.detach()[channels])
        setattr(padded, name, value)
    padded.normalized_shape = (len(channels),)
    return padded
