"""Read projections and properties of the dense attention modules of several libraries."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.slim.calls import call_convention

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
    """Return the kept heads as a tuple.

    Raises:
        OptionError: They are not strictly ascending within [0, num_heads).
    """
    kept = tuple(int(h) for h in kept_heads)
    # -1 and num_heads at the ends also test the bounds
    if any(b <= a for a, b in pairwise((-1, *kept, num_heads))):
        raise OptionError(
            f"kept_heads must be strictly ascending within [0, {num_heads}), given {kept}"
        )
    return kept


def head_index(heads: Sequence[int], head_dim: int) -> Tensor:
    """Return the channels of ``heads``, in their order, int64 [len(heads) * head_dim]."""
    first = torch.as_tensor(list(heads), dtype=torch.int64) * head_dim
    return (first[:, None] + torch.arange(head_dim)).reshape(-1)  # [heads, head_dim] -> [channels]


@torch.no_grad()
def is_batch_first(mha: nn.Module) -> bool:
    """Return True if ``mha`` reads [N, L, E], false if it reads [L, N, E].

    open_clip's own ``Attention`` reads [L, N, E] up to version 2.24 and [N, L, E] from 3.0 on. It
    has no attribute that tells, so it is applied to a small input.
    """
    declared = getattr(mha, "batch_first", None)
    if declared is not None:
        return bool(declared)
    if call_convention(mha).returns_tuple:
        return True
    probe = copy.deepcopy(mha).eval().float()  # torch 2.0 has no half precision on CPUs
    weight = probe.get_parameter("out_proj.weight")
    x = torch.arange(4.0 * len(weight), device=weight.device).sin().view(2, 2, len(weight))
    # x is [2, 2, E]: two images of two tokens, or two tokens of two images
    changed = x.clone()
    changed[1] = x[1].flip(-1)
    # The first image does not depend on the second image, but the first token does on the second.
    # The forward of the class: hooks of the original must not see the probe.
    return torch.equal(type(mha).forward(probe, x)[0], type(mha).forward(probe, changed)[0])


def refuse_extras(mha: nn.Module) -> None:
    """Refuse an attention with components that do not support the removal of heads.

    Raises:
        TargetError: ``mha`` has such a component, or is no supported attention.
    """
    missing = [n for n in ("num_heads", "out_proj") if not hasattr(mha, n)]
    if missing:
        raise TargetError(
            f"{type(mha).__name__} has no {' and no '.join(missing)}; expected "
            "nn.MultiheadAttention or a module with its parameters"
        )
    tensors = ("bias_k", "bias_v", "logit_scale", "head_scale")
    extras = [name for name in tensors if getattr(mha, name, None) is not None]
    for name in ("ln_q", "ln_k", "ln_inner"):
        if not isinstance(getattr(mha, name, None), (nn.Identity, type(None))):
            extras.append(name)
    if getattr(mha, "add_zero_attn", False):
        extras.append("add_zero_attn")
    if extras:
        raise TargetError(
            f"{type(mha).__name__} uses {', '.join(extras)}, which a slim attention does not have; "
            "protect this block"
        )


@dataclass(frozen=True, eq=False)
class Projections:
    """Linear maps of an attention.

    Attributes:
        weights: W_q, W_k and W_v, each [heads * head_dim, embed_dim].
        biases: Their biases, each [heads * head_dim] or None.
        columns: Weight of the output projection, [embed_dim, heads * head_dim].
        out_bias: Bias of the output projection, or None.
        heads: Number of heads.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    columns: Tensor
    out_bias: Tensor | None
    heads: int

    @classmethod
    def of(cls, parts: Sequence[nn.Linear], out: nn.Linear, heads: int) -> Projections:
        """Read separate layers: those of queries, keys and values, and the output projection."""
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
        return Projections(
            weights=weights,
            biases=biases,
            columns=self.columns[:, rows],
            out_bias=self.out_bias,
            heads=len(positions),
        )


def projections_of(mha: nn.Module, heads: int) -> Projections:
    """Read the linear maps of an attention that has ``heads`` heads.

    Raises:
        TargetError: ``mha`` has none, or its inputs have different widths.
    """
    fused, bias = getattr(mha, "in_proj_weight", None), getattr(mha, "in_proj_bias", None)
    separate = [getattr(mha, f"{letter}_proj_weight", None) for letter in "qkv"]
    weights = tuple(weight.detach() for weight in separate if isinstance(weight, Tensor))
    if fused is None and len(weights) < 3:
        raise TargetError(
            f"{type(mha).__name__} has neither in_proj_weight nor q/k/v_proj_weight; "
            "expected nn.MultiheadAttention or a module with its parameters"
        )
    widths = {weight.shape[1] for weight in weights}
    if len(widths) > 1:
        raise TargetError(f"q, k and v read different widths {sorted(widths)}; not supported")
    out: Any = mha.out_proj
    # A slim attention is narrower than E, so the width comes from the output projection.
    rows = [out.weight.shape[1]] * 3
    if fused is not None:
        weights = torch.split(fused.detach(), rows)
    biases = (None, None, None) if bias is None else torch.split(bias.detach(), rows)
    return Projections(
        weights=weights, biases=biases, columns=out.weight, out_bias=out.bias, heads=heads
    )


def dropout(mha: nn.Module) -> float:
    """Return the probability of dropping an attention weight."""
    drop: object = getattr(mha, "dropout", getattr(mha, "attn_drop", 0.0))
    if isinstance(drop, nn.Dropout):
        return drop.p
    return float(drop) if isinstance(drop, (int, float)) else 0.0
