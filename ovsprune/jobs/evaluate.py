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
from ovsprune.pruning.loading import load_model

__all__ = ["evaluate"]

SCENES = "scenes"


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
    """Score the dense features of a model against class names on a data set.

    Args:
        model: Model name or slim directory.
        data: Folder with ``images/``, ``labels/`` and ``classes.json``, or ``"scenes"`` for the
            procedural test scenes, which are the default for ``tiny``.
        pretrained: Tag, file, or ``"none"``.
        activation: ``"gelu"`` or ``"quick_gelu"``, for a weights file that does not say which.
        list_file: File with the stems of the images to use, one per line.
        text_embeddings: NPZ file with the class embeddings, for a model without a text tower.
        centred: Subtract the mean of the class embeddings from each of them first. It helps if all
            of them point in similar directions.
        last_block: Attention of the last block, one of
            :data:`ovsprune.evaluation.last_block.VARIANTS`; None for the tower's own dense output.
        limit: Maximum number of images; 500 test scenes by default.
        device: Torch device.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        batch_size: Images per batch.
        threads: CPU threads; None for PyTorch's default.
        progress: Progress reporter.

    Returns:
        ``miou`` and ``pixel_accuracy`` in [0, 1], ``per_class{name: IoU}``, ``images``,
        ``seconds``, ``model, data, centred, last_block, pixels``.

    Raises:
        OptionError: An option is out of range, or no data set is named.
        DataError: The data set or the embeddings cannot be used.
        WeightsError: The model cannot be loaded, or has no text tower and no embeddings are given.
    """
    progress = progress or Silent()
    start = time.perf_counter()
    for option, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise OptionError(f"{option} {value} is out of range; give 1 or more")
    torch_device, torch_dtype = device_and_dtype(device, dtype)
    with thread_limit(threads):
        backbone = load_model(model, pretrained, activation, device, progress)
        for note in backbone.notes:
            progress.note(note)
        images, label = _open(data, backbone, list_file, limit)
        embeddings = class_embeddings(backbone, images.prompts, text_embeddings)
        # Only the image tower: the class embeddings do not depend on the dtype.
        backbone.tower.to(torch_device, torch_dtype)
        title = f"segmenting with {backbone.name}"
        result = score_backbone(
            backbone, embeddings, images, batch_size, progress, title, centred, last_block
        )
    return {
        "model": model,
        "data": label,
        "centred": centred,
        "last_block": last_block,
        **result,
        "seconds": time.perf_counter() - start,
    }


def _open(
    data: str | Path | None, backbone: Backbone, list_file: str | Path | None, limit: int | None
) -> tuple[SegmentationData, str]:
    """Return the data set and its name in the record."""
    # Only `tiny` was trained on scenes; other models use them on request only.
    if data is None and backbone.name != "tiny":
        raise OptionError(
            f"--data is missing: name a folder with images/, labels/ and classes.json to score "
            f"{backbone.name} on, or '{SCENES}'"
        )
    if data is None or str(data) == SCENES:
        if list_file is not None:
            raise OptionError(f"--list {list_file} needs --data DIR; scenes have no files")
        # Scenes are square.
        size = max(backbone.preprocess.size)
        return ScenesData(limit or 500, size=size), SCENES
    return FolderData(data, list_file, limit), str(data)
