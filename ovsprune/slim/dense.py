"""A dense attention module, whoever wrote it: its projections, its call, what a cut cannot keep."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ovsprune.core.errors import OptionError, TargetError

__all__ = [
    "check_heads",
    "dropout",
    "head_index",
    "in_projection",
    "refuse_extras",
    "takes_key_value",
]


def check_heads(num_heads: int, kept_heads: Sequence[int]) -> tuple[int, ...]:
    """Kept heads as a tuple of ints.

    Raises:
        OptionError: None are kept, or they are not strictly ascending within [0, num_heads).
    """
    kept = tuple(int(h) for h in kept_heads)
    if not kept:
        raise OptionError(f"kept_heads is empty; keep at least one of the {num_heads} heads")
    if any(b <= a for a, b in pairwise(kept)) or kept[0] < 0 or kept[-1] >= num_heads:
        raise OptionError(
            f"kept_heads must be strictly ascending within [0, {num_heads}), given {kept}"
        )
    return kept


def head_index(heads: Sequence[int], head_dim: int) -> Tensor:
    """int64 [len(heads) * head_dim]: the channels that belong to ``heads``, in their order."""
    first = torch.as_tensor(list(heads), dtype=torch.int64) * head_dim
    return (first[:, None] + torch.arange(head_dim)).reshape(-1)


def takes_key_value(module: nn.Module) -> bool:
    """Whether ``module`` is called with (query, key, value) and returns a tuple.

    ``nn.MultiheadAttention`` and its copies are; open_clip's own ``Attention`` is called with
    (x, attn_mask) and returns a tensor.
    """
    own = getattr(module, "returns_tuple", None)  # a SlimAttention says so itself
    if isinstance(own, bool):
        return own
    return "key" in inspect.signature(type(module).forward).parameters


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


def in_projection(mha: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Fused in projection [3 * inner, embed_dim] and its bias.

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
        shapes = {tuple(p.shape) for p in parts if p is not None}
        if len(shapes) > 1:
            raise TargetError(f"q, k and v read different widths {sorted(shapes)}; not supported")
        weight = torch.cat([p.detach() for p in parts if p is not None])
    bias = getattr(mha, "in_proj_bias", None)
    return weight.detach(), None if bias is None else bias.detach()


def dropout(mha: nn.Module) -> float:
    """Probability of dropping an attention weight."""
    drop: object = getattr(mha, "dropout", getattr(mha, "attn_drop", 0.0))
    if isinstance(drop, nn.Dropout):
        return drop.p
    return float(drop) if isinstance(drop, (int, float)) else 0.0
