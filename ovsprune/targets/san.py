"""SAN, the side adapter network of MendelXu/SAN (detectron2, open_clip 2.16)."""

from __future__ import annotations

from ovsprune.targets.detectron2_rules import script_for
from ovsprune.targets.framework import TableTarget
from ovsprune.targets.key_map import KeyMap
from ovsprune.targets.layout import BLOCK_PARTS, POSITIONS, BlockStack, clip_text, under
from ovsprune.targets.registry import TARGETS
from ovsprune.targets.san_compat import HOOKS, VISUAL
from ovsprune.targets.san_rules import PROTECTS, STAYS, no_cross_attention

_KEY_MAP = KeyMap(
    framework="MendelXu/SAN",
    stem={
        **under("clip_visual_extractor", ("class_embedding", POSITIONS, "conv1", "ln_pre")),
        **under("clip_rec_head", ("ln_post", "proj")),
    },
    stacks=(
        # 9 of 12 (18 of 24) blocks extract features, the last ones classify masks
        BlockStack("clip_visual_extractor.resblocks", BLOCK_PARTS, share=0.75),
        BlockStack("clip_rec_head.resblocks", BLOCK_PARTS, share=0.25),
    ),
    stays=STAYS,
    activations=(
        "clip_visual_extractor.resblocks.0.mlp.gelu",
        "clip_rec_head.resblocks.0.mlp.gelu",
    ),
    text=clip_text("ov_classifier"),
)

_PRELUDE = 'ovsprune.targets.apply_compat("san")  # for open_clip newer than 2.16\n'


@TARGETS.register("san")
def san() -> TableTarget:
    """Target for SAN as published in MendelXu/SAN (detectron2); live models and checkpoints."""
    return TableTarget(
        name="san",
        framework="MendelXu/SAN at e19262d (detectron2, open_clip 2.16.0 or newer)",
        key_map=_KEY_MAP,
        takes=("vit",),
        protects=PROTECTS,
        trainable=(
            "side_adapter_network.*",
            "ov_classifier.bg_embed",
            "clip_visual_extractor.*",
            "clip_rec_head.*",
        ),
        script=script_for("MendelXu/SAN", prelude=_PRELUDE),
        checks=(no_cross_attention("clip_rec_head", supported_in=VISUAL),),
        hooks=HOOKS,
    )
