"""A dense attention module, whoever wrote it: its projections, its call, what a cut cannot keep."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.slim.calls import call_of

__all__ = [
    "Projections",
    "check_heads",
    "dropout",
    "head_index",
    "is_batch_first",
    "projections_of",
    "refuse_extras",
]


def check_heads(num_heads: int, kept_heads: Sequence[int]) -> tuple[int, ...]:
    """Kept heads as a tuple of ints.

    Raises:
        OptionError: They are not strictly ascending within [0, num_heads).
    """
    kept = tuple(int(h) for h in kept_heads)
    if any(b <= a for a, b in pairwise((-1, *kept, num_heads))):
        raise OptionError(
            f"kept_heads must be strictly ascending within [0, {num_heads}), given {kept}"
        )
    return kept


def head_index(heads: Sequence[int], head_dim: int) -> Tensor:
    """int64 [len(heads) * head_dim]: the channels that belong to ``heads``, in their order."""
    first = torch.as_tensor(list(heads), dtype=torch.int64) * head_dim
    return (first[:, None] + torch.arange(head_dim)).reshape(-1)


@torch.no_grad()
def is_batch_first(mha: nn.Module) -> bool:
    """Whether ``mha`` reads [N, L, E], not [L, N, E]; tried out where it does not say.

    open_clip's own ``Attention`` read [L, N, E] up to 2.24 and [N, L, E] from 3.0 on, and has no
    attribute that tells.
    """
    own = getattr(mha, "batch_first", None)
    if own is not None:
        return bool(own)
    if call_of(mha).returns_tuple:
        return True
    tried = copy.deepcopy(mha).eval().float()  # torch 2.0 has no half precision on CPUs
    weight = tried.get_parameter("out_proj.weight")
    x = torch.arange(4.0 * len(weight), device=weight.device).sin().view(2, 2, len(weight))
    other = x.clone()
    other[1] = x[1].flip(-1)
    # the first entry of a batch does not depend on the second; the first token does
    return torch.equal(type(mha).forward(tried, x)[0], type(mha).forward(tried, other)[0])


def refuse_extras(mha: nn.Module) -> None:
    """Refuse what a cut by heads would not leave as it was.

    Raises:
        TargetError: ``mha`` is no attention that we know, or has such a thing.
    """
    needed = [n for n in ("num_heads", "out_proj") if not hasattr(mha, n)]
    if needed:
        raise TargetError(
            f"{type(mha).__name__} has no {' and no '.join(needed)}; expected "
            "nn.MultiheadAttention or a module with its parameters"
        )
    found = [
        name
        for name in ("bias_k", "bias_v", "logit_scale", "head_scale")
        if getattr(mha, name, None) is not None
    ]
    found += [
        name
        for name in ("ln_q", "ln_k", "ln_inner")
        if not isinstance(getattr(mha, name, None), (nn.Identity, type(None)))
    ]
    if getattr(mha, "add_zero_attn", False):
        found.append("add_zero_attn")
    if found:
        raise TargetError(
            f"{type(mha).__name__} uses {', '.join(found)}, which a slim attention does not have; "
            "protect this block"
        )


@dataclass(frozen=True, eq=False)
class Projections:
    """The linear maps of an attention, taken apart.

    Attributes:
        weights: Of the queries, keys and values, each [heads * head_dim, embed_dim].
        biases: Theirs, [heads * head_dim], or None.
        columns: Weight of the out projection, [embed_dim, heads * head_dim].
        out_bias: Its bias, or None.
        heads: How many heads they have.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    columns: Tensor
    out_bias: Tensor | None
    heads: int

    @classmethod
    def of(cls, parts: Sequence[nn.Linear], out: nn.Linear, heads: int) -> Projections:
        """Of separate layers, (q, k, v) and the out projection."""
        weights, biases = tuple(m.weight for m in parts), tuple(m.bias for m in parts)
        return cls(weights, biases, out.weight, out.bias, heads)

    @property
    def head_dim(self) -> int:
        """Width of one head; 0 without heads."""
        return self.weights[0].shape[0] // (self.heads or 1)

    def cut(self, positions: Sequence[int]) -> Projections:
        """Return the heads at ``positions``."""
        rows = head_index(positions, self.head_dim).to(self.columns.device)
        weights = tuple(w[rows] for w in self.weights)
        biases = tuple(None if b is None else b[rows] for b in self.biases)
        return Projections(weights, biases, self.columns[:, rows], self.out_bias, len(positions))


def projections_of(mha: nn.Module, heads: int) -> Projections:
    """The linear maps of an attention of ``heads`` heads.

    Raises:
        TargetError: It has none, or q, k and v read different widths.
    """
    weight, bias = _in_projection(mha)
    out = mha.out_proj
    assert isinstance(out, nn.Linear)
    inner = out.weight.shape[1]
    rows = [inner] * 3
    biases = (None, None, None) if bias is None else torch.split(bias, rows)
    return Projections(torch.split(weight, rows), biases, out.weight, out.bias, heads)


def _in_projection(mha: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Fused in projection [q, k and v rows, embed_dim] and its bias.

    Raises:
        TargetError: It has none, or q, k and v read different widths.
    """
    weight = getattr(mha, "in_proj_weight", None)
    if weight is None:
        parts = [getattr(mha, f"{n}_proj_weight", None) for n in "qkv"]
        if any(not isinstance(p, Tensor) for p in parts):
            raise TargetError(
                f"{type(mha).__name__} has neither in_proj_weight nor q/k/v_proj_weight; "
                "expected nn.MultiheadAttention or a module with its parameters"
            )
        widths = {p.shape[1] for p in parts if p is not None}
        if len(widths) > 1:
            raise TargetError(f"q, k and v read different widths {sorted(widths)}; not supported")
        weight = torch.cat([p.detach() for p in parts if p is not None])
    bias = getattr(mha, "in_proj_bias", None)
    return weight.detach(), None if bias is None else bias.detach()


def dropout(mha: nn.Module) -> float:
    """Probability of dropping an attention weight."""
    drop: object = getattr(mha, "dropout", getattr(mha, "attn_drop", 0.0))
    if isinstance(drop, nn.Dropout):
        return drop.p
    return float(drop) if isinstance(drop, (int, float)) else 0.0
