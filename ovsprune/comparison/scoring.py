"""Scores of many towers on the same labelled images, relative to one dense tower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import allocate
from ovsprune.calibration.fidelity import Agreement
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Backbone
from ovsprune.evaluation.backbone_scores import zero_shot_head
from ovsprune.evaluation.datasets import Sample, SegmentationData
from ovsprune.evaluation.zero_shot import evaluate

__all__ = ["CachedData", "Scorer"]

CACHE_BYTES = 1 << 29
"""Images and labels up to this size are kept in memory; larger sets are read for every tower."""


class CachedData:
    """Data set that is read once and kept in memory if it is small.

    Args:
        data: Data set.
        limit: Maximum bytes of images and labels to keep.
    """

    def __init__(self, data: SegmentationData, limit: int = CACHE_BYTES) -> None:
        self.class_names, self.prompts, self.scored = data.class_names, data.prompts, data.scored
        self._data, self._limit = data, limit
        self._samples: list[Sample] | None = None

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Sample]:
        if self._samples is not None:
            yield from self._samples
            return
        samples: list[Sample] = []
        size = 0
        for sample in self._data:
            size += sample.image.nbytes + sample.label.nbytes
            if size <= self._limit:
                samples.append(sample)
            yield sample
        # After a complete pass only: a pass that was stopped has read a part of the data.
        if size <= self._limit:
            self._samples = samples


class Scorer:
    """Zero-shot mIoU of towers, and the distance of their features from the dense tower's.

    The dense tower is run once. Its features are kept in memory, or on disk if they exceed 1 GiB.

    Args:
        backbone: Dense backbone.
        embeddings: Class embeddings [K, C].
        data: Labelled images.
        batch_size: Images per batch.
        progress: Progress reporter.
        centred: Subtract the mean of the embeddings from each of them first.
    """

    def __init__(
        self,
        backbone: Backbone,
        embeddings: Tensor,
        data: SegmentationData,
        batch_size: int,
        progress: Progress,
        centred: bool = False,
    ) -> None:
        self.backbone, self._embeddings, self._centred = backbone, embeddings, centred
        self._data, self._batch_size, self._progress = CachedData(data), batch_size, progress
        self._features: Tensor | None = None  # of the dense tower, [N, C, h, w]

    def dense(self) -> dict[str, float]:
        """Return ``miou`` and ``pixel_accuracy`` of the dense tower; keep its features."""

        def keep(first: int, features: Tensor) -> None:
            if self._features is None:
                self._features = allocate((len(self._data), *features.shape[1:]))
            self._features[first : first + len(features)] = features

        return self._pass(self.backbone.tower, "scoring the dense tower", keep)

    def score(self, tower: nn.Module, label: str) -> dict[str, float]:
        """Return ``miou``, ``pixel_accuracy`` and ``relative_error`` of a tower.

        Args:
            tower: Tower that was pruned from the dense tower.
            label: Name of the tower in the progress.
        """
        # The dense scores of a resumed comparison come from its rows, without a pass.
        if self._features is None:
            self.dense()
        assert self._features is not None
        dense, agreement = self._features, Agreement()

        def compare(first: int, features: Tensor) -> None:
            agreement.update(dense[first : first + len(features)], features)

        scores = self._pass(tower, f"scoring {label}", compare)
        return {**scores, "relative_error": agreement.result().relative_error}

    def _pass(
        self, tower: nn.Module, label: str, observe: Callable[[int, Tensor], None]
    ) -> dict[str, float]:
        """Score a tower; ``observe`` gets the index of a batch's first image and its features."""
        head = zero_shot_head(
            replace(self.backbone, tower=tower.eval()), self._embeddings, self._centred
        )
        first = 0

        @torch.no_grad()
        def observed(images: Tensor) -> Tensor:
            nonlocal first
            features = head.dense(images)  # [B, C, h, w]
            # Images come in the same order for every tower, so `first` selects the same ones.
            observe(first, features.float().cpu())
            first += len(features)
            return features

        with self._progress.stage(label, len(self._data)) as advance:
            before = 0

            def tell(done: int, _: int) -> None:
                nonlocal before
                # evaluate() reports totals.
                advance(done - before)
                before = done

            scores = evaluate(
                replace(head, dense=observed),
                self._data,
                batch_size=self._batch_size,
                progress=tell,
            ).scores
        return {"miou": scores.miou, "pixel_accuracy": scores.pixel_accuracy}
