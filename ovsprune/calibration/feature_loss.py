"""Class-agnostic loss: distance between the features of two towers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["OUTPUT_WEIGHTS", "Features", "feature_loss", "total_variance"]

Features = tuple[Tensor, Tensor]
"""Pooled [B, C] and dense [B, C, h, w] outputs of a tower."""

OUTPUT_WEIGHTS = (0.1, 0.9)
"""Weights of the pooled output and of the dense tokens. Segmentation models read the tokens."""


def feature_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    scales: Sequence[float] = (1.0, 1.0),
    weights: Sequence[float] = (0.5, 0.5),
) -> Tensor:
    """Return the squared distance of L2-normalised features, differentiable.

    This is the mean over dense tokens of ``|t / |t| - t* / |t*||^2``, plus the same term of the
    pooled output. Features are normalised because a zero-shot head only uses their direction.
    Distillation of features instead of predictions is due to FitNets (Romero et al. 2015). Without
    classes, it is the semantic-agnostic loss of OpenTrans (Xu et al., CVPR 2024).

    Args:
        student: Pooled [B, C] and dense [B, C, h, w] features of the tower in training.
        teacher: The same features of the dense tower, for the same images.
        scales: Divisor of each term, see :func:`total_variance`.
        weights: Weight of each term; their sum is 1. OpenTrans has no pooled output; the default of
            one half is our choice.

    Returns:
        Scalar. With scales of 1 it is in [0, 4]: 0 for equal directions, 2 for orthogonal ones.
    """
    terms = [
        (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() / scale
        for a, b, scale in zip(student, teacher, scales, strict=True)
    ]
    return torch.stack([w * term for w, term in zip(weights, terms, strict=True)]).sum()


def total_variance(features: Tensor) -> float:
    """Return the mean squared distance of features [B, C, ...] from their mean, at least 1e-12."""
    flat = features.transpose(0, 1).flatten(1)  # [C, B * positions]
    return max(float((flat - flat.mean(1, keepdim=True)).square().sum(0).mean()), 1e-12)
