"""Latency and peak memory of towers by name, for ``ovsprune benchmark``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ovsprune import backbones
from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Backbone
from ovsprune.graph.costs import count_costs
from ovsprune.profiling.timing import alternate, latency_figures, peak_memory, random_images

__all__ = ["MeasuredTower", "add_memory", "latency_rows", "load_towers"]


@dataclass(frozen=True, eq=False, kw_only=True)
class MeasuredTower:
    """Tower to measure, and the arguments with which another process loads it.

    Attributes:
        label: Name in the record.
        role: ``"model"`` or ``"against"``.
        source: Model name or slim directory.
        pretrained: Weights, as for :func:`ovsprune.backbones.load_backbone`.
        backbone: Loaded model.
    """

    label: str
    role: str
    source: str
    pretrained: str | None
    backbone: Backbone


def load_towers(model: str, against: str | None) -> list[MeasuredTower]:
    """Load the tower to measure, after its reference if there is one.

    Args:
        model: Model name or slim directory.
        against: Reference; by default the dense base of a slim directory, and none for a dense
            model.
    """
    measured = _load(model, "model")
    if against is None and measured.backbone.slim is not None:
        # The name is enough, as a dense reference gets random weights.
        against = measured.backbone.slim.spec.base.model
    return [measured] if against is None else [_load(against, "against"), measured]


def _load(source: str, role: str) -> MeasuredTower:
    # Random weights: speed does not depend on them, and nothing needs to be downloaded.
    pretrained = None if Path(source).is_dir() else "none"
    backbone = backbones.load_backbone(source, pretrained=pretrained)
    return MeasuredTower(
        label=f"{backbone.name} {'dense' if backbone.slim is None else 'slim'}",
        role=role,
        source=source,
        pretrained=pretrained,
        backbone=backbone,
    )


def latency_rows(
    towers: Sequence[MeasuredTower],
    batch: int,
    pairs: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Measure the towers in alternation at one batch size; return a row of the record for each.

    Raises:
        OptionError: The towers take images of different sizes.
    """
    reference = towers[0]
    size = reference.backbone.preprocess.size
    for other in towers[1:]:
        if other.backbone.preprocess.size != size:
            raise OptionError(
                f"{other.source} takes images of {other.backbone.preprocess.size} pixels, "
                f"{reference.source} of {size}; choose an --against of the same input size"
            )
    images = random_images(batch, size).to(device, dtype)
    modules = {t.role: t.backbone.tower.to(device, dtype).eval() for t in towers}
    passes = {role: partial(module, images) for role, module in modules.items()}
    times = alternate(
        passes, rounds=pairs, device=device, progress=progress, label=f"latency at batch {batch}"
    )
    rows = []
    for tower in towers:
        costs = count_costs(tower.backbone.tower, size)
        rows.append(
            {
                "name": tower.label,
                "role": tower.role,
                "batch": batch,
                "peak_memory": None,  # filled in by add_memory
                "macs": costs.macs,
                "params": costs.params,
                **latency_figures(times, tower.role, reference.role, batch),
            }
        )
    return rows


def add_memory(
    rows: Sequence[dict[str, Any]],
    towers: Sequence[MeasuredTower],
    device: str,
    dtype: str,
    threads: int,
    progress: Progress,
) -> None:
    """Measure the ``peak_memory`` of every row, each in a new process."""
    by_role = {tower.role: tower for tower in towers}
    with progress.stage("peak memory, one process each", len(rows)) as advance:
        for row in rows:
            tower = by_role[row["role"]]
            row["peak_memory"] = peak_memory(
                tower.source,
                row["batch"],
                pretrained=tower.pretrained,
                device=device,
                dtype=dtype,
                threads=threads,
            )
            advance(1)
