"""torchvision's DeepLabV3 on CLIP's ResNet, a class being the direction of its text.

As torchvision does it for its own ResNets, the last stage is dilated and does not stride. CLIP's
tower, with its own weights, is inside whole, attention pool and all; the pool is not run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATES = (2, 4, 6)
"""Of the pyramid: torchvision's (12, 24, 36) are for maps six times as wide as these."""


class Backbone(nn.Module):
    """What torchvision's model asks of one: pictures to a mapping of features."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.visual = tower

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        net = self.visual
        x = net.stem(images.contiguous(memory_format=torch.channels_last))
        return {"out": net.layer4(net.layer3(net.layer2(net.layer1(x))))}


class DeepLab(nn.Module):
    """Dense embeddings that are compared with the texts."""

    target, frozen = "generic", False

    def __init__(self, tower: Any, seed: int) -> None:
        super().__init__()
        from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabV3

        _dilate(tower.layer4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Sequential(
                ASPP(768, RATES, 96),
                nn.Conv2d(96, 96, 3, padding=1, bias=False),
                nn.BatchNorm2d(96),
                nn.ReLU(),
                nn.Conv2d(96, 512, 1),
            )
        self.model = DeepLabV3(Backbone(tower), head)
        self.scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def scores(self, images: Tensor, text: Tensor) -> Tensor:
        """Scaled cosines [B, K, H / 16, W / 16]."""
        dense = self.model.classifier(self.model.backbone(images)["out"])
        cosines = torch.einsum("bchw,kc->bkhw", F.normalize(dense, dim=1), text)
        return self.scale.exp().clamp(max=100.0) * cosines

    def loss(self, images: Tensor, labels: Tensor, text: Tensor) -> Tensor:
        labels = labels[:, 2::4, 2::4]
        scores = F.interpolate(
            self.scores(images, text), size=labels.shape[-2:], mode="bilinear", align_corners=False
        )
        return F.cross_entropy(scores, labels, ignore_index=-1)

    def predict(self, images: Tensor, text: Tensor) -> Tensor:
        return self.scores(images, text)


def _dilate(stage: Any) -> None:
    """Dilation in the place of the stride, as torchvision's ``replace_stride_with_dilation``."""
    for i, block in enumerate(stage):
        if i == 0:
            block.avgpool = nn.Identity()
            block.downsample[0] = nn.Identity()
        else:
            block.conv2.dilation = block.conv2.padding = (2, 2)


def build(tower: Any, classes: int, seed: int) -> DeepLab:
    return DeepLab(tower, seed)
