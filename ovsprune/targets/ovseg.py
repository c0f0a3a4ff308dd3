"""OVSeg (facebookresearch/ov-seg, detectron2): MaskFormer, and a CLIP tuned for masked regions."""

from __future__ import annotations

from ovsprune.targets.detectron2_rules import script_for
from ovsprune.targets.framework import TableTarget
from ovsprune.targets.key_map import KeyMap
from ovsprune.targets.layout import (
    BLOCK_PARTS,
    POSITIONS,
    VIT_STEM,
    BlockStack,
    clip_text,
    under,
)
from ovsprune.targets.registry import TARGETS

_CLIP = "clip_adapter.clip_model"
_VISUAL = f"{_CLIP}.visual"

_KEY_MAP = KeyMap(
    framework="facebookresearch/ov-seg",
    stem=under(_VISUAL, VIT_STEM),
    stacks=(BlockStack(f"{_VISUAL}.transformer.resblocks", BLOCK_PARTS),),
    marks=("clip_adapter.non_object_embedding", "sem_seg_head.predictor"),
    activations=(f"{_VISUAL}.transformer.resblocks.0.mlp.gelu",),
    text=clip_text(_CLIP),
)

_ENDING = """\
# Build with the dense CLIP (MODEL.CLIP_ADAPTER.CLIP_MODEL_NAME): OVSeg's loader derives the
# architecture from the widths in that file. Leave MODEL.WEIGHTS empty: detectron2 skips tensors
# with another shape and only logs a warning. Checkpoints that this training saves are slim and
# load as usual (MODEL.WEIGHTS, --resume).
"""


@TARGETS.register("ovseg")
def ovseg() -> TableTarget:
    """Target for OVSeg; live models and checkpoints. Its finetuned CLIP is cut by the mask."""
    return TableTarget(
        name="ovseg",
        framework="facebookresearch/ov-seg at 36f49d4 (detectron2, its own fork of CLIP)",
        key_map=_KEY_MAP,
        takes=("vit",),
        protects={
            "residual width": "mask_embedding replaces its tokens, before and between blocks",
            "depth": "mask_embedding counts the first blocks",
            "projection": "regions are compared with text embeddings of the dense width",
            POSITIONS: "regions and mask_embedding use the patch grid of CLIP's native resolution",
        },
        trainable=(
            "backbone.*",
            "sem_seg_head.*",
            "clip_adapter.non_object_embedding",
            f"{_VISUAL}.*",
        ),
        script=script_for("OVSeg", ending=_ENDING),
    )
