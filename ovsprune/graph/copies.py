"""Copies of models that can be run: their hooks know the copy, not the original."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from types import CellType, FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["copy_model"]

Module = TypeVar("Module", bound=nn.Module)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def copy_model(model: Module, memo: dict[int, Any] | None = None) -> Module:
    """A deep copy of ``model``.

    ``copy.deepcopy`` passes functions on as they are, so a hook that writes into a model of its
    closure (``lambda module, given, out: self.layers.append(out)``, as CAT-Seg has it) would write
    into the original. What a run left in attributes, with its graph, is copied without that graph.

    Args:
        model: The original, which is not touched.
        memo: Of ``copy.deepcopy``: what stands for some of its parts.
    """
    memo = {} if memo is None else memo
    for tensor in _left_over(model):
        memo.setdefault(id(tensor), tensor.detach())
    clone = deepcopy(model, memo)
    for module in clone.modules():
        for table in (module.__dict__.get(name, {}) for name in _HOOKS):
            for key, hook in table.items():
                table[key] = _with_copies(hook, memo)
    return clone


def _left_over(model: nn.Module) -> Iterator[Tensor]:
    """Tensors in plain attributes that a forward pass has computed; deepcopy refuses them."""
    for module in model.modules():
        for value in module.__dict__.values():
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, Tensor) and not item.is_leaf:
                    yield item


def _with_copies(hook: Any, memo: dict[int, Any]) -> Any:
    """``hook`` with the copies of the modules in its closure."""
    if not isinstance(hook, FunctionType) or hook.__closure__ is None:
        return hook
    cells = tuple(
        CellType(memo[id(cell.cell_contents)]) if _is_copied(cell, memo) else cell
        for cell in hook.__closure__
    )
    made = FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, cells)
    made.__kwdefaults__ = hook.__kwdefaults__
    return made


def _is_copied(cell: CellType, memo: dict[int, Any]) -> bool:
    try:
        content = cell.cell_contents
    except ValueError:  # not assigned yet
        return False
    return isinstance(content, nn.Module) and id(content) in memo
