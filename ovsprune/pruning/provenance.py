"""Spec and provenance of a slim checkpoint."""

from __future__ import annotations

import json
from collections.abc import Container
from typing import Any

import torch

from ovsprune.backbones import FAMILIES
from ovsprune.calibration.pictures import calibration_hash
from ovsprune.core.protocols import Backbone, Pictures
from ovsprune.core.records import Costs, Group, Plan
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.reprune import layers_in_base, provenance_of
from ovsprune.pruning.search_space import SearchSpace
from ovsprune.slim import SlimSpec
from ovsprune.slim.hashing import base_spec, state_hashes, tensors_hash
from ovsprune.slim.spec import LayerSpec, SliceSpec

__all__ = ["make_spec", "origin_of", "provenance"]


def make_spec(
    backbone: Backbone,
    space: SearchSpace,
    plan: Plan,
    costs: tuple[Costs, Costs],
    provenance: dict[str, Any],
) -> SlimSpec:
    """Return the spec of a slim tower; ``costs`` are those before and after the prune."""
    state = backbone.tower.state_dict()
    layers = tuple(_layer_spec(g, plan, state) for g in space.groups)
    if backbone.slim is None:
        dense = costs[0]
        base = base_spec(backbone.name, backbone.pretrained, backbone.trained, state)
    else:
        # Spec and mask of a model that was pruned twice refer to the first dense model.
        base, dense = backbone.slim.spec.base, backbone.slim.spec.dense
        layers = layers_in_base(backbone.slim, layers, [layer.name for layer in space.layers])
        provenance = {**provenance, "given": provenance_of(backbone.slim)}
    return SlimSpec(
        base=base,
        family=backbone.family,
        library=FAMILIES.get(backbone.family).library,
        library_version=backbone.library_version,
        architecture=backbone.architecture,
        activation=backbone.activation,
        preprocess=backbone.preprocess,
        layers=layers,
        protected=tuple(space.protected),
        dense=dense,
        slim=costs[1],
        provenance=provenance,
    )


def provenance(config: PruneConfig, pictures: Pictures) -> dict[str, Any]:
    """Return the origin of a slim tower as JSON values, without paths of this machine."""
    return {
        **config.recorded(),
        "calibration_hash": calibration_hash(pictures),
        "samples": len(pictures),
        "torch": torch.__version__,
    }


def origin_of(backbone: Backbone, pictures: Pictures) -> dict[str, Any]:
    """Return everything that measurements of a model on images depend on, as JSON values."""
    return {
        "model": backbone.name,
        # The name does not determine the weights.
        "weights": tensors_hash(state_hashes(backbone.tower.state_dict())),
        # A stored origin went through JSON, where tuples become lists; this one must compare equal.
        "architecture": json.loads(json.dumps(backbone.architecture)),
        "activation": backbone.activation,
        "size": list(backbone.preprocess.size),
        "calibration": calibration_hash(pictures),
    }


def _layer_spec(group: Group, plan: Plan, base: Container[str]) -> LayerSpec:
    """Return the spec of a group; ``base`` has the names of the base tower's tensors."""
    slices: dict[SliceSpec, None] = {}  # a set that keeps the order
    # Rewriting split a fused attention if the base lacks its parts. Such an attention is cut as a
    # whole, and the spec lists no slices.
    fused = group.kind == "heads" and any(f"{s.module}.weight" not in base for s in group.slices)
    if not fused:
        for part in group.slices:
            offset = int(part.rows[0, 0])
            if not torch.equal(part.rows.flatten(), torch.arange(part.rows.numel()) + offset):
                raise AssertionError(
                    f"{part.module}: the format needs the units of a layer to be contiguous"
                )
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
