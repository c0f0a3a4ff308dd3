"""The loss that knows no class: how far a tower's features are from the dense tower's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SHARES", "Features", "feature_loss", "spread"]

Features = tuple[Tensor, Tensor]
"""Pooled [B, C] and dense [B, C, h, w] outputs of a tower."""

SHARES = (0.1, 0.9)
"""What pooled output and dense tokens count: what is made for segmentation is read from tokens."""


def feature_loss(
    found: Sequence[Tensor],
    wanted: Sequence[Tensor],
    spreads: Sequence[float] = (1.0, 1.0),
    shares: Sequence[float] = (0.5, 0.5),
) -> Tensor:
    """Squared distance of L2-normalised features, to be differentiated.

    The mean over dense tokens of ``|t / |t| - t* / |t*||^2``, and the same of the pooled output:
    what a zero-shot head reads is the direction of a feature, so its length does not count.
    Distilling features instead of predictions is FitNets' (Romero et al. 2015); without any class,
    it is the semantic-agnostic loss of OpenTrans (Xu et al., CVPR 2024).

    Args:
        found: Pooled [B, C] and dense [B, C, h, w] features of the tower that is trained.
        wanted: Of the dense tower, for the same pictures.
        spreads: What each kind's distance is divided by, see :func:`spread`.
        shares: What each kind counts; their sum is 1. OpenTrans has no pooled output to weigh; half
            and half is ours.

    Returns:
        Scalar; with spreads of 1 in [0, 4]: 0 for equal directions, 2 for orthogonal ones.
    """
    parts = [
        (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() / scale
        for a, b, scale in zip(found, wanted, spreads, strict=True)
    ]
    return torch.stack([s * part for s, part in zip(shares, parts, strict=True)]).sum()


def spread(features: Tensor) -> float:
    """Mean squared distance of features [B, C, ...] from their mean, at least 1e-12."""
    flat = features.transpose(0, 1).flatten(1)
    return max(float((flat - flat.mean(1, keepdim=True)).square().sum(0).mean()), 1e-12)
