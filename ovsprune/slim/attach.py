"""Replace modules and tensors of a built model, all at once, and put the originals back.

:func:`ovsprune.apply` and every target attach with this. New modules and tensors are collected in
:class:`Replacements`, which leaves the model as it is. :meth:`Replacements.commit` then exchanges
all of them or none, and returns the record that undoes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ovsprune.core.errors import TargetError

__all__ = ["Applied", "Replacements", "Swap", "exchange", "undo_on_error"]

_ABSENT = object()  # old value of an entry that did not exist


@dataclass(frozen=True, eq=False)
class Swap:
    """Exchange of one entry in a module's tables.

    Attributes:
        path: Dotted path in the model, for messages.
        owner: The module that owns the table.
        table: ``"_modules"``, ``"_parameters"``, ``"_buffers"`` or ``"__dict__"``.
        name: Key in the table.
        old: Original value; a sentinel if there was none.
        new: Value after the exchange.
    """

    path: str
    owner: nn.Module
    table: str
    name: str
    old: Any
    new: Any

    @classmethod
    def attribute(cls, path: str, owner: nn.Module, name: str, new: Any) -> Swap:
        """Return the exchange of a plain attribute (a method, for example) of ``owner``."""
        # A method of the class is no entry of the instance; undoing then deletes the attribute.
        old = vars(owner).get(name, _ABSENT)
        return cls(path=path, owner=owner, table="__dict__", name=name, old=old, new=new)

    def put(self, value: Any) -> None:
        """Store ``value``, one of ``old`` and ``new``, in the table."""
        if value is _ABSENT:
            getattr(self.owner, self.table).pop(self.name, None)
        else:
            getattr(self.owner, self.table)[self.name] = value


@dataclass(eq=False)
class Applied:
    """Record of an exchange, which can undo it; also a context manager that detaches.

    Attributes:
        replaced: Paths of the modules that were replaced.
        loaded: Paths of the other parameters and buffers that hold the checkpoint's values.
        unused: Tensors of the checkpoint that were not loaded (``keep``).
    """

    replaced: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    _swaps: list[Swap] = field(default_factory=list, repr=False)

    def detach(self) -> None:
        """Put the original objects back; they were never modified.

        A second call does nothing.

        Raises:
            TargetError: A slim module was replaced by something else since; nothing is undone.
        """
        for swap in self._swaps:
            # All are checked before the first is undone, so that an error leaves no mixture.
            if getattr(swap.owner, swap.table).get(swap.name) is not swap.new:
                raise TargetError(
                    f"{swap.path} was replaced by something else since the slim tower was "
                    "attached; undo that first"
                )
        self.show_original()
        self._swaps.clear()

    def show_original(self) -> None:
        """Put the originals in place for now; :meth:`show_new` must follow."""
        # In reverse order, so that of two swaps of one entry the older value is put last.
        for swap in reversed(self._swaps):
            swap.put(swap.old)

    def show_new(self) -> None:
        """Put the new modules and tensors in place."""
        for swap in self._swaps:
            swap.put(swap.new)

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


class _Detachable(Protocol):
    def detach(self) -> None: ...


@contextlib.contextmanager
def undo_on_error(applied: _Detachable) -> Iterator[None]:
    """Detach ``applied`` if the block raises."""
    try:
        yield
    except BaseException:
        applied.detach()
        raise


def exchange(swaps: Sequence[Swap]) -> Applied:
    """Carry out all exchanges, or none if one fails.

    Returns:
        The record of them; ``replaced`` holds their paths.
    """
    applied = Applied(replaced=tuple(swap.path for swap in swaps), _swaps=list(swaps))
    try:
        applied.show_new()
    except BaseException:
        applied.show_original()
        raise
    return applied


class Replacements:
    """New modules and tensors for a model, which stays as it is until :meth:`commit`.

    Args:
        model: The built model.

    Attributes:
        modules: Path of a module to the module and its replacement.
        tensors: Path of a parameter or buffer to the tensor and its replacement.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, tuple[nn.Module, nn.Module]] = {}
        self.tensors: dict[str, tuple[Tensor, Tensor]] = {}
        # Tensors of the model, to tell them from those of the replacement modules.
        self._originals = {id(t) for t in (*model.parameters(), *model.buffers())}

    def find(self, path: str) -> Tensor | None:
        """Return the parameter or buffer that ``path`` will have after the commit, or None."""
        if path in self.tensors:
            return self.tensors[path][1]
        owner: Any = self.model
        *parts, name = path.split(".")
        for i, part in enumerate(parts):
            # Follow the path through replacement modules, as it will be after the commit.
            pair = self.modules.get(".".join(parts[: i + 1]))
            owner = getattr(owner, part, None) if pair is None else pair[1]
            if not isinstance(owner, nn.Module):
                return None
        parameter: Tensor | None = owner._parameters.get(name)
        return owner._buffers.get(name) if parameter is None else parameter

    def is_new(self, path: str) -> bool:
        """Return True if the tensor at ``path`` belongs to a replacement module alone."""
        tensor = self.find(path)
        return tensor is not None and id(tensor) not in self._originals

    def holds(self, path: str, value: Tensor) -> bool:
        """Return True if the tensor at ``path`` equals ``value`` in its own type."""
        tensor = self.find(path)
        if tensor is None:
            return False
        return torch.equal(tensor.detach(), value.to(device=tensor.device, dtype=tensor.dtype))

    def load(self, path: str, value: Tensor) -> bool:
        """Give the tensor at ``path`` the values of ``value``.

        A tensor of a replacement module is filled; an original one gets a replacement.

        Returns:
            False if there is no such tensor, or if it has another shape.
        """
        tensor = self.find(path)
        fitted = None if tensor is None else _fit(value, tensor)
        if tensor is None or fitted is None:
            return False
        if path in self.tensors:
            self.tensors[path] = (self.tensors[path][0], fitted)
        elif id(tensor) in self._originals:
            self.tensors[path] = (tensor, fitted)
        else:
            tensor.data = fitted.data  # not yet part of the model
        return True

    def commit(self, extra: Sequence[Swap] = ()) -> Applied:
        """Exchange everything, in every place of the model where it is registered.

        Args:
            extra: Exchanges to carry out in the same step.
        """
        # Keyed by the original object, because a model can register it under several names.
        new: dict[int, tuple[str, Any]] = {
            id(old): (path, replacement)
            for path, (old, replacement) in (*self.modules.items(), *self.tensors.items())
        }
        swaps = []
        for owner in self._owners():
            for table in ("_modules", "_parameters", "_buffers"):
                for name, entry in getattr(owner, table).items():
                    if id(entry) in new:
                        path, replacement = new[id(entry)]
                        swaps.append(
                            Swap(
                                path=path,
                                owner=owner,
                                table=table,
                                name=name,
                                old=entry,
                                new=replacement,
                            )
                        )
        applied = exchange([*swaps, *extra])
        applied.replaced, applied.loaded = tuple(self.modules), tuple(self.tensors)
        return applied

    def _owners(self) -> Iterator[nn.Module]:
        """Yield the modules that the model will have after the commit, each once.

        A replacement module is walked instead of its original: it may share modules with the
        original that are replaced, too (the norm inside a convolution of detectron2).
        """
        replacement = {id(old): new for old, new in self.modules.values()}
        # Shared modules are reached by several paths.
        seen: set[int] = set()
        stack = [self.model]
        while stack:
            module = stack.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            yield module
            children = [child for child in module._modules.values() if child is not None]
            stack += [replacement.get(id(child), child) for child in reversed(children)]


def _fit(value: Tensor, old: Tensor) -> Tensor | None:
    """Return ``value`` with the shape, type, device and flag of ``old``; None if it cannot fit."""
    # Some frameworks add leading axes of size 1, for example to positional embeddings.
    squeezed = [[n for n in t.shape if n != 1] for t in (value, old)]
    if squeezed[0] != squeezed[1]:
        return None
    # a copy: training the model must not change the checkpoint in memory
    fitted = value.detach().reshape(old.shape).to(old.device, old.dtype, copy=True)
    return nn.Parameter(fitted, old.requires_grad) if isinstance(old, nn.Parameter) else fitted
