"""open_clip's ``TimmModel`` around an EfficientNet, with or without squeeze-and-excitation.

EfficientNet-Lite, EfficientNet-B and MobileNetV2 are such networks. Cut are the expanded channels
of the inverted residual blocks; the width between the blocks stays. Squeeze-and-excitation loses
the columns and the rows of the channels that go: a channel that is cut is zero in its mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones.open_clip_timm import pools_positions, timm_family
from ovsprune.core.protocols import PrunableLayer, Stages
from ovsprune.core.records import Group, Plan, StreamPoint
from ovsprune.graph.norms import FoldedNorm, fold_norm, unfold_norm
from ovsprune.slim.activation import find_activations
from ovsprune.slim.spec import ACTIVATIONS
from ovsprune.slim.timm_tower import timm_outputs

__all__ = ["OpenClipEfficientNet"]


@timm_family("open_clip-efficientnet")
class OpenClipEfficientNet:
    """timm EfficientNet and MobileNetV2 in open_clip: expanded channels of every block."""

    modules = ("efficientnet",)

    def takes(self, vision: Mapping[str, Any], trunk: nn.Module) -> bool:
        """Whether it is an EfficientNet in which something can be cut."""
        from timm.models.efficientnet import EfficientNet

        if not (isinstance(trunk, EfficientNet) and pools_positions(vision)):
            return False
        known = find_activations(trunk.modules())
        expanding = _expanding(nn.ModuleDict({"trunk": trunk}))
        return bool(expanding) and len(known) == 1 and known <= set(ACTIVATIONS)

    def rewrite(self, tower: nn.Module) -> None:
        """The norm behind every block's last convolution into that convolution, in place."""
        for block in _expanding(tower).values():
            if not isinstance(block.bn3, FoldedNorm):
                block.conv_pwl, block.bn3 = fold_norm(block.conv_pwl, block.bn3)

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """The folded norms out again."""
        kept = {g.consumer: g.columns[plan.kept[g.name]].flatten() for g in groups}
        for name, block in _expanding(tower).items():
            if isinstance(block.bn3, FoldedNorm):
                columns = kept.get(f"{name}.conv_pwl")
                block.conv_pwl, block.bn3 = unfold_norm(block.conv_pwl, block.bn3, columns)

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """The expanded channels of every inverted residual block."""
        seeds = []
        for name, block in _expanding(tower).items():
            after = StreamPoint(name, "output") if block.has_skip else None
            # squeeze-and-excitation reads the channels too
            seeds.append(
                PrunableLayer(
                    name, "channels", f"{name}.conv_pw", 1, name, after, consumer=f"{name}.conv_pwl"
                )
            )
        return seeds

    def stages(self, tower: nn.Module) -> Stages:
        """The first convolution; the blocks; the last convolution, pooling and projection."""
        trunk: Any = tower.get_submodule("trunk")

        def stem(images: Tensor) -> Tensor:
            stream: Tensor = trunk.bn1(trunk.conv_stem(images))
            return stream

        def head(stream: Tensor) -> tuple[Tensor, Tensor]:
            return timm_outputs(tower, trunk.bn2(trunk.conv_head(stream)))

        return Stages(stem, _blocks(tower), head)


def _blocks(tower: nn.Module) -> dict[str, Any]:
    trunk: Any = tower.get_submodule("trunk")
    return {
        f"trunk.blocks.{i}.{j}": block
        for i, stage in enumerate(trunk.blocks)
        for j, block in enumerate(stage)
    }


def _expanding(tower: nn.Module) -> dict[str, Any]:
    """Inverted residual blocks; a depthwise separable one has no channels of its own."""
    return {name: block for name, block in _blocks(tower).items() if _is_inverted(block)}


def _is_inverted(block: Any) -> bool:
    """Whether it is plain: other convolutions, norms and filters know the channels otherwise."""
    convolutions = [getattr(block, name, None) for name in ("conv_pw", "conv_dw", "conv_pwl")]
    norms = [getattr(block, name, None) for name in ("bn1", "bn2", "bn3")]
    return (
        all(isinstance(layer, nn.Conv2d) for layer in convolutions)
        and all(isinstance(norm, nn.BatchNorm2d | FoldedNorm) for norm in norms)
        and block.conv_dw.groups == block.conv_dw.out_channels
        and isinstance(block.aa, nn.Identity)
        and (isinstance(block.se, nn.Identity) or hasattr(block.se, "conv_reduce"))
    )
