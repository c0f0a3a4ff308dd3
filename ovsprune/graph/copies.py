"""Deep copies of models whose hooks refer to the copy instead of the original."""

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
    """Return a deep copy of ``model``.

    ``copy.deepcopy`` does not copy functions. A hook that writes to a model of its closure
    (``lambda module, args, out: self.layers.append(out)``, as in CAT-Seg) would still write to the
    original. Here such hooks refer to the copy. Tensors with an autograd graph that a forward pass
    stored in attributes are copied without the graph.

    Args:
        model: The original, which is not modified.
        memo: Memo of ``copy.deepcopy``: id of an object to the object to use instead of a copy.
    """
    memo = {} if memo is None else memo
    for tensor in _graph_tensors(model):
        memo.setdefault(id(tensor), tensor.detach())
    clone = deepcopy(model, memo)
    for module in clone.modules():
        for table in (module.__dict__.get(name, {}) for name in _HOOKS):
            for key, hook in table.items():
                table[key] = _with_copies(hook, memo)
    return clone


def _graph_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield non-leaf tensors in plain attributes; ``copy.deepcopy`` raises an error on them."""
    for module in model.modules():
        for value in module.__dict__.values():
            for entry in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(entry, Tensor) and not entry.is_leaf:
                    yield entry


def _with_copies(hook: Any, memo: dict[int, Any]) -> Any:
    """Return ``hook`` with the modules in its closure replaced by their copies."""
    if not isinstance(hook, FunctionType) or hook.__closure__ is None:
        return hook
    cells = tuple(
        CellType(memo[id(cell.cell_contents)]) if _is_copied(cell, memo) else cell
        for cell in hook.__closure__
    )
    rebound = FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, cells)
    rebound.__kwdefaults__ = hook.__kwdefaults__
    return rebound


def _is_copied(cell: CellType, memo: dict[int, Any]) -> bool:
    """Return True if the cell holds a module that has a copy."""
    try:
        content = cell.cell_contents
    except ValueError:  # The variable was never assigned.
        return False
    return isinstance(content, nn.Module) and id(content) in memo
