"""Multi-head attention with a subset of the heads, a drop-in replacement of the dense module.

``num_heads`` is the number of heads of the dense module, because frameworks check it and build
their masks from it. From a mask with one row per dense head, the rows of the kept heads are
selected here, so callers stay unchanged.

Letters: N images, L queries, S keys, E the width of the residual stream, h kept heads,
d channels per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.core.errors import OptionError
from ovsprune.slim.attention_masks import combine_masks
from ovsprune.slim.calls import TORCH_CALL, CallConvention, call_convention
from ovsprune.slim.dense import (
    Projections,
    check_heads,
    dropout,
    is_batch_first,
    projections_of,
    refuse_extras,
)
from ovsprune.slim.linear import linear

__all__ = ["SlimAttention"]

_FUSED = "in_proj_weight"
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class SlimAttention(nn.Module):
    """Self- or cross-attention over the kept heads of a dense attention.

    The output equals that of the dense module whose removed heads are masked to zero before the
    output projection. Without any head it is the bias of that projection. The parameters have the
    names of ``nn.MultiheadAttention``; ``in_proj_weight`` is [3 * kept * head_dim, embed_dim].

    Args:
        embed_dim: Width of the residual stream.
        num_heads: Heads of the dense module.
        kept_heads: Dense indices of the kept heads, strictly ascending.
        head_dim: Width of one head; ``embed_dim // num_heads`` by default.
        bias: True if the input projection has a bias.
        batch_first: Inputs are [N, L, E] if true, else [L, N, E].
        dropout: Probability of dropping an attention weight in training.
        call: Calling convention, by default that of ``nn.MultiheadAttention``; see
            :mod:`ovsprune.slim.calls`.
        separate_qkv: Store W_q, W_k and W_v as three parameters ``q_proj_weight`` and so on, as
            CAT-Seg does to train only some of them.

    Raises:
        OptionError: ``kept_heads`` are not valid, or ``embed_dim`` is no multiple of
            ``num_heads`` and ``head_dim`` is not given.
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
        call: CallConvention = TORCH_CALL,
        separate_qkv: bool = False,
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
        sizes = dict.fromkeys(_SEPARATE, rows) if separate_qkv else {_FUSED: 3 * rows}
        for name in (_FUSED, *_SEPARATE):  # as in nn.MultiheadAttention, unused ones are None
            weight = nn.Parameter(torch.empty(sizes[name], embed_dim)) if name in sizes else None
            self.register_parameter(name, weight)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * rows)) if bias else None
        self.out_proj = linear(rows, embed_dim)
        for name in sizes:
            nn.init.xavier_uniform_(self.get_parameter(name))
        # Callers of nn.MultiheadAttention read these attributes. The last one makes
        # nn.TransformerEncoderLayer avoid its fused path, which assumes square projections.
        self.kdim = self.vdim = embed_dim
        self.bias_k = self.bias_v = None
        self.add_zero_attn = False
        self._qkv_same_embed_dim = False

    @property
    def _rows(self) -> int:
        """Number of rows of queries, keys or values in the input projection."""
        return len(self.kept_heads) * self.head_dim

    def _split(self, tensor: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Split a fused ``tensor`` into queries, keys and values."""
        return torch.split(tensor, [self._rows] * 3, dim)

    def _weights(self) -> tuple[Tensor, ...]:
        """Return W_q, W_k and W_v: views of one parameter, or three parameters."""
        if self.in_proj_weight is not None:
            return self._split(self.in_proj_weight)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor | None]:
        """Call :meth:`attend` with the calling convention of the dense module."""
        x, weights = self.attend(**self.call.bind(args, kwargs))
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
            key_padding_mask: [N, S], bool (true is ignored) or float (added to the logits).
            need_weights: Also return the attention weights; the fused kernel is then not used.
            attn_mask: Bool (true is ignored) or float (added to the logits). One of [L, S];
                [N * num_heads, L, S] or [num_heads, L, S], with dense heads; [N * kept, L, S];
                [N or 1, heads or 1, L, S], with dense or kept heads.
            average_attn_weights: Weights are [N, L, S] if true (mean over the kept heads, zeros
                without any), else [N, kept, L, S].
            is_causal: Mask later keys. Ignored if ``attn_mask`` is given, as in torch.

        Returns:
            ([N, L, E], weights or None).

        Raises:
            OptionError: An input has no batch axis, or a mask has an unexpected shape.
        """
        key = query if key is None else key
        value = key if value is None else value
        # The projections are empty then; only the bias of the output projection is left.
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
        x, weights = self._attend_heads(q, k, v, mask, need_weights)  # [N, h, L, d]
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)  # [N, L, S]
        x = self.out_proj(x.transpose(1, 2).flatten(2))  # [N, L, E]
        x = x if self.batch_first else x.transpose(0, 1)
        return x, weights

    def _without_heads(
        self, query: Tensor, key: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the result of :meth:`attend` without heads: the output bias and zero weights."""
        x = self.out_proj(query[..., :0])  # an empty sum: only the bias, [N, L, E]
        if not need_weights:
            return x, None
        batch, tokens = (0, 1) if self.batch_first else (1, 0)
        shape = (query.shape[batch], query.shape[tokens], key.shape[tokens])
        return x, query.new_zeros(shape if average else (shape[0], 0, *shape[1:]))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to queries, keys and values, each [N, h, length, d]."""
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() != 3 or x.shape[-1] != self.embed_dim:
                order = "[N, L, E]" if self.batch_first else "[L, N, E]"
                raise OptionError(
                    f"{name} has shape {tuple(x.shape)}, expected {order} with E = "
                    f"{self.embed_dim}; add the batch axis to an unbatched input"
                )
        bias = self.in_proj_bias
        if query is key and key is value and self.in_proj_weight is not None:
            # self-attention with a fused weight: one product instead of three
            qkv = F.linear(query, self.in_proj_weight, bias)  # [N, L, 3 * h * d]
            flat = self._split(qkv, dim=-1)
        else:
            biases = (None,) * 3 if bias is None else self._split(bias)
            parts = zip((query, key, value), self._weights(), biases, strict=True)
            flat = tuple(F.linear(x, W, b) for x, W, b in parts)  # each [N, length, h * d]
        q, k, v = (self._split_heads(x) for x in flat)
        return q, k, v

    def _split_heads(self, x: Tensor) -> Tensor:
        """Reshape [N, L, h * d] (or [L, N, h * d]) -> [N, h, L, d]."""
        x = x if self.batch_first else x.transpose(0, 1)  # [N, L, h * d]
        return x.reshape(*x.shape[:2], len(self.kept_heads), self.head_dim).transpose(1, 2)

    def _attend_heads(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Compute softmax(q k^T / sqrt(d) + mask) v and the weights [N, h, L, S] for each head.

        Source: Vaswani et al., Attention is all you need, NeurIPS 2017, equation 1.
        """
        dropout = self.dropout if self.training else 0.0
        if not need_weights:  # the fused kernel does not return the weights
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
        scale = self.head_dim**-0.5  # a Python number, so that an exporter records a constant
        logits = (q * scale) @ k.transpose(-2, -1)  # [N, h, L, S]
        weights = (logits if mask is None else logits + mask).softmax(dim=-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        return weights.to(v.dtype) @ v, weights  # [N, h, L, d]

    def extra_repr(self) -> str:
        """Return width, kept and dense heads for ``print(model)``."""
        heads = f"{len(self.kept_heads)} of {self.num_heads} x {self.head_dim}"
        return f"embed_dim={self.embed_dim}, heads={heads}"

    @classmethod
    def from_dense(cls, mha: nn.Module, kept_heads: Sequence[int]) -> SlimAttention:
        """Build the slim attention that keeps some heads of ``mha``, with their weights.

        Args:
            mha: ``nn.MultiheadAttention`` or a module with its parameters (open_clip's
                ``Attention``, one with ``q_proj_weight`` and so on, or a ``SlimAttention``).
            kept_heads: Dense indices. If ``mha`` is a ``SlimAttention``, a subset of its heads.

        Raises:
            TargetError: ``mha`` has a component that does not support removing heads.
            OptionError: ``kept_heads`` are not valid.
        """
        refuse_extras(mha)
        num_heads = int(mha.num_heads)  # type: ignore[arg-type]
        kept = check_heads(num_heads, kept_heads)
        present = mha.kept_heads if isinstance(mha, SlimAttention) else tuple(range(num_heads))
        missing = [h for h in kept if h not in present]
        if missing:
            raise OptionError(
                f"kept_heads contains {missing}, which were removed before; choose among "
                f"{present} (of {num_heads} dense heads)"
            )
        dense = projections_of(mha, len(present))
        slim = cls(
            dense.weights[0].shape[1],
            num_heads,
            kept,
            # not read from the tensors of a slim attention: it may have no head
            head_dim=mha.head_dim if isinstance(mha, SlimAttention) else dense.head_dim,
            bias=any(bias is not None for bias in dense.biases),
            batch_first=is_batch_first(mha),
            dropout=dropout(mha),
            call=call_convention(mha),
            separate_qkv=getattr(mha, _FUSED, None) is None,
        ).to(device=dense.columns.device, dtype=dense.columns.dtype)
        # Positions among the present heads: the rows of removed heads are no longer there.
        slim._fill(dense, [present.index(h) for h in kept])
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
        """Build the slim attention from separate linear layers of all heads or the kept ones.

        The weights of ``q``, ``k`` and ``v`` are [heads * head_dim, embed_dim], that of ``out`` is
        [embed_dim, heads * head_dim]. The other arguments are those of the class.

        Raises:
            OptionError: The widths of the layers fit neither the kept nor all heads.
        """
        slim = cls(
            q.weight.shape[1],
            num_heads,
            kept_heads,
            head_dim=head_dim,
            bias=any(layer.bias is not None for layer in (q, k, v)),
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
    def _fill(self, source: Projections, positions: Sequence[int]) -> None:
        """Copy the weights of the heads at ``positions`` of ``source``."""
        source = source.cut(positions)
        for target, weight in zip(self._weights(), source.weights, strict=True):
            target.copy_(weight)
        if self.in_proj_bias is not None:
            parts = self._split(self.in_proj_bias)
            for target, bias in zip(parts, source.biases, strict=True):
                target.copy_(torch.zeros_like(target) if bias is None else bias)
        self.out_proj.weight.copy_(source.columns)
        if source.out_bias is None:
            self.out_proj.register_parameter("bias", None)
        else:
            self.out_proj.bias.copy_(source.out_bias)
