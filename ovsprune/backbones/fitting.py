"""Load state dicts into models: find the image tower in a file, and report what does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ovsprune.backbones.recognise import recognise
from ovsprune.core.errors import WeightsError
from ovsprune.slim.cutting import fuse_qkv

__all__ = ["Parts", "describe_faults", "fit", "split", "text_names"]

_TOWER = "visual."
State = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Parts:
    """State of a file, split into its parts.

    Attributes:
        tower: Tensors of the image tower, by canonical name.
        text: Other tensors of the same CLIP (text tower, ``logit_scale``); empty if the file
            contains an image tower only.
        prefix: Prefix of the tower's names (``"visual."``, ``""``, a framework's).
        others: Number of tensors that belong to neither.
    """

    tower: State
    text: State
    prefix: str
    others: int

    @property
    def root(self) -> str | None:
        """Prefix of the names of the CLIP, or None if there is only a tower."""
        is_clip = self.prefix == _TOWER or self.prefix.endswith(f".{_TOWER}")
        return self.prefix.removesuffix(_TOWER) if is_clip else None


def split(path: Path | str, state: State, tower: nn.Module) -> Parts:
    """Find the image tower in ``state``: it has the prefix with most of the tower's names.

    Queries, keys and values may be separate, as in CAT-Seg. ``path`` is for messages.

    Raises:
        WeightsError: The file contains two such towers with different values.
    """
    prefix = _find_prefix(path, state, tower.state_dict())
    tensors = _under(state, prefix)
    parts = Parts(tensors, {}, prefix, len(state) - len(tensors))
    if parts.root is None:
        return parts
    clip = _under(state, parts.root)
    text = {name: value for name, value in clip.items() if not name.startswith(_TOWER)}
    return Parts(tensors, text, prefix, len(state) - len(clip))


def _under(state: State, prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def _find_prefix(path: Path | str, state: State, expected: State) -> str:
    """Return the prefix with most names of ``expected``; of several, with most equal shapes."""
    names: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    for key, value in state.items():
        start = 0
        while True:  # every position after a dot can be the end of the prefix
            tensor = expected.get(key[start:])
            if tensor is not None:
                names[key[:start]] += 1
                shapes[key[:start]] += tensor.shape == value.shape
            start = key.find(".", start) + 1
            if not start:
                break
    # Fewer than a quarter of the names agree by accident: the file holds another kind of model.
    if 4 * max(names.values(), default=0) < len(expected):
        return _TOWER if any(key.startswith(_TOWER) for key in state) else ""
    score = {prefix: (names[prefix], shapes[prefix]) for prefix in names}
    best = max(score.values())
    # Shortest prefix first: it is taken if copies of the tower have equal values.
    first, *others = sorted((prefix for prefix in score if score[prefix] == best), key=len)
    for other in others:
        a, b = _under(state, first), _under(state, other)
        if 2 * names[first] > len(expected) and any(
            name in a and name in b and not torch.equal(a[name], b[name]) for name in expected
        ):
            raise WeightsError(
                f"{path} holds two such towers with other values, under {first or 'no prefix'!r} "
                f"and {other!r}; save the state_dict() of the one that is meant"
            )
    return first


def text_names(text: State, expected: Container[str]) -> dict[str, Tensor]:
    """Rename the tensors of a text tower to the expected names: with or without ``text.``.

    Separate queries, keys and values are joined if ``expected`` contains joined ones.
    """
    renamed = {}
    for name, value in text.items():
        options = (name, f"text.{name}", name.removeprefix("text."))
        renamed[next((option for option in options if option in expected), name)] = value
    return _joined(renamed, expected)


def fit(
    name: str,
    path: Path | str,
    state: State,
    model: nn.Module,
    file_state: State | None = None,
) -> None:
    """Load ``state`` into ``model``, completely or not at all; the model keeps its precision.

    Queries, keys and values may be separate. ``name``, ``path`` and ``file_state`` (all tensors of
    the file) are for messages.

    Raises:
        WeightsError: Keys are missing, unexpected or of another shape. The message names the first
            few of each, and models that would fit.
    """
    expected = model.state_dict()
    state = {
        # a scalar may be stored as [] or as [1]
        k: v.reshape(expected[k].shape)
        if k in expected and v.numel() == expected[k].numel() == 1
        else v
        for k, v in _joined(state, expected).items()
    }
    faults = describe_faults(
        missing=[k for k in expected if k not in state],
        unexpected=[k for k in state if k not in expected],
        shapes=[
            f"{k} {tuple(state[k].shape)} instead of {tuple(expected[k].shape)}"
            for k in expected
            if k in state and state[k].shape != expected[k].shape
        ],
    )
    if faults:
        hint = _hint(name, file_state or state)
        raise WeightsError(f"{path} does not fit {name}: {faults}. {hint}")
    # strict: the checks above leave nothing missing or unexpected
    model.load_state_dict({k: v.to(expected[k].dtype) for k, v in state.items()})


def describe_faults(
    missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str]
) -> str:
    """Summarise the keys of a state dict that do not fit; empty if all fit."""
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in faults.items()
        if keys
    )


def _joined(state: State, expected: Container[str]) -> dict[str, Tensor]:
    """Join separate queries, keys and values if ``expected`` contains joined ones."""
    fused = fuse_qkv(state)
    # Joining also renames; without the joined names in the model the file's own names fit.
    return fused if all(name in expected for name in fused if name not in state) else dict(state)


def _hint(name: str, state: State) -> str:
    """Name the models that a state dict would fit."""
    names = recognise(state)
    if not names or name in names:
        return "Is it another model's file, or one that was changed?"
    more = f" (or {len(names) - 3} more)" if len(names) > 3 else ""
    return f"Its shapes are those of {' or '.join(names[:3])}{more}: give that as --model."
