"""open_clip's ModifiedResNet, CLIP's residual network, and the CLIP around it.

The units are, in every bottleneck, the channels of the first and of the second convolution. The
width between the blocks, the stem, the downsampling paths and the attention pool are not pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones.layers import channels_layer, fold_norms, unfold_norms
from ovsprune.backbones.open_clip_build import load_clip, names_of, rebuild_clip
from ovsprune.backbones.registry import FAMILIES
from ovsprune.core.protocols import Backbone, PrunableLayer, Stages
from ovsprune.core.records import DenseModel, Group, Plan, StreamPoint

__all__ = ["OpenClipResNet"]

_NORMS = {"conv2": "bn2", "conv3": "bn3"}
"""Convolutions of a bottleneck that read units, and the norm after each."""


@FAMILIES.register("open_clip-resnet")
class OpenClipResNet:
    """open_clip ModifiedResNet: the channels of both inner convolutions of every bottleneck."""

    library = "open_clip_torch"

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Return True if open_clip builds a ModifiedResNet from ``config``."""
        vision = config["vision_cfg"]
        return isinstance(vision.get("layers"), list) and not vision.get("timm_model_name")

    def names(self) -> Sequence[str]:
        """Return ``RN50``, ``RN101``, ``RN50x4``, ``x16`` and ``x64``, also with ``-quickgelu``."""
        return names_of("open_clip-resnet")

    def load(self, name: str, pretrained: str | None, activation: str | None) -> Backbone:
        """Build the CLIP and load its weights; ``activation`` is that of the text tower."""
        backbone = _with_relu(load_clip("open_clip-resnet", name, pretrained, activation))
        # open_clip initialises the scale of the last norm in a block to 0. With random weights, the
        # blocks would be identities and nothing could be ranked.
        for block in () if backbone.trained else _blocks(backbone.tower).values():
            block.bn3.weight.fill_(1.0)
        return backbone

    def build(self, dense: DenseModel) -> Backbone:
        """Build the dense CLIP, with random weights in its image tower."""
        return _with_relu(rebuild_clip("open_clip-resnet", dense))

    def rewrite(self, tower: nn.Module) -> None:
        """Fold the norm after each consumer into that convolution, in place."""
        blocks = _blocks(tower).values()
        fold_norms(blocks, _NORMS)
        for block in blocks:
            # A refit reads the residual stream at the input of the last activation, which must not
            # overwrite it.
            block.act3.inplace = False

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Separate the folded norms again."""
        blocks = _blocks(tower)
        unfold_norms(blocks, _NORMS, groups, plan)
        for block in blocks.values():
            block.act3.inplace = True

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Return the channels of the first and of the second convolution of every bottleneck."""
        layers = []
        for name in _blocks(tower):
            # conv3 reads the units of conv2. The sum of its output and the shortcut is the input of
            # the last activation. conv2, which reads those of conv1, adds to no stream.
            after = StreamPoint(f"{name}.act3", "input")
            for path, stream in ((f"{name}.conv1", None), (f"{name}.conv2", after)):
                layers.append(channels_layer(name, path, path, stream))
        return layers

    def stages(self, tower: nn.Module) -> Stages:
        """Return the three convolutions of the stem; the bottlenecks; the attention pool.

        The dense output of a position is its value and output projection in the pool, without the
        mean token and without positions, as in MaskCLIP (Zhou, Loy and Dai, ECCV 2022, section
        3.3).
        """
        network: Any = tower

        def head(stream: Tensor) -> tuple[Tensor, Tensor]:
            pool = network.attnpool
            values = pool.v_proj(stream.movedim(1, -1))  # stream [B, D, h, w] -> [B, h, w, D]
            return pool(stream), pool.c_proj(values).movedim(-1, 1)  # [B, C], [B, C, h, w]

        return Stages(network.stem, _blocks(tower), head)


def _with_relu(backbone: Backbone) -> Backbone:
    """Set the image tower's activation; a name with ``-quickgelu`` means the text tower."""
    backbone.activation = "relu"
    return backbone


def _blocks(tower: nn.Module) -> dict[str, Any]:
    stages = [name for name, _ in tower.named_children() if name.startswith("layer")]
    return {
        f"{stage}.{i}": block
        for stage in stages
        for i, block in tower.get_submodule(stage).named_children()
    }
