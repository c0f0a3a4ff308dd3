"""CAT-Seg (cvlab-kaist/CAT-Seg, detectron2): finetunes CLIP and aggregates its cost volume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ovsprune.targets import TARGETS
from ovsprune.targets.detectron2_rules import script_for, sized_image_inputs
from ovsprune.targets.framework import TableTarget
from ovsprune.targets.key_map import KeyMap
from ovsprune.targets.layout import BLOCK_PARTS, POSITIONS, BlockStack, PathSpec, clip_text

_PREDICTOR = "sem_seg_head.predictor"
_CLIP = f"{_PREDICTOR}.clip_model"
_VISUAL = f"{_CLIP}.visual"
_VISION = ("class_embedding", POSITIONS, "conv1", "ln_pre", "ln_post", "proj")

# CAT-Seg trains queries and values but not keys, so it keeps three weights; the bias is fused
_PARTS: Mapping[str, PathSpec] = {
    **BLOCK_PARTS,
    "attn.in_proj_weight": tuple(f"attn.{which}_proj_weight" for which in "qkv"),
}

_KEY_MAP = KeyMap(
    framework="cvlab-kaist/CAT-Seg",
    stem={name: f"{_VISUAL}.{name}" for name in _VISION},
    stacks=(BlockStack(f"{_VISUAL}.transformer.resblocks", _PARTS),),
    marks=(f"{_PREDICTOR}.transformer", "upsample1", "upsample2"),
    activations=(f"{_VISUAL}.transformer.resblocks.0.mlp.gelu",),
    text=clip_text(_CLIP, _PARTS),
)

_PROTECTS = {
    "residual width": "upsample1 and upsample2 read the residual stream after two blocks (hooks)",
    "depth": "the hooks count blocks, and the last block runs through forward_dense",
    "projection": "the cost volume compares it with text embeddings of the dense width",
    POSITIONS: "the framework interpolates them from the grid of CLIP's native resolution",
}


def _inputs(model: Any) -> Mapping[str, Any]:
    """Return one image of CLIP's input size; the classes are those of the configuration."""
    height, width = model.clip_resolution
    return sized_image_inputs(height, width)


@TARGETS.register("cat-seg")
def cat_seg() -> TableTarget:
    """Target for CAT-Seg on OpenAI's ViTs; live models and checkpoints."""
    return TableTarget(
        name="cat-seg",
        framework="cvlab-kaist/CAT-Seg at 6d3a188 (detectron2, its own copy of CLIP)",
        key_map=_KEY_MAP,
        takes=("vit",),
        protects=_PROTECTS,
        trainable=(
            f"{_PREDICTOR}.transformer.*",
            "upsample1.*",
            "upsample2.*",
            f"{_VISUAL}.*",
            f"{_CLIP}.transformer.*",
        ),
        script=script_for("CAT-Seg"),
        inputs=_inputs,
    )
