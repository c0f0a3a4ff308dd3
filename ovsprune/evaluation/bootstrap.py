"""Confidence interval of the mIoU over test images: the percentile bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ovsprune.core.errors import DataError

__all__ = ["bootstrap_miou"]


def bootstrap_miou(
    counts: Tensor,
    *,
    scored: Sequence[int] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of the mIoU over resampled images.

    Images are drawn with replacement (Efron and Tibshirani, "An Introduction to the Bootstrap",
    1993, ch. 13). A class without labelled pixels in a draw is left out of the mean of that draw,
    as in the score of a data set.

    Args:
        counts: Confusion matrix of each image, int64 [n, K, K], with labels as rows.
        scored: Indices of the classes in the mean; all by default.
        draws: Number of resamples.
        level: Coverage of the interval, in (0, 1).
        seed: Seed of the draws.

    Returns:
        Lower and upper end of the interval, in 0..1.

    Raises:
        DataError: There are no images, no scored class has labelled pixels, or ``level`` is outside
            (0, 1).
    """
    if counts.ndim != 3 or not len(counts):
        raise DataError(f"counts of shape {tuple(counts.shape)}: give one matrix per image")
    if not 0.0 < level < 1.0:
        raise DataError(f"level {level:g} is outside (0, 1)")
    n, classes = len(counts), counts.shape[1]
    scored_classes = torch.tensor(range(classes) if scored is None else list(scored))
    generator = torch.Generator().manual_seed(seed)
    # Correct, labelled and predicted pixels of each image and class.
    pixels = torch.stack(
        [counts.diagonal(dim1=1, dim2=2), counts.sum(2), counts.sum(1)]
    ).double()  # [3, n, K]
    mious = []  # one per draw; draws without a labelled scored class are skipped
    for _ in range(draws):
        rows = torch.randint(n, (n,), generator=generator)
        # The number of times that each image was drawn weights its pixels.
        times = torch.bincount(rows, minlength=n).double()  # [n]
        totals = torch.einsum("n,pnk->pk", times, pixels)  # [3, K]
        correct, labelled, predicted = totals[:, scored_classes]
        present = labelled > 0
        if present.any():
            union = (labelled + predicted - correct)[present]
            mious.append((correct[present] / union).mean())
    if not mious:
        raise DataError("no pixel of a scored class in the labels")
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.stack(mious).quantile(ends).tolist()
    return float(low), float(high)
