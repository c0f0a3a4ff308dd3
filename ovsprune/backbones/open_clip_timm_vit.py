"""open_clip's ``TimmModel`` around timm's vision transformers.

SigLIP and SigLIP 2, EVA-01 and EVA-02, PE-Core, MobileCLIP's ViTs, ``vit_medium``, ``vit_relpos``:
whatever is a sequence of blocks of attention and MLP over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ovsprune.backbones.open_clip_timm import timm_family
from ovsprune.core.protocols import Seed, Stages
from ovsprune.core.records import Group, Plan, Slice, StreamPoint
from ovsprune.slim.activation import find_activations
from ovsprune.slim.norms import CountedLayerNorm
from ovsprune.slim.spec import ACTIVATIONS
from ovsprune.slim.timm_attention import TimmAttention, is_timm_attention
from ovsprune.slim.timm_vit import POOL, pool_of, timm_vit_blocks, timm_vit_parts

__all__ = ["OpenClipTimmVit"]

_FIRST = ("fc1", "fc1_g")
"""The first layer of an MLP, by the names that timm gives it; a gate's other half goes along."""


@timm_family("open_clip-timm-vit")
class OpenClipTimmVit:
    """timm vision transformers in open_clip: heads and MLP units, the attention pool's MLP."""

    modules = (
        "vision_transformer",
        "vision_transformer_hybrid",
        "vision_transformer_relpos",
        "eva",
    )

    def takes(self, vision: Mapping[str, Any], trunk: nn.Module) -> bool:
        """Whether it is a sequence of blocks with attention and an MLP that we know, over tokens.

        The pooling must be the class token's, a mean, or an attention pool with an MLP.
        """
        if not hasattr(trunk, "blocks") or not hasattr(trunk, "patch_embed"):
            return False
        tower = nn.ModuleDict({"trunk": trunk})
        blocks = list(timm_vit_blocks(tower).values())
        known = find_activations(m for block in blocks for m in block.modules())
        pool = vision.get("timm_pool") or trunk.global_pool
        return (
            all(is_timm_attention(getattr(b, "attn", nn.Identity())) for b in blocks)
            and all(any(hasattr(getattr(b, "mlp", None), n) for n in _FIRST) for b in blocks)
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
            if isinstance(block.mlp.norm, nn.LayerNorm):
                block.mlp.norm = CountedLayerNorm(block.mlp.norm)

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Attention in the form that timm gave it, and of timm's type where all heads stay."""
        for block in timm_vit_blocks(tower).values():
            if isinstance(block.attn, TimmAttention):
                cut = len(block.attn.kept_heads) < block.attn.num_heads
                block.attn = TimmAttention(block.attn) if cut else block.attn.whole()

    def seeds(self, tower: nn.Module) -> list[Seed]:
        """Heads and MLP units of every block; the last block's heads are protected."""
        blocks = timm_vit_blocks(tower)
        last = list(blocks)[-1]
        seeds = []
        for name, block in blocks.items():
            reason = "frameworks read the last block's attention directly" if name == last else None
            free = _adds_directly(block)
            heads = Slice(
                f"{name}.attn.heads", "out", torch.arange(block.attn.num_heads).unsqueeze(1)
            )
            seeds.append(
                Seed(
                    f"{name}.attn",
                    "heads",
                    f"{name}.attn.q_proj",
                    block.attn.head_dim,
                    name,
                    StreamPoint(f"{name}.norm2", "input") if free else None,
                    reason,
                    along=(heads,),
                )
            )
            after = StreamPoint(name, "output") if free else None
            seeds.append(
                Seed(f"{name}.mlp", "mlp", _first(f"{name}.mlp", block.mlp), 1, name, after)
            )
        pool = pool_of(tower)
        if pool is not None:
            seeds.append(
                Seed(
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
        """Patches and positions; the blocks, the attention pool as the last; the rest."""
        return Stages(*timm_vit_parts(tower))


def _first(path: str, mlp: nn.Module) -> str:
    """Dotted name of the layer whose outputs are the units."""
    return next(f"{path}.{name}" for name in _FIRST if hasattr(mlp, name))


def _adds_directly(block: Any) -> bool:
    """Whether what attention and MLP give is added to the stream as it is."""
    names = list(block._modules)
    behind = names.index("norm1") > names.index("attn")  # post-norm
    scaled = any(getattr(block, name, None) is not None for name in ("gamma_1", "gamma_2"))
    scales = (getattr(block, name, nn.Identity()) for name in ("ls1", "ls2"))
    return not (behind or scaled) and all(isinstance(scale, nn.Identity) for scale in scales)
