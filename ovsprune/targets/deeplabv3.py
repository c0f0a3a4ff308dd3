"""torchvision's DeepLabV3 with the mask of CLIP's ResNet: ``deeplabv3_resnet50`` and ``101``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ovsprune.targets import TARGETS
from ovsprune.targets.framework import TableTarget
from ovsprune.targets.key_map import KeyMap

_STAGES = tuple(f"layer{i}" for i in range(1, 5))
_STEM = "torchvision's stem is one convolution and a max pool, CLIP's three and a mean"

_PLACES = KeyMap(
    framework="torchvision's DeepLabV3 on a ResNet of bottlenecks",
    stem={stage: f"backbone.{stage}" for stage in _STAGES},
    marks=("classifier.0.convs", "classifier.0.project"),
    absent={
        **{f"{part}{i}": _STEM for part in ("conv", "bn") for i in (1, 2, 3)},
        "attnpool": "the ASPP reads the last stage itself; there is no attention pool",
    },
    activations=("backbone.layer1.0.relu",),
    mask_only=(
        "torchvision's ResNet has another stem than CLIP's and strides by convolutions, not by "
        "means, so CLIP's weights would compute something else in it"
    ),
)

_LINES = """\
# where the model is made: with the classes and the auxiliary head of the checkpoint
from torchvision.models.segmentation import deeplabv3_resnet50

import ovsprune.targets  # pip install --no-deps ovsprune

model = deeplabv3_resnet50(
    weights=None, weights_backbone=None, num_classes=21, aux_loss=True
)
ovsprune.targets.load_into(model, {output!r})  # slim modules, then every tensor

# Files that the training saves afterwards are slim and load as usual; a dense one is refused.
"""


def _inputs(model: Any) -> Mapping[str, Any]:
    """One picture of the size that torchvision's weights were trained and measured at."""
    return {"x": torch.zeros(1, 3, 520, 520)}


@TARGETS.register("deeplabv3")
def deeplabv3() -> TableTarget:
    """DeepLabV3 of torchvision: live models and checkpoints, cut by the mask of CLIP's ResNet."""
    return TableTarget(
        name="deeplabv3",
        framework="torchvision's deeplabv3_resnet50 and deeplabv3_resnet101",
        places=_PLACES,
        takes=("resnet",),
        protects={
            "stage outputs": "the ASPP reads the last stage, the auxiliary head the third",
            "stem": "its channels are the first stage's stream",
            "depth": "CLIP's mask says nothing of whole bottlenecks",
        },
        trainable=("backbone.layer*", "classifier.*", "aux_classifier.*"),
        script=_LINES,
        inputs=_inputs,
    )
