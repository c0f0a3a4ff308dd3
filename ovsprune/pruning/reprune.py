"""Pruning a slim model again: composition of both cuts in the coordinates of the base model.

The pipeline treats the slim tower like any other: the ratio refers to it, and recovery reconstructs
its features. The written checkpoint refers to the base: its mask composes both cuts, and its base,
hashes and dense costs are those of the first dense model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import Group, Plan
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.cutting import keep_index, layer_runs
from ovsprune.slim.spec import LayerSpec, SliceSpec

__all__ = ["check_reprune", "in_base", "layers_in_base", "mark_cut_before", "provenance_of"]


def check_reprune(model: Backbone, method: str) -> None:
    """Refuse a slim model that cannot be pruned again; accept every dense model.

    Raises:
        OptionError: The model is an unstructured result, or it is slim and the method is ``"imp"``.
    """
    checkpoint = model.slim
    if checkpoint is None:
        return
    if not isinstance(checkpoint, SlimCheckpoint):
        raise OptionError(
            f"{checkpoint.path} is an unstructured result: single weights are zero and no unit is "
            f"removed, so it cannot be pruned again; prune its dense model, {model.name}"
        )
    if method == "imp":
        raise OptionError(
            f"{checkpoint.path} is slim already, and --method imp starts at a dense model; omit "
            f"the option, or prune {model.name} again with a higher ratio"
        )


def mark_cut_before(checkpoint: SlimCheckpoint | None, groups: Iterable[Group]) -> list[Group]:
    """Return the groups with ``cut_before`` set for those that the slim model lost units of."""
    layers = () if checkpoint is None else checkpoint.spec.layers
    cut = {layer.name for layer in layers if layer.kept < layer.units}
    return [replace(g, cut_before=g.name in cut) for g in groups]


def in_base(checkpoint: SlimCheckpoint | None, plan: Plan) -> Plan:
    """Return a plan for a slim model in the coordinates of its base.

    Groups that the plan does not name stay as they are in the slim model. The plan of a dense model
    (``checkpoint=None``) is returned unchanged.
    """
    if checkpoint is None:
        return plan
    mask = checkpoint.mask
    # mask[name] maps units of the slim model to units of the base: [units] -> base indices.
    kept = {name: mask[name][i] if name in mask else i for name, i in plan.kept.items()}
    return Plan({**mask, **kept})  # the present cut wins over the earlier one


def layers_in_base(
    checkpoint: SlimCheckpoint, layers: Iterable[LayerSpec], order: Sequence[str]
) -> tuple[LayerSpec, ...]:
    """Return every layer that was cut before or now, in the coordinates of the base.

    ``layers`` are those of the present cut, in the coordinates of the slim model; ``order`` lists
    the names of all layers in the order of the blocks.
    """
    merged = {layer.name: layer for layer in checkpoint.spec.layers}
    for layer in layers:
        before = merged.get(layer.name)
        if before is None:  # not cut until now, but its slices may have moved
            slices = tuple(_slice_in_base(checkpoint, part) for part in layer.slices)
            merged[layer.name] = replace(layer, slices=slices)
        else:
            # Units and slices stay those of the base.
            merged[layer.name] = replace(before, kept=layer.kept)
    rank = {name: i for i, name in enumerate(order)}
    return tuple(sorted(merged.values(), key=lambda layer: rank.get(layer.name, len(rank))))


def _slice_in_base(checkpoint: SlimCheckpoint, part: SliceSpec) -> SliceSpec:
    """Return the slice of a layer that was whole until now, in the coordinates of the base.

    Other slices of the same weight may have been cut before; they shift the offset.
    """
    runs = layer_runs(checkpoint.spec, checkpoint.mask).get(part.module, {}).get(part.axis, [])
    if not runs:
        return part
    weight = checkpoint.tensors[f"visual.{part.module}.weight"]
    size = weight.shape[0 if part.axis == "out" else 1]
    # Add the channels that earlier cuts removed, to get the size of the axis in the base.
    size += sum((run.units - run.kept.numel()) * run.unit_width for run in runs)
    return replace(part, offset=int(keep_index(size, runs)[part.offset]))


def provenance_of(checkpoint: SlimCheckpoint) -> dict[str, Any]:
    """Return the costs and the provenance of a slim model as JSON values; no path."""
    spec = checkpoint.spec
    return {**asdict(spec.slim), "provenance": dict(spec.provenance)}
