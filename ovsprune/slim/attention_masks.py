"""Attention masks in every form that ``nn.MultiheadAttention`` accepts, for the kept heads.

Letters: N images, L queries, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ovsprune.core.errors import OptionError

__all__ = ["combine_masks", "gather_heads"]


def combine_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    *,
    batch: int,
    lengths: tuple[int, int],
    num_heads: int,
    kept_heads: Sequence[int],
    is_causal: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Combine masks to one additive mask that broadcasts to [N, kept, L, S], or None.

    Args:
        attn_mask: As in :meth:`ovsprune.slim.attention.SlimAttention.attend`.
        key_padding_mask: [N, S], bool or float.
        batch: N.
        lengths: (L, S).
        num_heads: Heads of the dense module.
        kept_heads: Dense indices of the kept heads.
        is_causal: Mask later keys if there is no ``attn_mask``.
        dtype: Type of the result.
        device: Device of the result.

    Raises:
        OptionError: A mask has an unexpected or ambiguous shape.
    """
    if attn_mask is None and is_causal:
        # true is ignored: the keys after the query's own position
        attn_mask = torch.ones(lengths, dtype=torch.bool, device=device).triu(1)
    mask = None
    if attn_mask is not None:
        if tuple(attn_mask.shape[-2:]) != tuple(lengths):
            raise OptionError(
                f"attn_mask has shape {tuple(attn_mask.shape)}, expected [..., L, S] with "
                f"(L, S) = {tuple(lengths)}"
            )
        mask = _additive(gather_heads(attn_mask, batch, num_heads, kept_heads), dtype, device)
    if key_padding_mask is not None:
        if tuple(key_padding_mask.shape) != (batch, lengths[1]):
            raise OptionError(
                f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, expected "
                f"[N, S] = {(batch, lengths[1])}"
            )
        # [N, 1, 1, S], equal for all heads and queries
        padding = _additive(key_padding_mask, dtype, device)[:, None, None, :]
        mask = padding if mask is None else mask + padding
    return mask


def gather_heads(mask: Tensor, batch: int, num_heads: int, kept_heads: Sequence[int]) -> Tensor:
    """Reshape ``mask`` to [N or 1, kept or 1, L, S], with the rows of the kept heads only.

    Args:
        mask: [L, S], [heads or N * heads, L, S] or [N or 1, heads or 1, L, S].
        batch: N.
        num_heads: Heads of the dense module.
        kept_heads: Dense indices of the kept heads.

    Raises:
        OptionError: The leading axes have an unexpected or ambiguous size.
    """
    kept = len(kept_heads)
    shape = tuple(mask.shape)
    if mask.dim() == 2:
        return mask[None, None]
    if mask.dim() == 3:
        rows = mask.shape[0]
        if rows == batch * num_heads:  # the form of nn.MultiheadAttention takes precedence
            mask = mask.reshape(batch, num_heads, *shape[1:])
        elif rows == batch * kept and rows == num_heads:
            raise OptionError(
                f"attn_mask of shape {shape} can be {num_heads} dense heads or {batch} x {kept} "
                "kept ones; give it with four axes, [N or 1, heads, L, S]"
            )
        elif rows == batch * kept:
            mask = mask.reshape(batch, kept, *shape[1:])
        elif rows == num_heads:
            mask = mask[None]
        else:
            raise OptionError(
                f"attn_mask has shape {shape}, expected {batch * num_heads} (N * dense heads), "
                f"{batch * kept} (N * kept heads) or {num_heads} rows for N = {batch}"
            )
    if mask.dim() != 4 or mask.shape[0] not in (1, batch):
        raise OptionError(f"attn_mask has shape {shape}, expected two, three or four axes")
    if mask.shape[1] == num_heads and kept != num_heads:
        index = torch.as_tensor(list(kept_heads), dtype=torch.int64, device=mask.device)
        return mask.index_select(1, index)
    if mask.shape[1] not in (1, kept):
        raise OptionError(
            f"attn_mask has shape {shape}: {mask.shape[1]} heads on its second axis, expected "
            f"{num_heads}, {kept} or 1"
        )
    return mask


def _additive(mask: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a mask to add to the logits; true entries of a bool mask become -inf."""
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=dtype, device=device)
        return zeros.masked_fill(mask.to(device), float("-inf"))
    if not mask.is_floating_point():
        raise OptionError(f"a mask must be bool or float, given {mask.dtype}")
    return mask.to(dtype=dtype, device=device)
