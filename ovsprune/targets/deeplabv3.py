"""DeepLabV3 of torchvision on ResNet-50 or 101; takes the mask of a CLIP ResNet."""

from __future__ import annotations

import torch

from ovsprune.targets.framework import TableTarget
from ovsprune.targets.key_map import KeyMap
from ovsprune.targets.layout import under
from ovsprune.targets.registry import TARGETS

_STEM = "torchvision's stem is one convolution and a max pool, CLIP's has three convolutions"

_KEY_MAP = KeyMap(
    framework="torchvision's DeepLabV3 on a ResNet of bottlenecks",
    stem=under("backbone", (f"layer{i}" for i in range(1, 5))),
    marks=("classifier.0.convs", "classifier.0.project"),
    absent={
        **{f"{part}{i}": _STEM for part in ("conv", "bn") for i in (1, 2, 3)},
        "attnpool": "the ASPP reads the last stage; there is no attention pool",
    },
    activations=("backbone.layer1.0.relu",),
    mask_only=(
        "torchvision's ResNet has another stem than CLIP's and downsamples by strided "
        "convolutions, not by pooling, so CLIP's weights would compute another function in it"
    ),
)

_SCRIPT = """\
# where the model is created; num_classes and aux_loss must be those of the checkpoint
from torchvision.models.segmentation import deeplabv3_resnet50

import ovsprune.targets  # pip install --no-deps ovsprune

model = deeplabv3_resnet50(
    weights=None, weights_backbone=None, num_classes=21, aux_loss=True
)
ovsprune.targets.load_into(model, {output!r})  # replaces modules, loads every tensor

# Checkpoints that the training saves afterwards are slim and load as usual; a dense one is refused.
"""


@TARGETS.register("deeplabv3")
def deeplabv3() -> TableTarget:
    """Target for DeepLabV3 of torchvision; live models and checkpoints."""
    return TableTarget(
        name="deeplabv3",
        framework="torchvision's deeplabv3_resnet50 and deeplabv3_resnet101",
        key_map=_KEY_MAP,
        takes=("resnet",),
        protects={
            "stage outputs": "the ASPP reads the last stage, the auxiliary head the third",
            "stem": "its channels are the residual stream of the first stage",
            "depth": "the mask of CLIP's ResNet has no entries for bottlenecks",
        },
        trainable=("backbone.layer*", "classifier.*", "aux_classifier.*"),
        script=_SCRIPT,
        # the size at which torchvision evaluates its weights
        inputs=lambda model: {"x": torch.zeros(1, 3, 520, 520)},
    )
