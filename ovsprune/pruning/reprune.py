"""Pruning a slim model again: what it lost before and what it loses now, as one cut of the base.

The job works on the slim tower as on any other: the ratio is of that tower, and its features are
what recovery comes close to. Only what is written counts from the base: the mask composes both
cuts, and base, hashes and dense costs are those of the first dense model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import Group, Plan
from ovsprune.pruning.config import PruneConfig
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.cutting import keep_index, layer_runs
from ovsprune.slim.spec import LayerSpec, SliceSpec

__all__ = ["check_again", "in_base", "layers_in_base", "marked", "provenance_of"]


def check_again(model: Backbone, settings: PruneConfig) -> None:
    """Refuse what cannot be cut again, or not in this way; a dense model is never refused.

    Raises:
        OptionError: ``model`` is an unstructured result, or the settings ask for iterative
            magnitude pruning of a slim model.
    """
    given = model.slim
    if given is None:
        return
    if not isinstance(given, SlimCheckpoint):
        raise OptionError(
            f"{given.path} is an unstructured result: weights of it are zero and no unit is gone, "
            f"so there is no slim model to go on from; prune its dense model, {model.name}"
        )
    if settings.method == "imp":
        raise OptionError(
            f"{given.path} is slim already, and --method imp does not go with a slim model: its "
            f"rounds start at the dense model; leave it out, or prune {model.name} again with a "
            "higher ratio"
        )


def marked(given: SlimCheckpoint | None, groups: Iterable[Group]) -> list[Group]:
    """``groups``, of which those that ``given`` lost units of say so."""
    before = {} if given is None else {x.name: x.kept < x.units for x in given.spec.layers}
    return [replace(g, cut_before=before.get(g.name, False)) for g in groups]


def in_base(given: SlimCheckpoint | None, plan: Plan) -> Plan:
    """``plan``, made for the slim model ``given``, in the coordinates of its base.

    What ``given`` lost in layers that ``plan`` does not name stays lost. A plan for a dense model
    (``given`` is None) is as it is.
    """
    if given is None:
        return plan
    kept = {n: given.mask[n][now] if n in given.mask else now for n, now in plan.kept.items()}
    return Plan({**given.mask, **kept})


def layers_in_base(
    given: SlimCheckpoint, layers: Iterable[LayerSpec], order: Sequence[str]
) -> tuple[LayerSpec, ...]:
    """Every layer that could be cut before or now, as the base has it.

    Args:
        given: The slim model.
        layers: Of the cut now, in the coordinates of the slim model.
        order: Names of all layers, in the order of the blocks.
    """
    found = {layer.name: layer for layer in given.spec.layers}
    for layer in layers:
        old = found.get(layer.name)
        if old is None:
            slices = tuple(_in_base(given, part) for part in layer.slices)
            found[layer.name] = replace(layer, slices=slices)
        else:
            found[layer.name] = replace(old, kept=layer.kept)
    place = {name: i for i, name in enumerate(order)}
    return tuple(sorted(found.values(), key=lambda layer: place.get(layer.name, len(place))))


def _in_base(given: SlimCheckpoint, part: SliceSpec) -> SliceSpec:
    """The slice of a layer that was whole until now, beside which others may have been cut."""
    runs = layer_runs(given.spec, given.mask).get(part.module, {}).get(part.axis, [])
    if not runs:
        return part
    size = _weight(given, part.module).shape[0 if part.axis == "out" else 1]
    size += sum((run.units - run.kept.numel()) * run.unit_width for run in runs)
    return replace(part, offset=int(keep_index(size, runs)[part.offset]))


def _weight(given: SlimCheckpoint, module: str) -> Tensor:
    return given.tensors[f"visual.{module}.weight"]


def provenance_of(given: SlimCheckpoint) -> dict[str, Any]:
    """What a checkpoint says of the slim model that it was cut from, as JSON values; no path."""
    slim = given.spec.slim
    return {
        "macs": slim.macs,
        "params": slim.params,
        "provenance": dict(given.spec.provenance),
    }
