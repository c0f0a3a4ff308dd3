"""Compatibility of MendelXu/SAN with recent open_clip, and with removed heads.

SAN was written for open_clip 2.16 and uses parts of its model directly. open_clip removed some
attributes in 2.23, and its blocks take [N, L, E] instead of [L, N, E] since 2.26. The hooks of this
file restore both on the open_clip model just before SAN receives it. With open_clip 2.16 they
change nothing. A further hook replaces SAN's cross attention where heads were removed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ovsprune.slim import SlimAttention
from ovsprune.slim.attention_masks import gather_heads
from ovsprune.targets.hooks import Hook

__all__ = ["HOOKS", "VISUAL", "cross_attention_with_self", "restore_old_interface"]


def restore_old_interface(clip: nn.Module) -> None:
    """Restore the interface of open_clip 2.16 on a model of a newer version, in place.

    Do not call the model's own ``forward`` afterwards; SAN calls the blocks directly.

    Args:
        clip: A vision transformer of open_clip (its missing attributes are added), or a CLIP
            model, of which SAN calls the text blocks.
    """
    if hasattr(clip, "conv1"):
        if not hasattr(clip, "input_patchnorm"):  # off in every model of open_clip
            clip.input_patchnorm = False  # type: ignore[assignment]
            clip.patchnorm_pre_ln = nn.Identity()
        if not hasattr(clip, "global_average_pool"):
            clip.global_average_pool = getattr(clip, "pool_type", "tok") == "avg"  # type: ignore[assignment]
    for module in clip.get_submodule("transformer").modules():
        if isinstance(module, nn.MultiheadAttention | SlimAttention):
            module.batch_first = False


def _restore_before_init(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap an ``__init__`` of SAN whose first argument is an open_clip model."""

    @functools.wraps(init)
    def restoring_init(self: nn.Module, clip: nn.Module, *args: Any, **kwargs: Any) -> None:
        restore_old_interface(clip)
        init(self, clip, *args, **kwargs)

    return restoring_init


def cross_attention_with_self(
    attention: SlimAttention, query: Tensor, memory: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """Compute SAN's cross attention with the kept heads.

    Every query attends to the memory and to itself. K is the number of queries, L the length of
    the memory, N the batch size, E the width.

    Args:
        attention: Slim attention of a block of SAN's recognition head.
        query: Queries [K, N, E].
        memory: Keys and values [L, N, E].
        attn_mask: Bias [N * dense heads, K, L], added to the logits of the memory.

    Returns:
        Output of the out projection [K, N, E].
    """
    count = len(attention.kept_heads)
    x: Tensor
    if not count:
        x = attention.out_proj(query[..., :0])
        return x
    widths = [count * attention.head_dim] * 3
    bias = attention.in_proj_bias
    biases = [None] * 3 if bias is None else list(torch.split(bias, widths))
    assert attention.in_proj_weight is not None  # SAN uses torch's fused projection
    weights = torch.split(attention.in_proj_weight, widths)

    def project(x: Tensor, part: int) -> Tensor:
        """Project [length, N, E] to queries (0), keys (1) or values (2): [N, H, length, D]."""
        flat = functional.linear(x, weights[part], biases[part])  # [length, N, H * D]
        return flat.reshape(*flat.shape[:2], count, -1).permute(1, 2, 0, 3)

    # H kept heads of width D
    q = project(query, 0) * attention.head_dim**-0.5  # [N, H, K, D]
    logits = q @ project(memory, 1).transpose(-2, -1)  # [N, H, K, L]
    if attn_mask is not None:
        logits = logits + gather_heads(
            attn_mask, q.shape[0], attention.num_heads, attention.kept_heads
        )
    # the mask does not apply to the logit of a query with itself
    self_logit = (q * project(query, 1)).sum(dim=-1, keepdim=True)  # [N, H, K, 1]
    weight = torch.cat([logits, self_logit], dim=-1).softmax(dim=-1)  # [N, H, K, L + 1]
    if attention.training and attention.dropout:
        weight = functional.dropout(weight, attention.dropout)
    x = weight[..., :-1] @ project(memory, 2) + weight[..., -1:] * project(query, 2)
    x = attention.out_proj(x.permute(2, 0, 1, 3).flatten(2))  # [N, H, K, D] -> [K, N, E]
    return x


def _support_slim_attention(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap SAN's function for cross attention so that it accepts a slim attention."""

    @functools.wraps(attend)
    def attend_any(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        # Dense attention runs SAN's own code, so an unpruned model stays bit-identical.
        if not isinstance(module, SlimAttention):
            return attend(module, query, key, value, *args, **kwargs)
        mask = args[0] if args else kwargs.get("attn_mask")
        return cross_attention_with_self(module, query, key, mask), None

    return attend_any


VISUAL, _TEXT = "san.model.clip_utils.visual", "san.model.clip_utils.classifier"

HOOKS = (
    Hook(VISUAL, "FeatureExtractor.__init__", _restore_before_init),
    Hook(VISUAL, "RecWithAttnbiasHead.__init__", _restore_before_init),
    Hook(_TEXT, "PredefinedOvClassifier.__init__", _restore_before_init),
    Hook("san.model.attn_helper", "cross_attn_with_self_bias", _support_slim_attention),
)
"""Functions of SAN that are wrapped, by import path."""
