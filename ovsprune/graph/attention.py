"""Attention rewritten to separate linear maps, the form that the dependency graph can follow.

torch-pruning cannot cut heads of ``nn.MultiheadAttention`` and can misread fused qkv without a
word; on separate q, k, v and output projections it finds the head groups by itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.slim import SlimAttention
from ovsprune.slim.dense import projections_of
from ovsprune.slim.linear import linear

__all__ = ["SeparateAttention"]


class SeparateAttention(nn.Module):
    """Self-attention with q, k, v and output projections apart; equals the module it replaces.

    The number of heads is read from the weights, so that a cut of heads needs no bookkeeping;
    ``kept_heads`` says which heads of the dense module they were before it.

    Args:
        attention: Self-attention with one width for q, k and v, without ``bias_k`` or
            ``add_zero_attn``; or slim attention, some heads of such a module. Weights are copied.

    Raises:
        ValueError: ``attention`` is of another form.
    """

    def __init__(self, attention: nn.MultiheadAttention | SlimAttention) -> None:
        super().__init__()
        if attention.in_proj_weight is None or attention.bias_k is not None:
            raise ValueError("only self-attention with one width for q, k and v can be rewritten")
        heads = tuple(range(attention.num_heads))
        if isinstance(attention, SlimAttention):
            if not attention.call.returns_tuple:
                raise ValueError("slim attention that returns no tuple cannot be rewritten")
            heads = attention.kept_heads
        self.embed_dim = attention.embed_dim
        self.num_heads = attention.num_heads
        self.kept_heads = heads
        self.head_dim = attention.head_dim
        self.batch_first = attention.batch_first
        maps = projections_of(attention, len(heads))
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(w, b) for w, b in zip(maps.weights, maps.biases, strict=True)
        )
        self.out_proj = _linear(maps.columns, maps.out_bias)

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

        def heads(projection: nn.Linear) -> Tensor:
            split: Tensor = projection(stream)  # [B, N, heads * head_dim]
            count = split.shape[2] // self.head_dim
            return split.view(batch, tokens, count, self.head_dim).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(  # [B, heads, N, head_dim]
            heads(self.q_proj), heads(self.k_proj), heads(self.v_proj), attn_mask
        )
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def finished(self, kept: Tensor | None = None) -> nn.Module:
        """The module for a finished tower: slim, or torch's own where all dense heads stay whole.

        Args:
            kept: int64, which of the heads that were here before the cut stay; None for all.
        """
        here = self.kept_heads
        heads = here if kept is None else tuple(here[i] for i in kept.tolist())
        if len(heads) == self.num_heads:
            return self._fused()
        return SlimAttention.from_projections(
            self.q_proj,
            self.k_proj,
            self.v_proj,
            self.out_proj,
            num_heads=self.num_heads,
            kept_heads=heads,
            head_dim=self.head_dim,
            batch_first=self.batch_first,
        )

    def _fused(self) -> nn.MultiheadAttention:
        """Torch's own attention again, with the weights as they are now."""
        whole = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            bias=self.q_proj.bias is not None,
            batch_first=self.batch_first,
            device="meta",
        )
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([p.weight for p in parts])
        whole.in_proj_weight = nn.Parameter(weight, requires_grad=False)
        if self.q_proj.bias is not None:
            bias = torch.cat([p.bias for p in parts])
            whole.in_proj_bias = nn.Parameter(bias, requires_grad=False)
        whole.out_proj.weight, whole.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return whole.eval()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    weight = weight.detach()
    layer = linear(weight.shape[1], weight.shape[0], bias is not None, "meta")
    layer.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
