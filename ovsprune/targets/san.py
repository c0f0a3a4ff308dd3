"""SAN, the side adapter network of MendelXu/SAN (detectron2, open_clip 2.16)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ovsprune.slim import SlimCheckpoint
from ovsprune.targets import TARGETS, split_vit
from ovsprune.targets.attached import Attached
from ovsprune.targets.check import Weights
from ovsprune.targets.convert import Converted
from ovsprune.targets.layout import BLOCK_PARTS, Layout

_STEM = ("class_embedding", "positional_embedding", "conv1", "ln_pre")
_TEXT = ("token_embedding", "positional_embedding", "ln_final", "text_projection", "logit_scale")

_PLACES = split_vit.Places(
    framework="MendelXu/SAN",
    front="clip_visual_extractor.resblocks",
    back="clip_rec_head.resblocks",
    front_parts=BLOCK_PARTS,
    back_parts=BLOCK_PARTS,
    stem={
        **{name: f"clip_visual_extractor.{name}" for name in _STEM},
        **{name: f"clip_rec_head.{name}" for name in ("ln_post", "proj")},
    },
    text={name: f"ov_classifier.{name}" for name in _TEXT},
    text_parts=BLOCK_PARTS,
    text_blocks="ov_classifier.transformer.resblocks",
    activations=(
        "clip_visual_extractor.resblocks.0.mlp.gelu",
        "clip_rec_head.resblocks.0.mlp.gelu",
    ),
    cross_attention="clip_rec_head",
)

_LINES = """\
# train_net.py of MendelXu/SAN
import ovsprune.targets  # pip install --no-deps ovsprune

class Trainer(DefaultTrainer):
    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        ovsprune.targets.load(model, {output!r})  # slim modules, then every tensor
        return model

# Start without MODEL.WEIGHTS: detectron2 would drop what has another shape and only warn. Files
# that this training saves are slim and load as usual (MODEL.WEIGHTS, --resume).
"""


@TARGETS.register("san")
class San:
    """SAN as MendelXu/SAN has it (detectron2): live models and checkpoints."""

    framework = "MendelXu/SAN at e19262d (detectron2, open_clip 2.16.0)"
    protects: Mapping[str, str] = split_vit.PROTECTS
    trainable = (
        "side_adapter_network.*",
        "ov_classifier.bg_embed",
        "clip_visual_extractor.*",
        "clip_rec_head.*",
    )

    def detect(self, model: nn.Module) -> bool:
        """Whether ``model`` is a SAN of this layout."""
        return split_vit.detect(model, _PLACES)

    def towers(self, model: nn.Module) -> dict[str, str]:
        """Blocks to their paths; raises TargetError where ``model`` is something else."""
        return split_vit.towers(model, _PLACES)

    def layout(self, names: Mapping[str, object] | None, depth: int) -> Layout:
        """Names in both directions; without ``names`` blocks are split 9 to 3, as in SAN."""
        return split_vit.layout(names, depth, _PLACES)

    def check(
        self,
        model: nn.Module,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> tuple[Weights, str]:
        """Whether ``model`` can take the slim tower; TargetError says why not."""
        return split_vit.check(model, checkpoint, _PLACES, weights, force)

    def attach(
        self,
        model: nn.Module,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> Attached:
        """Put the slim tower into ``model``, in place."""
        choice = self.check(model, checkpoint, weights=weights, force=force)
        return split_vit.attach(model, checkpoint, _PLACES, choice, "san", self.trainable)

    def convert(
        self,
        state: Mapping[str, Tensor] | None,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> Converted:
        """A SAN checkpoint with the slim tower in it."""
        return split_vit.convert(state, checkpoint, _PLACES, weights, force)

    def lines(self, output: str) -> str:
        """Lines for ``train_net.py``."""
        return _LINES.format(output=output)
