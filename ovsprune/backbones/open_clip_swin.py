"""open_clip's ``TimmModel`` around a Swin Transformer (Liu et al., ICCV 2021), the first version.

Cut are heads and MLP units of every block. The biases of relative positions are kept for all heads,
a slim attention takes those of its own. Stage widths, windows, patches, the merging of patches
between the stages, the head's norm and the projection stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil, prod
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones.open_clip_timm import pools_positions, timm_family
from ovsprune.backbones.timm_heads import heads_seed, put_together
from ovsprune.core.protocols import PrunableLayer, Stages
from ovsprune.core.records import Group, Plan, StreamPoint
from ovsprune.slim.activation import find_activations
from ovsprune.slim.bound import bound
from ovsprune.slim.spec import ACTIVATIONS
from ovsprune.slim.timm_attention import TimmAttention, is_timm_attention
from ovsprune.slim.timm_tower import timm_outputs

__all__ = ["OpenClipSwin"]


@timm_family("open_clip-swin")
class OpenClipSwin:
    """timm Swin Transformers in open_clip: heads and MLP units of every block."""

    modules = ("swin_transformer",)

    def takes(self, vision: Mapping[str, Any], trunk: nn.Module) -> bool:
        """Whether it is a Swin Transformer of the first version; the second scales its logits."""
        from timm.models.swin_transformer import SwinTransformer

        if not (isinstance(trunk, SwinTransformer) and pools_positions(vision)):
            return False
        known = find_activations(trunk.modules())
        return len(known) == 1 and known <= set(ACTIVATIONS)

    def rewrite(self, tower: nn.Module) -> None:
        """Attention to separate linear maps that see all windows of a picture at once, in place."""
        for block in _attending(tower).values():
            if is_timm_attention(block.attn):
                block.attn = TimmAttention(block.attn, apart=True, windows=_windows(block))

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Attention in the form that timm gave it, and of timm's type where all heads stay."""
        put_together(_attending(tower).values())

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Heads and MLP units of every block; the last block's heads are protected.

        What attention gives lies window by window, and the stream picture by picture: heads are
        refitted to the attention's own output, the MLP behind it to the stream.
        """
        blocks = _attending(tower)
        last = list(blocks)[-1]
        seeds = []
        for name, block in blocks.items():
            seeds.append(heads_seed(name, block.attn, None, protected=name == last))
            after = StreamPoint(name, "output")
            seeds.append(PrunableLayer(f"{name}.mlp", "mlp", f"{name}.mlp.fc1", 1, name, after))
        return seeds

    def stages(self, tower: nn.Module) -> Stages:
        """Patches; the blocks, and what merges patches between stages; norm, pooling, projection.

        The stream is [B, h, w, C].
        """
        trunk: Any = tower.get_submodule("trunk")
        blocks = {
            name: bound(block, partial(_forward, block)) if hasattr(block, "attn") else block
            for name, block in _blocks(tower).items()
        }

        def head(stream: Tensor) -> tuple[Tensor, Tensor]:
            return timm_outputs(tower, trunk.norm(stream))

        return Stages(trunk.patch_embed, blocks, head)


def _blocks(tower: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, stage in enumerate(tower.get_submodule("trunk.layers").children()):
        if not isinstance(stage.downsample, nn.Identity):
            found[f"trunk.layers.{i}.downsample"] = stage.downsample
        blocks: Any = stage.blocks
        found |= {f"trunk.layers.{i}.blocks.{j}": block for j, block in enumerate(blocks)}
    return found


def _attending(tower: nn.Module) -> dict[str, Any]:
    return {name: block for name, block in _blocks(tower).items() if hasattr(block, "attn")}


def _forward(block: Any, x: Tensor) -> Tensor:
    """A block whose MLP reads the stream as it is, [B, h, w, C], where timm's flattens it."""
    x = x + block._attn(block.norm1(x))
    out: Tensor = x + block.mlp(block.norm2(x))
    return out


def _windows(block: Any) -> int:
    """Windows of one picture at the size that the tower was built for."""
    sizes = zip(block.input_resolution, block.window_size, strict=True)
    return prod(ceil(size / window) for size, window in sizes)
