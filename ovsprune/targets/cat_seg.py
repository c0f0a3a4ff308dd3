"""CAT-Seg (cvlab-kaist/CAT-Seg, detectron2): cost aggregation over a CLIP that it finetunes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ovsprune.targets import TARGETS
from ovsprune.targets.detectron2_rules import picture_of, script_for
from ovsprune.targets.framework import TableTarget
from ovsprune.targets.key_map import KeyMap
from ovsprune.targets.layout import BLOCK_PARTS, POSITIONS, BlockStack, Place, clip_text

_PREDICTOR = "sem_seg_head.predictor"
_CLIP = f"{_PREDICTOR}.clip_model"
_VISUAL = f"{_CLIP}.visual"
_VISION = ("class_embedding", POSITIONS, "conv1", "ln_pre", "ln_post", "proj")

# three weights, so that queries and values are trained and keys are not; one bias
_PARTS: Mapping[str, Place] = {
    **BLOCK_PARTS,
    "attn.in_proj_weight": tuple(f"attn.{which}_proj_weight" for which in "qkv"),
}

_PLACES = KeyMap(
    framework="cvlab-kaist/CAT-Seg",
    stem={name: f"{_VISUAL}.{name}" for name in _VISION},
    stacks=(BlockStack(f"{_VISUAL}.transformer.resblocks", _PARTS),),
    marks=(f"{_PREDICTOR}.transformer", "upsample1", "upsample2"),
    activations=(f"{_VISUAL}.transformer.resblocks.0.mlp.gelu",),
    text=clip_text(_CLIP, _PARTS),
)

_PROTECTS = {
    "residual width": "upsample1 and upsample2 read the stream behind two blocks (hooks)",
    "depth": "the hooks count blocks, and the last one is run by a way of its own (forward_dense)",
    "projection": "the cost volume compares it with text embeddings of the dense width",
    POSITIONS: "the framework interpolates them itself, from the grid of CLIP's own resolution",
}


def _inputs(model: Any) -> Mapping[str, Any]:
    """One image of the size that CLIP reads here; the texts are the framework's own classes."""
    height, width = model.clip_resolution
    return picture_of(height, width)


@TARGETS.register("cat-seg")
def cat_seg() -> TableTarget:
    """CAT-Seg on OpenAI's ViTs: live models and checkpoints, tuned weights cut by the mask."""
    return TableTarget(
        name="cat-seg",
        framework="cvlab-kaist/CAT-Seg at 6d3a188 (detectron2, its own copy of CLIP)",
        places=_PLACES,
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
