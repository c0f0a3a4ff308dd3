"""open_clip's VisionTransformer, and the CLIP around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones.layers import heads_layer, mlp_layer
from ovsprune.backbones.open_clip_build import load_clip, names_of, rebuild_clip
from ovsprune.backbones.open_clip_source import TINY
from ovsprune.backbones.registry import FAMILIES
from ovsprune.core.protocols import Backbone, PrunableLayer, Stages
from ovsprune.core.records import DenseModel, Group, Plan, StreamPoint
from ovsprune.graph.attention import SeparateAttention
from ovsprune.slim import SlimAttention
from ovsprune.slim.pooling import pool_each_position

__all__ = ["OpenClipVit"]


@FAMILIES.register("open_clip-vit")
class OpenClipVit:
    """open_clip VisionTransformer: heads and MLP units of every block."""

    library = "open_clip_torch"

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Return True if open_clip builds a supported VisionTransformer from ``config``."""
        vision = config["vision_cfg"]
        return (
            isinstance(vision.get("layers", 12), int)
            and not vision.get("timm_model_name")
            # "parallel" and "cascade" pooling (two poolers) are untested: no model of open_clip's
            # list has them.
            and not isinstance(vision.get("attentional_pool"), str)
            and not vision.get("block_type")
            and not any(key.startswith("scale_") or key == "qk_norm" for key in vision)
        )

    def names(self) -> Sequence[str]:
        """Return ``tiny`` and open_clip's names of VisionTransformers."""
        return (TINY, *names_of("open_clip-vit"))

    def load(self, name: str, pretrained: str | None, activation: str | None) -> Backbone:
        """Build the CLIP and load its weights."""
        return load_clip("open_clip-vit", name, pretrained, activation)

    def build(self, dense: DenseModel) -> Backbone:
        """Build the dense CLIP, with random weights in its image tower."""
        return rebuild_clip("open_clip-vit", dense)

    def rewrite(self, tower: nn.Module) -> None:
        """Split the attention of every block, slim or not, into separate linear maps, in place."""
        for block in _blocks(tower).values():
            if isinstance(block.attn, (nn.MultiheadAttention, SlimAttention)):
                block.attn = SeparateAttention(block.attn)

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Replace rewritten attention by slim attention, or by torch's if no head was cut."""
        for name, block in _blocks(tower).items():
            if isinstance(block.attn, SeparateAttention):
                block.attn = block.attn.finished(plan.kept.get(f"{name}.attn"))

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Return heads and MLP units of every block; the last block's heads are protected."""
        blocks = _blocks(tower)
        last = list(blocks)[-1]
        layers = []
        for name, block in blocks.items():
            # With a layer scale, the stream is no target for a refit of the layer before it.
            scaled = not isinstance(block.ls_1, nn.Identity)
            middle = None if scaled else StreamPoint(f"{name}.ln_2", "input")
            after = None if scaled else StreamPoint(name, "output")
            path, width = f"{name}.attn", block.attn.head_dim
            layers.append(heads_layer(name, path, width, middle, last=name == last))
            layers.append(mlp_layer(name, block.mlp, after))
        return layers

    def stages(self, tower: nn.Module) -> Stages:
        """Return patches and positions; residual blocks; pooling and projection.

        The dense output of a patch is ``ln_post`` and ``proj`` of its token, as for the class token
        (MaskCLIP, Zhou, Loy and Dai, ECCV 2022). With an attention pool, the token first passes
        through the pool's value and output projections.
        """
        vit: Any = tower

        def head(stream: Tensor) -> tuple[Tensor, Tensor]:
            pooled, tokens = vit._pool(stream)  # [B, E], [B, h * w, E]
            if vit.attn_pool is not None:
                tokens = vit.ln_post(pool_each_position(vit.attn_pool, stream[:, 1:]))
            elif vit.final_ln_after_pool:
                tokens = vit.ln_post(tokens)
            dense = (tokens @ vit.proj).transpose(1, 2)  # [B, C, h * w]
            return pooled @ vit.proj, dense.unflatten(2, tuple(vit.grid_size))

        return Stages(vit._embeds, _blocks(tower), head)


def _blocks(tower: nn.Module) -> dict[str, Any]:
    blocks = tower.get_submodule("transformer.resblocks")
    return {f"transformer.resblocks.{i}": block for i, block in blocks.named_children()}
