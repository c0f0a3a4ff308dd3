"""Setup of a comparison: configuration, model and labelled images."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ovsprune.comparison.grid import Grid
from ovsprune.core.errors import OptionError, UnknownNameError
from ovsprune.core.options import options_of
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Backbone
from ovsprune.evaluation.datasets import FolderData, ScenesData, SegmentationData
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.loading import load_model

__all__ = ["SCENE_SEED", "common_config", "data_opener", "open_backbone"]

SCENE_SEED = 1_000_000
"""First seed of the test scenes; calibration scenes are of another split and start at 0."""


def common_config(grid: Grid, options: dict[str, Any]) -> PruneConfig:
    """Return the configuration that holds for all rows, after a check of every row's.

    Args:
        grid: Rows to make.
        options: Names and values of options that hold for all rows.

    Raises:
        OptionError: The budget is ``"latency"``, or the configuration of a row is not valid.
        UnknownNameError: An option does not hold for all rows.
    """
    known = [option.name for option in options_of(PruneConfig) if option.compare == "all"]
    for name in options:
        if name not in known:
            raise UnknownNameError("option of compare", name, known)
    config = PruneConfig.from_options({"ratio": grid.ratios[0], **options})
    if config.budget == "latency":
        raise OptionError(
            "--budget latency cannot be compared: Torch-Pruning has no table of layer times; use "
            "macs or params, and time the slim towers with 'ovsprune benchmark'"
        )
    config.check()
    for ratio, method in itertools.product(grid.ratios, grid.methods):
        # A combination without an effect is refused before the first row.
        method.settings(replace(config, ratio=ratio)).check()
    return config


def data_opener(
    data: str | Path | None, list_file: str | Path | None, scenes: int | None
) -> Callable[[int], SegmentationData]:
    """Return a function of the tower's image size in pixels that opens the labelled images.

    Raises:
        OptionError: A value is out of range.
        DataError: The folder cannot be used.
    """
    if scenes is not None and scenes < 1:
        raise OptionError(f"--scenes {scenes} is out of range; give 1 or more")
    if data is not None:
        # Opened now: a wrong folder is reported before the model is loaded.
        folder = FolderData(data, list_file, scenes)
        return lambda size: folder
    if list_file is not None:
        raise OptionError(f"--list {list_file} needs --data DIR; scenes have no files")
    return lambda size: ScenesData(scenes or 500, seed=SCENE_SEED, size=size)


def open_backbone(
    model: str | Backbone,
    pretrained: str | None,
    activation: str | None,
    device: str,
    progress: Progress,
) -> Backbone:
    """Return the dense model in float32, loaded if it is a name.

    Raises:
        OptionError: The model is slim already.
        WeightsError: The weights cannot be loaded.
    """
    backbone = load_model(model, pretrained, activation, device, progress)
    if backbone.slim is not None:
        raise OptionError(
            f"{backbone.slim.path} is slim already: compare on its dense model, {backbone.name}"
        )
    for note in backbone.notes:
        progress.note(note)
    if any(p.dtype != torch.float32 for p in backbone.tower.parameters()):
        # Half precision is for files only: moments and repairs need float32.
        # A copy, because float() would change the tower of the caller.
        backbone = replace(backbone, tower=deepcopy(backbone.tower).float())
    if not backbone.trained:
        progress.note(f"{backbone.name} has random weights: its mIoU and retention have no meaning")
    return backbone
