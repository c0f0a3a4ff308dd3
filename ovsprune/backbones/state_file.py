"""State dicts out of files: safetensors, torch's own, TorchScript. No line of theirs runs."""

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
"""Entries of OpenAI's own state dicts that are no weights."""

_USUAL = ("state_dict", "model")
"""Where a training script puts the model, of several entries with as many tensors."""


@dataclass(frozen=True, eq=False)
class StateFile:
    """A state dict, and what its file says beside it.

    Attributes:
        path: The file.
        tensors: Name to tensor, on the CPU, in the file's own names and precision.
        openai: Whether the file is one of OpenAI's own releases, by the entries that those have.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    openai: bool = False


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of :func:`open_state`.

    Raises:
        WeightsError: The file is damaged, or no state dict of tensors.
    """
    return dict(open_state(path).tensors)


def open_state(path: Path) -> StateFile:
    """State dict from safetensors, ``.pt``, ``.pth``, ``.bin``, or a TorchScript archive.

    torch reads its own format with ``weights_only=True``. What it refuses then (TorchScript, a
    training checkpoint with settings in it) is read by :mod:`ovsprune.core.unpickle.foreign`, which
    has nothing to call and imports nothing. Entries around the state (``state_dict``, ``model``)
    and a ``module.`` prefix are taken off.

    Raises:
        WeightsError: The file is damaged, or no state dict of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        found = None if path.suffix == ".safetensors" else _foreign(path)
        if found is None:
            raise WeightsError(
                f"{path} cannot be read as weights: {first_line(error)}. Give a safetensors file, "
                "a state dict saved by torch.save, or a TorchScript archive; of a pickled model, "
                "save its state_dict() first."
            ) from error
    state = _largest(found)
    if not state:
        raise WeightsError(f"{path} holds no state dict of tensors")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    weights = {k: v for k, v in state.items() if not _is_extra(k)}
    return StateFile(path, weights, openai=set(state) >= _OPENAI_EXTRAS)


def _is_extra(key: str) -> bool:
    # A causal mask follows from the text's length; archives hold it as a tensor all the same.
    return key in _OPENAI_EXTRAS or key.rpartition(".")[2] == "attn_mask"


def _foreign(path: Path) -> Mapping[str, Tensor] | None:
    """What the reader that runs nothing finds, or None."""
    try:
        return read_foreign(path).tensors
    except CheckpointError:
        return None


def _largest(found: Any) -> dict[str, Tensor]:
    """The state dict in what a file holds: of the mappings in it, the one with most tensors."""
    best: dict[str, Tensor] = {}
    for state in _states(found, 3):
        if len(state) > len(best):
            best = state
    return best


def _states(found: Any, depth: int) -> Iterator[dict[str, Tensor]]:
    if not isinstance(found, Mapping) or not depth:
        return
    yield {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)}
    for key in sorted(found, key=lambda key: key not in _USUAL):
        yield from _states(found[key], depth - 1)
