"""CAT-Seg (cvlab-kaist/CAT-Seg, detectron2): finetunes CLIP and aggregates its cost volume."""

from __future__ import annotations

from collections.abc import Mapping

from ovsprune.targets.detectron2_rules import image_inputs, script_for
from ovsprune.targets.framework import TableTarget
from ovsprune.targets.key_map import KeyMap
from ovsprune.targets.layout import (
    BLOCK_PARTS,
    POSITIONS,
    VIT_STEM,
    BlockStack,
    PathSpec,
    clip_text,
    under,
)
from ovsprune.targets.registry import TARGETS

_PREDICTOR = "sem_seg_head.predictor"
_CLIP = f"{_PREDICTOR}.clip_model"
_VISUAL = f"{_CLIP}.visual"

# CAT-Seg trains queries and values but not keys, so it keeps three weights; the bias is fused
_PARTS: Mapping[str, PathSpec] = {
    **BLOCK_PARTS,
    "attn.in_proj_weight": tuple(f"attn.{which}_proj_weight" for which in "qkv"),
}

_KEY_MAP = KeyMap(
    framework="cvlab-kaist/CAT-Seg",
    stem=under(_VISUAL, VIT_STEM),
    stacks=(BlockStack(f"{_VISUAL}.transformer.resblocks", _PARTS),),
    marks=(f"{_PREDICTOR}.transformer", "upsample1", "upsample2"),
    activations=(f"{_VISUAL}.transformer.resblocks.0.mlp.gelu",),
    text=clip_text(_CLIP, _PARTS),
)


@TARGETS.register("cat-seg")
def cat_seg() -> TableTarget:
    """Target for CAT-Seg on OpenAI's ViTs; live models and checkpoints."""
    return TableTarget(
        name="cat-seg",
        framework="cvlab-kaist/CAT-Seg at 6d3a188 (detectron2, its own copy of CLIP)",
        key_map=_KEY_MAP,
        takes=("vit",),
        protects={
            "residual width": "upsample1 and upsample2 read the residual stream after two blocks "
            "(hooks)",
            "depth": "the hooks count blocks, and the last block runs through forward_dense",
            "projection": "the cost volume compares it with text embeddings of the dense width",
            POSITIONS: "the framework interpolates them from the grid of CLIP's native resolution",
        },
        trainable=(
            f"{_PREDICTOR}.transformer.*",
            "upsample1.*",
            "upsample2.*",
            f"{_VISUAL}.*",
            f"{_CLIP}.transformer.*",
        ),
        script=script_for("CAT-Seg"),
        inputs=lambda model: image_inputs(model, model.clip_resolution),
    )
