"""The architecture of ``photo``: an open_clip VisionTransformer whose tokens speak CLIP's 512."""

from __future__ import annotations

import math
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from torch import Tensor

SIZE, PATCH = 192, 16
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {
        "image_size": SIZE,
        "patch_size": PATCH,
        "width": 192,
        "layers": 8,
        "head_width": 32,
        "mlp_ratio": 3.0,
    },
    # Never trained and never saved: the text embeddings are CLIP's own, from a file.
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1},
}
PREPROCESS_CFG: dict[str, Any] = {
    "size": SIZE,
    "mean": list(OPENAI_DATASET_MEAN),
    "std": list(OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def build() -> CLIP:
    """An untrained model, its positions two-dimensional sines (they are trained all the same)."""
    model = CLIP(**MODEL_CFG)
    visual = model.visual
    width, side = visual.positional_embedding.shape[1], visual.grid_size[0]
    rates = torch.exp(torch.linspace(math.log(0.15), math.log(1.6), width // 4))
    angles = torch.arange(side)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows = line[:, None].expand(side, side, -1)
    columns = line[None].expand(side, side, -1)
    with torch.no_grad():
        visual.positional_embedding[1:] = 0.3 * torch.cat([rows, columns], 2).flatten(0, 1)
    return model


def encode(model: CLIP, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the image tower gives.

    Args:
        model: the model.
        images: normalised pictures, shape (B, 3, H, W).

    Returns:
        Pooled features of shape (B, 512); dense ones of shape (B, 512, h, w), both unit length
        along the features; and the tokens before the projection, shape (B, h * w, width).
    """
    visual = model.visual
    visual.output_tokens = True
    try:
        pooled, tokens = visual(images)
    finally:
        visual.output_tokens = False
    dense = torch.nn.functional.normalize(tokens @ visual.proj, dim=-1)
    side = images.shape[-1] // PATCH
    dense = dense.transpose(1, 2).reshape(images.shape[0], -1, side, side)
    return torch.nn.functional.normalize(pooled, dim=-1), dense, tokens
