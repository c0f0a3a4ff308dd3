"""The dense zero-shot head: projected patch tokens against text embeddings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ovsprune.core.errors import DataError
from ovsprune.core.records import Preprocess
from ovsprune.evaluation.datasets import Sample, SegmentationData
from ovsprune.evaluation.metrics import ConfusionMatrix, SegmentationScores

__all__ = ["DenseZeroShot", "Evaluation", "evaluate", "prepare_image"]

Dense = Callable[[Tensor], Tensor]
"""Pictures [B, 3, H, W] to projected dense tokens [B, C, h, w]."""

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        scores: The scores.
        images: How many pictures were segmented.
        seconds: Wall-clock time.
        counts: Confusion matrix of each picture, int64 [images, K, K], where it was asked for.
    """

    scores: SegmentationScores
    images: int
    seconds: float
    counts: Tensor | None = None


def prepare_image(image: NDArray[np.uint8], preprocess: Preprocess) -> Tensor:
    """Resizes a whole picture to the tower's input, without cropping, and normalises it.

    Args:
        image: sRGB, uint8 [H, W, 3].
        preprocess: The tower's input. Its ``resize_mode`` is not used: a crop would leave pixels
            without a prediction.

    Returns:
        float32 [3, height, width].

    Raises:
        DataError: If the picture has another shape or type, or the interpolation is unknown.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(f"picture of shape {image.shape}, {image.dtype}: expected uint8 [H, W, 3]")
    if preprocess.interpolation not in _FILTERS:
        raise DataError(
            f"unknown interpolation {preprocess.interpolation!r}: use {' or '.join(_FILTERS)}"
        )
    height, width = preprocess.size
    if image.shape[:2] != (height, width):
        resized = Image.fromarray(image).resize((width, height), _FILTERS[preprocess.interpolation])
        image = np.asarray(resized)
    pixels = torch.from_numpy(image.astype(np.float32) / np.float32(255.0)).permute(2, 0, 1)
    mean = torch.tensor(preprocess.mean)[:, None, None]
    std = torch.tensor(preprocess.std)[:, None, None]
    return (pixels - mean) / std


@dataclass(frozen=True, eq=False)
class DenseZeroShot:
    """Segments pictures by the text embedding that each patch is closest to.

    Attributes:
        dense: Pictures [B, 3, H, W] to projected dense tokens [B, C, h, w].
        embeddings: Text embeddings [K, C], one a class.
        preprocess: What ``dense`` takes.
        centred: Whether the mean of the embeddings is taken off them first, which helps where all
            of a vocabulary's embeddings point the same way.
        device: Where pictures are put before ``dense`` sees them.
    """

    dense: Dense
    embeddings: Tensor
    preprocess: Preprocess
    centred: bool = False
    device: torch.device | str = field(default="cpu")

    def text(self) -> Tensor:
        """The unit-length class embeddings in use, float32 [K, C]."""
        text = functional.normalize(self.embeddings.float(), dim=-1)
        if self.centred:
            text = functional.normalize(text - text.mean(0, keepdim=True), dim=-1)
        return text.to(self.device)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Cosine of each patch with each class.

        Args:
            images: Normalised pictures [B, 3, H, W].

        Returns:
            float32 [B, K, h, w], in -1..1.

        Raises:
            DataError: If tokens and embeddings differ in width.
        """
        tokens = self.dense(images.to(self.device)).float()
        if tokens.ndim != 4 or tokens.shape[1] != self.embeddings.shape[-1]:
            raise DataError(
                f"dense tokens of shape {tuple(tokens.shape)} do not fit text embeddings of shape "
                f"{tuple(self.embeddings.shape)}: both must come from one model"
            )
        tokens = functional.normalize(tokens, dim=1)
        return torch.einsum("bchw,kc->bkhw", tokens, self.text())

    def segment(self, image: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Segments one picture of any size.

        Args:
            image: sRGB, uint8 [H, W, 3].

        Returns:
            Class indices, int64 [H, W].
        """
        logits = self.logits(prepare_image(image, self.preprocess)[None])
        return _upsampled(logits, (image.shape[0], image.shape[1]))[0].cpu().numpy()


def _upsampled(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Class indices [B, H, W] of bilinearly upsampled logits."""
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)


def _batches(data: SegmentationData, size: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in data:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def evaluate(
    head: DenseZeroShot,
    data: SegmentationData,
    *,
    batch_size: int = 16,
    each: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Scores a head on a data set, at the labels' full resolution.

    Args:
        head: Its embeddings are one a class of the data set, in that order.
        data: The pictures and labels.
        batch_size: Pictures that go through the tower at a time.
        each: Keep the confusion matrix of each picture, for a bootstrap.
        progress: Called after each batch with (pictures done, pictures in all).

    Returns:
        Scores, number of pictures and seconds.

    Raises:
        DataError: If classes and embeddings differ in number, or the data cannot be read.
    """
    classes = len(data.class_names)
    if len(head.embeddings) != classes:
        raise DataError(
            f"{len(head.embeddings)} text embeddings for {classes} classes: give one a class"
        )
    start = time.perf_counter()
    confusion, done = ConfusionMatrix(classes), 0
    counts: list[Tensor] = []
    for batch in _batches(data, batch_size):
        images = torch.stack([prepare_image(s.image, head.preprocess) for s in batch])
        for sample, logits in zip(batch, head.logits(images), strict=True):
            label = torch.from_numpy(sample.label)
            prediction = _upsampled(logits[None], (label.shape[0], label.shape[1]))[0]
            before = confusion.counts.clone() if each else confusion.counts
            confusion.update(prediction.cpu(), label)
            if each:
                counts.append(confusion.counts - before)
        done += len(batch)
        if progress is not None:
            progress(done, len(data))
    scores = confusion.scores(data.class_names, data.scored)
    stacked = torch.stack(counts) if each else None
    return Evaluation(scores, done, time.perf_counter() - start, stacked)
