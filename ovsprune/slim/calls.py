"""Calling conventions of attention modules: torch's, and the two of open_clip's ``Attention``.

They differ in the order of the arguments, the type of the result, and the meaning of true in a
bool mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["OPEN_CLIP_CALL", "OPEN_CLIP_KV_CALL", "TORCH_CALL", "CallConvention", "call_convention"]

# Argument names of open_clip's class -> those of nn.MultiheadAttention.
_TORCH_NAMES = {"x": "query", "k_x": "key", "v_x": "value"}


@dataclass(frozen=True)
class CallConvention:
    """Calling convention of an attention module.

    Attributes:
        order: Positional arguments after the first, by their names in ``nn.MultiheadAttention``.
        returns_tuple: True if it returns (output, weights), false if the output alone.
        true_means_attend: True if true in a bool ``attn_mask`` marks keys to attend to; false if
            it marks keys to ignore, as in torch.
    """

    order: tuple[str, ...]
    returns_tuple: bool = False
    true_means_attend: bool = False

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Translate the arguments of a call to those of ``nn.MultiheadAttention``, by name.

        A bool mask is inverted if its meaning is the opposite of torch's.

        Example:
            >>> OPEN_CLIP_KV_CALL.bind(("x", None, None, "mask"), {})["attn_mask"]
            'mask'

        Raises:
            TypeError: There are too many positional arguments, or one argument is given twice.
        """
        names = ("query", *self.order)
        if len(args) > len(names):
            raise TypeError(
                f"attention got {len(args)} positional arguments, expected at most {len(names)}: "
                f"{', '.join(names)}"
            )
        bound = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            torch_name = _TORCH_NAMES.get(name, name)
            if torch_name in bound:
                raise TypeError(f"attention got the argument {name} twice; pass it once")
            bound[torch_name] = value
        mask = bound.get("attn_mask")
        if self.true_means_attend and mask is not None and mask.dtype == torch.bool:
            bound["attn_mask"] = ~mask
        if not self.returns_tuple:  # in open_clip, a missing key or value defaults to the query
            for name in ("key", "value"):
                if bound.get(name) is None:
                    bound[name] = bound.get("query")
        return bound


TORCH_CALL = CallConvention(
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
"""``nn.MultiheadAttention`` and its copies: (query, key, value, ...) -> (output, weights)."""

OPEN_CLIP_CALL = CallConvention(("attn_mask",))
"""``Attention`` of released versions of open_clip: (x, attn_mask) -> output."""

OPEN_CLIP_KV_CALL = CallConvention(("key", "value", "attn_mask"), true_means_attend=True)
"""``Attention`` of open_clip's main branch: (x, k_x, v_x, attn_mask) -> output."""


def call_convention(module: nn.Module) -> CallConvention:
    """Return the calling convention of an attention module.

    This is its attribute ``call`` if it has one. Otherwise the argument names of its ``forward``
    decide. A ``forward(*args, **kwargs)``, as in CAT-Seg, passes its arguments on to the parent
    class, so the parent's ``forward`` is read instead.
    """
    declared = getattr(module, "call", None)
    if isinstance(declared, CallConvention):
        return declared
    parameters = _forward_arguments(type(module))
    if "key" in parameters:
        return TORCH_CALL
    return OPEN_CLIP_KV_CALL if "k_x" in parameters else OPEN_CLIP_CALL


def _forward_arguments(module_class: type[nn.Module]) -> list[str]:
    """Return the argument names of the first ``forward`` in the class hierarchy that has any."""
    for base in module_class.__mro__:
        forward = vars(base).get("forward")
        if forward is not None:
            parameters = inspect.signature(forward).parameters.values()
            names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
            if len(names) > 1:  # more than self
                return names
    return []
