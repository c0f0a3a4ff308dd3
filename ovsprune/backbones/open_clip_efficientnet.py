"""open_clip's ``TimmModel`` around an EfficientNet without squeeze-and-excitation.

EfficientNet-Lite and MobileNetV2 are such networks. Cut are the expanded channels of the inverted
residual blocks; the width between the blocks stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.backbones import FAMILIES
from ovsprune.backbones.open_clip_model import (
    build_clip,
    encoder_of,
    fit_text,
    has_own_text,
    preprocess_of,
)
from ovsprune.backbones.open_clip_source import fill, open_source
from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Backbone, Seed, Stages
from ovsprune.core.records import Group, Plan, Preprocess, StreamPoint
from ovsprune.graph.norms import FoldedNorm, fold, unfold
from ovsprune.slim.activation import find_activations
from ovsprune.slim.spec import ACTIVATIONS
from ovsprune.slim.timm_tower import build_timm_tower, timm_outputs

__all__ = ["OpenClipEfficientNet"]


@FAMILIES.register("open_clip-efficientnet")
class OpenClipEfficientNet:
    """timm EfficientNet-Lite and MobileNetV2 in open_clip: expanded channels of every block."""

    library = "open_clip_torch"

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Whether open_clip builds, from ``config``, a trunk in which something can be cut.

        The pooling must be a mean and the projection linear, so that the dense output is what the
        pooled one is the mean of.
        """
        vision = config["vision_cfg"]
        name = vision.get("timm_model_name")
        return (
            isinstance(name, str)
            and vision.get("timm_pool", "avg") == "avg"
            and vision.get("timm_proj", "linear") in ("linear", "none", "")
            and _is_cuttable(name)
        )

    def names(self) -> Sequence[str]:
        """None: open_clip lists no such model, so they come as folders."""
        return ()

    def load(self, name: str, pretrained: str | None, activation: str | None) -> Backbone:
        """Load a folder of open_clip's form, or a repository on the hub.

        Args:
            name: The folder, or ``hf-hub:org/repo``.
            pretrained: A file, ``"none"``, or None for the folder's own weights.
            activation: What the network has anyway, or None.

        Raises:
            WeightsError: The weights cannot be had or do not fit.
            OptionError: ``activation`` is not the network's own.
        """
        source = open_source(name, pretrained, None)
        model = build_clip(source.config)
        text = fill(source, model)
        backbone = self._backbone(
            source.name,
            source.pretrained,
            model.get_submodule("visual"),
            source.config,
            preprocess_of(model.visual, source.preprocess),
            trained=source.weights is not None,
            text=text,
        )
        if text and has_own_text(source.config):
            backbone.encoder = encoder_of(model, source.config)
        backbone.notes = source.notes
        if activation not in (None, backbone.activation):
            raise OptionError(
                f"--activation {activation!r}: {name} has {backbone.activation}; leave it out"
            )
        return backbone

    def build(
        self,
        name: str,
        pretrained: str | None,
        architecture: Mapping[str, Any],
        preprocess: Preprocess,
        *,
        trained: bool,
        text: Mapping[str, Tensor],
    ) -> Backbone:
        """The dense tower with random weights, and the CLIP around it where there is a text."""
        if not text or not has_own_text(architecture):
            tower = build_timm_tower(architecture)
            return self._backbone(
                name, pretrained, tower, architecture, preprocess, trained=trained, text=text
            )
        model = build_clip(architecture)
        fit_text(name, text, model)
        tower = model.get_submodule("visual")
        backbone = self._backbone(
            name, pretrained, tower, architecture, preprocess, trained=trained, text=text
        )
        backbone.encoder = encoder_of(model, architecture)
        return backbone

    def _backbone(
        self,
        name: str,
        pretrained: str | None,
        tower: nn.Module,
        architecture: Mapping[str, Any],
        preprocess: Preprocess,
        *,
        trained: bool,
        text: Mapping[str, Tensor],
    ) -> Backbone:
        import open_clip

        (activation,) = find_activations(tower.modules())
        return Backbone(
            name=name,
            pretrained=pretrained,
            trained=trained,
            family="open_clip-efficientnet",
            tower=tower,
            stages=self.stages,
            preprocess=preprocess,
            activation=activation,
            architecture=dict(architecture),
            library_version=open_clip.__version__,
            text=text,
        )

    def rewrite(self, tower: nn.Module) -> None:
        """The norm behind every block's last convolution into that convolution, in place."""
        for block in _expanding(tower).values():
            if not isinstance(block.bn3, FoldedNorm):
                block.conv_pwl, block.bn3 = fold(block.conv_pwl, block.bn3)

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """The folded norms out again."""
        kept = {g.consumer: g.columns[plan.kept[g.name]].flatten() for g in groups}
        for name, block in _expanding(tower).items():
            if isinstance(block.bn3, FoldedNorm):
                columns = kept.get(f"{name}.conv_pwl")
                block.conv_pwl, block.bn3 = unfold(block.conv_pwl, block.bn3, columns)

    def seeds(self, tower: nn.Module) -> list[Seed]:
        """The expanded channels of every inverted residual block."""
        seeds = []
        for name, block in _expanding(tower).items():
            after = StreamPoint(name, "output") if block.has_skip else None
            reason = None if _is_free(block) else "squeeze-and-excitation reads the channels too"
            seeds.append(Seed(name, "channels", f"{name}.conv_pw", 1, name, after, reason))
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
    wanted = ("conv_pw", "conv_dw", "conv_pwl", "bn3")
    return {n: b for n, b in _blocks(tower).items() if all(hasattr(b, w) for w in wanted)}


def _is_free(block: Any) -> bool:
    """Whether nothing but its last convolution reads the block's channels."""
    return isinstance(block.se, nn.Identity)


@cache
def _is_cuttable(name: str) -> bool:
    import timm
    from timm.models.efficientnet import EfficientNet

    if not timm.is_model(name):
        return False
    with torch.device("meta"):
        trunk = timm.create_model(name, pretrained=False)
    if not isinstance(trunk, EfficientNet):
        return False
    tower = nn.ModuleDict({"trunk": trunk})
    activations = find_activations(trunk.modules())
    free = [block for block in _expanding(tower).values() if _is_free(block)]
    return bool(free) and len(activations) == 1 and activations <= set(ACTIVATIONS)
