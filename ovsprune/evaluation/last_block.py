"""Training-free dense features: what the tokens of the last block attend to, and what is added.

CLIP's last block is trained to gather the picture into the class token. Where tokens attend to
those like themselves instead, the dense output is sharper, and nothing is trained for it.
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
    """How the last block is read.

    Attributes:
        pairs: What is compared with what (``"qk"``, ``"qq"``, ``"kk"``, ``"vv"``); the attention
            weights of several are added. None: every token sees itself alone.
        whole: Whether the stream is added and the MLP follows, as trained; else the attention's
            output is all that the head reads.
        source: Where it comes from.
    """

    pairs: tuple[str, ...]
    whole: bool
    source: str


VARIANTS: Mapping[str, Variant] = {
    "qk": Variant(("qk",), True, "as trained"),
    "qq": Variant(("qq",), True, "queries with queries"),
    "kk": Variant(("kk",), True, "keys with keys"),
    "vv": Variant(("vv",), True, "values with values"),
    "maskclip": Variant((), True, "MaskCLIP (Zhou et al., ECCV 2022, arXiv 2112.01071)"),
    "sclip": Variant(("qq", "kk"), True, "SCLIP (Wang et al., ECCV 2024, arXiv 2312.01597)"),
    "clearclip": Variant(("qq",), False, "ClearCLIP (Lan et al., ECCV 2024, arXiv 2407.12442)"),
}
"""Variants by the name that ``--last-block`` takes."""


def attend(attention: nn.Module, tokens: Tensor, pairs: tuple[str, ...]) -> Tensor:
    """The output of an attention that compares other things than queries with keys.

    Args:
        attention: ``nn.MultiheadAttention``, a module with its parameters, or a slim one, whose
            kept heads attend.
        tokens: Stream behind the norm, [B, N, E].
        pairs: As :attr:`Variant.pairs`.

    Returns:
        [B, N, E].

    Raises:
        TargetError: ``attention`` is no attention that is known.
    """
    refuse_extras(attention)
    slim = isinstance(attention, SlimAttention)
    heads = len(attention.kept_heads) if slim else int(attention.num_heads)  # type: ignore[arg-type]
    maps = projections_of(attention, heads)
    part: dict[str, Tensor] = {}
    for name, weight, bias in zip("qkv", maps.weights, maps.biases, strict=True):
        shape = (*tokens.shape[:2], heads, len(weight) // max(heads, 1))
        part[name] = nn.functional.linear(tokens, weight, bias).view(shape).transpose(1, 2)
    mixed = torch.zeros_like(part["v"]) if pairs else part["v"]
    for one, other in map(tuple, pairs) if heads else ():
        mixed = mixed + nn.functional.scaled_dot_product_attention(
            part[one], part[other], part["v"]
        )
    return nn.functional.linear(mixed.transpose(1, 2).flatten(2), maps.columns, maps.out_bias)


def dense_with(backbone: Backbone, name: str) -> Callable[[Tensor], Tensor]:
    """Pictures [B, 3, H, W] to projected dense tokens [B, C, h, w], the last block read as asked.

    Args:
        backbone: Of a vision transformer with a plain last block (norm, attention, norm, MLP).
        name: Of :data:`VARIANTS`.

    Raises:
        OptionError: The variant is unknown, or the tower has no such block.
    """
    if name not in VARIANTS:
        raise OptionError(f"--last-block {name!r} is unknown; known: {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    stages = backbone.stages(backbone.tower)
    *front, last = stages.blocks.values()
    block: Any = last
    missing = [n for n in ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2") if not hasattr(block, n)]
    if missing:
        raise OptionError(
            f"--last-block {name}: {backbone.name} is of the family {backbone.family}, whose last "
            f"block has no {' and no '.join(missing)}; leave the option out"
        )
    try:
        projections_of(block.attn, 1)
        refuse_extras(block.attn)
    except TargetError as error:
        raise OptionError(f"--last-block {name}: {error}") from error
    if not is_batch_first(block.attn):
        raise OptionError(
            f"--last-block {name} needs blocks that read [batch, tokens, channels]; this version "
            "of open_clip has the tokens first (2.24 and before); take a newer one"
        )

    def dense(images: Tensor) -> Tensor:
        stream = stages.stem(images)
        for earlier in front:
            stream = earlier(stream)
        seen: Tensor = block.ls_1(attend(block.attn, block.ln_1(stream), variant.pairs))
        if variant.whole:
            seen = stream + seen
            seen = seen + block.ls_2(block.mlp(block.ln_2(seen)))
        return stages.head(seen)[1]

    return dense
