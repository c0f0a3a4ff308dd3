"""Multi-head attention that keeps only some of its heads and fits where the dense module was.

``num_heads`` reports the dense count, because frameworks assert it and build their masks from it;
a mask with a row per dense head is gathered at the kept heads here, so no caller has to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.core.errors import OptionError
from ovsprune.slim.calls import TORCH, Call, call_of
from ovsprune.slim.dense import (
    Projections,
    check_heads,
    dropout,
    is_batch_first,
    projections_of,
    refuse_extras,
)
from ovsprune.slim.linear import linear
from ovsprune.slim.masks import combine_masks

__all__ = ["SlimAttention"]

Output = Tensor | tuple[Tensor, Tensor | None]

_FUSED = "in_proj_weight"
_APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class SlimAttention(nn.Module):
    """Self- or cross-attention over the kept heads of a dense attention.

    Its output equals that of the dense module whose cut heads are masked to zero before the out
    projection; without any head it is that projection's bias. Parameters have the names of
    ``nn.MultiheadAttention``: ``in_proj_weight`` (queries, keys, values)
    [3 * kept * head_dim, embed_dim], or ``q_proj_weight``, ``k_proj_weight`` and
    ``v_proj_weight`` where it is ``apart``; ``in_proj_bias``, ``out_proj``.

    Args:
        embed_dim: Width of the residual stream.
        num_heads: Heads of the dense module.
        kept_heads: Dense indices of the heads that are here, strictly ascending.
        head_dim: Width of one head; ``embed_dim // num_heads`` by default.
        bias: Whether the in projection has a bias.
        batch_first: Inputs are [N, L, E] if true, else [L, N, E].
        dropout: Probability of dropping an attention weight in training.
        call: How it is called and what it returns: as ``nn.MultiheadAttention`` by default; for
            callers of open_clip's ``Attention`` see :mod:`ovsprune.slim.calls`.
        apart: Whether the weights of queries, keys and values are three parameters, as
            ``nn.MultiheadAttention`` has them for inputs of several widths (and CAT-Seg for inputs
            of one, to train some of the three).

    Raises:
        OptionError: ``kept_heads`` are not valid, or the head width cannot be told.
    """

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter
    k_proj_weight: nn.Parameter
    v_proj_weight: nn.Parameter

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
        call: Call = TORCH,
        apart: bool = False,
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
        self.call = call
        rows = self._rows
        made = dict.fromkeys(_APART, rows) if apart else {_FUSED: 3 * rows}
        for name in (_FUSED, *_APART):  # those that are not there are None, as in torch's own
            weight = nn.Parameter(torch.empty(made[name], embed_dim)) if name in made else None
            self.register_parameter(name, weight)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * rows)) if bias else None
        self.out_proj = linear(rows, embed_dim)
        for name in made:
            nn.init.xavier_uniform_(self.get_parameter(name))
        # nn.MultiheadAttention's attributes that its callers read. The last one keeps
        # nn.TransformerEncoderLayer off its fused path, which assumes embed_dim wide projections.
        self.kdim = self.vdim = embed_dim
        self.bias_k = self.bias_v = None
        self.add_zero_attn = False
        self._qkv_same_embed_dim = False

    @property
    def _rows(self) -> int:
        """Rows that each of queries, keys and values has in the in projection."""
        return len(self.kept_heads) * self.head_dim

    def _split(self, tensor: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Return the parts of queries, keys and values in a fused ``tensor``."""
        return torch.split(tensor, [self._rows] * 3, dim)

    def _weights(self) -> tuple[Tensor, ...]:
        """The weights of the queries, keys and values: views of one parameter, or three."""
        if self.in_proj_weight is not None:
            return self._split(self.in_proj_weight)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def forward(self, *args: Any, **given: Any) -> Output:
        """Attend, called the way the dense module was; see :meth:`attend` for the arguments.

        Returns:
            What :meth:`attend` returns, or its output alone, as ``call`` says.
        """
        x, weights = self.attend(**self.call.bind(args, given))
        return (x, weights) if self.call.returns_tuple else x

    def attend(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with the arguments of ``nn.MultiheadAttention``.

        Args:
            query: [N, L, E] (or [L, N, E] if not ``batch_first``).
            key: [N, S, E], ``query`` by default.
            value: [N, S, E], ``key`` by default.
            key_padding_mask: [N, S], bool (true is left out) or float (added).
            need_weights: Also return the attention weights, which costs the fused kernel.
            attn_mask: Bool (true is left out) or float (added): [L, S]; [N * num_heads, L, S] or
                [num_heads, L, S] in dense heads; [N * kept, L, S]; or [N or 1, heads or 1, L, S]
                with dense or kept heads.
            average_attn_weights: Weights are [N, L, S] if true (mean over the kept heads, zeros
                without any), else [N, kept, L, S].
            is_causal: Mask the future; where ``attn_mask`` is given, that one is used, as in torch.

        Returns:
            ([N, L, E], weights or None).

        Raises:
            OptionError: An input is unbatched or a mask has a shape that fits nothing.
        """
        key = query if key is None else key
        value = key if value is None else value
        if not self.kept_heads:
            return self._without_heads(query, key, need_weights, average_attn_weights)
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
        return x, weights

    def _without_heads(
        self, query: Tensor, key: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What :meth:`attend` returns if every head is gone: the bias, and weights of nothing."""
        x = self.out_proj(query[..., :0])
        if not need_weights:
            return x, None
        batch, tokens = (0, 1) if self.batch_first else (1, 0)
        shape = (query.shape[batch], query.shape[tokens], key.shape[tokens])
        return x, query.new_zeros(shape if average else (shape[0], 0, *shape[1:]))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [N, kept, length, head_dim]."""
        order = "[N, L, E]" if self.batch_first else "[L, N, E]"
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() != 3 or x.shape[-1] != self.embed_dim:
                raise OptionError(
                    f"{name} has shape {tuple(x.shape)}, expected {order} with E = "
                    f"{self.embed_dim}; add the batch axis to an unbatched input"
                )
        if query is key and key is value and self.in_proj_weight is not None:
            both = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            flat = self._split(both, dim=-1)
        else:
            bias = self.in_proj_bias
            biases = (None,) * 3 if bias is None else self._split(bias)
            flat = tuple(
                F.linear(x, w, b)
                for x, w, b in zip((query, key, value), self._weights(), biases, strict=True)
            )
        count = len(self.kept_heads)
        heads = [x if self.batch_first else x.transpose(0, 1) for x in flat]
        q, k, v = (x.reshape(*x.shape[:2], count, self.head_dim).transpose(1, 2) for x in heads)
        return q, k, v

    def extra_repr(self) -> str:
        """Dense and kept heads, for ``print(model)``."""
        heads = f"{len(self.kept_heads)} of {self.num_heads} x {self.head_dim}"
        return f"embed_dim={self.embed_dim}, heads={heads}"

    @classmethod
    def from_dense(cls, mha: nn.Module, kept_heads: Sequence[int]) -> SlimAttention:
        """The slim attention that keeps some heads of ``mha``, with those heads' weights.

        Where ``mha`` has its queries, keys and values apart, so has the slim one.

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
        maps = projections_of(mha, len(present))
        slim = cls(
            maps.weights[0].shape[1],
            num_heads,
            kept,
            head_dim=mha.head_dim if isinstance(mha, SlimAttention) else maps.head_dim,
            bias=any(bias is not None for bias in maps.biases),
            batch_first=is_batch_first(mha),
            dropout=dropout(mha),
            call=call_of(mha),
            apart=getattr(mha, _FUSED, None) is None,
        ).to(device=maps.columns.device, dtype=maps.columns.dtype)
        slim._fill(maps, [present.index(h) for h in kept])
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
            q: Query map, [kept * head_dim, embed_dim], or of all heads and then cut here.
            k: Key map, likewise.
            v: Value map, [kept * head_dim, embed_dim], or of all heads.
            out: Out projection, [embed_dim, kept * head_dim], or of all heads.
            num_heads: Heads of the dense module.
            kept_heads: Dense indices of the heads that stay.
            head_dim: Width of one head.
            batch_first: Axis order of the inputs.

        Raises:
            OptionError: The maps' widths are neither those of the kept nor those of all heads.
        """
        slim = cls(
            q.weight.shape[1],
            num_heads,
            kept_heads,
            head_dim=head_dim,
            bias=any(m.bias is not None for m in (q, k, v)),
            batch_first=batch_first,
        ).to(device=q.weight.device, dtype=q.weight.dtype)
        kept = slim.kept_heads
        widths = {m.weight.shape[0] for m in (q, k, v)} | {out.weight.shape[1]}
        if widths == {len(kept) * head_dim}:
            positions: Sequence[int] = range(len(kept))
        elif widths == {num_heads * head_dim}:
            positions = kept
        else:
            raise OptionError(
                f"q, k, v and out have widths {sorted(widths)}; expected all {len(kept)} or "
                f"all {num_heads} heads of width {head_dim}"
            )
        slim._fill(Projections.of((q, k, v), out, q.weight.shape[0] // head_dim), positions)
        slim.train(out.training)
        return slim

    @torch.no_grad()
    def _fill(self, maps: Projections, positions: Sequence[int]) -> None:
        """Copy the heads at ``positions``."""
        maps = maps.cut(positions)
        for to, weight in zip(self._weights(), maps.weights, strict=True):
            to.copy_(weight)
        if self.in_proj_bias is not None:
            parts = self._split(self.in_proj_bias)
            for to, bias in zip(parts, maps.biases, strict=True):
                to.copy_(torch.zeros_like(to) if bias is None else bias)
        self.out_proj.weight.copy_(maps.columns)
        if maps.out_bias is None:
            self.out_proj.register_parameter("bias", None)
        else:
            self.out_proj.bias.copy_(maps.out_bias)
