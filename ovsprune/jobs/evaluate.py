"""Zero-shot dense segmentation of a labelled data set, by patches against class names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Backbone
from ovsprune.evaluation.datasets import FolderData, ScenesData, SegmentationData
from ovsprune.evaluation.last_block import dense_with
from ovsprune.evaluation.text import DEFAULT_TEMPLATES, read_embeddings
from ovsprune.evaluation.zero_shot import DenseZeroShot
from ovsprune.evaluation.zero_shot import evaluate as score
from ovsprune.profiling.timing import device_and_dtype, thread_limit

__all__ = ["class_embeddings", "evaluate", "head", "score_backbone"]

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


def class_embeddings(
    backbone: Backbone, prompts: Sequence[str], file: str | Path | None = None
) -> Tensor:
    """Unit-length class embeddings [K, C], from ``file`` or the backbone's own text tower.

    Raises:
        DataError: ``file`` cannot be used.
        WeightsError: There is neither a file nor a text tower.
    """
    if file is not None:
        return read_embeddings(file, prompts)
    total = torch.stack(
        [
            backbone.encode_text([template.format(prompt) for prompt in prompts])
            for template in DEFAULT_TEMPLATES
        ]
    ).sum(0)
    return torch.nn.functional.normalize(total, dim=-1)


def head(
    backbone: Backbone,
    embeddings: Tensor,
    centred: bool = False,
    last_block: str | None = None,
) -> DenseZeroShot:
    """The dense zero-shot head on ``backbone``, in whatever dtype and place its tower is.

    Raises:
        OptionError: ``last_block`` is unknown, or the tower's last block cannot be read so.
    """
    weight = next(backbone.tower.parameters())
    dense = backbone.dense if last_block is None else dense_with(backbone, last_block)
    return DenseZeroShot(
        lambda images: dense(images.to(weight.dtype)),
        embeddings,
        backbone.preprocess,
        centred,
        weight.device,
    )


def score_backbone(
    backbone: Backbone,
    embeddings: Tensor,
    data: SegmentationData,
    batch_size: int,
    progress: Progress,
    label: str,
    centred: bool = False,
    last_block: str | None = None,
) -> dict[str, Any]:
    """``miou, per_class, pixel_accuracy, pixels, images, seconds`` of a loaded backbone."""
    with progress.stage(label, len(data)) as advance:
        before = 0

        def tell(done: int, _: int) -> None:
            nonlocal before
            advance(done - before)
            before = done

        found = score(
            head(backbone, embeddings, centred, last_block),
            data,
            batch_size=batch_size,
            progress=tell,
        )
    return {
        "miou": found.scores.miou,
        "per_class": found.scores.per_class,
        "pixel_accuracy": found.scores.pixel_accuracy,
        "pixels": found.scores.pixels,
        "images": found.images,
        "seconds": found.seconds,
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
