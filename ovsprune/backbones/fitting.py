"""State dicts into models: where the image tower lies in a file, and what does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ovsprune.backbones.recognise import recognise
from ovsprune.core.errors import WeightsError
from ovsprune.slim.cutting import fuse_qkv

__all__ = ["Parts", "fit", "split", "text_names"]

_TOWER = "visual."
State = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Parts:
    """A file's state, taken apart.

    Attributes:
        tower: Of the image tower, by canonical name.
        text: Of everything beside it in the same CLIP (the text tower, ``logit_scale``); empty for
            a file of the image tower alone.
        prefix: What stood before the tower's names (``"visual."``, ``""``, a framework's).
        others: How many tensors belong to neither.
    """

    tower: State
    text: State
    prefix: str
    others: int

    @property
    def root(self) -> str | None:
        """What stood before the whole CLIP's names, or None if there is only a tower."""
        inside = self.prefix == _TOWER or self.prefix.endswith(f".{_TOWER}")
        return self.prefix.removesuffix(_TOWER) if inside else None


def split(path: Path | str, state: State, tower: nn.Module) -> Parts:
    """Find the image tower in ``state``: under the prefix behind which most of its names are.

    Args:
        path: Of the file, for messages.
        state: In the file's own names; queries, keys and values may be apart, as in CAT-Seg.
        tower: The image tower, by whose names it is found.

    Raises:
        WeightsError: Two towers of the same names but other values are in the file.
    """
    prefix = _prefix(path, state, tower.state_dict())
    found = _under(state, prefix)
    parts = Parts(found, {}, prefix, len(state) - len(found))
    if parts.root is None:
        return parts
    clip = _under(state, parts.root)
    text = {name: value for name, value in clip.items() if not name.startswith(_TOWER)}
    return Parts(found, text, prefix, len(state) - len(clip))


def _under(state: State, prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def _prefix(path: Path | str, state: State, wanted: State) -> str:
    """Behind which most names of ``wanted`` are, most shapes where several have as many."""
    names: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    for key, value in state.items():
        start = 0
        while True:
            own = wanted.get(key[start:])
            if own is not None:
                names[key[:start]] += 1
                shapes[key[:start]] += own.shape == value.shape
            start = key.find(".", start) + 1
            if not start:
                break
    if 4 * max(names.values(), default=0) < len(wanted):  # by accident: another kind of model
        return _TOWER if any(key.startswith(_TOWER) for key in state) else ""
    score = {prefix: (names[prefix], shapes[prefix]) for prefix in names}
    most = max(score.values())
    first, *more = sorted((prefix for prefix in score if score[prefix] == most), key=len)
    for other in more:
        one, two = _under(state, first), _under(state, other)
        if 2 * names[first] > len(wanted) and any(
            name in one and name in two and not torch.equal(one[name], two[name]) for name in wanted
        ):
            raise WeightsError(
                f"{path} holds two such towers with other values, under {first or 'no prefix'!r} "
                f"and {other!r}; save the state_dict() of the one that is meant"
            )
    return first


def text_names(text: State, wanted: Container[str]) -> dict[str, Tensor]:
    """``text`` by the names of ``wanted``: with ``text.`` before them or without, as those have.

    Queries, keys and values that are apart come together where ``wanted`` has them so.
    """
    renamed = {}
    for name, value in text.items():
        options = (name, f"text.{name}", name.removeprefix("text."))
        renamed[next((option for option in options if option in wanted), name)] = value
    return _joined(renamed, wanted)


def fit(
    name: str,
    path: Path | str,
    state: State,
    model: nn.Module,
    whole: State | None = None,
) -> None:
    """Load ``state`` into ``model``, all of it or nothing.

    Args:
        name: What the model is called, for messages.
        path: Where the state comes from, for messages.
        state: By the model's names, of any precision; queries, keys and values may be apart.
        model: Gets the values in its own precision.
        whole: All that is in the file, to tell by which model it is if it does not fit.

    Raises:
        WeightsError: Keys are missing, unexpected or of other shapes; names the first few of each,
            and the models that would fit.
    """
    wanted = model.state_dict()
    state = _in_form(state, wanted)
    missing = [k for k in wanted if k not in state]
    unexpected = [k for k in state if k not in wanted]
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(faults.values()):
        said = "; ".join(
            f"{len(v)} {kind} ({', '.join(v[:3])}{', ...' if len(v) > 3 else ''})"
            for kind, v in faults.items()
            if v
        )
        raise WeightsError(f"{path} does not fit {name}: {said}. {_hint(name, whole or state)}")
    model.load_state_dict({k: v.to(wanted[k].dtype) for k, v in state.items()})


def _in_form(state: State, wanted: State) -> State:
    """``state`` in the form of ``wanted``, which may keep a number as [] or as [1]."""
    return {
        k: v.reshape(wanted[k].shape) if k in wanted and v.numel() == wanted[k].numel() == 1 else v
        for k, v in _joined(state, wanted).items()
    }


def _joined(state: State, wanted: Container[str]) -> dict[str, Tensor]:
    """``state`` with queries, keys and values together where ``wanted`` has them so."""
    fused = fuse_qkv(state)
    return fused if all(name in wanted for name in fused if name not in state) else dict(state)


def _hint(name: str, state: State) -> str:
    """For which model the file would fit."""
    names = recognise(state)
    if not names or name in names:
        return "Is it another model's file, or one that was changed?"
    more = f" (or {len(names) - 3} more)" if len(names) > 3 else ""
    return f"Its shapes are those of {' or '.join(names[:3])}{more}: give that as --model."
