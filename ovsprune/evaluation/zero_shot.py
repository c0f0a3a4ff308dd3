"""Dense zero-shot head: cosine similarity of projected patch tokens and text embeddings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

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
"""Function of images [B, 3, H, W] that returns projected patch tokens [B, C, h, w]."""

Progress = Callable[[int, int], None]
"""Function of (number of images done, number of all images)."""

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes:
        scores: The scores.
        images: Number of images.
        seconds: Wall-clock time in seconds.
        counts: Confusion matrix of each image, int64 [images, K, K], if requested.
    """

    scores: SegmentationScores
    images: int
    seconds: float
    counts: Tensor | None = None


def prepare_image(image: NDArray[np.uint8], preprocess: Preprocess) -> Tensor:
    """Resize an image to the input size of the tower, without cropping, and normalise it.

    Args:
        image: sRGB, uint8 [H, W, 3].
        preprocess: Preprocessing of the tower. Its ``resize_mode`` is not used: a crop would leave
            pixels without a prediction.

    Returns:
        float32 [3, height, width].

    Raises:
        DataError: The image has another shape or dtype, or the interpolation is unknown.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(f"image of shape {image.shape}, {image.dtype}: expected uint8 [H, W, 3]")
    if preprocess.interpolation not in _FILTERS:
        raise DataError(
            f"unknown interpolation {preprocess.interpolation!r}: use {' or '.join(_FILTERS)}"
        )
    height, width = preprocess.size
    if image.shape[:2] != (height, width):
        # PIL widens its filter when it reduces an image, as open_clip's preprocessing does; torch's
        # interpolation does so only with antialias=True. PIL takes the width first.
        resized = Image.fromarray(image).resize((width, height), _FILTERS[preprocess.interpolation])
        image = np.asarray(resized)
    pixels = torch.from_numpy(image.astype(np.float32) / np.float32(255.0))  # [H, W, 3]
    mean = torch.tensor(preprocess.mean)[:, None, None]
    std = torch.tensor(preprocess.std)[:, None, None]
    return (pixels.permute(2, 0, 1) - mean) / std


@dataclass(frozen=True, eq=False)
class DenseZeroShot:
    """Assigns to each patch the class with the closest text embedding.

    Attributes:
        dense: Function of images [B, 3, H, W] that returns projected patch tokens [B, C, h, w].
        embeddings: Text embeddings [K, C], one per class.
        preprocess: Preprocessing of the images for ``dense``.
        centred: If true, subtract the mean of the embeddings first. This helps if all embeddings
            of a vocabulary have a similar direction.
        device: Device of the images.
    """

    dense: Dense
    embeddings: Tensor
    preprocess: Preprocess
    centred: bool = False
    device: torch.device | str = "cpu"

    def text(self) -> Tensor:
        """Return the class embeddings with unit length, float32 [K, C]."""
        text = functional.normalize(self.embeddings.float(), dim=-1)
        if self.centred:
            text = functional.normalize(text - text.mean(0, keepdim=True), dim=-1)
        return text.to(self.device)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the cosine similarity of each patch and each class.

        Args:
            images: Normalised images [B, 3, H, W].

        Returns:
            float32 [B, K, h, w], in -1..1.

        Raises:
            DataError: Tokens and embeddings have different widths.
        """
        tokens = self.dense(images.to(self.device)).float()  # [B, C, h, w]
        if tokens.ndim != 4 or tokens.shape[1] != self.embeddings.shape[-1]:
            raise DataError(
                f"dense tokens of shape {tuple(tokens.shape)} do not fit text embeddings of shape "
                f"{tuple(self.embeddings.shape)}: both must come from one model"
            )
        tokens = functional.normalize(tokens, dim=1)
        return torch.einsum("bchw,kc->bkhw", tokens, self.text())  # [B, K, h, w]

    def segment(self, image: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Segment one image of any size.

        Args:
            image: sRGB, uint8 [H, W, 3].

        Returns:
            Class indices, int64 [H, W].
        """
        logits = self.logits(prepare_image(image, self.preprocess)[None])  # [1, K, h, w]
        return _predict(logits, (image.shape[0], image.shape[1]))[0].cpu().numpy()


def _predict(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample logits [B, K, h, w] bilinearly and return class indices [B, H, W]."""
    # The logits are interpolated, not the classes: there is nothing between two class indices.
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)


def _batches(data: SegmentationData, size: int) -> Iterator[list[Sample]]:
    """Yield the samples in lists of at most ``size``."""
    samples = iter(data)
    while batch := list(islice(samples, size)):
        yield batch


def evaluate(
    head: DenseZeroShot,
    data: SegmentationData,
    *,
    batch_size: int = 16,
    each: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a head on a data set, at the full resolution of the labels.

    Args:
        head: The head, with one embedding per class of the data set, in the same order.
        data: The images and labels.
        batch_size: Number of images per batch.
        each: Keep the confusion matrix of each image, for a bootstrap.
        progress: Called after each batch with (number of images done, number of all images).

    Raises:
        DataError: The numbers of classes and embeddings differ, or the data cannot be read.
    """
    classes = len(data.class_names)
    if len(head.embeddings) != classes:
        raise DataError(
            f"{len(head.embeddings)} text embeddings for {classes} classes: give one per class"
        )
    start = time.perf_counter()
    confusion, done = ConfusionMatrix(classes), 0
    counts: list[Tensor] = []  # [K, K] for each image
    for batch in _batches(data, batch_size):
        images = torch.stack([prepare_image(s.image, head.preprocess) for s in batch])
        # Labels of a data set have different sizes, so the upsampling is done image by image.
        for sample, logits in zip(batch, head.logits(images), strict=True):
            label = torch.from_numpy(sample.label)
            prediction = _predict(logits[None], (label.shape[0], label.shape[1]))[0]
            before = confusion.counts.clone()  # update adds in place
            confusion.update(prediction.cpu(), label)
            if each:
                counts.append(confusion.counts - before)
        done += len(batch)
        if progress is not None:
            progress(done, len(data))
    scores = confusion.scores(data.class_names, data.scored)
    return Evaluation(
        scores=scores,
        images=done,
        seconds=time.perf_counter() - start,
        counts=torch.stack(counts) if each else None,
    )
