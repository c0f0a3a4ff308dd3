"""open_clip's ``TimmModel`` around a Swin Transformer (Liu et al., ICCV 2021), the first version.

The units are heads and MLP units of every block. The table of relative position biases keeps the
columns of all heads, and a slim attention selects those of its heads. The widths of the stages,
windows, patches, the merging of patches between the stages, the norm of the head and the projection
are not pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil, prod
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones.layers import (
    has_one_activation,
    mlp_layer,
    restore_attention,
    stage_blocks,
    timm_heads_layer,
)
from ovsprune.backbones.open_clip_timm import pools_positions, timm_family
from ovsprune.core.protocols import PrunableLayer, Stages
from ovsprune.core.records import Group, Plan, StreamPoint
from ovsprune.slim.forwards import with_forward
from ovsprune.slim.timm_attention import TimmAttention, is_timm_attention
from ovsprune.slim.timm_tower import timm_head_outputs

__all__ = ["OpenClipSwin"]

_STAGES = "trunk.layers"


@timm_family("open_clip-swin")
class OpenClipSwin:
    """timm Swin Transformers in open_clip: heads and MLP units of every block."""

    modules = ("swin_transformer",)

    def takes(self, vision: Mapping[str, Any], trunk: nn.Module) -> bool:
        """Return True for the first version; the second uses cosine attention."""
        from timm.models.swin_transformer import SwinTransformer

        supported = isinstance(trunk, SwinTransformer) and pools_positions(vision)
        return supported and has_one_activation(trunk.modules())

    def rewrite(self, tower: nn.Module) -> None:
        """Split fused attention into separate linear maps, in place."""
        # A layer must see all windows of an image in one row of the batch, because calibration
        # counts and subsamples rows by image.
        for block in _attention_blocks(tower).values():
            if is_timm_attention(block.attn):
                block.attn = TimmAttention(
                    block.attn, separate_qkv=True, windows_per_image=_windows(block)
                )

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Join the projections of the attention again; it is timm's class if no head was cut."""
        restore_attention(_attention_blocks(tower).values())

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Return heads and MLP units of every block; the heads of the last block are protected."""
        blocks = _attention_blocks(tower)
        last = list(blocks)[-1]
        layers = []
        for name, block in blocks.items():
            # The attention orders its output by window, the stream by position in the image.
            # Heads are therefore refitted to the output of the attention, not to the stream.
            path, is_last = f"{name}.attn", name == last
            layers.append(timm_heads_layer(name, path, block.attn, None, last=is_last))
            layers.append(mlp_layer(name, block.mlp, StreamPoint(name, "output")))
        return layers

    def stages(self, tower: nn.Module) -> Stages:
        """Return patches; blocks and patch merging on [B, h, w, C]; norm, pooling, projection."""
        trunk: Any = tower.get_submodule("trunk")
        blocks = {
            name: with_forward(block, partial(_forward, block)) if hasattr(block, "attn") else block
            for name, block in stage_blocks(tower, _STAGES).items()
        }

        def head(stream: Tensor) -> tuple[Tensor, Tensor]:
            return timm_head_outputs(tower, trunk.norm(stream))  # stream [B, h, w, C]

        return Stages(trunk.patch_embed, blocks, head)


def _attention_blocks(tower: nn.Module) -> dict[str, Any]:
    blocks = stage_blocks(tower, _STAGES)
    return {name: block for name, block in blocks.items() if hasattr(block, "attn")}


def _forward(block: Any, x: Tensor) -> Tensor:
    """Apply a block without the flattening to [B, h * w, C] in timm's forward."""
    x = x + block._attn(block.norm1(x))  # [B, h, w, C]
    out: Tensor = x + block.mlp(block.norm2(x))
    return out


def _windows(block: Any) -> int:
    """Return the number of windows of one image of the native size."""
    sizes = zip(block.input_resolution, block.window_size, strict=True)
    return prod(ceil(size / window) for size, window in sizes)
