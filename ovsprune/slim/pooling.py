"""Attention pooling as in open_clip's CoCa."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AttentionalPooler", "PoolerShape", "pool_each_position"]


@dataclass(frozen=True)
class PoolerShape:
    """Widths of an attentional pooler.

    Attributes:
        queries: Number of learnt queries; the first gives the pooled embedding, the others serve
            a captioning decoder.
        width: Width of the queries and of the output.
        context: Width of the tokens.
        heads: Number of heads, each of ``width / heads`` channels.
    """

    queries: int
    width: int
    context: int
    heads: int


class AttentionalPooler(nn.Module):
    """Cross-attention of learnt queries to all tokens, with open_clip's parameter names."""

    def __init__(self, shape: PoolerShape, eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(shape.queries, shape.width))
        self.attn = nn.MultiheadAttention(
            shape.width, shape.heads, kdim=shape.context, vdim=shape.context, batch_first=True
        )
        self.ln_q = nn.LayerNorm(shape.width, eps)
        self.ln_k = nn.LayerNorm(shape.context, eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool tokens, [B, N, context] -> [B, queries, width]."""
        context = self.ln_k(tokens)  # [B, N, context]
        query = self.ln_q(self.query).expand(tokens.shape[0], -1, -1)  # [B, queries, width]
        out: Tensor = self.attn(query, context, context, need_weights=False)[0]
        return out


def pool_each_position(pooler: nn.Module, tokens: Tensor) -> Tensor:
    """Apply an attention pool to each token alone, [B, N, context] -> [B, N, width].

    Attention to a single token has weight 1, so the output is the projected value of that token,
    for every query. MaskCLIP (Zhou, Loy and Dai, ECCV 2022, section 3.2) takes the same dense
    features from CLIP's attention pool. ``pooler`` is open_clip's, or :class:`AttentionalPooler`.
    """
    pool: Any = pooler
    attention = pool.attn
    weight, bias = attention.v_proj_weight, attention.in_proj_bias
    if weight is None:  # equal widths: torch stores the three weights in one parameter
        weight = attention.in_proj_weight.chunk(3)[2]  # [width, context]
    values = F.linear(pool.ln_k(tokens), weight, None if bias is None else bias.chunk(3)[2])
    out: Tensor = attention.out_proj(values)  # [B, N, width]
    return out
