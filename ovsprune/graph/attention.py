"""Attention rewritten to separate linear maps, the form that the dependency graph can follow.

torch-pruning cannot cut heads of ``nn.MultiheadAttention`` and can misread fused qkv without a
word; on separate q, k, v and output projections it finds the head groups by itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.slim.directions import scaled

__all__ = ["SeparateAttention"]


class SeparateAttention(nn.Module):
    """Self-attention with q, k, v and output projections apart; equals the module it replaces.

    The number of heads is read from the weights, so that a cut of heads needs no bookkeeping.
    ``qk_dim`` and ``v_dim``, the widths of one head, are the dense ``head_dim`` until directions
    inside heads are cut; the logits keep the dense head's scale.

    Args:
        attention: Self-attention with one width for q, k and v, without ``bias_k`` or
            ``add_zero_attn``. Weights are copied.

    Raises:
        ValueError: ``attention`` is of another form.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if attention.in_proj_weight is None or attention.bias_k is not None:
            raise ValueError("only self-attention with one width for q, k and v can be rewritten")
        width = attention.embed_dim
        self.embed_dim = width
        self.num_heads = attention.num_heads
        self.head_dim = width // attention.num_heads
        self.qk_dim = self.v_dim = self.head_dim
        self.batch_first = attention.batch_first
        weights = attention.in_proj_weight.detach().chunk(3)
        bias = attention.in_proj_bias
        biases = (None, None, None) if bias is None else bias.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(w, b) for w, b in zip(weights, biases, strict=True)
        )
        out_bias = attention.out_proj.bias
        self.out_proj = _linear(
            attention.out_proj.weight.detach(), None if out_bias is None else out_bias.detach()
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend ``query`` [B, N, D] (or [N, B, D]) over itself; key and value must be the same."""
        stream = query if self.batch_first else query.transpose(0, 1)
        batch, tokens, _ = stream.shape

        def heads(projection: nn.Linear, width: int) -> Tensor:
            split: Tensor = projection(stream)
            return split.view(batch, tokens, -1, width).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            scaled(heads(self.q_proj, self.qk_dim), self.head_dim),
            heads(self.k_proj, self.qk_dim),
            heads(self.v_proj, self.v_dim),
            attn_mask,
        )
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return (out if self.batch_first else out.transpose(0, 1)), None


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer
