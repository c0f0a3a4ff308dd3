"""Conversion of a framework's checkpoint to a slim one, with a report of every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.cutting import cut_state
from ovsprune.targets.check import Weights
from ovsprune.targets.layout import Layout
from ovsprune.targets.surgery import Cut, cuts_of

__all__ = ["Converted", "convert_state"]


@dataclass(frozen=True, eq=False)
class Converted:
    """Result of a conversion: a framework's state dict with the slim tower in it.

    Attributes:
        state: Name in the framework to tensor.
        depth: Number of transformer blocks of the tower; 0 for a tower of another kind.
        cuts: Modules that must be slim before ``state`` is loaded.
        replaced: Key to the source of its new value.
        kept: Key to the reason why it was not changed.
        dropped: Key (``slim: NAME`` for tensors of the slim checkpoint) to the reason why
            ``state`` does not have it.
        weights: ``"slim"`` or ``"target"``.
        reason: Reason for these weights.
        complete: True if ``state`` has all tensors that the framework saves; False if it has CLIP
            alone, since no checkpoint of the framework was given.
        notes: Remarks for the report.
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
    notes: tuple[str, ...] = ()


def convert_state(
    state: Mapping[str, Tensor] | None,
    checkpoint: SlimCheckpoint,
    layout: Layout,
    choice: tuple[Weights, str],
    obsolete_keys: Mapping[str, str],
) -> Converted:
    """Return the framework's state with the slim tower in it. The caller has checked that it fits.

    ``state`` is None to write the slim checkpoint's CLIP alone; ``choice`` is ``"slim"`` or
    ``"target"``, and the reason.
    """
    cuts = cuts_of(checkpoint, layout)
    empty = Converted(
        state={},
        depth=layout.depth or 0,
        cuts=cuts,
        replaced={},
        kept={},
        dropped={},
        weights=choice[0],
        reason=choice[1],
        complete=state is not None,
    )
    if state is None:
        return _clip_alone(checkpoint, layout, empty)
    if choice[0] == "target":
        tower = cut_state(layout.tower_state(state), checkpoint.spec, checkpoint.mask)
        source, unchanged = "the framework's own weights, cut by the mask", "the framework's own"
    else:
        tower = checkpoint.tower()
        source, unchanged = "the slim tower", "equal to the slim tower's"
    values = {  # by the framework's names and shapes
        name: value
        for canonical, tensor in tower.items()
        if canonical not in layout.stays
        for name, value in layout.to_framework(canonical, tensor).items()
    }
    result: dict[str, Tensor] = {}
    replaced, kept, dropped = {}, {}, _unused(checkpoint, layout, choice[0])
    for name, old in state.items():
        obsolete = [why for key, why in obsolete_keys.items() if fnmatchcase(name, key)]
        if obsolete:
            dropped[name] = obsolete[0]
            continue
        new = values.get(name, old).to(old.dtype)  # the framework may save float16
        same = new.shape == old.shape and torch.equal(new, old)
        # Values of tensors that the framework stores transposed are views, not contiguous.
        result[name] = old if same else new.contiguous()
        if not same:
            replaced[name] = f"{source}, {_cut_of(name, cuts)}"
        else:
            kept[name] = _kept_because(name, layout, unchanged if name in values else "")
    return replace(empty, state=result, replaced=replaced, kept=kept, dropped=dropped)


def _clip_alone(checkpoint: SlimCheckpoint, layout: Layout, empty: Converted) -> Converted:
    """Return the conversion ``empty`` with the state of CLIP alone, by the framework's names."""
    result, replaced, dropped = {}, {}, {}
    for canonical, tensor in checkpoint.tower().items():
        values = layout.to_framework(canonical, tensor)
        if not values:
            raise TargetError(
                f"{checkpoint.path} has a tensor {canonical} that this framework does not have; "
                "prune the CLIP that the framework uses"
            )
        for name, value in values.items():
            result[name] = value.contiguous()
            replaced[name] = f"the slim tower, {_cut_of(name, empty.cuts)}"
    for canonical, tensor in checkpoint.text().items():
        values = {} if layout.text is None else layout.text.to_framework(canonical, tensor)
        if not values:
            dropped[f"slim: {canonical}"] = "this framework does not have it"
        for name, value in values.items():
            result[name] = value.contiguous()
            replaced[name] = "the slim checkpoint's text tower, not pruned"
    notes = ("only CLIP was written; the framework initialises the parts that it adds",)
    return replace(empty, state=result, replaced=replaced, dropped=dropped, notes=notes)


def _kept_because(name: str, layout: Layout, unchanged: str) -> str:
    """Return why a tensor was kept; ``unchanged`` is the reason for a tensor that was compared."""
    if unchanged:
        return unchanged
    if (canonical := layout.canonical(name)) is not None:
        return layout.stays.get(canonical, "no forward pass reads it")
    if layout.text is not None and layout.text.canonical(name) is not None:
        return "the text tower was not pruned"
    return "no part of the image tower"


def _cut_of(name: str, cuts: tuple[Cut, ...]) -> str:
    """Describe the cut of the tensor ``name`` for the report."""
    return next((str(cut) for cut in cuts if cut.owns(name)), "not cut")


def _unused(checkpoint: SlimCheckpoint, layout: Layout, weights: Weights) -> dict[str, str]:
    """List the tensors of the slim checkpoint that the result does not have."""
    dropped = {}
    for name in checkpoint.tower():
        replaced = "the framework's own was used" if weights == "target" else None
        reason = layout.absent_reason(name) or replaced or layout.stays.get(name)
        if reason is not None:
            dropped[f"slim: visual.{name}"] = reason
    for name in checkpoint.text():
        dropped[f"slim: {name}"] = "the framework's own text tower was kept"
    return dropped
