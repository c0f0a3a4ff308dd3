"""Directions inside heads: a change of basis after which those that matter least come last.

The logits of a head depend on its queries and keys only by their product, and its output on its
values and its part of the out projection only by theirs. So with any invertible T the head is the
same with ``q' = T q`` and ``k' = T^-T k``, or with ``v' = T v`` and ``W_out' = W_out T^-1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dual", "scaled", "turned"]


def scaled(query: Tensor, head_dim: int) -> Tensor:
    """``query`` [..., width] such that the usual ``width^-0.5`` makes it ``head_dim^-0.5``.

    Logits keep the scale of the dense head when directions of it are cut. (The argument ``scale``
    of torch's attention is younger than the oldest torch that this room works with.)
    """
    width = query.shape[-1]
    return query if width == head_dim else query * (width / head_dim) ** 0.5


def turned(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows of each head in another basis, computed in float64.

    Args:
        rows: [heads * d, ...]: a projection's weight or bias; of an out projection, its transpose.
        basis: T [heads, d, d].

    Returns:
        ``T`` times the rows of each head, in the shape and type of ``rows``.

    Example:
        >>> import torch
        >>> turned(torch.tensor([1.0, 2.0]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])).tolist()
        [2.0, 1.0]
    """
    heads, width, _ = basis.shape
    split = rows.detach().double().reshape(heads, width, -1)
    return (basis.double().to(rows.device) @ split).reshape(rows.shape).to(rows.dtype)


def dual(basis: Tensor) -> Tensor:
    """``T^-T`` [heads, d, d] of T, in float64: what keys and the out projection are turned by."""
    inverse: Tensor = torch.linalg.inv(basis.double())
    return inverse.transpose(-2, -1)
