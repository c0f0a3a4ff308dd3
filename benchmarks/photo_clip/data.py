"""Photographs with labels, cut into augmented crops on the fly.

The data is read from a folder that is not part of the project: ``msrc/``, ``camvid/``,
``coco128/``, each with ``images/``, ``labels/`` and ``classes.json``, and ``text/*.npz`` with
embeddings by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import PATCH, PREPROCESS_CFG, SIZE
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

WORK = (240, 336)
"""Height and width in which pictures are kept; all are squashed to it."""
VOID = -1
SETS = {
    "msrc": ("msrc", "train.txt", 2.0),
    "coco": ("coco128", None, 1.0),
    "camvid": ("camvid/train", None, 0.7),
}
"""Folder, list of stems, and how often a picture is drawn relative to the others' pictures."""


@dataclass(frozen=True, eq=False)
class Photos:
    """All training pictures in memory.

    Attributes:
        images: uint8 [N, 3, H, W].
        labels: int16 [N, H, W], rows of ``embeddings``, `VOID` where nothing is known.
        origin: int64 [N]: which data set.
        classes: bool [sets, K]: the classes of each data set.
        names: K prompt names.
        embeddings: float32 [K, 512], unit length.
        weights: float64 [N], how often each is drawn.
    """

    images: Tensor
    labels: Tensor
    origin: Tensor
    classes: Tensor
    names: tuple[str, ...]
    embeddings: Tensor
    weights: NDArray[np.float64]


def read_photos(root: Path) -> Photos:
    """Reads the training pictures under ``root``; no test or validation picture is opened."""
    file = np.load(next((root / "text").glob("*.npz")))
    known = {str(n): i for i, n in enumerate(file["names"])}
    names: dict[str, int] = {}
    images, labels, origin, weights = [], [], [], []
    members: list[set[int]] = []
    for number, (folder, listing, often) in enumerate(SETS.values()):
        base = root / folder
        described = next(
            p for p in (base / "classes.json", base.parent / "classes.json") if p.exists()
        )
        spec = json.loads(described.read_text())
        lookup = np.full(256, VOID, np.int16)
        for key, name in spec["classes"].items():
            prompt = spec["aliases"].get(name, name)
            if prompt in known:
                lookup[int(key)] = names.setdefault(prompt, len(names))
        members.append({int(i) for i in lookup if i != VOID})
        stems = (base / listing).read_text().split() if listing else None
        for path in sorted((base / "images").iterdir()):
            if stems is not None and path.stem not in stems:
                continue
            picture = Image.open(path).convert("RGB").resize(WORK[::-1], Image.Resampling.BICUBIC)
            label = Image.open(base / "labels" / f"{path.stem}.png").resize(
                WORK[::-1], Image.Resampling.NEAREST
            )
            images.append(np.asarray(picture).transpose(2, 0, 1))
            labels.append(lookup[np.asarray(label)])
            origin.append(number)
            weights.append(often)
    classes = torch.zeros(len(members), len(names), dtype=torch.bool)
    for number, ids in enumerate(members):
        classes[number, sorted(ids)] = True
    rows = torch.from_numpy(file["emb"].astype(np.float32))[[known[n] for n in names]]
    share = np.array(weights)
    return Photos(
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.stack(labels)),
        torch.tensor(origin),
        classes,
        tuple(names),
        F.normalize(rows, dim=1),
        share / share.sum(),
    )


@dataclass(frozen=True, eq=False)
class Batch:
    """Augmented crops.

    Attributes:
        images: float32 [B, 3, S, S], normalised.
        labels: int64 [B, S, S].
        rows: int64 [B], which pictures.
        grid: float32 [B, S, S, 2], where each pixel came from, as ``grid_sample`` wants it, before
            anything was pasted.
        pastes: what was pasted from crop to crop, as :func:`paste` takes it.
        allowed: bool [B, K], the classes of the data sets that a crop's pixels come from.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    grid: Tensor
    pastes: tuple[tuple[int, int, int, int], ...]
    allowed: Tensor


def paste(maps: Tensor, pastes: Sequence[tuple[int, int, int, int]]) -> Tensor:
    """Copies rectangles from each map to the one before it in the batch (CutMix, Yun et al. 2019).

    Args:
        maps: shape (B, ..., H, W).
        pastes: top, left, bottom, right of each map's rectangle, in patches; empty for none.
    """
    pasted, scale = maps.clone(), maps.shape[-1] // (SIZE // PATCH)
    for i, (top, left, bottom, right) in enumerate(pastes):
        y, x = slice(top * scale, bottom * scale), slice(left * scale, right * scale)
        pasted[i - 1, ..., y, x] = maps[i, ..., y, x]
    return pasted


def batch(photos: Photos, step: int, size: int, seed: int) -> Batch:
    """The batch of a step: a pure function of step, size and seed.

    Crops of 30% to 100% of the picture with other aspects, flips, small turns, changes of
    brightness, contrast, saturation and single channels, and rectangles of other crops.
    """
    rng = np.random.default_rng((seed, 3, step))
    rows = torch.from_numpy(rng.choice(len(photos.images), size, p=photos.weights))
    theta = torch.from_numpy(np.stack([_affine(rng) for _ in range(size)])).float()
    grid = F.affine_grid(theta, [size, 3, SIZE, SIZE], align_corners=False)
    images = photos.images[rows].float() / 255.0
    images = F.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    labels = photos.labels[rows][:, None].float() - VOID
    labels = F.grid_sample(labels, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    pastes = tuple(_rectangle(rng) for _ in range(size))
    images, labels = paste(_coloured(images, rng), pastes), paste(labels[:, 0], pastes)
    allowed = photos.classes[photos.origin[rows]]
    pasted = torch.tensor([bottom > top for top, _, bottom, _ in pastes])
    allowed = allowed | (allowed & pasted[:, None]).roll(-1, 0)
    return Batch(normalised(images), labels.long() + VOID, rows, grid, pastes, allowed)


def _rectangle(rng: np.random.Generator) -> tuple[int, int, int, int]:
    """In half of the cases a rectangle of up to half of the crop, in patches; else an empty one."""
    if rng.random() < 0.5:
        return 0, 0, 0, 0
    side = SIZE // PATCH
    height, width = rng.integers(side // 4, 3 * side // 4 + 1, 2)
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    return int(top), int(left), int(top + height), int(left + width)


def _affine(rng: np.random.Generator) -> NDArray[np.float64]:
    area, aspect = rng.uniform(0.3, 1.0), np.exp(rng.uniform(-0.25, 0.25))
    height, width = min(1.0, np.sqrt(area / aspect)), min(1.0, np.sqrt(area * aspect))
    y, x = rng.uniform(height - 1, 1 - height), rng.uniform(width - 1, 1 - width)
    turn = np.deg2rad(rng.normal(0, 5))
    flip = -1.0 if rng.random() < 0.5 else 1.0
    cos, sin = np.cos(turn), np.sin(turn)
    return np.array([[flip * width * cos, -width * sin, x], [flip * height * sin, height * cos, y]])


def _coloured(images: Tensor, rng: np.random.Generator) -> Tensor:
    count = len(images)

    def draw(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (count, channels, 1, 1))).float()

    images = images * draw(0.7, 1.3) * draw(0.93, 1.07, 3)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * draw(0.7, 1.3)
    grey = images.mean(1, keepdim=True)
    return (grey + (images - grey) * draw(0.5, 1.4)).clamp(0, 1)


def normalised(images: Tensor) -> Tensor:
    """Pictures in 0..1 [B, 3, H, W] as the tower takes them."""
    mean = torch.tensor(PREPROCESS_CFG["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(PREPROCESS_CFG["std"]).view(1, 3, 1, 1)
    return (images - mean) / std
