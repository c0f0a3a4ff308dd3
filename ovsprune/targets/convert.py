"""Turning a framework's checkpoint slim, key by key; every key is accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.cutting import cut_state
from ovsprune.targets.attached import POSITIONS_STAY
from ovsprune.targets.check import Weights
from ovsprune.targets.layout import POSITIONS, Layout
from ovsprune.targets.surgery import Cut, cuts_of

__all__ = ["Converted", "convert_state"]


@dataclass(frozen=True, eq=False)
class Converted:
    """A framework's state with the slim tower in it.

    Attributes:
        state: Name in the framework's layout to tensor.
        depth: Blocks of the tower.
        cuts: Modules that must be slim before ``state`` is loaded.
        replaced: Key to where its new value comes from.
        kept: Key to why it stayed as it was.
        dropped: Key (``slim: NAME`` for tensors of the slim checkpoint) to why it is not there.
        weights: ``"slim"`` or ``"target"``.
        reason: Why these weights.
        complete: Whether ``state`` is all that the framework saves; without a checkpoint of the
            framework it holds CLIP alone.
        notes: What a reader should know.
    """

    state: Mapping[str, Tensor]
    depth: int
    cuts: tuple[Cut, ...]
    replaced: Mapping[str, str]
    kept: Mapping[str, str]
    dropped: Mapping[str, str]
    weights: Weights
    reason: str
    complete: bool
    notes: tuple[str, ...] = field(default_factory=tuple)


def convert_state(
    state: Mapping[str, Tensor] | None,
    checkpoint: SlimCheckpoint,
    layout: Layout,
    choice: tuple[Weights, str],
) -> Converted:
    """The framework's state with the slim tower in it; everything was checked before.

    Args:
        state: The framework's dense state, or None to write the slim checkpoint's CLIP alone.
        checkpoint: The slim checkpoint.
        layout: Where its parts are.
        choice: ``"slim"`` or ``"target"``, and the reason.
    """
    cuts = cuts_of(checkpoint, layout)
    if state is None:
        return _clip_alone(checkpoint, layout, choice, cuts)
    if choice[0] == "target":
        tower = cut_state(layout.tower_state(state), checkpoint.spec, checkpoint.mask)
        source = "the framework's own weights, cut by the mask"
    else:
        tower = checkpoint.tower()
        source = "the slim tower"
    result: dict[str, Tensor] = {}
    replaced, kept = {}, {}
    for name, old in state.items():
        canonical = layout.canonical(name)
        result[name] = old
        if canonical is None:
            kept[name] = _why_not_tower(name, layout)
        elif canonical == POSITIONS:
            kept[name] = POSITIONS_STAY
        else:
            new = layout.to_framework(canonical, tower[canonical]).to(old.dtype)
            if new.shape == old.shape and torch.equal(new, old):
                kept[name] = "equal to the slim tower's"
                continue
            result[name] = new
            replaced[name] = f"{source}, {_cut_of(name, cuts)}"
    dropped = _unused(checkpoint, choice[0])
    return Converted(result, layout.depth, cuts, replaced, kept, dropped, *choice, complete=True)


def _clip_alone(
    checkpoint: SlimCheckpoint,
    layout: Layout,
    choice: tuple[Weights, str],
    cuts: tuple[Cut, ...],
) -> Converted:
    result, replaced, dropped = {}, {}, {}
    for canonical, tensor in checkpoint.tower().items():
        name = layout.name(canonical)
        if name is None:
            raise TargetError(
                f"{checkpoint.path} has a tensor {canonical} that has no place in this framework; "
                "prune the CLIP that the framework uses"
            )
        result[name] = layout.to_framework(canonical, tensor)
        replaced[name] = f"the slim tower, {_cut_of(name, cuts)}"
    for canonical, tensor in checkpoint.text().items():
        name = layout.text_name(canonical)
        if name is None:
            dropped[f"slim: {canonical}"] = "has no place in this framework"
            continue
        result[name] = tensor
        replaced[name] = "the slim checkpoint's text tower, as the base has it"
    notes = ("only CLIP was written; what the framework adds starts as the framework starts it",)
    return Converted(
        result, layout.depth, cuts, replaced, {}, dropped, *choice, complete=False, notes=notes
    )


def _why_not_tower(name: str, layout: Layout) -> str:
    texts = {path.partition(".")[0] for path in layout.text.values()}
    if name.partition(".")[0] in texts:
        return "the text tower was not pruned"
    return "no part of the image tower"


def _cut_of(name: str, cuts: tuple[Cut, ...]) -> str:
    for cut in cuts:
        if name.startswith(f"{cut.path}."):
            return str(cut)
    return "not cut"


def _unused(checkpoint: SlimCheckpoint, weights: Weights) -> dict[str, str]:
    """Tensors of the slim checkpoint that the result does not have."""
    if weights == "target":
        return {
            f"slim: visual.{n}": "the framework's own was taken" for n in checkpoint.tower()
        } | {f"slim: {n}": "the framework's own text tower was kept" for n in checkpoint.text()}
    dropped = {f"slim: visual.{POSITIONS}": POSITIONS_STAY}
    for name in checkpoint.text():
        dropped[f"slim: {name}"] = "the framework's own text tower was kept"
    return dropped
