"""Segmentation metrics from a confusion matrix that is accumulated over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ovsprune.core.errors import DataError

__all__ = ["ConfusionMatrix", "SegmentationScores"]


@dataclass(frozen=True)
class SegmentationScores:
    """Scores on a data set.

    Attributes:
        miou: Mean intersection over union in 0..1, over the scored classes in the labels.
        per_class: Map of class name to intersection over union in 0..1; classes absent from the
            labels are omitted.
        pixel_accuracy: Fraction of the labelled pixels that are classified correctly, in 0..1.
        pixels: Number of labelled pixels, without void.
    """

    miou: float
    per_class: dict[str, float]
    pixel_accuracy: float
    pixels: int


class ConfusionMatrix:
    """Pixel counts of (label, prediction) pairs, accumulated over images.

    Args:
        classes: Number of classes, K.

    Attributes:
        counts: int64 [K, K]; rows are labels, columns are predictions.
    """

    def __init__(self, classes: int) -> None:
        self.counts: Tensor = torch.zeros(classes, classes, dtype=torch.int64)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add one or more images.

        Args:
            prediction: Integer class indices of any shape, in 0..K - 1.
            label: Integer class indices of the same shape; negative ones are void.

        Raises:
            DataError: The shapes differ, or an index is out of range.
        """
        if prediction.shape != label.shape:
            raise DataError(
                f"prediction of shape {tuple(prediction.shape)} and label of shape "
                f"{tuple(label.shape)} differ: upsample the prediction to the label's size"
            )
        classes = self.counts.shape[0]
        labelled = label >= 0
        rows = label[labelled].to("cpu", torch.int64)
        columns = prediction.to(label.device)[labelled].to("cpu", torch.int64)
        for name, values in (("label", rows), ("prediction", columns)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < classes:
                raise DataError(
                    f"{name} contains class indices from {int(values.min())} to "
                    f"{int(values.max())}, but there are {classes} classes: use 0 to "
                    f"{classes - 1}, or -1 for void"
                )
        # The flat index of (label, prediction) in the matrix counts the pairs in one pass.
        pairs = torch.bincount(rows * classes + columns, minlength=classes * classes)  # [K * K]
        self.counts += pairs.view(classes, classes)

    def scores(
        self, names: Sequence[str], scored: Sequence[int] | None = None
    ) -> SegmentationScores:
        """Compute the scores of all added images.

        Args:
            names: Name of each class.
            scored: Indices of the classes in the mean; all by default.

        Raises:
            DataError: No scored class occurs in the labels, or the number of names is not K.
        """
        if len(names) != self.counts.shape[0]:
            raise DataError(f"{len(names)} class names for {self.counts.shape[0]} classes")
        correct = self.counts.diagonal().double()  # [K]
        labelled = self.counts.sum(1)  # [K]
        union = labelled + self.counts.sum(0) - self.counts.diagonal()  # [K]
        # A class that the data set does not contain has no score: only false positives.
        classes = range(len(names)) if scored is None else scored
        present = [i for i in classes if int(labelled[i]) > 0]
        if not present:
            raise DataError(
                "no pixel of a scored class in the labels: check the labels and classes.json"
            )
        iou = {i: float(correct[i] / union[i]) for i in range(len(names)) if int(labelled[i]) > 0}
        pixels = int(labelled.sum())
        return SegmentationScores(
            miou=sum(iou[i] for i in present) / len(present),
            per_class={names[i]: value for i, value in iou.items()},
            pixel_accuracy=float(correct.sum()) / pixels,
            pixels=pixels,
        )
