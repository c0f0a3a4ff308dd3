"""Attention with separate linear projections, the form that the dependency graph can follow.

torch-pruning cannot cut heads of ``nn.MultiheadAttention``, and can misinterpret a fused qkv
projection without an error. On separate q, k, v and output projections it finds the head groups.
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
    """Self-attention with separate q, k, v and output projections, equal to the given module.

    The current number of heads follows from the shapes of the weights, so cutting the projections
    is enough to remove heads. ``kept_heads`` lists the dense heads before that cut.

    Args:
        attention: Self-attention with one width for q, k and v, without ``bias_k`` and
            ``add_zero_attn``; or a slim attention made from such a module. Weights are copied.

    Raises:
        ValueError: ``attention`` has another form.
    """

    def __init__(self, attention: nn.MultiheadAttention | SlimAttention) -> None:
        super().__init__()
        if attention.in_proj_weight is None or attention.bias_k is not None:
            raise ValueError(
                f"{type(attention).__name__} cannot be rewritten: only self-attention with one "
                "width for q, k and v, and without bias_k, is supported"
            )
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
        projections = projections_of(attention, len(heads))
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(w, b) for w, b in zip(projections.weights, projections.biases, strict=True)
        )
        self.out_proj = _linear(projections.columns, projections.out_bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Compute self-attention of ``query``, with the signature of ``nn.MultiheadAttention``.

        Args:
            query: [B, N, D], or [N, B, D] if the module is not ``batch_first``.
            key: Ignored; must be ``query``.
            value: Ignored; must be ``query``.
            need_weights: Ignored; the attention weights in the result are always None.
            attn_mask: Mask as in ``nn.MultiheadAttention``, or None.
        """
        x = query if self.batch_first else query.transpose(0, 1)  # [B, N, D]
        batch, tokens, _ = x.shape

        def heads(projection: nn.Linear) -> Tensor:
            projected: Tensor = projection(x)  # [B, N, heads * head_dim]
            # The number of heads comes from the weight, which may have been cut.
            count = projected.shape[2] // self.head_dim
            return projected.view(batch, tokens, count, self.head_dim).transpose(1, 2)

        attended = F.scaled_dot_product_attention(  # [B, heads, N, head_dim]
            heads(self.q_proj), heads(self.k_proj), heads(self.v_proj), attn_mask
        )
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))  # [B, N, D]
        return (out if self.batch_first else out.transpose(0, 1)), None

    def finished(self, kept: Tensor | None = None) -> nn.Module:
        """Return the module for the finished tower.

        It is an ``nn.MultiheadAttention`` if all heads of the dense module are kept, otherwise a
        slim attention.

        Args:
            kept: int64, indices into ``kept_heads`` of the heads that stay; None for all.
        """
        before = self.kept_heads
        heads = before if kept is None else tuple(before[i] for i in kept.tolist())
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
        """Return an ``nn.MultiheadAttention`` with the current weights."""
        fused = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            bias=self.q_proj.bias is not None,
            batch_first=self.batch_first,
            device="meta",
        )
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([p.weight for p in parts])  # [3 D, D]
        fused.in_proj_weight = nn.Parameter(weight, requires_grad=False)
        if self.q_proj.bias is not None:
            bias = torch.cat([p.bias for p in parts])  # [3 D]
            fused.in_proj_bias = nn.Parameter(bias, requires_grad=False)
        fused.out_proj.weight, fused.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return fused.eval()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer with copies of ``weight`` [m, n] and ``bias`` [m]."""
    weight = weight.detach()
    layer = linear(weight.shape[1], weight.shape[0], bias is not None, "meta")
    layer.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
