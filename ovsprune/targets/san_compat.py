"""What lets MendelXu/SAN run with today's open_clip, and with cut heads under cross attention.

SAN takes an open_clip model (of 2.16) apart when it is made: attributes of it are gone since 2.23,
and blocks that took [L, N, E] take [N, L, E] since 2.26. Both are put right on the model that SAN
is handed, just before; with open_clip 2.16 there is nothing to put right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ovsprune.slim import SlimAttention
from ovsprune.slim.masks import gather_heads
from ovsprune.targets.hooks import Hook

__all__ = ["HOOKS", "VISUAL", "attend_and_self", "make_old"]


def make_old(clip: nn.Module) -> None:
    """Give a tower of open_clip, or a whole CLIP, what open_clip 2.16 had, in place.

    Its own ``forward`` is not for use afterwards: SAN calls the blocks itself.

    Args:
        clip: A vision transformer (then its missing attributes come back), or a CLIP, whose text
            blocks SAN calls.
    """
    if hasattr(clip, "conv1"):
        if not hasattr(clip, "input_patchnorm"):  # no model that open_clip ships ever had it on
            clip.input_patchnorm = False  # type: ignore[assignment]
            clip.patchnorm_pre_ln = nn.Identity()
        if not hasattr(clip, "global_average_pool"):
            clip.global_average_pool = getattr(clip, "pool_type", "tok") == "avg"  # type: ignore[assignment]
    for module in clip.get_submodule("transformer").modules():
        if isinstance(module, nn.MultiheadAttention | SlimAttention):
            module.batch_first = False


def _first_made_old(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def made(self: nn.Module, clip: nn.Module, *args: Any, **given: Any) -> None:
        make_old(clip)
        init(self, clip, *args, **given)

    return made


def attend_and_self(
    attention: SlimAttention, query: Tensor, memory: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """SAN's cross attention at the kept heads: every query reads the memory, and itself.

    Args:
        attention: Of a recognition block.
        query: [K, N, E].
        memory: [L, N, E], keys and values.
        attn_mask: [N * dense heads, K, L], added to the logits of the memory.

    Returns:
        [K, N, E], after the out projection.
    """
    count = len(attention.kept_heads)
    x: Tensor
    if not count:
        x = attention.out_proj(query[..., :0])
        return x
    widths = [count * attention.head_dim] * 3
    bias = attention.in_proj_bias
    biases = [None] * 3 if bias is None else list(torch.split(bias, widths))
    assert attention.in_proj_weight is not None  # SAN's attention is torch's own, fused
    weights = torch.split(attention.in_proj_weight, widths)

    def heads(x: Tensor, which: int) -> Tensor:
        """[length, N, E] to [N, kept, length, width]."""
        flat = functional.linear(x, weights[which], biases[which])
        return flat.reshape(*flat.shape[:2], count, -1).permute(1, 2, 0, 3)

    q = heads(query, 0) * attention.head_dim**-0.5
    logits = q @ heads(memory, 1).transpose(-2, -1)
    if attn_mask is not None:
        logits = logits + gather_heads(
            attn_mask, q.shape[0], attention.num_heads, attention.kept_heads
        )
    own = (q * heads(query, 1)).sum(dim=-1, keepdim=True)
    shares = torch.cat([logits, own], dim=-1).softmax(dim=-1)
    if attention.training and attention.dropout:
        shares = functional.dropout(shares, attention.dropout)
    x = shares[..., :-1] @ heads(memory, 2) + shares[..., -1:] * heads(query, 2)
    x = attention.out_proj(x.permute(2, 0, 1, 3).flatten(2))
    return x


def _slim_too(attend: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(attend)
    def attends(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **given: Any
    ) -> Any:
        if not isinstance(module, SlimAttention):
            return attend(module, query, key, value, *args, **given)
        mask = args[0] if args else given.get("attn_mask")
        return attend_and_self(module, query, key, mask), None

    return attends


VISUAL, _TEXT = "san.model.clip_utils.visual", "san.model.clip_utils.classifier"

HOOKS = (
    Hook(VISUAL, "FeatureExtractor.__init__", _first_made_old),
    Hook(VISUAL, "RecWithAttnbiasHead.__init__", _first_made_old),
    Hook(_TEXT, "PredefinedOvClassifier.__init__", _first_made_old),
    Hook("san.model.attn_helper", "cross_attn_with_self_bias", _slim_too),
)
"""Functions of SAN that are exchanged, by import path."""
