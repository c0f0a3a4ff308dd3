"""Small modules with the names of FC-CLIP and Mask2Former, for tests without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ovsprune.targets import TARGETS
from tests.targets.by_hand import lively, lively_convnext, lively_resnet, put

EMBED = 24
RESNET = [1, 1, 1, 1]


def tower_of(kind: str) -> dict[str, Tensor]:
    """Build a tower for the models of this file."""
    return lively_convnext() if kind == "convnext" else lively_resnet(RESNET)


def _resnet(side: int = 64) -> nn.Module:
    from open_clip.modified_resnet import ModifiedResNet

    return ModifiedResNet(RESNET, EMBED, 4, side, 8)


def _convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    trunk = ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=0)
    return nn.ModuleDict({"trunk": trunk, "head": nn.ModuleDict({"proj": _projection()})})


def _projection() -> nn.Module:
    return nn.Linear(32, 16, bias=False)


class _Backbone(nn.Module):
    """Backbone of FC-CLIP: a CLIP, and an ``encode_text`` for old versions of open_clip."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        from open_clip.model import CLIP

        vision = {"layers": RESNET, "width": 8, "image_size": 64}
        text = {"width": 16, "heads": 2, "layers": 1, "vocab_size": 32, "context_length": 8}
        self.kind, self.clip_model = kind, CLIP(EMBED, vision, text)
        if kind == "convnext":
            self.clip_model.visual = _convnext()
        self.dim_latent = EMBED

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        raise RuntimeError("the shape of the 2D attn_mask is not as it was")

    def forward(self, images: Tensor) -> list[Tensor]:
        visual: Any = self.clip_model.visual
        if self.kind == "convnext":
            x, stages = visual["trunk"].stem(images), visual["trunk"].stages
        else:
            x, stages = visual.stem(images), [getattr(visual, f"layer{i}") for i in range(1, 5)]
        found = []
        for stage in stages:
            x = stage(x)
            found.append(x)
        return found


def _head(widths: list[int]) -> nn.Module:
    head = nn.Module()
    head.pixel_decoder = nn.ModuleList(nn.Conv2d(width, EMBED, 1) for width in widths)
    head.predictor = nn.Linear(EMBED, 3)
    return head


class MiniFcClip(nn.Module):
    """Model with FC-CLIP's names; masks are the mean of the pixel decoder's outputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.backbone = _Backbone(kind)
        widths = [8, 16, 24, 32] if kind == "convnext" else [32, 64, 128, 256]
        self.sem_seg_head: Any = _head(widths)
        self.void_embedding = nn.Embedding(1, EMBED)
        self.test_num_templates = [1, 2]
        self.test_text_classifier: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.void_embedding.weight.device

    @classmethod
    def with_tower(cls, kind: str, tower: Mapping[str, Tensor]) -> MiniFcClip:
        torch.manual_seed(3)
        model = cls(kind)
        put(model, tower, TARGETS.get("fc-clip").layout(model.state_dict(), 0))
        return model.eval()

    def forward(self, batched_inputs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        if self.test_text_classifier is None:
            text = torch.zeros(3, 8, dtype=torch.int64, device=self.device)
            self.test_text_classifier = self.backbone.encode_text(text)
        features = self.backbone(torch.stack([p["image"] for p in batched_inputs]))
        side = features[0].shape[-2:]
        mixed = sum(
            functional.interpolate(layer(x), side)
            for layer, x in zip(self.sem_seg_head.pixel_decoder, features, strict=True)
        )
        scores = torch.einsum("bchw,kc->bkhw", mixed, self.test_text_classifier)
        return [{"sem_seg": picture} for picture in scores]


class _Frozen(nn.Module):
    """Norm without parameters, like detectron2's FrozenBatchNorm2d."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((width,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        given: Any = (self.running_mean, self.running_var, self.weight, self.bias)
        return functional.batch_norm(x, *given)


class _Conv(nn.Conv2d):
    """Convolution that contains its norm."""

    def __init__(self, made: int, width: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(made, width, kernel, stride, kernel // 2, bias=False)
        self.norm = _Frozen(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class _Bottleneck(nn.Module):
    def __init__(self, wide: int, width: int, stride: int) -> None:
        super().__init__()
        self.shortcut = _Conv(wide, 4 * width, 1, stride)
        self.conv1, self.conv2 = _Conv(wide, width), _Conv(width, width, 3, stride)
        self.conv3 = _Conv(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.conv2(functional.relu(self.conv1(x))))
        return functional.relu(self.conv3(inner) + self.shortcut(x))


class _Plain(nn.Module):
    """Copy of detectron2's ResNet of bottlenecks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = _Conv(3, 8, 7, 2)
        for i, width in enumerate((8, 16, 32, 64)):
            block = _Bottleneck(8 if i == 0 else 2 * width, width, 1 if i == 0 else 2)
            setattr(self, f"res{i + 2}", nn.Sequential(block))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = [functional.relu(self.stem.conv1(x))]
        for i in range(2, 6):
            found.append(getattr(self, f"res{i}")(found[-1]))
        return found[1:]


class MiniMask2Former(nn.Module):
    """Model with Mask2Former's names, on CLIP's or detectron2's ResNet."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        backbone: Any = _Plain() if kind == "plain" else _resnet(96)
        if kind != "plain":
            for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
                stage[0].relu = stage[0].act1
        if kind == "unpooled":
            backbone.attnpool = None
        self.kind, self.backbone = kind, backbone
        self.sem_seg_head: Any = _head([32, 64, 128, 256])

    @classmethod
    def lively(cls, kind: str, seed: int = 3) -> MiniMask2Former:
        torch.manual_seed(seed)
        model = cls(kind)
        lively(model.backbone, seed)
        return model.eval()

    def forward(self, batched_inputs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        backbone: Any = self.backbone
        images = torch.stack([picture["image"] for picture in batched_inputs])
        if self.kind == "plain":
            features = backbone(images)
        else:
            features, x = [], backbone.stem(images)
            for i in range(1, 5):
                x = getattr(backbone, f"layer{i}")(x)
                features.append(x)
        side = features[0].shape[-2:]
        mixed = sum(
            functional.interpolate(layer(x), side)
            for layer, x in zip(self.sem_seg_head.pixel_decoder, features, strict=True)
        )
        scores = self.sem_seg_head.predictor(mixed.movedim(1, -1)).movedim(-1, 1)
        return [{"sem_seg": picture} for picture in scores]


@torch.no_grad()
def run(model: nn.Module, side: int = 64) -> dict[str, Tensor]:
    """Return the output for two images of noise."""
    draw = torch.Generator().manual_seed(0)
    pictures = [{"image": torch.randn(3, side, side, generator=draw)} for _ in range(2)]
    return {"sem_seg": torch.stack([found["sem_seg"] for found in model(pictures)])}


def load_as_detectron2(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load like detectron2's checkpointer, which drops tensors of another shape."""
    own = model.state_dict()
    fits = {k: v for k, v in state.items() if k not in own or own[k].shape == v.shape}
    model.load_state_dict(fits, strict=False)
