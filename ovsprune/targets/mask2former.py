"""Mask2Former (detectron2) on the CLIP ResNet of OpenTrans, or on detectron2's ResNet."""

from __future__ import annotations

from dataclasses import replace

from ovsprune.targets.detectron2_rules import image_inputs, script_for
from ovsprune.targets.framework import TableTarget
from ovsprune.targets.key_map import KeyMap
from ovsprune.targets.layout import under
from ovsprune.targets.registry import TARGETS

_STAGES = range(1, 5)
_STEM = tuple(f"{part}{i}" for part in ("conv", "bn") for i in (1, 2, 3))

# CLIPResNetWithAttention of OpenTrans keeps CLIP's names
_CLIP = KeyMap(
    framework="Mask2Former on a ResNet of bottlenecks",
    stem=under("backbone", (*_STEM, *(f"layer{i}" for i in _STAGES), "attnpool")),
    marks=("sem_seg_head.pixel_decoder", "sem_seg_head.predictor"),
    stays={"attnpool.positional_embedding": "the framework resizes its positions"},
    activations=("backbone.layer1.0.relu",),
)
# OpenTrans removes the attention pool if it does not read it
_CLIP_UNPOOLED = replace(
    _CLIP,
    stem={name: path for name, path in _CLIP.stem.items() if name != "attnpool"},
    stays={},
    absent={"attnpool": "the framework removed its attention pool"},
)
# detectron2's ResNet, with the norms inside the convolutions
_PLAIN = replace(
    _CLIP,
    stem={
        f"layer{i}.*.{name}": f"backbone.res{i + 1}.*.{path}"
        for i in _STAGES
        for name, path in (
            *((f"conv{k}", f"conv{k}") for k in (1, 2, 3)),
            *((f"bn{k}", f"conv{k}.norm") for k in (1, 2, 3)),
            ("downsample.0", "shortcut"),
            ("downsample.1", "shortcut.norm"),
        )
    },
    stays={},
    absent={
        **dict.fromkeys(_STEM, "detectron2's stem is one convolution and a max pool"),
        "attnpool": "the pixel decoder reads the last stage; there is no attention pool",
    },
    activations=(),  # detectron2 calls the ReLU as a function, so there is no module to check
    mask_only=(
        "detectron2's ResNet has another stem than CLIP's and downsamples by strided "
        "convolutions, not by pooling, so CLIP's weights would compute another function in it"
    ),
)


@TARGETS.register("mask2former")
def mask2former() -> TableTarget:
    """Target for Mask2Former on CLIP's ResNet (OpenTrans) or detectron2's ResNet."""
    return TableTarget(
        name="mask2former",
        framework="facebookresearch/Mask2Former at 9b0651c, and its fork in OpenTrans at aea33ff",
        key_map=_CLIP,
        variants=(_CLIP_UNPOOLED, _PLAIN),
        takes=("resnet",),
        protects={
            "stage outputs": "the pixel decoder reads all four, at widths that the code sets",
            "stem": "its channels are the residual stream of the first stage",
            "attnpool": "the code sets its number of heads, and its output is compared with text",
            "depth": "the pixel decoder reads four stages",
        },
        trainable=("backbone.*", "sem_seg_head.*"),
        script=script_for("Mask2Former (or of OpenTrans)"),
        inputs=image_inputs,
    )
