"""open_clip's ``TimmModel`` around timm's vision transformers.

SigLIP and SigLIP 2, EVA-01 and EVA-02, PE-Core, MobileCLIP's ViTs, ``vit_medium``, ``vit_relpos``:
whatever is a sequence of blocks of attention and MLP over tokens. ViTamin, too, whose tokens come
from inverted bottlenecks with a norm in front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ovsprune.backbones.open_clip_timm import timm_family
from ovsprune.backbones.timm_heads import heads_seed, put_together
from ovsprune.core.protocols import PrunableLayer, Stages
from ovsprune.core.records import Group, Plan, StreamPoint
from ovsprune.slim.activation import find_activations
from ovsprune.slim.norms import CountedLayerNorm
from ovsprune.slim.spec import ACTIVATIONS
from ovsprune.slim.timm_attention import TimmAttention, is_timm_attention
from ovsprune.slim.timm_vit import (
    POOL,
    pool_of,
    timm_vit_blocks,
    timm_vit_bottlenecks,
    timm_vit_parts,
)

__all__ = ["OpenClipTimmVit"]

_FIRST = ("fc1", "fc1_g", "w0")
"""The first layer of an MLP, by the names that timm gives it; a gate's other half goes along."""


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
        """Whether it is a sequence of blocks with attention and an MLP that we know, over tokens.

        The pooling must be the class token's, a mean, or an attention pool with an MLP. An MLP that
        packs gate and value into one layer (EVA-02's tiny and small) is not known.
        """
        if not hasattr(trunk, "blocks") or not hasattr(trunk, "patch_embed"):
            return False
        tower = nn.ModuleDict({"trunk": trunk})
        blocks = list(timm_vit_blocks(tower).values())
        inside = (*timm_vit_bottlenecks(tower).values(), *blocks)
        known = find_activations(m for block in inside for m in block.modules())
        pool = vision.get("timm_pool") or getattr(trunk, "global_pool", None)
        return (
            all(is_timm_attention(getattr(b, "attn", nn.Identity())) for b in blocks)
            and all(any(hasattr(getattr(b, "mlp", None), n) for n in _FIRST) for b in blocks)
            and not any(_is_packed(b.mlp) for b in blocks)
            and (pool in ("token", "avg") or (pool == "map" and pool_of(tower) is not None))
            and len(known) == 1
            and known <= set(ACTIVATIONS)
        )

    def rewrite(self, tower: nn.Module) -> None:
        """Attention to separate linear maps; inner norms to such as count what will be cut."""
        for block in timm_vit_blocks(tower).values():
            if is_timm_attention(block.attn):
                block.attn = TimmAttention(block.attn, apart=True)
            if isinstance(block.attn.norm, nn.LayerNorm):
                block.attn.norm = CountedLayerNorm(block.attn.norm)
            if isinstance(block.mlp.norm, nn.LayerNorm) and _is_inner(block.mlp):
                block.mlp.norm = CountedLayerNorm(block.mlp.norm)

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Attention in the form that timm gave it, and of timm's type where all heads stay."""
        put_together(timm_vit_blocks(tower).values())

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Bottlenecks' channels, heads and MLP units; the last block's heads are protected."""
        seeds = [
            PrunableLayer(n, "channels", f"{n}.conv1_1x1", 1, n, StreamPoint(n, "output"))
            for n in timm_vit_bottlenecks(tower)
        ]
        blocks = timm_vit_blocks(tower)
        last = list(blocks)[-1]
        for name, block in blocks.items():
            free = _adds_directly(block)
            middle = StreamPoint(f"{name}.norm2", "input") if free else None
            seeds.append(heads_seed(name, block.attn, middle, protected=name == last))
            after = StreamPoint(name, "output") if free else None
            seeds.append(
                PrunableLayer(
                    f"{name}.mlp", "mlp", _first(f"{name}.mlp", block.mlp), 1, name, after
                )
            )
        pool = pool_of(tower)
        if pool is not None:
            seeds.append(
                PrunableLayer(
                    f"{POOL}.mlp",
                    "mlp",
                    _first(f"{POOL}.mlp", pool.mlp),
                    1,
                    POOL,
                    StreamPoint(POOL, "output"),
                )
            )
        return seeds

    def stages(self, tower: nn.Module) -> Stages:
        """Patches and positions, or a stem and what makes tokens of it; the blocks; the rest."""
        return Stages(*timm_vit_parts(tower))


def _first(path: str, mlp: nn.Module) -> str:
    """Dotted name of the layer whose outputs are the units."""
    return next(f"{path}.{name}" for name in _FIRST if hasattr(mlp, name))


def _is_packed(mlp: Any) -> bool:
    """Whether the first layer makes gate and value at once, twice as many as there are units."""
    return hasattr(mlp, "fc1") and mlp.fc1.out_features != mlp.fc2.in_features


def _is_inner(mlp: nn.Module) -> bool:
    """Whether the norm of an MLP comes behind its first layer; ViTamin's comes in front."""
    names = list(mlp._modules)
    return names.index("norm") > min(names.index(name) for name in _FIRST if name in names)


def _adds_directly(block: Any) -> bool:
    """Whether what attention and MLP give is added to the stream as it is."""
    names = list(block._modules)
    behind = names.index("norm1") > names.index("attn")  # post-norm
    scaled = any(getattr(block, name, None) is not None for name in ("gamma_1", "gamma_2"))
    scales = (getattr(block, name, nn.Identity()) for name in ("ls1", "ls2"))
    return not (behind or scaled) and all(isinstance(scale, nn.Identity) for scale in scales)
