"""Zero-shot dense segmentation scores of a loaded backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Backbone
from ovsprune.evaluation.datasets import SegmentationData
from ovsprune.evaluation.last_block import dense_with
from ovsprune.evaluation.text import DEFAULT_TEMPLATES, read_embeddings
from ovsprune.evaluation.zero_shot import DenseZeroShot, evaluate

__all__ = ["class_embeddings", "score_backbone", "zero_shot_head"]


def class_embeddings(
    backbone: Backbone, prompts: Sequence[str], file: str | Path | None = None
) -> Tensor:
    """Return unit-length class embeddings [K, C], from a file or from the backbone's text tower.

    Args:
        backbone: Model whose text tower encodes the prompts.
        prompts: K prompts, one per class.
        file: NPZ file of embeddings, used instead of the text tower.

    Raises:
        DataError: The file cannot be used.
        WeightsError: There is neither a file nor a text tower.
    """
    if file is not None:
        return read_embeddings(file, prompts)
    # CLIP's prompt ensemble: the normalised mean over the templates.
    sentences = [[template.format(prompt) for prompt in prompts] for template in DEFAULT_TEMPLATES]
    total = torch.stack([backbone.encode_text(texts) for texts in sentences]).sum(0)  # [K, C]
    return torch.nn.functional.normalize(total, dim=-1)


def zero_shot_head(
    backbone: Backbone,
    embeddings: Tensor,
    centred: bool = False,
    last_block: str | None = None,
) -> DenseZeroShot:
    """Return the dense zero-shot head of a backbone, on the tower's device and in its dtype.

    Args:
        backbone: Model whose dense features are classified.
        embeddings: Unit-length class embeddings [K, C].
        centred: Subtract the mean of the embeddings from each of them first.
        last_block: Variant of the last block's attention, see
            :mod:`ovsprune.evaluation.last_block`; None for the tower's own dense output.

    Raises:
        OptionError: ``last_block`` is unknown, or does not apply to this tower.
    """
    weight = next(backbone.tower.parameters())
    dense = backbone.dense if last_block is None else dense_with(backbone, last_block)
    return DenseZeroShot(
        # Images are float32, but the tower may have half precision.
        dense=lambda images: dense(images.to(weight.dtype)),
        embeddings=embeddings,
        preprocess=backbone.preprocess,
        centred=centred,
        device=weight.device,
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
    """Score a loaded backbone on a data set.

    Args:
        backbone: Model to score.
        embeddings: Unit-length class embeddings [K, C].
        data: Labelled images.
        batch_size: Images per batch.
        progress: Progress reporter.
        label: Title of the progress bar.
        centred: As of :func:`zero_shot_head`.
        last_block: As of :func:`zero_shot_head`.

    Returns:
        ``miou, per_class, pixel_accuracy, pixels, images, seconds``.
    """
    with progress.stage(label, len(data)) as advance:
        before = 0

        def tell(done: int, _: int) -> None:
            nonlocal before
            advance(done - before)  # evaluate reports totals, a stage takes increments
            before = done

        result = evaluate(
            zero_shot_head(backbone, embeddings, centred, last_block),
            data,
            batch_size=batch_size,
            progress=tell,
        )
    return {**asdict(result.scores), "images": result.images, "seconds": result.seconds}
