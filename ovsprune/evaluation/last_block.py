"""Training-free dense features: variants of the attention in CLIP's last block.

CLIP's last block is trained to collect the image in the class token. If tokens attend to similar
tokens instead, the dense features are sharper, without any training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.core.protocols import Backbone
from ovsprune.slim.attention import SlimAttention
from ovsprune.slim.dense import is_batch_first, projections_of, refuse_extras

__all__ = ["VARIANTS", "Variant", "attend", "dense_with"]


@dataclass(frozen=True)
class Variant:
    """Variant of the last block.

    Attributes:
        pairs: Products that give the attention weights (``"qk"``, ``"qq"``, ``"kk"``, ``"vv"``);
            the weights of several are added. Empty: every token attends to itself only.
        residual: True if the residual connection and the MLP are kept; False if the output of the
            attention alone is projected.
    """

    pairs: tuple[str, ...]
    residual: bool = True


VARIANTS: Mapping[str, Variant] = {
    "qk": Variant(("qk",)),  # as trained
    "qq": Variant(("qq",)),
    "kk": Variant(("kk",)),
    "vv": Variant(("vv",)),
    "maskclip": Variant(()),  # MaskCLIP (Zhou et al., ECCV 2022, arXiv 2112.01071)
    "sclip": Variant(("qq", "kk")),  # SCLIP (Wang et al., ECCV 2024, arXiv 2312.01597)
    # ClearCLIP (Lan et al., ECCV 2024, arXiv 2407.12442)
    "clearclip": Variant(("qq",), residual=False),
}
"""Variants by their name in ``--last-block``."""


def attend(attention: nn.Module, tokens: Tensor, pairs: tuple[str, ...]) -> Tensor:
    """Return the output of an attention with other weights than queries times keys.

    Args:
        attention: ``nn.MultiheadAttention``, a module with its parameters, or a slim attention.
        tokens: Input of the attention after its norm, [B, N, E].
        pairs: See :attr:`Variant.pairs`.

    Returns:
        [B, N, E].

    Raises:
        TargetError: The type of ``attention`` is not supported.
    """
    refuse_extras(attention)
    slim = isinstance(attention, SlimAttention)
    heads = len(attention.kept_heads) if slim else int(attention.num_heads)  # type: ignore[arg-type]
    maps = projections_of(attention, heads)
    part: dict[str, Tensor] = {}  # q, k, v as [B, heads, N, head_dim]
    for name, weight, bias in zip("qkv", maps.weights, maps.biases, strict=True):
        shape = (*tokens.shape[:2], heads, len(weight) // max(heads, 1))
        part[name] = nn.functional.linear(tokens, weight, bias).view(shape).transpose(1, 2)
    # Every product has its own softmax over the tokens; the outputs are added.
    mixed = torch.zeros_like(part["v"]) if pairs else part["v"]
    for left, right in map(tuple, pairs) if heads else ():
        mixed = mixed + nn.functional.scaled_dot_product_attention(
            part[left], part[right], part["v"]
        )
    mixed = mixed.transpose(1, 2).flatten(2)  # [B, N, heads * head_dim]
    return nn.functional.linear(mixed, maps.columns, maps.out_bias)


def dense_with(backbone: Backbone, name: str) -> Callable[[Tensor], Tensor]:
    """Return a function of images [B, 3, H, W] that computes dense features [B, C, h, w].

    Args:
        backbone: A vision transformer with a plain last block (norm, attention, norm, MLP).
        name: Variant of the last block, a name in :data:`VARIANTS`.

    Raises:
        OptionError: The variant is unknown, or the tower has no such block.
    """
    if name not in VARIANTS:
        raise OptionError(f"--last-block {name!r} is unknown; known: {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    stages = backbone.stages(backbone.tower)
    *front, last = stages.blocks.values()
    block: Any = last  # the attributes of open_clip's ResidualAttentionBlock are needed
    missing = [n for n in ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2") if not hasattr(block, n)]
    if missing:
        raise OptionError(
            f"--last-block {name}: {backbone.name} belongs to the family {backbone.family}, whose "
            f"last block has no {' and no '.join(missing)}; omit the option"
        )
    try:
        projections_of(block.attn, 1)  # for its error, before any image is read
        refuse_extras(block.attn)
    except TargetError as error:
        raise OptionError(f"--last-block {name}: {error}") from error
    if not is_batch_first(block.attn):
        raise OptionError(
            f"--last-block {name} needs blocks with input [batch, tokens, channels]; this version "
            "of open_clip (2.24 or before) has the tokens first; install a newer one"
        )

    def dense(images: Tensor) -> Tensor:
        x = stages.stem(images)  # [B, N, E]
        for previous in front:
            x = previous(x)
        y: Tensor = block.ls_1(attend(block.attn, block.ln_1(x), variant.pairs))  # [B, N, E]
        if variant.residual:
            y = x + y
            y = y + block.ls_2(block.mlp(block.ln_2(y)))
        return stages.head(y)[1]  # [B, C, h, w]

    return dense
