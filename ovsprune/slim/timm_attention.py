"""Self-attention by timm's names, with some of its heads: what stands where timm's own stood.

timm's towers write their attention in several ways: queries, keys and values in one map or apart,
the bias inside that map or beside it, norms of queries and keys, rotary positions, a bias for
relative positions, a mask for each window, a norm before the out projection. This one does what
they do, from whichever of these parts the dense module has, and keeps the parts' names.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.slim.dense import check_heads, head_index
from ovsprune.slim.linear import linear
from ovsprune.slim.norms import ZeroPaddedLayerNorm

__all__ = ["HeadIndex", "TimmAttention", "is_timm_attention"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
BIASES = ("q_bias", "k_bias", "v_bias")
_WHOLE = ("q_norm", "k_norm", "rel_pos", "proj_drop")
"""Parts that know no heads, or all heads of the dense module."""
_TABLE, _INDEX = "relative_position_bias_table", "relative_position_index"
"""Biases by relative position, [positions, dense heads], and the position of pairs of tokens."""


def is_timm_attention(module: nn.Module) -> bool:
    """Whether ``module`` has an attention's maps by timm's names."""
    names = dict(module.named_children())
    return (
        hasattr(module, "num_heads")
        and isinstance(names.get("proj"), nn.Linear)
        and any(isinstance(names.get(name), nn.Linear) for name in ("qkv", "q_proj"))
    )


class HeadIndex(nn.Module):
    """Which heads are here: an index that is cut as a layer with a row for each head is.

    Args:
        heads: int64, dense indices.
    """

    weight: Tensor

    def __init__(self, heads: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", heads, persistent=False)


class TimmAttention(nn.Module):
    """Self-attention over the kept heads of one of timm's.

    Its output equals that of the dense module whose cut heads are masked to zero, before the inner
    norm where there is one; without any head it is the out projection's bias. Parameters have the
    names that they have there, and are copies. Biases of relative positions stay for all heads of
    the dense module.

    Args:
        dense: See :func:`is_timm_attention`; may be one of these.
        kept_heads: Dense indices of the heads that stay, strictly ascending; by default all that
            are there.
        apart: Queries, keys and values as layers of their own (``q_proj``, ``k_proj``, ``v_proj``)
            whatever form the dense module has, so that heads can be cut layer by layer. Made from
            such a one without it, the dense module's form is back.
        windows: How many of the B that come in are windows of one picture, one after another. The
            maps then read and give a picture's tokens at once, [B / windows, windows * N, ...], so
            that their first axis counts pictures.

    Attributes:
        num_heads: Heads of the dense module.
        apart: As given.
        windows: As given.
        head_dim: Width of one head.

    Raises:
        TargetError: ``dense`` has something that a cut by heads would not leave as it was.
        OptionError: ``kept_heads`` are not valid.
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
        apart: bool = False,
        windows: int = 1,
    ) -> None:
        super().__init__()
        _refuse(dense)
        source: Any = dense
        self.num_heads = int(source.num_heads)
        present = dense.kept_heads if isinstance(dense, TimmAttention) else range(self.num_heads)
        kept = check_heads(self.num_heads, tuple(present if kept_heads is None else kept_heads))
        if not set(kept) <= set(present):
            raise OptionError(f"heads {kept} are not all here; {tuple(present)} are left")
        weights, biases = _maps(source)
        own = isinstance(dense, TimmAttention)
        self.head_dim = int(source.head_dim if own else weights[0].shape[0] // self.num_heads)
        self.apart, self.windows = apart, windows
        self.num_prefix_tokens = int(getattr(source, "num_prefix_tokens", 0))
        self.rotate_half = bool(getattr(source, "rotate_half", False))
        # What to be called again, and in which form: without the maps, it weighs nothing.
        self._shell: tuple[Any, ...] = getattr(source, "_shell", None) or (_shell(dense),)
        self.heads = HeadIndex(torch.tensor(kept))
        rows = head_index([list(present).index(head) for head in kept], self.head_dim)
        rows = rows.to(weights[0].device)
        self._modules |= dict.fromkeys((*PROJECTIONS, "qkv"))
        self._parameters |= dict.fromkeys(BIASES)
        self._set_maps(
            [weight[rows] for weight in weights],
            [None if bias is None else bias[rows] for bias in biases],
            apart,
        )
        self._modules |= {name: copy.deepcopy(getattr(source, name, None)) for name in _WHOLE}
        table = getattr(source, _TABLE, None)
        self._parameters[_TABLE] = None if table is None else _frozen(table.detach())
        self.register_buffer(_INDEX, getattr(source, _INDEX, None), persistent=False)
        self.norm = _cut_norm(getattr(source, "norm", None), rows)
        columns = source.proj.weight.detach()[:, rows]
        self.proj = _linear(
            columns, None if source.proj.bias is None else source.proj.bias.detach()
        )
        self.train(dense.training)

    @property
    def kept_heads(self) -> tuple[int, ...]:
        """Dense indices of the heads that are here."""
        return tuple(self.heads.weight.tolist())

    @property
    def is_cut(self) -> bool:
        """Whether heads are gone, so that it is not of timm's form."""
        return len(self.kept_heads) < self.num_heads

    def whole(self) -> nn.Module:
        """The dense module's own type again, with the maps that are here now.

        Raises:
            OptionError: Heads are gone.
        """
        if self.is_cut:
            raise OptionError(f"only {len(self.kept_heads)} of {self.num_heads} heads are left")
        now = TimmAttention(self)
        own = copy.copy(self._shell[0])
        own._modules = dict(own._modules)
        own._parameters = dict(own._parameters)
        for table, names in (
            (own._modules, (*PROJECTIONS, *_WHOLE, "qkv", "proj", "norm")),
            (own._parameters, (*BIASES, _TABLE)),
        ):
            table.update({name: getattr(now, name) for name in names if name in table})
        own.train(self.training)
        return own  # type: ignore[no-any-return]

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
            x: [B, N, C], or a map [B, C, h, w] whose positions are the tokens, row by row.
            rope: Sines and cosines of the tokens behind the prefix, side by side in the last axis.
            attn_mask: Bool (true takes part) or float (added), to broadcast to
                [B, dense heads or 1, N, N].
            is_causal: Mask the future.
            shared_rel_pos: Added to the logits, [1 or B, dense heads, N, N].
            mask: Added to the logits, [windows, N, N], in the place of ``attn_mask``: of the B, a
                picture's windows lie one after another.

        Returns:
            Of the shape of ``x``.
        """
        is_map = x.ndim == 4
        # The linear maps work on [B, h, w, C], not on tokens, so that what they give lies as a map.
        x = x.movedim(1, -1) if is_map else x
        if not len(self.heads.weight):
            mixed = self._seen(x)[..., :0]
        else:
            if mask is not None:
                attn_mask = mask.repeat(x.shape[0] // mask.shape[0], 1, 1).unsqueeze(1)
            bias = self._position_bias(shared_rel_pos)
            mixed = self._mixed(x, rope, bias, self._gathered(attn_mask), is_causal)
        out: Tensor = self.proj(mixed if self.norm is None else self.norm(mixed))
        out = out.reshape(*x.shape[:-1], -1) if self.windows > 1 else out
        out = out if self.proj_drop is None else self.proj_drop(out)
        return out.movedim(-1, 1) if is_map else out

    def extra_repr(self) -> str:
        """Dense and kept heads, for ``print(model)``."""
        return f"heads={len(self.kept_heads)} of {self.num_heads} x {self.head_dim}"

    def _mixed(
        self,
        x: Tensor,
        rope: Tensor | None,
        bias: Tensor | None,
        added: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """What the heads gather, [B, ..., heads * head_dim]."""
        q, k, v = (self._heads(part, x.shape[0]) for part in self._projected(self._seen(x)))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._rotated(part, rope).to(v) for part in (q, k))
        if bias is not None:
            # Apart, heads are about to be cut by a graph, which takes a bias's heads for channels.
            bias = self._gathered(bias.detach() if self.apart else bias)
            added = bias if added is None else bias + added
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=added, is_causal=is_causal)
        return self._seen(mixed.transpose(1, 2).reshape(*x.shape[:-1], -1))

    def _heads(self, part: Tensor, batch: int) -> Tensor:
        """[..., heads * head_dim] -> [B, heads, N, head_dim]."""
        heads = (batch, -1, len(self.heads.weight), self.head_dim)
        return part.reshape(heads).transpose(1, 2)

    def _seen(self, x: Tensor) -> Tensor:
        """What the maps see of [B, N, ...]: a picture's windows as one."""
        return x.reshape(-1, self.windows * x.shape[1], x.shape[2]) if self.windows > 1 else x

    def _projected(self, x: Tensor) -> Sequence[Tensor]:
        if self.qkv is None:
            return [self.get_submodule(name)(x) for name in PROJECTIONS]
        bias = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        """Rotary positions (Su et al. 2021, RoFormer) on the tokens behind the prefix."""
        first, rest = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        sine, cosine = rope.chunk(2, dim=-1)
        if self.rotate_half:
            one, two = rest.chunk(2, dim=-1)
            turned = torch.cat([-two, one], dim=-1)
        else:
            turned = torch.stack([-rest[..., 1::2], rest[..., ::2]], dim=-1).flatten(-2)
        return torch.cat([first, rest * cosine + turned * sine], dim=2)

    def _position_bias(self, shared: Tensor | None) -> Tensor | None:
        """What relative positions add to the logits, [1 or B, dense heads, N, N]."""
        if self.rel_pos is not None:
            bias: Tensor = self.rel_pos.get_bias()
            return bias
        if self.relative_position_bias_table is None:
            return shared
        pairs = self.relative_position_bias_table[self.relative_position_index]
        return pairs.permute(2, 0, 1).unsqueeze(0)

    def _gathered(self, mask: Any) -> Any:
        """A mask's or bias's rows of the heads that are here."""
        if mask is None or mask.ndim < 3 or mask.shape[-3] != self.num_heads:
            return mask
        return mask.index_select(mask.ndim - 3, self.heads.weight.to(mask.device))

    def _set_maps(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], apart: bool
    ) -> None:
        shell: Any = self._shell[0]
        if apart or "qkv" not in shell._modules:
            for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
                self._modules[name] = _linear(weight, bias)
            return
        q_bias, k_bias, v_bias = biases
        if q_bias is None or v_bias is None:
            self._modules["qkv"] = _linear(torch.cat(list(weights)), None)
        elif k_bias is None:
            self._modules["qkv"] = _linear(torch.cat(list(weights)), None)
            self.q_bias, self.v_bias = _frozen(q_bias), _frozen(v_bias)
        else:
            bias = torch.cat([q_bias, k_bias, v_bias])
            self._modules["qkv"] = _linear(torch.cat(list(weights)), bias)


def _refuse(module: nn.Module) -> None:
    if not is_timm_attention(module):
        raise TargetError(
            f"{type(module).__name__} has no maps by timm's names (qkv or q_proj, and proj)"
        )
    found = ["gate"] if getattr(module, "gate", None) is not None else []
    if getattr(module, "num_kv_heads", module.num_heads) != module.num_heads:
        found.append("keys and values shared by several heads")
    if found:
        raise TargetError(
            f"{type(module).__name__} uses {' and '.join(found)}, which a slim attention does not "
            "have; protect this block"
        )


def _maps(module: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights [heads * head_dim, C] of queries, keys and values, and their biases."""
    if module.qkv is None:
        layers = [getattr(module, name) for name in PROJECTIONS]
        biases = [None if m.bias is None else m.bias.detach() for m in layers]
        return [m.weight.detach() for m in layers], biases
    weights = list(module.qkv.weight.detach().chunk(3))
    if getattr(module, "q_bias", None) is not None:
        return weights, [module.q_bias.detach(), None, module.v_bias.detach()]
    bias = module.qkv.bias
    return weights, [None] * 3 if bias is None else list(bias.detach().chunk(3))


def _shell(dense: nn.Module) -> nn.Module:
    """A copy without maps; the names that it has for them say which form they had."""
    shell = copy.copy(dense)
    shell._modules, shell._parameters = dict(dense._modules), dict(dense._parameters)
    for table, names in (
        (shell._modules, (*PROJECTIONS, "qkv", "proj", "norm")),
        (shell._parameters, BIASES),
    ):
        table.update({name: None for name in names if name in table})
    return shell


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = _frozen(weight)
    if bias is not None:
        layer.bias = _frozen(bias)
    return layer


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.clone(memory_format=torch.contiguous_format), requires_grad=False)


def _cut_norm(norm: nn.Module | None, rows: Tensor) -> nn.Module | None:
    """The inner norm over the channels ``rows``, those that are gone counted as zero."""
    if not isinstance(norm, nn.LayerNorm):
        return norm
    counted = ZeroPaddedLayerNorm(copy.copy(norm))
    for name in ("weight", "bias"):
        tensor = getattr(norm, name)
        setattr(counted, name, None if tensor is None else _frozen(tensor.detach()[rows]))
    counted.normalized_shape = (len(rows),)
    return counted
