"""Pooling by attention, as open_clip's CoCa does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AttentionalPooler", "PoolerShape", "each_alone"]


@dataclass(frozen=True)
class PoolerShape:
    """Widths of an attentional pooler.

    Attributes:
        queries: Learnt queries; the first is the pooled one, the others are a captioner's.
        width: Of the queries and of what comes out.
        context: Width of the tokens that are read.
        heads: Heads, of ``width / heads`` channels.
    """

    queries: int
    width: int
    context: int
    heads: int


class AttentionalPooler(nn.Module):
    """Learnt queries that attend to all tokens; names are those of open_clip's."""

    def __init__(self, shape: PoolerShape, eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(shape.queries, shape.width))
        self.attn = nn.MultiheadAttention(
            shape.width, shape.heads, kdim=shape.context, vdim=shape.context, batch_first=True
        )
        self.ln_q = nn.LayerNorm(shape.width, eps)
        self.ln_k = nn.LayerNorm(shape.context, eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, context] -> [B, queries, width]."""
        read = self.ln_k(tokens)
        query = self.ln_q(self.query).expand(tokens.shape[0], -1, -1)
        out: Tensor = self.attn(query, read, read, need_weights=False)[0]
        return out


def each_alone(pooler: nn.Module, tokens: Tensor) -> Tensor:
    """What ``pooler`` gives of each token if that token is all there is.

    With one token every query's attention is 1, so it is the token's value, projected: the same
    for every query, and without queries. This is what MaskCLIP (Zhou, Loy and Dai, ECCV 2022,
    section 3.2) takes as dense features of CLIP's own attention pool.

    Args:
        pooler: :class:`AttentionalPooler`, open_clip's or ours.
        tokens: [B, N, context].

    Returns:
        [B, N, width].
    """
    own: Any = pooler
    attention = own.attn
    weight, bias = attention.v_proj_weight, attention.in_proj_bias
    if weight is None:  # one width for queries, keys and values: torch keeps them together
        weight = attention.in_proj_weight.chunk(3)[2]
    values = F.linear(own.ln_k(tokens), weight, None if bias is None else bias.chunk(3)[2])
    out: Tensor = attention.out_proj(values)
    return out
