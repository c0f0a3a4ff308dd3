"""Segmentation scores from a streaming confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ovsprune.core.errors import DataError

__all__ = ["ConfusionMatrix", "SegmentationScores"]


@dataclass(frozen=True)
class SegmentationScores:
    """Scores over a data set.

    Attributes:
        miou: Mean intersection over union in 0..1, over the scored classes in the labels.
        per_class: Class name to intersection over union in 0..1; classes absent from the labels
            are left out.
        pixel_accuracy: Share of the pixels with a class that are right, in 0..1.
        pixels: Pixels with a class.
    """

    miou: float
    per_class: dict[str, float]
    pixel_accuracy: float
    pixels: int


class ConfusionMatrix:
    """Counts of (label, prediction) pairs, added up picture by picture.

    Args:
        classes: How many classes there are.

    Attributes:
        counts: int64 [classes, classes]: rows are labels, columns predictions.
    """

    def __init__(self, classes: int) -> None:
        self.counts: Tensor = torch.zeros(classes, classes, dtype=torch.int64)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Adds pictures.

        Args:
            prediction: Integer class indices of any shape, each in 0..classes - 1.
            label: Integer class indices of the same shape; a negative one is void and not counted.

        Raises:
            DataError: If the shapes differ or an index is outside its range.
        """
        if prediction.shape != label.shape:
            raise DataError(
                f"prediction of shape {tuple(prediction.shape)} and label of shape "
                f"{tuple(label.shape)} differ: upsample the prediction to the label's size"
            )
        classes = self.counts.shape[0]
        known = label >= 0
        rows = label[known].to("cpu", torch.int64)
        columns = prediction.to(label.device)[known].to("cpu", torch.int64)
        for what, values in (("label", rows), ("prediction", columns)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < classes:
                raise DataError(
                    f"{what} holds class indices from {int(values.min())} to {int(values.max())}, "
                    f"but there are {classes} classes: use 0 to {classes - 1}, or -1 for void"
                )
        pairs = torch.bincount(rows * classes + columns, minlength=classes * classes)
        self.counts += pairs.view(classes, classes)

    def scores(
        self, names: Sequence[str], scored: Sequence[int] | None = None
    ) -> SegmentationScores:
        """Scores of everything that was added.

        Args:
            names: The name of each class.
            scored: Class indices that the mean is taken over; all by default.

        Returns:
            The scores.

        Raises:
            DataError: If no scored class is in the labels, or the names do not fit.
        """
        if len(names) != self.counts.shape[0]:
            raise DataError(f"{len(names)} class names for {self.counts.shape[0]} classes")
        hits = self.counts.diagonal().double()
        labelled = self.counts.sum(1)
        union = labelled + self.counts.sum(0) - self.counts.diagonal()
        present = [
            i for i in (range(len(names)) if scored is None else scored) if int(labelled[i]) > 0
        ]
        if not present:
            raise DataError(
                "no pixel of a scored class in the labels: check the labels and classes.json"
            )
        iou = {i: float(hits[i] / union[i]) for i in range(len(names)) if int(labelled[i]) > 0}
        pixels = int(labelled.sum())
        return SegmentationScores(
            miou=sum(iou[i] for i in present) / len(present),
            per_class={names[i]: value for i, value in iou.items()},
            pixel_accuracy=float(hits.sum()) / pixels,
            pixels=pixels,
        )
