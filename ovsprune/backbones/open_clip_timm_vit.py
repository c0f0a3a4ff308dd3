"""open_clip's ``TimmModel`` around timm's vision transformers.

This includes SigLIP and SigLIP 2, EVA-01 and EVA-02, PE-Core, MobileCLIP's ViTs, ``vit_medium`` and
``vit_relpos``: each is a sequence of blocks of attention and MLP over tokens. It also includes
ViTamin, whose tokens come from inverted bottlenecks (Chen et al., CVPR 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ovsprune.backbones.layers import (
    channels_layer,
    has_one_activation,
    mlp_layer,
    restore_attention,
    timm_heads_layer,
)
from ovsprune.backbones.open_clip_timm import timm_family
from ovsprune.core.protocols import PrunableLayer, Stages
from ovsprune.core.records import Group, Plan, StreamPoint
from ovsprune.slim.norms import ZeroPaddedLayerNorm
from ovsprune.slim.timm_attention import TimmAttention, is_timm_attention
from ovsprune.slim.timm_vit import (
    ATTENTION_POOL,
    attention_pool,
    timm_vit_blocks,
    timm_vit_bottlenecks,
    timm_vit_parts,
)

__all__ = ["OpenClipTimmVit"]

_FIRST = ("fc1", "fc1_g", "w0")
"""Names in timm of the first layer of an MLP."""


@timm_family("open_clip-timm-vit")
class OpenClipTimmVit:
    """timm vision transformers in open_clip: heads, MLP units, ViTamin's inverted bottlenecks."""

    modules = (
        "vision_transformer",
        "vision_transformer_hybrid",
        "vision_transformer_relpos",
        "eva",
        "vitamin",
    )

    def takes(self, vision: Mapping[str, Any], trunk: nn.Module) -> bool:
        """Return True for a sequence of blocks with supported attention and MLP over tokens.

        The pooling must be the class token, a mean, or an attention pool with an MLP.
        """
        if not hasattr(trunk, "blocks") or not hasattr(trunk, "patch_embed"):
            return False
        tower = nn.ModuleDict({"trunk": trunk})
        blocks = list(timm_vit_blocks(tower).values())
        prunable = (*timm_vit_bottlenecks(tower).values(), *blocks)
        pool = vision.get("timm_pool") or getattr(trunk, "global_pool", None)
        return (
            all(is_timm_attention(getattr(b, "attn", nn.Identity())) for b in blocks)
            and all(any(hasattr(getattr(b, "mlp", None), n) for n in _FIRST) for b in blocks)
            and not any(_is_packed(b.mlp) for b in blocks)
            and (pool in ("token", "avg") or (pool == "map" and attention_pool(tower) is not None))
            and has_one_activation(m for block in prunable for m in block.modules())
        )

    def rewrite(self, tower: nn.Module) -> None:
        """Split fused attention, and replace norms over units, in place."""
        for block in timm_vit_blocks(tower).values():
            if is_timm_attention(block.attn):
                block.attn = TimmAttention(block.attn, separate_qkv=True)
            # A norm between units and consumer must count removed units as zeros, or the cut tower
            # would differ from the masked one.
            if isinstance(block.attn.norm, nn.LayerNorm):
                block.attn.norm = ZeroPaddedLayerNorm(block.attn.norm)
            if isinstance(block.mlp.norm, nn.LayerNorm) and _is_inner(block.mlp):
                block.mlp.norm = ZeroPaddedLayerNorm(block.mlp.norm)

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Join the projections of the attention again; it is timm's class if no head was cut."""
        restore_attention(timm_vit_blocks(tower).values())

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Return bottleneck channels, heads and MLP units; the last block's heads are protected."""
        layers = [
            channels_layer(name, name, f"{name}.conv1_1x1", StreamPoint(name, "output"))
            for name in timm_vit_bottlenecks(tower)
        ]
        blocks = timm_vit_blocks(tower)
        last = list(blocks)[-1]
        for name, block in blocks.items():
            direct = _adds_directly(block)
            middle = StreamPoint(f"{name}.norm2", "input") if direct else None
            after = StreamPoint(name, "output") if direct else None
            path, is_last = f"{name}.attn", name == last
            layers.append(timm_heads_layer(name, path, block.attn, middle, last=is_last))
            layers.append(mlp_layer(name, block.mlp, after))
        pool = attention_pool(tower)
        if pool is not None:
            after = StreamPoint(ATTENTION_POOL, "output")
            layers.append(mlp_layer(ATTENTION_POOL, pool.mlp, after))
        return layers

    def stages(self, tower: nn.Module) -> Stages:
        """Return the parts of :func:`ovsprune.slim.timm_vit.timm_vit_parts`."""
        return Stages(*timm_vit_parts(tower))


def _is_packed(mlp: Any) -> bool:
    """Return True if one layer computes gate and value (EVA-02 tiny and small): no units to cut."""
    return hasattr(mlp, "fc1") and mlp.fc1.out_features != mlp.fc2.in_features


def _is_inner(mlp: nn.Module) -> bool:
    """Return True if the norm of an MLP follows its first layer; in ViTamin it precedes it."""
    names = list(mlp._modules)
    return names.index("norm") > min(names.index(name) for name in _FIRST if name in names)


def _adds_directly(block: Any) -> bool:
    """Return True if the outputs of attention and MLP are added to the stream unchanged.

    With a norm or a scale in between, the stream is no target for a refit.
    """
    names = list(block._modules)
    is_post_norm = names.index("norm1") > names.index("attn")
    is_scaled = any(getattr(block, name, None) is not None for name in ("gamma_1", "gamma_2"))
    scales = (getattr(block, name, nn.Identity()) for name in ("ls1", "ls2"))
    return not (is_post_norm or is_scaled) and all(isinstance(s, nn.Identity) for s in scales)
