"""Multi-head attention that keeps only some of its heads and fits where the dense module was.

``num_heads`` reports the dense count, because frameworks assert it and build their masks from it;
a mask with a row per dense head is gathered at the kept heads here, so no caller has to know.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.core.errors import OptionError
from ovsprune.slim.dense import (
    check_heads,
    dropout,
    head_index,
    in_projection,
    refuse_extras,
    takes_key_value,
)
from ovsprune.slim.masks import combine_masks

__all__ = ["SlimAttention"]

Output = Tensor | tuple[Tensor, Tensor | None]


class SlimAttention(nn.Module):
    """Self- or cross-attention over the kept heads of a dense attention.

    Its output equals that of the dense module whose cut heads are masked to zero before the out
    projection. Parameters have the names of ``nn.MultiheadAttention``: ``in_proj_weight``
    [3 * kept * head_dim, embed_dim] (queries, keys, values), ``in_proj_bias``, ``out_proj``.

    Args:
        embed_dim: Width of the residual stream.
        num_heads: Heads of the dense module.
        kept_heads: Dense indices of the heads that are here, strictly ascending.
        head_dim: Width of one head; ``embed_dim // num_heads`` by default.
        bias: Whether the in projection has a bias.
        batch_first: Inputs are [N, L, E] if true, else [L, N, E].
        dropout: Probability of dropping an attention weight in training.
        returns_tuple: True for callers of ``nn.MultiheadAttention``; false for callers of
            open_clip's ``Attention``: called as (x, attn_mask), returns the tensor alone.

    Raises:
        OptionError: ``kept_heads`` are not valid, or the head width cannot be told.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kept_heads: Sequence[int],
        *,
        head_dim: int | None = None,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        returns_tuple: bool = True,
    ) -> None:
        super().__init__()
        if head_dim is None:
            if embed_dim % num_heads:
                raise OptionError(
                    f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}; give head_dim"
                )
            head_dim = embed_dim // num_heads
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.kept_heads = check_heads(num_heads, kept_heads)
        self.head_dim = head_dim
        self.batch_first = batch_first
        self.dropout = dropout
        self.returns_tuple = returns_tuple
        inner = len(self.kept_heads) * head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * inner)) if bias else None
        self.out_proj = nn.Linear(inner, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        # nn.MultiheadAttention's attributes that its callers read. The last one keeps
        # nn.TransformerEncoderLayer off its fused path, which assumes embed_dim wide projections.
        self.kdim = self.vdim = embed_dim
        self.bias_k = self.bias_v = None
        self.add_zero_attn = False
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Output:
        """Attend.

        Args:
            query: [N, L, E] (or [L, N, E] if not ``batch_first``).
            key: [N, S, E], ``query`` by default.
            value: [N, S, E], ``key`` by default.
            key_padding_mask: [N, S], bool (true is left out) or float (added).
            need_weights: Also return the attention weights, which costs the fused kernel.
            attn_mask: Bool (true is left out) or float (added): [L, S]; [N * num_heads, L, S] or
                [num_heads, L, S] in dense heads; [N * kept, L, S]; or [N or 1, heads or 1, L, S]
                with dense or kept heads.
            average_attn_weights: Weights are [N, L, S] if true (mean over the kept heads), else
                [N, kept, L, S].
            is_causal: Mask the future; where ``attn_mask`` is given, that one is used, as in torch.

        Returns:
            ([N, L, E], weights or None), or the first alone if ``returns_tuple`` is false.

        Raises:
            OptionError: An input is unbatched or a mask has a shape that fits nothing.
        """
        if not self.returns_tuple and key is not None and value is None:
            key, attn_mask = None, key  # open_clip's positional form: (x, attn_mask)
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = self._project(query, key, value)
        mask = combine_masks(
            attn_mask,
            key_padding_mask,
            batch=q.shape[0],
            lengths=(q.shape[2], k.shape[2]),
            num_heads=self.num_heads,
            kept_heads=self.kept_heads,
            is_causal=is_causal,
            dtype=q.dtype,
            device=q.device,
        )
        drop = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = (logits if mask is None else logits + mask).softmax(dim=-1)
            weights = F.dropout(weights, drop) if drop else weights
            x = weights.to(v.dtype) @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        x = x if self.batch_first else x.transpose(0, 1)
        return (x, weights) if self.returns_tuple else x

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [N, kept, length, head_dim]."""
        order = "[N, L, E]" if self.batch_first else "[L, N, E]"
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() != 3 or x.shape[-1] != self.embed_dim:
                raise OptionError(
                    f"{name} has shape {tuple(x.shape)}, expected {order} with E = "
                    f"{self.embed_dim}; add the batch axis to an unbatched input"
                )
        if query is key and key is value:
            flat = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            flat = tuple(
                F.linear(x, w, b)
                for x, w, b in zip(
                    (query, key, value), self.in_proj_weight.chunk(3), biases, strict=True
                )
            )
        heads = [x if self.batch_first else x.transpose(0, 1) for x in flat]
        q, k, v = (x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for x in heads)
        return q, k, v

    def extra_repr(self) -> str:
        """Dense and kept heads, for ``print(model)``."""
        kept = len(self.kept_heads)
        return f"embed_dim={self.embed_dim}, heads={kept} of {self.num_heads} x {self.head_dim}"

    @classmethod
    def from_dense(cls, mha: nn.Module, kept_heads: Sequence[int]) -> SlimAttention:
        """The slim attention that keeps some heads of ``mha``, with those heads' weights.

        Args:
            mha: ``nn.MultiheadAttention`` or a module with its parameters (open_clip's
                ``Attention``, one with ``q_proj_weight`` and so on, or a ``SlimAttention``).
            kept_heads: Dense indices; of a ``SlimAttention``, those must be among its own.

        Raises:
            TargetError: ``mha`` has something that a cut would change (see the message).
            OptionError: ``kept_heads`` are not valid.
        """
        refuse_extras(mha)
        num_heads = int(mha.num_heads)  # type: ignore[arg-type]
        kept = check_heads(num_heads, kept_heads)
        present = mha.kept_heads if isinstance(mha, SlimAttention) else tuple(range(num_heads))
        missing = [h for h in kept if h not in present]
        if missing:
            raise OptionError(f"heads {missing} are cut already; {present} are left of {num_heads}")
        weight, bias = in_projection(mha)
        out = mha.out_proj
        assert isinstance(out, nn.Linear)
        head_dim = weight.shape[0] // (3 * len(present))
        slim = cls(
            weight.shape[1],
            num_heads,
            kept,
            head_dim=head_dim,
            bias=bias is not None,
            batch_first=bool(getattr(mha, "batch_first", True)),
            dropout=dropout(mha),
            returns_tuple=takes_key_value(mha),
        ).to(device=weight.device, dtype=weight.dtype)
        rows = head_index([present.index(h) for h in kept], head_dim).to(weight.device)
        slim._fill(weight, bias, out, rows)
        slim.train(mha.training)
        return slim

    @classmethod
    def from_projections(
        cls,
        q: nn.Linear,
        k: nn.Linear,
        v: nn.Linear,
        out: nn.Linear,
        *,
        num_heads: int,
        kept_heads: Sequence[int],
        head_dim: int,
        batch_first: bool = True,
    ) -> SlimAttention:
        """The slim attention that does what separate linear maps do.

        Args:
            q: Query map, [kept * head_dim, embed_dim], or dense and then cut here.
            k: Key map, likewise.
            v: Value map, likewise.
            out: Out projection, [embed_dim, kept * head_dim], or dense.
            num_heads: Heads of the dense module.
            kept_heads: Dense indices of the heads that stay.
            head_dim: Width of one head.
            batch_first: Axis order of the inputs.

        Raises:
            OptionError: The maps' widths are neither the kept nor the dense one.
        """
        kept = check_heads(num_heads, kept_heads)
        widths = {m.weight.shape[0] for m in (q, k, v)} | {out.weight.shape[1]}
        if widths == {len(kept) * head_dim}:
            positions: Sequence[int] = range(len(kept))
        elif widths == {num_heads * head_dim}:
            positions = kept
        else:
            raise OptionError(
                f"q, k, v and out have widths {sorted(widths)}; expected all {len(kept)} or all "
                f"{num_heads} heads of width {head_dim}"
            )
        weight = torch.cat([m.weight.detach() for m in (q, k, v)])
        bias = None
        if any(m.bias is not None for m in (q, k, v)):
            rows = q.weight.shape[0]
            bias = torch.cat(
                [weight.new_zeros(rows) if m.bias is None else m.bias.detach() for m in (q, k, v)]
            )
        slim = cls(
            weight.shape[1],
            num_heads,
            kept,
            head_dim=head_dim,
            bias=bias is not None,
            batch_first=batch_first,
        ).to(device=weight.device, dtype=weight.dtype)
        slim._fill(weight, bias, out, head_index(positions, head_dim).to(weight.device))
        slim.train(out.training)
        return slim

    @torch.no_grad()
    def _fill(self, weight: Tensor, bias: Tensor | None, out: nn.Linear, rows: Tensor) -> None:
        """Copy rows ``rows`` of each third of the in projection and columns of the out one."""
        third = weight.shape[0] // 3
        three = torch.cat([rows + i * third for i in range(3)])
        self.in_proj_weight.copy_(weight[three])
        if self.in_proj_bias is not None and bias is not None:
            self.in_proj_bias.copy_(bias[three])
        self.out_proj.weight.copy_(out.weight[:, rows])
        bias_out: Tensor | None = out.bias
        if bias_out is None:
            self.out_proj.register_parameter("bias", None)
        else:
            self.out_proj.bias.copy_(bias_out)
