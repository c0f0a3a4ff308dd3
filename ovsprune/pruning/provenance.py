"""What a slim checkpoint says of the job that made it: layers, costs, settings."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch

from ovsprune.calibration.pictures import calibration_hash
from ovsprune.core.protocols import Backbone, Family, Pictures, PrunableLayer
from ovsprune.core.records import Costs, Group, Plan
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.reprune import layers_in_base, provenance_of
from ovsprune.slim import SlimSpec
from ovsprune.slim.hashing import base_spec, state_hashes, tensors_hash
from ovsprune.slim.spec import LayerSpec, SliceSpec

__all__ = ["make_spec", "origin_of", "provenance"]


def make_spec(
    backbone: Backbone,
    family: Family,
    groups: Sequence[Group],
    plan: Plan,
    protected: Iterable[str],
    costs: tuple[Costs, Costs],
    provenance: dict[str, Any],
    seeds: Sequence[PrunableLayer] = (),
) -> SlimSpec:
    """The spec of a slim tower.

    Args:
        backbone: What was pruned.
        family: Its family.
        groups: What could be cut.
        plan: What was kept.
        protected: Names of the groups that could not.
        costs: Of the tower that was pruned and of what came out.
        provenance: :func:`provenance`.
        seeds: Of all groups, those that could not be cut among them, in the order of the blocks.
    """
    state = backbone.tower.state_dict()
    layers = tuple(_layer(g, plan, state) for g in groups)
    if backbone.slim is None:
        dense = costs[0]
        base = base_spec(backbone.name, backbone.pretrained, backbone.trained, state)
    else:
        base, dense = backbone.slim.spec.base, backbone.slim.spec.dense
        layers = layers_in_base(backbone.slim, layers, [seed.name for seed in seeds])
        provenance = {**provenance, "given": provenance_of(backbone.slim)}
    return SlimSpec(
        base=base,
        family=backbone.family,
        library=family.library,
        library_version=backbone.library_version,
        architecture=backbone.architecture,
        activation=backbone.activation,
        preprocess=backbone.preprocess,
        layers=layers,
        protected=tuple(protected),
        dense=dense,
        slim=costs[1],
        provenance=provenance,
    )


def provenance(config: PruneConfig, pictures: Pictures) -> dict[str, Any]:
    """Return the origin of a slim tower as JSON values; no path of this machine.

    Args:
        config: Configuration of the prune.
        pictures: Calibration images.
    """
    return {
        **config.recorded(),
        "calibration_hash": calibration_hash(pictures),
        "samples": len(pictures),
        "torch": torch.__version__,
    }


def origin_of(backbone: Backbone, pictures: Pictures) -> dict[str, Any]:
    """What anything depends on that is measured of a model on pictures, as JSON values."""
    return {
        "model": backbone.name,
        "weights": tensors_hash(state_hashes(backbone.tower.state_dict())),
        "architecture": json.loads(json.dumps(backbone.architecture)),
        "activation": backbone.activation,
        "size": list(backbone.preprocess.size),
        "calibration": calibration_hash(pictures),
    }


def _layer(group: Group, plan: Plan, base: Container[str]) -> LayerSpec:
    """What the spec says of a group; ``base`` has the names of the base tower's tensors.

    Where rewriting took an attention apart, its parts are no layers of the base tower: it is cut
    as a whole, and has no slices.
    """
    slices: dict[SliceSpec, None] = {}
    fused = group.kind == "heads" and any(f"{s.module}.weight" not in base for s in group.slices)
    if not fused:
        for part in group.slices:
            offset = int(part.rows[0, 0])
            if not torch.equal(part.rows.flatten(), torch.arange(part.rows.numel()) + offset):
                raise AssertionError(f"{part.module}: the format has no units that are scattered")
            slices[SliceSpec(part.module, part.axis, offset)] = None
    return LayerSpec(
        name=group.name,
        kind=group.kind,
        block=group.block,
        units=group.units,
        kept=plan.width(group.name),
        unit_width=int(group.columns.shape[1]),
        slices=tuple(slices),
    )
