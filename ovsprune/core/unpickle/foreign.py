"""Reads tensors from the checkpoints of other frameworks without executing their code.

A ``.pth`` file is a pickle, and a pickle is a program that can import and call anything. This
reader replaces every name in it: the few names that describe a tensor by functions of ours, all
others by placeholders. Nothing is imported by name.

Supported layouts: the zip format of ``torch.save`` (torch 1.6 and later), the legacy format before
it, safetensors, and TorchScript archives, of which the tensors are read and the code is not.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ovsprune.core.errors import CheckpointError
from ovsprune.core.unpickle.machine import PickleReader, TensorStub

__all__ = ["Foreign", "read_foreign"]

_MAX_MODULES, _MAX_DEPTH = 1 << 16, 64
"""Limits for TorchScript archives."""
_CONTAINERS = ("state_dict", "model", "module", "model_state", "model_state_dict")


@dataclass(frozen=True, eq=False)
class Foreign:
    """Content of a foreign checkpoint.

    Attributes:
        path: The file.
        tensors: State dict of the model, on the CPU.
        container: Key of the entry with the state (``"model"``, ``"state_dict"``); None if it
            was at the top level.
        prefix: Prefix that was removed from every name (``"module."`` of data-parallel training);
            may be empty.
        other: Other top-level entries (optimizer, schedule, ...), which are not read.
        inert: Names of classes and functions in the file that were replaced by placeholders.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    container: str | None
    prefix: str
    other: tuple[str, ...]
    inert: tuple[str, ...]


Wanted = Callable[[Mapping[str, Tensor]], bool]


def read_foreign(
    path: str | Path, wanted: Wanted | None = None, what: str = "tensors of a model"
) -> Foreign:
    """Read the model's tensors from a ``.pth``, ``.pt``, ``.ckpt`` or ``.safetensors`` file.

    Args:
        path: The file.
        wanted: Returns True if the given tensors are the ones to read. By default the first of the
            top level and the usual containers that has tensors is read. With ``wanted``, every
            other top-level entry is searched as well.
        what: Description of these tensors, for messages.

    Raises:
        CheckpointError: The file is missing, damaged, in an unknown layout, or holds no such
            tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {path} is not a file; give the framework's .pth or .safetensors file"
        )
    if path.suffix == ".safetensors":
        return _collect(path, _read_safetensors(path), (), wanted, what)
    reader = PickleReader()
    try:
        with path.open("rb") as stream:
            root = reader.zip(stream) if zipfile.is_zipfile(stream) else reader.plain(stream)
        if reader.is_scripted:
            root = _flatten_modules(root)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None
    except RecursionError:
        raise CheckpointError(f"checkpoint {path} is nested too deeply to be read") from None
    except Exception as error:  # a malicious pickle can raise any exception
        raise CheckpointError(
            f"checkpoint {path} cannot be read as a torch checkpoint "
            f"({type(error).__name__}: {error}); it is damaged or has another format. "
            "Save it again with torch.save(model.state_dict(), ...) or as safetensors"
        ) from None
    return _collect(path, root, tuple(sorted(reader.unknown_names)), wanted, what)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(str(path)))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is not a safetensors file: {error}") from None


def _collect(
    path: Path, root: Any, inert: tuple[str, ...], wanted: Wanted | None, what: str
) -> Foreign:
    """Find the model's state in the content of the file."""
    state, container = _plain(root), None
    accept = wanted or bool  # bool: there is at least one tensor
    if not accept(_tensors(state)):
        # Without `wanted`, any tensors fit, so only the usual containers are searched.
        others = [] if wanted is None else [key for key in state if isinstance(key, str)]
        for key in (*_CONTAINERS, *others):
            if accept(_tensors(_plain(state.get(key)))):
                container = key
                break
        else:
            content = ", ".join(_names(state)[:8]) or f"a {type(root).__name__}"
            raise CheckpointError(
                f"checkpoint {path} holds no {what} at its top level or under "
                f"{', '.join(_CONTAINERS) if wanted is None else 'any entry'}; it holds: {content}"
            )
    inner = state if container is None else _plain(state[container])
    tensors = _tensors(inner)
    # Data-parallel training puts "module." before every name.
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    other = set(_names(k for k in state if k != container)) if container else set()
    other |= set(_names(k for k in inner if k not in tensors))
    return Foreign(
        path=path,
        tensors={name.removeprefix(prefix): tensor for name, tensor in tensors.items()},
        container=container,
        prefix=prefix,
        other=tuple(sorted(other)),
        inert=inert,
    )


def _flatten_modules(root: Any) -> dict[str, Any]:
    """Return the attributes of nested TorchScript modules by their dotted names."""
    attributes: dict[str, Any] = {}
    # A loop instead of a recursion, with limits: in a pickle, a module can contain itself.
    todo, visited = [("", 0, root)], 0
    while todo:
        prefix, depth, module = todo.pop()
        visited += 1
        if visited > _MAX_MODULES or depth > _MAX_DEPTH:
            raise CheckpointError(
                f"it has more than {_MAX_MODULES} modules or {_MAX_DEPTH} nested inside each other"
            )
        for key, value in _plain(module).items():
            if isinstance(key, str) and isinstance(value, dict):
                todo.append((f"{prefix}{key}.", depth + 1, value))
            elif isinstance(key, str):
                attributes[f"{prefix}{key}"] = value
    return attributes


def _plain(value: Any) -> dict[Any, Any]:
    """Copy a dict; ``dict.items`` avoids methods that a pickle may have overridden."""
    return dict(dict.items(value)) if isinstance(value, dict) else {}


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the entries that are tensors."""
    tensors = {}
    for key, value in state.items():
        if isinstance(key, str) and isinstance(value, TensorStub) and value.is_tensor:
            tensors[key] = value.tensor()
        elif isinstance(key, str) and isinstance(value, Tensor):
            tensors[key] = value
    return tensors


def _names(keys: Iterable[Any]) -> list[str]:
    """Return keys for a message; a key that is not a string is replaced by its type."""
    return [key if isinstance(key, str) else f"a {type(key).__name__}" for key in keys]
