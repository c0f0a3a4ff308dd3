"""What families of timm's transformers share: heads as seeds, and attention put together again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ovsprune.core.protocols import PrunableLayer
from ovsprune.core.records import Slice, StreamPoint
from ovsprune.slim.timm_attention import TimmAttention

__all__ = ["heads_seed", "put_together"]


def put_together(blocks: Iterable[Any]) -> None:
    """Attention in the form that timm gave it, and of timm's type where all heads stay, in place.

    Args:
        blocks: Their ``attn`` is apart, or as timm has it.
    """
    for block in blocks:
        if isinstance(block.attn, TimmAttention):
            now = block.attn
            block.attn = TimmAttention(now) if now.is_cut else now.whole()


def heads_seed(
    block: str, attention: Any, stream: StreamPoint | None, *, protected: bool
) -> PrunableLayer:
    """The heads of a block.

    Args:
        block: Dotted name; the attention is its ``attn``.
        attention: That, apart or as timm has it.
        stream: Where the residual stream is read after the out projection, or None.
        protected: Whether it is the tower's last block.
    """
    name = f"{block}.attn"
    count = len(getattr(attention, "kept_heads", range(attention.num_heads)))
    width = getattr(attention, "head_dim", 0) or attention.proj.in_features // count
    index = Slice(f"{name}.heads", "out", torch.arange(count).unsqueeze(1))
    reason = "frameworks read the last block's attention directly" if protected else None
    return PrunableLayer(
        name, "heads", f"{name}.q_proj", width, block, stream, reason, extra_slices=(index,)
    )
