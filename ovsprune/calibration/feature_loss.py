"""The loss that knows no class: how far a tower's features are from the dense tower's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Features", "feature_loss"]

Features = tuple[Tensor, Tensor]
"""Pooled [B, C] and dense [B, C, h, w] outputs of a tower."""


def feature_loss(found: Features, wanted: Features) -> Tensor:
    """Squared distance of L2-normalised features, to be differentiated.

    Half the mean over dense tokens of ``|t / |t| - t* / |t*||^2``, and half the same of the pooled
    output: what a zero-shot head reads is the direction of a feature, so its length does not count.
    Distilling features instead of predictions is FitNets' (Romero et al. 2015); without any class,
    it is the semantic-agnostic loss of OpenTrans (Xu et al., CVPR 2024).

    Args:
        found: Of the tower that is trained.
        wanted: Of the dense tower, for the same pictures.

    Returns:
        Scalar in [0, 4]: 0 for equal directions, 2 for orthogonal ones.
    """
    total = found[0].new_zeros(())
    for one, other in zip(found, wanted, strict=True):
        distance = (F.normalize(one, dim=1) - F.normalize(other, dim=1)).square().sum(1)
        total = total + 0.5 * distance.mean()
    return total
