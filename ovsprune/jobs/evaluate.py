"""Zero-shot dense segmentation of a labelled data set, by patches against class names."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Backbone
from ovsprune.evaluation.backbone_scores import class_embeddings, score_backbone
from ovsprune.evaluation.datasets import FolderData, ScenesData, SegmentationData
from ovsprune.profiling.timing import device_and_dtype, thread_limit

__all__ = ["evaluate"]

SCENES = "scenes"
SCENE_COUNT = 500
"""Test scenes that are scored unless ``limit`` says otherwise."""


def evaluate(
    model: str,
    data: str | Path | None = None,
    *,
    pretrained: str | None = None,
    activation: str | None = None,
    list_file: str | Path | None = None,
    text_embeddings: str | Path | None = None,
    centred: bool = False,
    last_block: str | None = None,
    limit: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 16,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a model's dense features against class names on a data set.

    Args:
        model: A model name or a slim directory.
        data: A folder with ``images/``, ``labels/`` and ``classes.json``, or ``"scenes"`` for the
            procedural test scenes, which are the default for ``tiny``.
        pretrained: A tag, a file, or ``"none"``.
        activation: For a weights file that does not say.
        list_file: Names the pictures to use, one stem a line.
        text_embeddings: ``.npz`` with the classes' embeddings, for a model without a text tower.
        centred: Take the mean of the classes' embeddings off each of them first, which helps where
            all of them point the same way.
        last_block: What tokens attend to in the last block, of
            :data:`ovsprune.evaluation.last_block.VARIANTS`; None for the tower's own dense output.
        limit: Use only the first so many pictures.
        device: Where to run.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        batch_size: Pictures at a time.
        threads: CPU threads; None leaves PyTorch's choice.
        progress: Told of the pictures that are done.

    Returns:
        ``miou`` and ``pixel_accuracy`` in 0..1, ``per_class{name: IoU}``, ``images``, ``seconds``,
        ``model, data, centred, last_block, pixels``.

    Raises:
        OptionError: An option is out of range, or no data set is named.
        DataError: The data set or the embeddings cannot be used.
        WeightsError: The model cannot be loaded, or has no text tower and no embeddings are given.
    """
    from ovsprune.backbones import load_backbone

    progress = progress or Silent()
    start = time.perf_counter()
    for option, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise OptionError(f"{option} {value} is out of range; give 1 or more")
    found, kind = device_and_dtype(device, dtype)
    with thread_limit(threads):
        backbone = load_backbone(model, pretrained=pretrained, activation=activation, device=device)
        for note in backbone.notes:
            progress.note(note)
        opened, label = _open(data, backbone, list_file, limit)
        embeddings = class_embeddings(backbone, opened.prompts, text_embeddings)
        backbone.tower.to(found, kind)
        result = score_backbone(
            backbone,
            embeddings,
            opened,
            batch_size,
            progress,
            f"segmenting with {backbone.name}",
            centred,
            last_block,
        )
    return {
        "model": model,
        "data": label,
        "centred": centred,
        "last_block": last_block,
        "miou": result["miou"],
        "per_class": result["per_class"],
        "pixel_accuracy": result["pixel_accuracy"],
        "images": result["images"],
        "pixels": result["pixels"],
        "seconds": time.perf_counter() - start,
    }


def _open(
    data: str | Path | None,
    backbone: Backbone,
    list_file: str | Path | None,
    limit: int | None,
) -> tuple[SegmentationData, str]:
    """The data set, and what it is called in the record."""
    if data is None and backbone.name != "tiny":
        raise OptionError(
            f"--data is missing: name a folder with images/, labels/ and classes.json to score "
            f"{backbone.name} on, or '{SCENES}'"
        )
    if data is None or str(data) == SCENES:
        if list_file is not None:
            raise OptionError(f"--list {list_file} needs --data DIR; scenes have no files")
        size = max(backbone.preprocess.size)
        return ScenesData(limit or SCENE_COUNT, size=size), SCENES
    return FolderData(data, list_file, limit), str(data)
