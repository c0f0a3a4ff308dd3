"""How far a score would move with other pictures: the percentile bootstrap."""

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
    """Percentile interval of the mIoU over pictures drawn again with replacement.

    A class that a draw has no pixel of is left out of that draw's mean, as it is left out of the
    score of a data set (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13).

    Args:
        counts: Confusion matrix of each picture, int64 [pictures, K, K], rows labels.
        scored: Class indices that the mean is taken over; all by default.
        draws: How many times pictures are drawn.
        level: Coverage, in (0, 1).
        seed: Of the draws.

    Returns:
        Lower and upper end, in 0..1.

    Raises:
        DataError: If there are no pictures, or the level is outside (0, 1).
    """
    if counts.ndim != 3 or not len(counts):
        raise DataError(f"counts of shape {tuple(counts.shape)}: give one matrix a picture")
    if not 0.0 < level < 1.0:
        raise DataError(f"level {level:g} is outside (0, 1)")
    pictures, classes = len(counts), counts.shape[1]
    chosen = torch.tensor(range(classes) if scored is None else list(scored))
    generator = torch.Generator().manual_seed(seed)
    parts = torch.stack(
        [counts.diagonal(dim1=1, dim2=2), counts.sum(2), counts.sum(1)]
    ).double()  # [3, pictures, K]
    found = []
    for _ in range(draws):
        rows = torch.randint(pictures, (pictures,), generator=generator)
        times = torch.bincount(rows, minlength=pictures).double()
        hits, labelled, predicted = torch.einsum("n,pnk->pk", times, parts)[:, chosen]
        present = labelled > 0
        if present.any():
            union = (labelled + predicted - hits)[present]
            found.append((hits[present] / union).mean())
    if not found:
        raise DataError("no pixel of a scored class in the labels")
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.stack(found).quantile(ends).tolist()
    return float(low), float(high)
