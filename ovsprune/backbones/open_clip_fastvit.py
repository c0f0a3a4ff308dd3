"""open_clip's ``TimmModel`` around a FastViT: the image towers of MobileCLIP and MobileCLIP 2.

The units are the hidden channels of each block's MLP (``fc1``, activation, ``fc2``: 1x1
convolutions after a depthwise one) and the heads of the attention blocks of the last stages.

The other blocks mix positions by depthwise convolutions in several branches (RepMixer, MobileOne).
They have no inner channels and are not pruned. They keep their branches; timm's
``reparameterize_model`` merges them in the slim tower as in the dense one. The widths of the
stages, the stem, downsampling, positions, and the last convolution with its squeeze-and-excitation
are not pruned either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones.layers import (
    has_one_activation,
    kept_columns,
    mlp_blocks,
    mlp_layer,
    restore_attention,
    stage_blocks,
    timm_heads_layer,
)
from ovsprune.backbones.open_clip_timm import pools_positions, timm_family
from ovsprune.core.protocols import PrunableLayer, Stages
from ovsprune.core.records import Group, Plan, StreamPoint
from ovsprune.graph.scales import FoldedScale, fold_scale, unfold_scale
from ovsprune.slim.timm_attention import TimmAttention, is_timm_attention
from ovsprune.slim.timm_tower import timm_head_outputs

__all__ = ["OpenClipFastVit"]

_SCALES = (
    ("layer_scale", "mlp", "fc2"),
    ("layer_scale_1", "token_mixer", "proj"),
    ("layer_scale_2", "mlp", "fc2"),
)
"""Layer scales that a block may have, each with the module and the layer in it that it scales."""


@timm_family("open_clip-fastvit")
class OpenClipFastVit:
    """timm FastViT in open_clip: MLP units of every block, heads of the attention blocks."""

    modules = ("fastvit",)

    def takes(self, vision: Mapping[str, Any], trunk: nn.Module) -> bool:
        """Return True for a FastViT with a head, and with timm's MLP and attention in its blocks.

        With ``fork_feat``, a trunk returns the features of all stages and has no head.
        """
        from timm.models.fastvit import Attention, ConvMlp, FastVit

        if not (isinstance(trunk, FastVit) and pools_positions(vision)) or trunk.fork_feat:
            return False
        blocks = _mlp_blocks(nn.ModuleDict({"trunk": trunk})).values()
        return (
            all(type(block.mlp) is ConvMlp for block in blocks)
            and all(_attends(b) for b in blocks if isinstance(b.token_mixer, Attention))
            and has_one_activation(m for block in blocks for m in block.modules())
        )

    def rewrite(self, tower: nn.Module) -> None:
        """Split fused attention, and fold layer scales into the layer before them, in place."""
        # The folded layer outputs what the block adds to the residual stream, so that the stream
        # can be the target of a refit.
        for block in _mlp_blocks(tower).values():
            if _attends(block):
                block.token_mixer = TimmAttention(block.token_mixer, separate_qkv=True)
            for scale, part, layer in _scales(block):
                gamma, owner = getattr(block, scale), getattr(block, part)
                if not isinstance(gamma, FoldedScale):
                    folded, place = fold_scale(getattr(owner, layer), gamma.gamma)
                    setattr(owner, layer, folded)
                    setattr(block, scale, place)

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Separate the layer scales, and join the projections of the attention again."""
        from timm.models.fastvit import LayerScale2d

        kept = kept_columns(groups, plan)
        for name, block in _mlp_blocks(tower).items():
            for scale, part, layer in _scales(block):
                place, owner = getattr(block, scale), getattr(block, part)
                if isinstance(place, FoldedScale):
                    columns = kept.get(f"{name}.{part}.{layer}")
                    unfolded, gamma = unfold_scale(getattr(owner, layer), place, columns)
                    setattr(owner, layer, unfolded)
                    module = LayerScale2d(len(gamma), device="meta").train(place.training)
                    module.gamma = gamma
                    setattr(block, scale, module)
        restore_attention(_mlp_blocks(tower).values(), "token_mixer")

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Return heads and MLP units; the heads of the last attention are protected."""
        blocks = _mlp_blocks(tower)
        last = [name for name, block in blocks.items() if _attends(block)][-1:]
        layers = []
        for name, block in blocks.items():
            if _attends(block):
                # The projections map [B, h, w, C] inside the attention; the stream is [B, C, h, w].
                middle = StreamPoint(f"{name}.mlp", "input", axis=1)
                path, attention = f"{name}.token_mixer", block.token_mixer
                layers.append(timm_heads_layer(name, path, attention, middle, last=name in last))
            layers.append(mlp_layer(name, block.mlp, StreamPoint(name, "output")))
        return layers

    def stages(self, tower: nn.Module) -> Stages:
        """Return stem; downsampling, positions, blocks; last convolution, pooling, projection."""
        trunk: Any = tower.get_submodule("trunk")

        def head(stream: Tensor) -> tuple[Tensor, Tensor]:
            return timm_head_outputs(tower, trunk.final_conv(stream))  # stream [B, C, h, w]

        return Stages(trunk.stem, _blocks(tower), head)


def _blocks(tower: nn.Module) -> dict[str, Any]:
    return stage_blocks(tower, "trunk.stages", ("downsample", "pos_emb"))


def _mlp_blocks(tower: nn.Module) -> dict[str, Any]:
    return mlp_blocks(_blocks(tower))


def _attends(block: Any) -> bool:
    return is_timm_attention(block.token_mixer)


def _scales(block: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield the entries of ``_SCALES`` that the block has, folded or not."""
    for names in _SCALES:
        if hasattr(getattr(block, names[0], None), "gamma"):
            yield names
