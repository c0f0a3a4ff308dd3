"""Read state dicts from safetensors, torch and TorchScript files, without running their code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovsprune.backbones.hub import first_line
from ovsprune.core.errors import CheckpointError, WeightsError
from ovsprune.core.unpickle.foreign import read_foreign

__all__ = ["StateFile", "open_state", "read_state"]

_OPENAI_EXTRAS = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Entries of OpenAI's state dicts that are not weights."""

_MODEL_KEYS = ("state_dict", "model")
"""Keys under which training scripts store the model; they decide between equal candidates."""


@dataclass(frozen=True, eq=False)
class StateFile:
    """State dict of a file.

    Attributes:
        path: The file.
        tensors: Tensors on the CPU, with the names and the precision of the file.
        openai: True if the file has the additional entries of OpenAI's releases.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    openai: bool = False


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of :func:`open_state`, which may raise WeightsError."""
    return dict(open_state(path).tensors)


def open_state(path: Path) -> StateFile:
    """Read a state dict from safetensors, ``.pt``, ``.pth``, ``.bin``, or a TorchScript archive.

    torch reads its own format with ``weights_only=True``. Files that this refuses (TorchScript,
    training checkpoints with settings) are read by :mod:`ovsprune.core.unpickle.foreign`, which
    calls and imports nothing. Outer entries (``state_dict``, ``model``) and a ``module.`` prefix
    are removed.

    Raises:
        WeightsError: The file is damaged, or contains no state dict of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        content = None if path.suffix == ".safetensors" else _foreign(path)
        if content is None:
            raise WeightsError(
                f"{path} cannot be read as weights: {first_line(error)}. Give a safetensors file, "
                "a state dict saved by torch.save, or a TorchScript archive; of a pickled model, "
                "save its state_dict() first."
            ) from error
    # Among nested mappings, the one with most tensors; of several, the first.
    state = max(_states(content, depth=3), key=len, default={})
    if not state:
        raise WeightsError(f"{path} holds no state dict of tensors")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    weights = {k: v for k, v in state.items() if not _is_extra(k)}
    return StateFile(path, weights, openai=set(state) >= _OPENAI_EXTRAS)


def _is_extra(key: str) -> bool:
    # The causal mask follows from the length of the text, but TorchScript archives contain it.
    return key in _OPENAI_EXTRAS or key.rpartition(".")[2] == "attn_mask"


def _foreign(path: Path) -> Mapping[str, Tensor] | None:
    """Return the tensors that the restricted reader finds, or None."""
    try:
        return read_foreign(path).tensors
    except CheckpointError:
        return None


def _states(content: Any, depth: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each mapping in ``content``, at most ``depth`` levels deep."""
    if not isinstance(content, Mapping) or not depth:
        return
    yield {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    for key in sorted(content, key=lambda key: key not in _MODEL_KEYS):
        yield from _states(content[key], depth - 1)
