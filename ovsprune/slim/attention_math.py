"""Projection and scaled dot-product attention over some heads, as functions of tensors.

Letters: N images, L queries, S keys, E the width of the residual stream, h kept heads,
d channels per head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ovsprune.core.errors import OptionError

__all__ = ["attend_heads", "check_inputs", "project_separately", "split_heads"]


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, *, embed_dim: int, batch_first: bool
) -> None:
    """Check the shapes of the inputs of an attention.

    Args:
        query: [N, L, E], or [L, N, E] if not ``batch_first``.
        key: [N, S, E], or [S, N, E].
        value: [N, S, E], or [S, N, E].
        embed_dim: E.
        batch_first: True if the first axis counts images.

    Raises:
        OptionError: An input has no batch axis or another width.
    """
    order = "[N, L, E]" if batch_first else "[L, N, E]"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 3 or x.shape[-1] != embed_dim:
            raise OptionError(
                f"{name} has shape {tuple(x.shape)}, expected {order} with E = {embed_dim}; "
                "add the batch axis to an unbatched input"
            )


def project_separately(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Project query, key and value, each with its own weight.

    Args:
        inputs: Query, key and value, each [..., E].
        weights: W_q, W_k and W_v, each [h * d, E].
        biases: Their biases, each [h * d] or None.

    Returns:
        Three tensors [..., h * d].
    """
    return tuple(F.linear(x, W, b) for x, W, b in zip(inputs, weights, biases, strict=True))


def split_heads(x: Tensor, heads: int, head_dim: int, *, batch_first: bool) -> Tensor:
    """Reshape a projection to one matrix per head.

    Args:
        x: [N, L, h * d], or [L, N, h * d] if not ``batch_first``.
        heads: h.
        head_dim: d.
        batch_first: True if the first axis counts images.

    Returns:
        [N, h, L, d].
    """
    x = x if batch_first else x.transpose(0, 1)  # [N, L, h * d]
    return x.reshape(*x.shape[:2], heads, head_dim).transpose(1, 2)  # [N, h, L, d]


def attend_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    dropout: float,
    need_weights: bool,
    average_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute softmax(scale * q k^T + mask) v for each head.

    Source: Vaswani et al., Attention is all you need, NeurIPS 2017, equation 1.

    Args:
        q: [N, h, L, d].
        k: [N, h, S, d].
        v: [N, h, S, d].
        mask: Added to the logits; broadcasts to [N, h, L, S].
        scale: 1 / sqrt(d), as a Python number, so that an exporter records a constant.
        dropout: Probability of dropping an attention weight.
        need_weights: Also return the attention weights. The fused kernel does not give them, so
            this is slower.
        average_weights: Return the mean of the weights over the heads.

    Returns:
        [N, h, L, d], and the weights [N, L, S] or [N, h, L, S], or None.
    """
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
    logits = (q * scale) @ k.transpose(-2, -1)  # [N, h, L, S]
    weights = (logits if mask is None else logits + mask).softmax(dim=-1)
    weights = F.dropout(weights, dropout) if dropout else weights
    x = weights.to(v.dtype) @ v  # [N, h, L, d]
    return x, weights.mean(dim=1) if average_weights else weights
