"""How an attention module is called: torch's form, and the two that open_clip's own class has had.

They differ in the order of the arguments, in what comes back, and in what true means in a mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["TORCH", "X_KV_MASK", "X_MASK", "Call", "call_of"]

# Names of other classes for torch's arguments.
_TORCHS_NAMES = {"x": "query", "k_x": "key", "v_x": "value"}


@dataclass(frozen=True)
class Call:
    """How the callers of an attention write their arguments, and what they get.

    Attributes:
        order: torch's names of the positional arguments after the first.
        returns_tuple: Whether they get the output and the weights, or the output alone.
        true_attends: Whether true in a bool ``attn_mask`` takes part; else true is left out.
    """

    order: tuple[str, ...]
    returns_tuple: bool = False
    true_attends: bool = False

    def bind(self, args: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by torch's names, and a mask with torch's meaning.

        Example:
            >>> X_KV_MASK.bind(("x", None, None, "mask"), {})["attn_mask"]
            'mask'

        Args:
            args: Positional arguments of a caller.
            given: Its keyword arguments, by the names of any form.

        Raises:
            TypeError: There are too many arguments, or one is given twice.
        """
        names = ("query", *self.order)
        if len(args) > len(names):
            raise TypeError(f"{len(args)} positional arguments, expected {', '.join(names)}")
        bound = dict(zip(names, args, strict=False))
        for name, value in given.items():
            known = _TORCHS_NAMES.get(name, name)
            if known in bound:
                raise TypeError(f"the argument {name} is given twice")
            bound[known] = value
        mask = bound.get("attn_mask")
        if self.true_attends and mask is not None and mask.dtype == torch.bool:
            bound["attn_mask"] = ~mask
        if not self.returns_tuple:  # open_clip's own take the query for whichever is not given
            for name in ("key", "value"):
                if bound.get(name) is None:
                    bound[name] = bound.get("query")
        return bound


TORCH = Call(
    (
        "key",
        "value",
        "key_padding_mask",
        "need_weights",
        "attn_mask",
        "average_attn_weights",
        "is_causal",
    ),
    returns_tuple=True,
)
"""``nn.MultiheadAttention`` and its copies: (query, key, value, ...) to (output, weights)."""

X_MASK = Call(("attn_mask",))
"""open_clip's ``Attention`` in its releases: (x, attn_mask) to the output."""

X_KV_MASK = Call(("key", "value", "attn_mask"), true_attends=True)
"""The same class in open_clip's development head: (x, k_x, v_x, attn_mask) to the output."""


def call_of(module: nn.Module) -> Call:
    """How ``module`` is called: what it says itself (``call``), else by its ``forward``.

    A ``forward(*args, **kwargs)`` hands on what it gets (CAT-Seg's), so its parent's tells.
    """
    own = getattr(module, "call", None)
    if isinstance(own, Call):
        return own
    parameters = _named(type(module))
    if "key" in parameters:
        return TORCH
    return X_KV_MASK if "k_x" in parameters else X_MASK


def _named(kind: type[nn.Module]) -> list[str]:
    """Arguments of the nearest ``forward`` that names any."""
    for owner in kind.__mro__:
        own = vars(owner).get("forward")
        if own is not None:
            parameters = inspect.signature(own).parameters.values()
            names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
            if len(names) > 1:  # beside self
                return names
    return []
