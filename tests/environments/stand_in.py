"""Reimplementation of the attention of open_clip's development head, with the same interface.

The input projection is fused; the call is (x, k_x, v_x, attn_mask); the result is a tensor; true in
a bool mask means attended; inputs are [N, L, E], which no attribute tells.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class HeadAttention(nn.Module):
    """Attention with the projections of an ``nn.MultiheadAttention``."""

    def __init__(self, mha: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = mha.num_heads
        self.head_dim = mha.head_dim
        self.in_proj_weight, self.in_proj_bias = mha.in_proj_weight, mha.in_proj_bias
        self.out_proj = mha.out_proj
        self.attn_drop = nn.Dropout(0.0)
        self.logit_scale = self.head_scale = None
        self.ln_q = nn.Identity()

    def forward(
        self,
        x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        inputs = (x, x if k_x is None else k_x, x if v_x is None else v_x)
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(y, w, b).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for y, w, b in zip(inputs, weights, biases, strict=True)
        )
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (len(x), self.num_heads))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class HeadBlock(nn.Module):
    """Residual block with the parts of another one, for :class:`HeadAttention`."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = block.ln_1, HeadAttention(block.attn), block.ln_2
        self.mlp = block.mlp

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, k_x=y, v_x=y, attn_mask=attn_mask)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out
