"""SAN as mmsegmentation ships it (mmengine): its own ViT, split over encoder and decode head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ovsprune.slim import SlimCheckpoint
from ovsprune.targets import TARGETS, split_vit
from ovsprune.targets.attached import Attached
from ovsprune.targets.check import Weights
from ovsprune.targets.convert import Converted
from ovsprune.targets.layout import Layout

_HEAD = "decode_head.rec_with_attnbias"
# The head's blocks are mmcv's generic transformer layers, and so are those of the text tower.
_GENERIC = {
    "ln_1": "norms.0",
    "attn": "attentions.0.attn",
    "ln_2": "norms.1",
    "mlp.c_fc": "ffns.0.layers.0.0",
    "mlp.c_proj": "ffns.0.layers.1",
}

_PLACES = split_vit.Places(
    framework="mmsegmentation's SAN",
    front="image_encoder.layers",
    back=f"{_HEAD}.layers",
    front_parts={
        "ln_1": "ln1",
        "attn": "attn.attn",
        "ln_2": "ln2",
        "mlp.c_fc": "ffn.layers.0.0",
        "mlp.c_proj": "ffn.layers.1",
    },
    back_parts=_GENERIC,
    stem={
        "class_embedding": "image_encoder.cls_token",
        "positional_embedding": "image_encoder.pos_embed",
        "conv1": "image_encoder.patch_embed.projection",
        "ln_pre": "image_encoder.ln_pre",
        "ln_post": f"{_HEAD}.ln_post",
        "proj": f"{_HEAD}.proj.weight",
    },
    leading={"class_embedding": 2, "positional_embedding": 1},
    transposed=("proj",),
    text={
        name: f"text_encoder.{name}"
        for name in (
            "token_embedding",
            "positional_embedding",
            "ln_final",
            "text_projection",
            "logit_scale",
        )
    },
    text_parts=_GENERIC,
    text_blocks="text_encoder.transformer",
    activations=("image_encoder.layers.0.ffn.layers.0.1", f"{_HEAD}.layers.0.ffns.0.layers.0.1"),
    cross_attention=_HEAD,
)

_LINES = """\
# tools/train.py of mmsegmentation, where the runner is made
import ovsprune.targets  # pip install --no-deps ovsprune

cfg.model.pretrained = None  # every tensor of CLIP comes from the slim checkpoint
runner = Runner.from_cfg(cfg)
ovsprune.targets.load(runner.model, {output!r})  # slim modules, then every tensor
runner.model.is_init = True  # or mmengine would initialise it again
runner.train()

# Set neither load_from nor resume to a dense checkpoint; those that this training saves are slim
# and load as usual.
"""


@TARGETS.register("mmseg-san")
class MmsegSan:
    """SAN as mmsegmentation ships it (mmengine): live models and checkpoints."""

    framework = "mmsegmentation 1.x (onedl-mmsegmentation 1.4.2), san_vit-b16 and san_vit-l14"
    protects: Mapping[str, str] = split_vit.PROTECTS
    trainable = (
        "decode_head.side_adapter_network.*",
        "text_encoder.bg_embed",
        "image_encoder.*",
        f"{_HEAD}.*",
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
        return split_vit.attach(model, checkpoint, _PLACES, choice, "mmseg-san", self.trainable)

    def convert(
        self,
        state: Mapping[str, Tensor] | None,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> Converted:
        """An mmsegmentation SAN checkpoint's state with the slim tower in it."""
        return split_vit.convert(state, checkpoint, _PLACES, weights, force)

    def lines(self, output: str) -> str:
        """Lines for ``tools/train.py``."""
        return _LINES.format(output=output)
