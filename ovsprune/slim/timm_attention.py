"""Self-attention with timm's parameter names and a subset of the heads; replaces timm's modules.

timm's towers have several variants of attention: queries, keys and values fused or in separate
layers, biases in these layers or as parameters of the attention, norms of queries and keys, rotary
positions, relative position biases, masks for windows, a norm before the output projection.
:class:`TimmAttention` supports all of them. It takes over the parts of the dense module by their
names.

Letters: B images (or windows), N tokens, C channels, h kept heads, d channels per head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.core.errors import OptionError
from ovsprune.slim.dense import check_heads, head_index
from ovsprune.slim.timm_projections import (
    BIASES,
    PROJECTIONS,
    check_supported,
    copy_with,
    frozen_linear,
    frozen_parameter,
    is_timm_attention,
    projection_tensors,
    slice_norm,
)

__all__ = ["HeadIndex", "TimmAttention", "is_timm_attention"]

_HEAD_DEPENDENT = (*PROJECTIONS, *BIASES, "qkv", "proj", "norm")
"""Parts that lose rows or columns with a head."""

_HEAD_INDEPENDENT = ("q_norm", "k_norm", "rel_pos", "proj_drop")
"""Parts that do not depend on the heads, or that stay for all dense heads."""

_TABLE, _INDEX = "relative_position_bias_table", "relative_position_index"
"""Relative position biases [positions, dense heads], and the row of each pair of tokens [N, N]."""


class HeadIndex(nn.Module):
    """Dense indices of the kept heads, stored like a layer with one row per head.

    So the code that removes the rows of a unit from a layer also updates this index.

    Args:
        heads: int64 [h], dense indices.
    """

    weight: Tensor

    def __init__(self, heads: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", heads, persistent=False)


class TimmAttention(nn.Module):
    """Self-attention over the kept heads of an attention of timm.

    The output equals that of the dense module whose removed heads are masked to zero before the
    inner norm, if there is one. Without any head it is the bias of the output projection. The
    parameters have the names of the dense module and are copies. Relative position biases stay
    for all dense heads.

    Args:
        dense: An attention of timm (:func:`is_timm_attention`) or a :class:`TimmAttention`.
        kept_heads: Dense indices of the kept heads, strictly ascending; by default all heads that
            ``dense`` has.
        separate_qkv: Use separate layers ``q_proj``, ``k_proj`` and ``v_proj``, so that heads can
            be removed layer by layer. If false, the layout is that of timm's module, also if
            ``dense`` is a :class:`TimmAttention` with separate layers.
        windows_per_image: Number of consecutive entries of the batch axis that are windows of
            one image. The linear layers then read and return all tokens of an image at once,
            [B / windows, windows * N, ...], so that their first axis counts images, as hooks and
            calibration expect.

    Attributes:
        num_heads: Heads of the dense module.
        head_dim: Width of one head.

    Raises:
        TargetError: ``dense`` has a component that does not support removing heads.
        OptionError: ``kept_heads`` are not valid, or not a subset of the heads of ``dense``.
    """

    qkv: Any
    q_bias: nn.Parameter | None
    v_bias: nn.Parameter | None
    q_norm: Any
    k_norm: Any
    rel_pos: Any
    proj_drop: Any
    relative_position_bias_table: nn.Parameter | None
    relative_position_index: Any

    def __init__(
        self,
        dense: nn.Module,
        kept_heads: Sequence[int] | None = None,
        *,
        separate_qkv: bool = False,
        windows_per_image: int = 1,
    ) -> None:
        super().__init__()
        check_supported(dense)
        source: Any = dense
        self.num_heads = int(source.num_heads)
        is_slim = isinstance(dense, TimmAttention)
        present = tuple(source.kept_heads if is_slim else range(self.num_heads))
        kept = check_heads(self.num_heads, present if kept_heads is None else kept_heads)
        if not set(kept) <= set(present):
            raise OptionError(
                f"kept_heads is {kept}, but only the heads {present} are left; choose among these"
            )
        weights, biases = projection_tensors(source)
        self.head_dim = int(source.head_dim if is_slim else weights[0].shape[0] // self.num_heads)
        self.separate_qkv, self.windows_per_image = separate_qkv, windows_per_image
        self.num_prefix_tokens = int(getattr(source, "num_prefix_tokens", 0))
        self.rotate_half = bool(getattr(source, "rotate_half", False))
        # Template for to_dense. Without projections it holds no dense weights, but records their
        # layout. The tuple keeps it from being registered as a submodule.
        self._template: tuple[Any, ...] = getattr(source, "_template", None) or (
            copy_with(dense, dict.fromkeys(_HEAD_DEPENDENT)),
        )
        self.heads = HeadIndex(torch.tensor(kept))
        rows = head_index([present.index(head) for head in kept], self.head_dim)  # [h * d]
        rows = rows.to(weights[0].device)
        self._modules |= dict.fromkeys((*PROJECTIONS, "qkv"))
        self._parameters |= dict.fromkeys(BIASES)
        self._set_projections(
            [weight[rows] for weight in weights],
            [None if bias is None else bias[rows] for bias in biases],
        )
        for name in _HEAD_INDEPENDENT:
            self._modules[name] = copy.deepcopy(getattr(source, name, None))
        table = getattr(source, _TABLE, None)
        self._parameters[_TABLE] = None if table is None else frozen_parameter(table.detach())
        self.register_buffer(_INDEX, getattr(source, _INDEX, None), persistent=False)
        self.norm = slice_norm(getattr(source, "norm", None), rows)
        bias = source.proj.bias
        columns = source.proj.weight.detach()[:, rows]  # [C, h * d]
        self.proj = frozen_linear(columns, None if bias is None else bias.detach())
        self.train(dense.training)

    @property
    def kept_heads(self) -> tuple[int, ...]:
        """Dense indices of the kept heads."""
        return tuple(self.heads.weight.tolist())

    @property
    def is_cut(self) -> bool:
        """True if heads were removed, so that timm's own class cannot hold the parameters."""
        return len(self.kept_heads) < self.num_heads

    def to_dense(self) -> nn.Module:
        """Convert back to timm's class, with the current parameters.

        Raises:
            OptionError: Heads were removed.
        """
        if self.is_cut:
            raise OptionError(
                f"only {len(self.kept_heads)} of {self.num_heads} heads are left; timm's class "
                "needs all heads"
            )
        current = TimmAttention(self)
        names = (*_HEAD_DEPENDENT, *_HEAD_INDEPENDENT, _TABLE)
        dense: nn.Module = copy_with(self._template[0], {n: getattr(current, n) for n in names})
        return dense.train(self.training)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared_rel_pos: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [B, N, C], or a feature map [B, C, height, width] whose positions are the tokens,
                row by row.
            rope: Sines and cosines of the tokens after the prefix tokens, concatenated along the
                last axis, [N - prefix, 2 * d].
            attn_mask: Bool (true marks keys to attend to) or float (added to the logits);
                broadcasts to [B, dense heads or 1, N, N].
            is_causal: Mask later keys.
            shared_rel_pos: Added to the logits, [1 or B, dense heads, N, N].
            mask: Added to the logits, [windows, N, N], instead of ``attn_mask``. The windows of
                an image are consecutive entries of the batch axis.

        Returns:
            Tensor of the shape of ``x``.
        """
        is_map = x.ndim == 4
        # The linear layers get [B, height, width, C], so that their outputs are feature maps, too.
        x = x.movedim(1, -1) if is_map else x
        if not len(self.heads.weight):
            mixed = self._merge_windows(x)[..., :0]
        else:
            if mask is not None:
                # [B, 1, N, N]
                attn_mask = mask.repeat(x.shape[0] // mask.shape[0], 1, 1).unsqueeze(1)
            bias = self._position_bias(shared_rel_pos)
            mixed = self._mix_values(x, rope, bias, self._select_heads(attn_mask), is_causal)
        out: Tensor = self.proj(mixed if self.norm is None else self.norm(mixed))
        out = out.reshape(*x.shape[:-1], -1) if self.windows_per_image > 1 else out  # [B, N, C]
        out = out if self.proj_drop is None else self.proj_drop(out)
        return out.movedim(-1, 1) if is_map else out

    def extra_repr(self) -> str:
        """Return kept and dense heads for ``print(model)``."""
        return f"heads={len(self.kept_heads)} of {self.num_heads} x {self.head_dim}"

    def _mix_values(
        self,
        x: Tensor,
        rope: Tensor | None,
        bias: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """Compute the concatenated outputs of the heads, [B, ..., h * d]."""
        # each [B, h, N, d]
        q, k, v = (self._split_heads(y, x.shape[0]) for y in self._project(self._merge_windows(x)))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._rotate(y, rope).to(v) for y in (q, k))
        if bias is not None:
            # With separate layers, a dependency graph is traced through this module. The bias is
            # detached, so that its head axis does not become a channel axis of that graph.
            bias = self._select_heads(bias.detach() if self.separate_qkv else bias)
            attn_mask = bias if attn_mask is None else bias + attn_mask
        # [B, h, N, d]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        return self._merge_windows(mixed.transpose(1, 2).reshape(*x.shape[:-1], -1))

    def _split_heads(self, x: Tensor, batch: int) -> Tensor:
        """Reshape [..., h * d] -> [B, h, N, d]."""
        shape = (batch, -1, len(self.heads.weight), self.head_dim)
        return x.reshape(shape).transpose(1, 2)

    def _merge_windows(self, x: Tensor) -> Tensor:
        """Reshape [B, N, ...] -> [B / windows, windows * N, ...], one entry per image."""
        windows = self.windows_per_image
        return x.reshape(-1, windows * x.shape[1], x.shape[2]) if windows > 1 else x

    def _project(self, x: Tensor) -> Sequence[Tensor]:
        """Return queries, keys and values, each [..., h * d]."""
        if self.qkv is None:
            return [self.get_submodule(name)(x) for name in PROJECTIONS]
        bias = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Apply rotary positions (Su et al. 2021, RoFormer, equation 34) to [B, h, N, d].

        Prefix tokens (class token, registers) have no position and stay as they are.
        """
        prefix, patches = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        sine, cosine = rope.chunk(2, dim=-1)  # each [N - prefix, d]
        if self.rotate_half:  # channel i is paired with channel i + d / 2
            x_1, x_2 = patches.chunk(2, dim=-1)
            rotated = torch.cat([-x_2, x_1], dim=-1)
        else:  # channel 2i is paired with channel 2i + 1
            rotated = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
        return torch.cat([prefix, patches * cosine + rotated * sine], dim=2)

    def _position_bias(self, shared: Tensor | None) -> Tensor | None:
        """Return the relative position bias of the logits, [1 or B, dense heads, N, N]."""
        if self.rel_pos is not None:
            bias: Tensor = self.rel_pos.get_bias()
            return bias
        if self.relative_position_bias_table is None:
            return shared
        # [N, N, dense heads]
        pairs = self.relative_position_bias_table[self.relative_position_index]
        return pairs.permute(2, 0, 1).unsqueeze(0)  # [1, dense heads, N, N]

    def _select_heads(self, mask: Any) -> Any:
        """Select the kept heads in a mask or bias that has an axis of dense heads."""
        if mask is None or mask.ndim < 3 or mask.shape[-3] != self.num_heads:
            return mask
        return mask.index_select(mask.ndim - 3, self.heads.weight.to(mask.device))

    def _set_projections(self, weights: list[Tensor], biases: list[Tensor | None]) -> None:
        """Register W_q, W_k and W_v, each [h * d, C], and their biases, each [h * d] or None."""
        if self.separate_qkv or "qkv" not in self._template[0]._modules:
            for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
                self._modules[name] = frozen_linear(weight, bias)
            return
        q_bias, k_bias, v_bias = biases
        fused_bias = None
        if q_bias is not None and k_bias is not None and v_bias is not None:
            fused_bias = torch.cat([q_bias, k_bias, v_bias])
        elif q_bias is not None and v_bias is not None:  # BEiT: keys have no bias
            self.q_bias, self.v_bias = frozen_parameter(q_bias), frozen_parameter(v_bias)
        self.qkv = frozen_linear(torch.cat(weights), fused_bias)  # weight [3 * h * d, C]
