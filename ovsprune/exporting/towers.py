"""Tower and metadata of an export."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ovsprune._version import __version__
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import Plan
from ovsprune.graph.costs import count_costs
from ovsprune.pruning.provenance import make_spec
from ovsprune.pruning.search_space import SearchSpace
from ovsprune.slim import SlimCheckpoint, SlimTower
from ovsprune.slim.load import tower_of

__all__ = ["float_tower", "metadata_of"]


def float_tower(backbone: Backbone) -> SlimTower:
    """Return the tower as a SlimTower in float32 on the CPU; a dense tower keeps all units."""
    checkpoint = backbone.slim
    if not isinstance(checkpoint, SlimCheckpoint):
        # A plan that removes nothing turns a dense tower into a slim checkpoint in memory.
        costs = count_costs(backbone.tower, backbone.preprocess.size)
        space = SearchSpace(tower=backbone.tower, layers=(), groups=[], protected={})
        spec = make_spec(backbone, space, Plan({}), (costs, costs), {})
        # A checkpoint has the names of the full CLIP model, where the tower is `visual`.
        tensors = {f"visual.{k}": v.cpu() for k, v in backbone.tower.state_dict().items()}
        checkpoint = SlimCheckpoint(Path(backbone.name), spec, {}, tensors)
    return tower_of(checkpoint).float().requires_grad_(False)


def metadata_of(tower: SlimTower, size: tuple[int, int], dynamic: bool) -> dict[str, str]:
    """Return the metadata of the file; ONNX allows strings only."""
    spec = tower.spec
    # The exported size may differ from the native one.
    preprocess = {**asdict(spec.preprocess), "size": list(size)}
    return {
        "ovsprune": __version__,
        "model": spec.base.model,
        "pretrained": spec.base.pretrained or "",
        "trained": json.dumps(spec.base.trained),
        "ratio": f"{spec.ratio:.6f}",
        "activation": spec.activation,
        "preprocess": json.dumps(preprocess),
        "dynamic": json.dumps(dynamic),
    }
