"""A layer norm over units of which some are cut, equal to the dense one that sees them as zero."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CountedLayerNorm"]


class CountedLayerNorm(nn.LayerNorm):
    """Layer norm whose mean and variance still count the channels that are gone, each as zero.

    So the cut tower equals the dense one whose cut units are masked to zero before the norm. Over
    ``k`` channels that are left of ``n``: ``mean = sum(x) / n`` and
    ``var = (sum((x - mean)^2) + (n - k) mean^2) / n``. Nothing cut, it is the layer norm.

    Args:
        norm: A layer norm over the last axis; its parameters are taken over, not copied.

    Attributes:
        dense_width: n, the channels that the dense norm has.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.dense_width = int(getattr(norm, "dense_width", norm.normalized_shape[-1]))
        self.training = norm.training

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., k], normalised over its last axis."""
        width = input.shape[-1]
        if width == self.dense_width:
            return F.layer_norm(input, (width,), self.weight, self.bias, self.eps)
        x = input.float()
        mean = x.sum(-1, keepdim=True) / self.dense_width
        gone = (self.dense_width - width) * mean.square()
        centred = x - mean
        variance = (centred.square().sum(-1, keepdim=True) + gone) / self.dense_width
        normal = (centred * (variance + self.eps).rsqrt()).to(input.dtype)
        scaled = normal if self.weight is None else normal * self.weight
        return scaled if self.bias is None else scaled + self.bias

    def extra_repr(self) -> str:
        """Kept and dense channels, for ``print(model)``."""
        return f"{self.normalized_shape[-1]} of {self.dense_width}, eps={self.eps}"
