"""open_clip's ModifiedResNet, CLIP's residual network, and the CLIP around it.

Cut are, in every bottleneck, the channels of the first and of the second convolution. The width
between the blocks, the stem, the downsampling paths and the attention pool, with its heads, stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones import FAMILIES
from ovsprune.backbones.open_clip_own import load_own, rebuild_own
from ovsprune.backbones.open_clip_source import config_of
from ovsprune.core.protocols import Backbone, PrunableLayer, Stages
from ovsprune.core.records import DenseModel, Group, Plan, StreamPoint
from ovsprune.graph.norms import FoldedNorm, fold_norm, unfold_norm

__all__ = ["OpenClipResNet"]

_CONSUMERS = {"conv2": "bn2", "conv3": "bn3"}
"""Convolutions of a bottleneck that read units, and the norms behind them."""


@FAMILIES.register("open_clip-resnet")
class OpenClipResNet:
    """open_clip ModifiedResNet: the channels of both inner convolutions of every bottleneck."""

    library = "open_clip_torch"

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Whether open_clip builds a ModifiedResNet from ``config``."""
        vision = config["vision_cfg"]
        return isinstance(vision.get("layers"), list) and not vision.get("timm_model_name")

    def names(self) -> Sequence[str]:
        """``RN50``, ``RN101``, ``RN50x4``, ``x16`` and ``x64``, and the same ``-quickgelu``."""
        return _names()

    def load(self, name: str, pretrained: str | None, activation: str | None) -> Backbone:
        """Build the CLIP called ``name`` and load its weights.

        The image tower's activation is ReLU, whatever the name; ``-quickgelu``, a tag and
        ``activation`` speak of the text tower alone. Of random weights, the scale of every block's
        last norm is 1: open_clip starts it at 0, so that nothing in a block would do anything.

        Raises:
            WeightsError: The weights cannot be had or do not fit.
            OptionError: ``activation`` is unknown, or contradicts the tag's own.
        """
        backbone = _with_relu(load_own("open_clip-resnet", name, pretrained, activation))
        for block in () if backbone.trained else _blocks(backbone.tower).values():
            block.bn3.weight.fill_(1.0)
        return backbone

    def build(self, dense: DenseModel) -> Backbone:
        """Build the dense CLIP, its image tower with random weights; see the protocol."""
        return _with_relu(rebuild_own("open_clip-resnet", dense))

    def rewrite(self, tower: nn.Module) -> None:
        """The norms behind what reads units into it, in place.

        The last activation of a block no longer writes into the sum that it reads: repairs look
        at that sum.
        """
        for block in _blocks(tower).values():
            for layer, norm in _CONSUMERS.items():
                if not isinstance(getattr(block, norm), FoldedNorm):
                    folded, place = fold_norm(getattr(block, layer), getattr(block, norm))
                    setattr(block, layer, folded)
                    setattr(block, norm, place)
            block.act3.inplace = False

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """The folded norms out again."""
        kept = {
            (part.module, part.axis): part.rows[plan.kept[group.name]].flatten()
            for group in groups
            for part in group.slices
        }
        for name, block in _blocks(tower).items():
            for layer, norm in _CONSUMERS.items():
                place = getattr(block, norm)
                if isinstance(place, FoldedNorm):
                    columns, rows = (kept.get((f"{name}.{layer}", axis)) for axis in ("in", "out"))
                    plain = unfold_norm(getattr(block, layer), place, columns, rows)
                    for own, module in zip((layer, norm), plain, strict=True):
                        setattr(block, own, module)
            block.act3.inplace = True

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """The channels of the first and of the second convolution of every bottleneck."""
        seeds = []
        for name in _blocks(tower):
            first, second = f"{name}.conv1", f"{name}.conv2"
            after = StreamPoint(f"{name}.act3", "input")  # which the shortcut was added to
            seeds.append(PrunableLayer(first, "channels", first, 1, name, None))
            seeds.append(PrunableLayer(second, "channels", second, 1, name, after))
        return seeds

    def stages(self, tower: nn.Module) -> Stages:
        """The three convolutions of the stem; the bottlenecks; the attention pool.

        The dense output is what the pool makes of each position alone: its value and output
        projections, without the mean token and without positions, as MaskCLIP reads it (Zhou, Loy
        and Dai, ECCV 2022, section 3.3).
        """
        network: Any = tower

        def head(stream: Tensor) -> tuple[Tensor, Tensor]:
            pool = network.attnpool
            dense = pool.c_proj(pool.v_proj(stream.movedim(1, -1))).movedim(-1, 1)
            return pool(stream), dense

        return Stages(network.stem, _blocks(tower), head)


@cache
def _names() -> tuple[str, ...]:
    import open_clip

    family = FAMILIES.get("open_clip-resnet")
    return tuple(name for name in open_clip.list_models() if family.takes(config_of(name)))


def _with_relu(backbone: Backbone) -> Backbone:
    backbone.activation = "relu"
    return backbone


def _blocks(tower: nn.Module) -> dict[str, Any]:
    stages = [name for name, _ in tower.named_children() if name.startswith("layer")]
    return {
        f"{stage}.{i}": block
        for stage in stages
        for i, block in tower.get_submodule(stage).named_children()
    }
