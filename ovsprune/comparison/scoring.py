"""Scoring many towers on the same labelled pictures, against one dense tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import allocate
from ovsprune.calibration.fidelity import Agreement
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Backbone
from ovsprune.evaluation.backbone_scores import zero_shot_head
from ovsprune.evaluation.datasets import Sample, SegmentationData
from ovsprune.evaluation.zero_shot import evaluate

__all__ = ["KeptData", "Scorer"]

KEPT_BYTES = 1 << 29
"""Pictures and labels up to this size are kept in memory instead of read for every tower."""


class KeptData:
    """A data set that is read once, as long as it is small; otherwise it is read every time.

    Args:
        data: The data set.
        limit: Most bytes of pictures and labels to keep.
    """

    def __init__(self, data: SegmentationData, limit: int = KEPT_BYTES) -> None:
        self.class_names, self.prompts, self.scored = data.class_names, data.prompts, data.scored
        self._data, self._limit = data, limit
        self._samples: list[Sample] | None = None

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Sample]:
        if self._samples is not None:
            yield from self._samples
            return
        kept: list[Sample] = []
        size = 0
        for sample in self._data:
            size += sample.image.nbytes + sample.label.nbytes
            if size <= self._limit:
                kept.append(sample)
            yield sample
        if size <= self._limit:
            self._samples = kept


class Scorer:
    """mIoU of towers, and how far their dense features are from the dense tower's.

    The dense tower is run once: its features are kept, in memory or (above 1 GiB) on disk.

    Args:
        dense: The dense backbone.
        embeddings: Class embeddings [K, C].
        data: Labelled pictures.
        batch_size: Pictures at a time.
        progress: Told of every pass.
        centred: Take the mean of the embeddings off each of them first.
    """

    def __init__(
        self,
        dense: Backbone,
        embeddings: Tensor,
        data: SegmentationData,
        batch_size: int,
        progress: Progress,
        centred: bool = False,
    ) -> None:
        self._backbone, self._embeddings, self._centred = dense, embeddings, centred
        self._data, self._batch_size, self._progress = KeptData(data), batch_size, progress
        self._features: Tensor | None = None

    def dense(self) -> dict[str, float]:
        """``miou`` and ``pixel_accuracy`` of the dense tower."""
        done = 0

        def keep(features: Tensor) -> None:
            nonlocal done
            if self._features is None:
                self._features = allocate((len(self._data), *features.shape[1:]))
            self._features[done : done + len(features)] = features.float().cpu()
            done += len(features)

        return self._pass(self._backbone.tower, "scoring the dense tower", keep)

    def score(self, tower: nn.Module, label: str) -> dict[str, float]:
        """``miou``, ``pixel_accuracy`` and ``relative_error`` of a tower.

        Args:
            tower: Pruned from the dense tower.
            label: What the progress calls it.
        """
        if self._features is None:
            self.dense()
        assert self._features is not None
        wanted, sums, done = self._features, Agreement(), 0

        def compare(features: Tensor) -> None:
            nonlocal done
            sums.update(wanted[done : done + len(features)], features.float().cpu())
            done += len(features)

        found = self._pass(tower, f"scoring {label}", compare)
        return {**found, "relative_error": sums.result().relative_error}

    def _pass(
        self, tower: nn.Module, label: str, see: Callable[[Tensor], None]
    ) -> dict[str, float]:
        backbone = dataclasses.replace(self._backbone, tower=tower.eval())
        plain = zero_shot_head(backbone, self._embeddings, self._centred)

        @torch.no_grad()
        def features(images: Tensor) -> Tensor:
            tokens = plain.dense(images)
            see(tokens)
            return tokens

        with self._progress.stage(label, len(self._data)) as advance:
            before = 0

            def tell(now: int, _: int) -> None:
                nonlocal before
                advance(now - before)
                before = now

            found = evaluate(
                dataclasses.replace(plain, dense=features),
                self._data,
                batch_size=self._batch_size,
                progress=tell,
            ).scores
        return {"miou": found.miou, "pixel_accuracy": found.pixel_accuracy}
