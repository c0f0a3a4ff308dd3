"""SAN of mmsegmentation (mmengine): its own ViT, split over image encoder and decode head."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ovsprune.targets.framework import TableTarget
from ovsprune.targets.key_map import KeyMap
from ovsprune.targets.layout import POSITIONS, TEXT_STEM, BlockStack, Layout, PathSpec, under
from ovsprune.targets.registry import TARGETS
from ovsprune.targets.san_rules import PROTECTS, STAYS, no_cross_attention

_HEAD = "decode_head.rec_with_attnbias"
# blocks of the decode head and of the text tower are mmcv's generic transformer layers
_MMCV_PARTS: Mapping[str, PathSpec] = {
    "ln_1": "norms.0",
    "attn": "attentions.0.attn",
    "ln_2": "norms.1",
    "mlp.c_fc": "ffns.0.layers.0.0",
    "mlp.c_proj": "ffns.0.layers.1",
}
_ENCODER_PARTS: Mapping[str, PathSpec] = {
    "ln_1": "ln1",
    "attn": "attn.attn",
    "ln_2": "ln2",
    "mlp.c_fc": "ffn.layers.0.0",
    "mlp.c_proj": "ffn.layers.1",
}

_KEY_MAP = KeyMap(
    framework="mmsegmentation's SAN",
    stem={
        "class_embedding": "image_encoder.cls_token",
        POSITIONS: "image_encoder.pos_embed",
        "conv1": "image_encoder.patch_embed.projection",
        "ln_pre": "image_encoder.ln_pre",
        "ln_post": f"{_HEAD}.ln_post",
        "proj": f"{_HEAD}.proj.weight",
    },
    stacks=(
        # 9 of 12 (18 of 24) blocks are in the encoder, the last ones classify masks
        BlockStack("image_encoder.layers", _ENCODER_PARTS, share=0.75),
        BlockStack(f"{_HEAD}.layers", _MMCV_PARTS, share=0.25),
    ),
    # [E] is stored as [1, 1, E], [L, E] as [1, L, E], and proj as a linear layer
    leading={"class_embedding": 2, POSITIONS: 1},
    transposed=("proj",),
    stays=STAYS,
    activations=("image_encoder.layers.0.ffn.layers.0.1", f"{_HEAD}.layers.0.ffns.0.layers.0.1"),
    text=Layout(
        stem=under("text_encoder", TEXT_STEM),
        stacks=(BlockStack("text_encoder.transformer", _MMCV_PARTS),),
    ),
)

_SCRIPT = """\
# tools/train.py of mmsegmentation, where the runner is created
import ovsprune.targets  # pip install --no-deps ovsprune

cfg.model.pretrained = None  # every tensor of CLIP comes from the slim checkpoint
runner = Runner.from_cfg(cfg)
ovsprune.targets.load_into(runner.model, {output!r})  # replaces modules, loads every tensor
runner.model.is_init = True  # keeps mmengine from initialising it again
runner.train()

# Set neither load_from nor resume to a dense checkpoint. Checkpoints that this training saves are
# slim and load as usual.
"""


@TARGETS.register("mmseg-san")
def mmseg_san() -> TableTarget:
    """Target for SAN of mmsegmentation (mmengine); live models and checkpoints."""
    return TableTarget(
        name="mmseg-san",
        framework="mmsegmentation 1.x (onedl-mmsegmentation 1.4.2), san_vit-b16 and san_vit-l14",
        key_map=_KEY_MAP,
        takes=("vit",),
        protects=PROTECTS,
        trainable=(
            "decode_head.side_adapter_network.*",
            "text_encoder.bg_embed",
            "image_encoder.*",
            f"{_HEAD}.*",
        ),
        script=_SCRIPT,
        # the size of san_vit-b16 and san_vit-l14, whose CLIP reads it at half size
        inputs=lambda model: {"inputs": torch.zeros(1, 3, 640, 640), "mode": "predict"},
        checks=(no_cross_attention(_HEAD),),
    )
