"""Mask2Former (detectron2), with CLIP's residual network as OpenTrans has it, or a plain one."""

from __future__ import annotations

from dataclasses import replace

from ovsprune.targets import TARGETS
from ovsprune.targets.detectron2_rules import one_picture, script_for
from ovsprune.targets.framework import TableTarget
from ovsprune.targets.key_map import KeyMap

_STAGES = range(1, 5)
_STEM = tuple(f"{part}{i}" for part in ("conv", "bn") for i in (1, 2, 3))
_POOL_POSITIONS = "attnpool.positional_embedding"

# CLIPResNetWithAttention of OpenTrans keeps CLIP's names
_CLIP = KeyMap(
    framework="Mask2Former on a ResNet of bottlenecks",
    stem={
        name: f"backbone.{name}" for name in (*_STEM, *(f"layer{i}" for i in _STAGES), "attnpool")
    },
    marks=("sem_seg_head.pixel_decoder", "sem_seg_head.predictor"),
    stays={_POOL_POSITIONS: "the framework resizes its positions"},
    activations=("backbone.layer1.0.relu",),
)
# OpenTrans takes the attention pool out where it does not read it
_CLIP_UNPOOLED = replace(
    _CLIP,
    stem={name: place for name, place in _CLIP.stem.items() if name != "attnpool"},
    stays={},
    absent={"attnpool": "the framework took its attention pool out"},
)
# detectron2's own ResNet, with the norms inside the convolutions
_PLAIN = replace(
    _CLIP,
    stem={
        place: f"backbone.res{i + 1}{path}"
        for i in _STAGES
        for place, path in (
            *((f"layer{i}.*.conv{k}", f".*.conv{k}") for k in (1, 2, 3)),
            *((f"layer{i}.*.bn{k}", f".*.conv{k}.norm") for k in (1, 2, 3)),
            (f"layer{i}.*.downsample.0", ".*.shortcut"),
            (f"layer{i}.*.downsample.1", ".*.shortcut.norm"),
        )
    },
    stays={},
    absent={
        **dict.fromkeys(_STEM, "detectron2's stem is one convolution and a max pool"),
        "attnpool": "the pixel decoder reads the last stage itself; there is no attention pool",
    },
    activations=(),  # detectron2 calls the ReLU as a function
    mask_only=(
        "detectron2's ResNet has another stem than CLIP's and strides by convolutions, not by "
        "means, so CLIP's weights would compute something else in it"
    ),
)


@TARGETS.register("mask2former")
def mask2former() -> TableTarget:
    """Mask2Former on CLIP's ResNet (as OpenTrans has it) or detectron2's; live and on disk."""
    return TableTarget(
        name="mask2former",
        framework="facebookresearch/Mask2Former at 9b0651c, and its fork in OpenTrans at aea33ff",
        places=_CLIP,
        builds=(_CLIP_UNPOOLED, _PLAIN),
        takes=("resnet",),
        protects={
            "stage outputs": "the pixel decoder reads all four, at widths that the code names",
            "stem": "its channels are the first stage's stream",
            "attnpool": "its heads are a number in the code, and its output is compared with text",
            "depth": "the features are those of four stages",
        },
        trainable=("backbone.*", "sem_seg_head.*"),
        script=script_for("Mask2Former (or of OpenTrans)"),
        inputs=one_picture,
    )
