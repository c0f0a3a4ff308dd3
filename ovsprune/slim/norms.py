"""Layer norm over a subset of the channels, equal to the dense norm with the others at zero."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ZeroPaddedLayerNorm"]


class ZeroPaddedLayerNorm(nn.LayerNorm):
    """Layer norm whose mean and variance count each removed channel as a zero.

    So the pruned tower equals the dense one whose removed units are masked to zero before the
    norm. With ``k`` of ``n`` channels kept: ``mean = sum(x) / n`` and
    ``var = (sum((x - mean)^2) + (n - k) mean^2) / n``. For k = n it is the plain layer norm.

    Args:
        norm: Layer norm over the last axis; its parameters are shared, not copied.

    Attributes:
        dense_width: n, the number of channels of the dense norm.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.dense_width = int(getattr(norm, "dense_width", norm.normalized_shape[-1]))
        self.training = norm.training

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` [..., k] over its last axis."""
        width = input.shape[-1]
        if width == self.dense_width:
            return F.layer_norm(input, (width,), self.weight, self.bias, self.eps)
        x = input.float()  # squares overflow in half precision
        mean = x.sum(-1, keepdim=True) / self.dense_width  # [..., 1]
        # each of the n - k removed channels is 0 and so deviates by -mean
        removed = (self.dense_width - width) * mean.square()  # [..., 1]
        centred = x - mean  # [..., k]
        variance = (centred.square().sum(-1, keepdim=True) + removed) / self.dense_width
        normal = (centred * (variance + self.eps).rsqrt()).to(input.dtype)  # [..., k]
        scaled = normal if self.weight is None else normal * self.weight
        return scaled if self.bias is None else scaled + self.bias

    def extra_repr(self) -> str:
        """Return kept and dense channels for ``print(model)``."""
        return f"{self.normalized_shape[-1]} of {self.dense_width}, eps={self.eps}"
