"""Tensors out of other people's checkpoints, without running a line of theirs.

A ``.pth`` file is a pickle, and a pickle is a program. This reader runs that program with nothing
to call: every name in it becomes an inert placeholder, except for the handful of names that
describe a tensor, and those are answered by closures of ours. Nothing is imported by name.

Layouts: the zip format of ``torch.save`` (torch 1.6 on), the plain one before it, safetensors, and
TorchScript archives, whose modules are taken as the tensors in them; their code stays unread.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ovsprune.core.errors import CheckpointError
from ovsprune.core.inert import Reader, Sketch

__all__ = ["Foreign", "read_foreign"]

_MOST_MODULES, _DEEPEST = 1 << 16, 64
_CONTAINERS = ("state_dict", "model", "module", "model_state", "model_state_dict")


@dataclass(frozen=True, eq=False)
class Foreign:
    """What was found in a foreign checkpoint.

    Attributes:
        path: The file.
        tensors: Name to tensor, on the CPU, of the model's state.
        container: Key of the entry that held the state (``"model"``, ``"state_dict"``), or None.
        prefix: What was taken off every name (``"module."`` of data-parallel training), or "".
        other: Other top-level entries (optimizer, schedule, ...), which are left behind.
        inert: Names of classes and functions that the file asked for and did not get.
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
        wanted: Asked of the tensors in one place, whether this is the place. By default that is
            the top level or a usual container, whichever has tensors; with ``wanted``, every other
            top-level entry is looked into as well.
        what: What is wanted, for messages.

    Raises:
        CheckpointError: The file is missing, damaged, in no known layout, or holds nothing that is
            wanted.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {path} is not a file; give the framework's .pth or .safetensors file"
        )
    if path.suffix == ".safetensors":
        return _collect(path, _read_safetensors(path), (), wanted, what)
    reader = Reader()
    try:
        with path.open("rb") as stream:
            root = reader.zip(stream) if zipfile.is_zipfile(stream) else reader.plain(stream)
        if reader.scripted:
            root = _flat(root)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None
    except RecursionError:
        raise CheckpointError(f"checkpoint {path} is nested too deep to be read") from None
    except Exception as error:  # a hostile pickle can make its machine fail in any way it likes
        raise CheckpointError(
            f"checkpoint {path} cannot be read as a torch checkpoint "
            f"({type(error).__name__}: {error}); it is damaged or of another kind. "
            "Save it again with torch.save(model.state_dict(), ...) or as safetensors"
        ) from None
    return _collect(path, root, tuple(sorted(reader.asked)), wanted, what)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(str(path)))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is no safetensors file: {error}") from None


def _collect(
    path: Path,
    root: Any,
    inert: tuple[str, ...],
    wanted: Wanted | None,
    what: str,
) -> Foreign:
    """Find the model's state in what the file holds."""
    state, container = _plain(root), None  # reads of a dict, never calls of what a file made
    right = wanted or bool
    if not right(_tensors(state)):
        others = [] if wanted is None else [key for key in state if isinstance(key, str)]
        for key in (*_CONTAINERS, *others):
            if right(_tensors(_plain(state.get(key)))):
                container = key
                break
        else:
            held = ", ".join(_names(state)[:8]) or f"a {type(root).__name__}"
            raise CheckpointError(
                f"checkpoint {path} holds no {what} at its top level or under "
                f"{', '.join(_CONTAINERS) if wanted is None else 'any entry'}; it holds: {held}"
            )
    inner = state if container is None else _plain(state[container])
    found = _tensors(inner)
    prefix = "module." if all(name.startswith("module.") for name in found) else ""
    other = set(_names(k for k in state if k != container)) if container else set()
    other |= set(_names(k for k in inner if k not in found))
    named = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return Foreign(path, named, container, prefix, tuple(sorted(other)), inert)


def _flat(root: Any) -> dict[str, Any]:
    """The tensors of nested modules by their dotted names."""
    found: dict[str, Any] = {}
    todo, visited = [("", 0, root)], 0
    while todo:
        prefix, depth, module = todo.pop()
        visited += 1
        if visited > _MOST_MODULES or depth > _DEEPEST:
            raise CheckpointError(
                f"it has more than {_MOST_MODULES} modules or {_DEEPEST} inside each other"
            )
        for key, value in _plain(module).items():
            if isinstance(key, str) and isinstance(value, dict):
                todo.append((f"{prefix}{key}.", depth + 1, value))
            elif isinstance(key, str):
                found[f"{prefix}{key}"] = value
    return found


def _plain(value: Any) -> dict[Any, Any]:
    return dict(dict.items(value)) if isinstance(value, dict) else {}


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    found = {}
    for key, value in state.items():
        if isinstance(key, str) and isinstance(value, Sketch) and value.whole:
            found[key] = value.tensor()
        elif isinstance(key, str) and isinstance(value, Tensor):
            found[key] = value
    return found


def _names(keys: Iterable[Any]) -> list[str]:
    """Keys for a message; a key that is no text is named by its kind."""
    return [key if isinstance(key, str) else f"a {type(key).__name__}" for key in keys]
