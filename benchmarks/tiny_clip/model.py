"""The architecture of ``tiny``, as an open_clip configuration, and the reading of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from torch import Tensor

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 96,
        "patch_size": 8,
        "width": 192,
        "layers": 6,
        "head_width": 16,
        "mlp_ratio": 4.0,
    },
    "text_cfg": {
        "context_length": 20,
        "vocab_size": 49408,
        "width": 64,
        "heads": 4,
        "layers": 2,
    },
}

PREPROCESS_CFG: dict[str, Any] = {
    "mean": list(OPENAI_DATASET_MEAN),
    "std": list(OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}

_SHARPNESS = 3.0


def build() -> CLIP:
    """An untrained tiny CLIP (GELU, not QuickGELU), its image tower initialised to look around.

    A small ViT learns shapes late from open_clip's own initialisation. Here positions start as
    two-dimensional sines, and four heads of each of the first four blocks start by attending to
    the patch at a fixed offset, as in a convolution ("Structured Initialization for Attention in
    Vision Transformers", Zheng et al., 2024). All of it is trained.
    """
    model = CLIP(**MODEL_CFG)
    visual = model.visual
    width, side = visual.positional_embedding.shape[1], visual.grid_size[0]
    with torch.no_grad():
        visual.positional_embedding[1:] = _sines(side, _rates(width))
        for number, block in enumerate(visual.transformer.resblocks[:4]):
            reach = 1 + number // 2
            straight = ((0, reach), (0, -reach), (reach, 0), (-reach, 0))
            slanted = ((reach, reach), (reach, -reach), (-reach, reach), (-reach, -reach))
            for head, offset in enumerate(slanted if number % 2 else straight):
                _look_at(block.attn, head, offset)
    return model


def _rates(width: int) -> Tensor:
    return torch.exp(torch.linspace(math.log(0.15), math.log(1.6), width // 4))


def _sines(side: int, rates: Tensor) -> Tensor:
    """Positions of shape (side * side, 4 * rates): sines and cosines of rows, then columns."""
    angles = torch.arange(side)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows = line[:, None].expand(side, side, -1)
    columns = line[None].expand(side, side, -1)
    return torch.cat([rows, columns], 2).reshape(side * side, -1)


def _look_at(attention: torch.nn.MultiheadAttention, head: int, offset: tuple[int, int]) -> None:
    """Makes a head attend to the patch at an offset of (rows, columns), by position alone."""
    width = attention.embed_dim
    each, count = width // attention.num_heads, width // 4
    rates = _rates(width)
    chosen = torch.linspace(count * 0.4, count - 1, each // 4).round().long()
    query, key = torch.zeros(each, width), torch.zeros(each, width)
    row = 0
    for axis, shift in enumerate(offset):
        base = axis * 2 * count
        for i in chosen.tolist():
            sine, cosine = base + i, base + count + i
            turn = float(rates[i]) * shift
            key[row, sine] = key[row + 1, cosine] = 1.0
            # sin(a + t) and cos(a + t) of the query's own angle a
            query[row, sine], query[row, cosine] = math.cos(turn), math.sin(turn)
            query[row + 1, cosine], query[row + 1, sine] = math.cos(turn), -math.sin(turn)
            row += 2
    rows = slice(head * each, (head + 1) * each)
    attention.in_proj_weight[:width][rows] = _SHARPNESS * query
    attention.in_proj_weight[width : 2 * width][rows] = _SHARPNESS * key


def encode_dense(model: CLIP, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled and dense features in the joint space.

    Args:
        model: the CLIP.
        images: normalised pictures, shape (B, 3, H, W).

    Returns:
        Pooled features of shape (B, C), and dense ones of shape (B, C, h, w), both unit length
        along C.
    """
    visual = model.visual
    visual.output_tokens = True
    try:
        pooled, tokens = visual(images)
    finally:
        visual.output_tokens = False
    dense = torch.nn.functional.normalize(tokens @ visual.proj, dim=-1)
    side = images.shape[-1] // visual.patch_size[0]
    dense = dense.transpose(1, 2).reshape(images.shape[0], -1, side, side)
    return torch.nn.functional.normalize(pooled, dim=-1), dense
