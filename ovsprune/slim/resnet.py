"""CLIP's residual network with a width of its own in every inner convolution.

Parameter names are those of open_clip's ``ModifiedResNet``, and with the same weights so are the
outputs. Other input sizes than the native one work: the attention pool's positions are
interpolated as a vision transformer's are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.core.errors import OptionError
from ovsprune.slim.vit import resize_positions

__all__ = ["STRIDE", "AttentionPool", "Bottleneck", "ModifiedResNet"]

STRIDE = 32
"""Pixels of one position of the last stage."""


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut; where it strides, both average first.

    Args:
        inputs: Channels of the stream before it.
        first: Channels of the first convolution.
        second: Channels of the second.
        outputs: Channels of the stream after it.
        stride: 1 or 2.
        shortcut: Whether the shortcut has a convolution.
    """

    def __init__(
        self, inputs: int, first: int, second: int, outputs: int, stride: int, shortcut: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, first, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.act2 = nn.ReLU()
        self.avgpool: nn.Module = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(second, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.act3 = nn.ReLU()
        self.downsample: nn.Module | None = None
        if shortcut:
            parts: list[tuple[str, nn.Module]] = [
                ("-1", nn.AvgPool2d(stride)),
                ("0", nn.Conv2d(inputs, outputs, 1, bias=False)),
                ("1", nn.BatchNorm2d(outputs)),
            ]
            self.downsample = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H // stride, W // stride]."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.avgpool(self.act2(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.act3(y + (x if self.downsample is None else self.downsample(x)))
        return out


class AttentionPool(nn.Module):
    """Attention of the mean over all positions and itself; the mean token's output alone is made.

    Args:
        width: Of what is pooled.
        heads: Of the attention.
        outputs: C, the width of the embedding.
        grid_size: Rows and columns of the native input.
    """

    def __init__(self, width: int, heads: int, outputs: int, grid_size: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads, self.grid_size = heads, grid_size
        tokens = grid_size[0] * grid_size[1] + 1
        self.positional_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, h, w] -> [B, C]."""
        grid = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
        positions = resize_positions(self.positional_embedding, self.grid_size, grid)
        tokens = tokens + positions.to(tokens.dtype)
        query, key, value = (
            projection(part).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection, part in (
                (self.q_proj, tokens[:, :1]),
                (self.k_proj, tokens),
                (self.v_proj, tokens),
            )
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.c_proj(mixed.transpose(1, 2).flatten(1))
        return out

    def dense(self, x: Tensor) -> Tensor:
        """Each position on its own, [B, width, h, w] -> [B, C, h, w]: values and projection."""
        out: Tensor = self.c_proj(self.v_proj(x.movedim(1, -1))).movedim(-1, 1)
        return out


class ModifiedResNet(nn.Module):
    """CLIP's residual network, to be filled with weights.

    Args:
        stem: Channels of the three convolutions of the stem.
        stages: Of every stage, of every bottleneck, the channels of both inner convolutions.
        widths: Channels after every stage.
        shortcuts: Dotted names of the bottlenecks whose shortcut has a convolution.
        heads: Of the attention pool.
        output_dim: C, the width of the embedding that images and texts share.
        grid_size: Rows and columns of the last stage for the native input.
    """

    def __init__(
        self,
        *,
        stem: tuple[int, int, int],
        stages: Sequence[Sequence[tuple[int, int]]],
        widths: Sequence[int],
        shortcuts: frozenset[str],
        heads: int,
        output_dim: int,
        grid_size: tuple[int, int],
    ) -> None:
        super().__init__()
        inputs = 3
        for i, width in enumerate(stem, 1):
            step = 2 if i == 1 else 1
            self.add_module(f"conv{i}", nn.Conv2d(inputs, width, 3, step, padding=1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(width))
            self.add_module(f"act{i}", nn.ReLU())
            inputs = width
        self.avgpool = nn.AvgPool2d(2)
        self.stages = [f"layer{i}" for i in range(1, len(stages) + 1)]
        for name, blocks, width in zip(self.stages, stages, widths, strict=True):
            stage = nn.Sequential()
            for j, (first, second) in enumerate(blocks):
                step = 2 if j == 0 and name != self.stages[0] else 1
                path = f"{name}.{j}" in shortcuts
                stage.append(Bottleneck(inputs, first, second, width, step, path))
                inputs = width
            self.add_module(name, stage)
        self.attnpool = AttentionPool(inputs, heads, output_dim, grid_size)

    def forward(self, images: Tensor) -> Tensor:
        """Embedding of each picture, [B, 3, H, W] -> [B, C].

        Raises:
            OptionError: The pictures are smaller than one position or of another shape.
        """
        out: Tensor = self.attnpool(self.features(images))
        return out

    def dense(self, images: Tensor) -> Tensor:
        """Embedding of each position, [B, 3, H, W] -> [B, C, H // 32, W // 32].

        The attention pool's value and output projections of each position of the last stage,
        without the mean token and without positions (Zhou, Loy and Dai, ECCV 2022, section 3.3).

        Raises:
            OptionError: The pictures are smaller than one position or of another shape.
        """
        out: Tensor = self.attnpool.dense(self.features(images))
        return out

    def features(self, images: Tensor) -> Tensor:
        """What the last stage gives, [B, width, H // 32, W // 32].

        Raises:
            OptionError: The pictures are smaller than one position or of another shape.
        """
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < STRIDE:
            raise OptionError(
                f"images have shape {tuple(images.shape)}, expected [B, 3, H, W] with H and W of "
                f"at least {STRIDE} pixels"
            )
        x: Tensor = images
        stem = [f"{part}{i}" for i in range(1, 4) for part in ("conv", "bn", "act")]
        for name in (*stem, "avgpool", *self.stages):
            x = self.get_submodule(name)(x)
        return x
