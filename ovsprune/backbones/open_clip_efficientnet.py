"""open_clip's ``TimmModel`` around an EfficientNet, with or without squeeze-and-excitation.

This includes EfficientNet-Lite, EfficientNet-B and MobileNetV2. The units are the expanded channels
of the inverted residual blocks; the width between the blocks is not pruned. Squeeze-and-excitation
loses the columns and the rows of removed channels: a masked channel contributes zero to the means
that it reads, so cutting and masking agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones.layers import channels_layer, fold_norms, has_one_activation, unfold_norms
from ovsprune.backbones.open_clip_timm import pools_positions, timm_family
from ovsprune.core.protocols import PrunableLayer, Stages
from ovsprune.core.records import Group, Plan, StreamPoint
from ovsprune.graph.norms import FoldedNorm
from ovsprune.slim.timm_tower import timm_head_outputs

__all__ = ["OpenClipEfficientNet"]

_NORMS = {"conv_pwl": "bn3"}
"""Convolution of a block that reads units, and the norm after it."""


@timm_family("open_clip-efficientnet")
class OpenClipEfficientNet:
    """timm EfficientNet and MobileNetV2 in open_clip: expanded channels of every block."""

    modules = ("efficientnet",)

    def takes(self, vision: Mapping[str, Any], trunk: nn.Module) -> bool:
        """Return True for an EfficientNet with at least one block that can be pruned."""
        from timm.models.efficientnet import EfficientNet

        if not (isinstance(trunk, EfficientNet) and pools_positions(vision)):
            return False
        prunable = _prunable_blocks(nn.ModuleDict({"trunk": trunk}))
        return bool(prunable) and has_one_activation(trunk.modules())

    def rewrite(self, tower: nn.Module) -> None:
        """Fold the norm after each block's last convolution into that convolution, in place."""
        fold_norms(_prunable_blocks(tower).values(), _NORMS)

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Separate the folded norms again."""
        unfold_norms(_prunable_blocks(tower), _NORMS, groups, plan)

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Return the expanded channels of every inverted residual block."""
        return [
            channels_layer(
                name,
                name,
                f"{name}.conv_pw",
                # A block that changes the width or the stride has no residual connection.
                StreamPoint(name, "output") if block.has_skip else None,
                # Squeeze-and-excitation reads the channels too, so the consumer must be named.
                consumer=f"{name}.conv_pwl",
            )
            for name, block in _prunable_blocks(tower).items()
        ]

    def stages(self, tower: nn.Module) -> Stages:
        """Return first convolution; blocks; last convolution, pooling and projection."""
        trunk: Any = tower.get_submodule("trunk")

        def stem(images: Tensor) -> Tensor:
            stream: Tensor = trunk.bn1(trunk.conv_stem(images))  # [B, C, h, w]
            return stream

        def head(stream: Tensor) -> tuple[Tensor, Tensor]:
            return timm_head_outputs(tower, trunk.bn2(trunk.conv_head(stream)))

        return Stages(stem, _blocks(tower), head)


def _blocks(tower: nn.Module) -> dict[str, Any]:
    trunk: Any = tower.get_submodule("trunk")
    return {
        f"trunk.blocks.{i}.{j}": block
        for i, stage in enumerate(trunk.blocks)
        for j, block in enumerate(stage)
    }


def _prunable_blocks(tower: nn.Module) -> dict[str, Any]:
    """Return the inverted residual blocks; a depthwise separable block expands no channels."""
    return {name: block for name, block in _blocks(tower).items() if _is_inverted(block)}


def _is_inverted(block: Any) -> bool:
    """Return True for an inverted residual block of layers that can be cut by channel."""
    convolutions = [getattr(block, name, None) for name in ("conv_pw", "conv_dw", "conv_pwl")]
    norms = [getattr(block, name, None) for name in ("bn1", "bn2", "bn3")]
    return (
        all(isinstance(layer, nn.Conv2d) for layer in convolutions)
        and all(isinstance(norm, nn.BatchNorm2d | FoldedNorm) for norm in norms)
        and block.conv_dw.groups == block.conv_dw.out_channels
        and isinstance(block.aa, nn.Identity)  # anti-aliasing, a filter with a fixed width
        and (isinstance(block.se, nn.Identity) or hasattr(block.se, "conv_reduce"))
    )
