"""CLIP's residual network with individual widths for every inner convolution.

Parameter names are those of open_clip's ``ModifiedResNet``; with the same weights the outputs are
the same, too. Input sizes other than the native one are supported: the positions of the attention
pool are interpolated as those of a vision transformer.
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
"""Total stride of the network: input pixels per position of the last stage."""


class Bottleneck(nn.Module):
    """Bottleneck block: three convolutions with a shortcut.

    With stride 2, average pooling precedes the last convolution and that of the shortcut.

    Args:
        inputs: Channels of the residual stream before the block.
        first: Output channels of the first convolution.
        second: Output channels of the second convolution.
        outputs: Channels of the residual stream after the block.
        stride: 1 or 2.
        shortcut: True if the shortcut has a convolution, false if it is the identity.
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
            layers: list[tuple[str, nn.Module]] = [
                ("-1", nn.AvgPool2d(stride)),
                ("0", nn.Conv2d(inputs, outputs, 1, bias=False)),
                ("1", nn.BatchNorm2d(outputs)),
            ]
            self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] -> [B, outputs, H // stride, W // stride]."""
        y = self.act1(self.bn1(self.conv1(x)))  # [B, first, H, W]
        y = self.avgpool(self.act2(self.bn2(self.conv2(y))))  # [B, second, H // s, W // s]
        y = self.bn3(self.conv3(y))  # [B, outputs, H // s, W // s]
        out: Tensor = self.act3(y + (x if self.downsample is None else self.downsample(x)))
        return out


class AttentionPool(nn.Module):
    """Attention pool: the mean of all positions attends to itself and to all positions.

    Only the output of the mean token is computed.

    Args:
        width: D, the channels of the feature map.
        heads: Number of heads.
        outputs: C, the width of the embedding.
        grid_size: Rows and columns of the feature map for the native input.
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
        """Pool a feature map, [B, D, h, w] -> [B, C]."""
        grid = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)  # [B, h * w, D]
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)  # [B, 1 + h * w, D]
        positions = resize_positions(self.positional_embedding, self.grid_size, grid)
        tokens = tokens + positions.to(tokens.dtype)
        # each [B, heads, 1 or 1 + h * w, D / heads]
        query, key, value = (
            projection(inputs).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection, inputs in (
                (self.q_proj, tokens[:, :1]),
                (self.k_proj, tokens),
                (self.v_proj, tokens),
            )
        )
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, heads, 1, D / heads]
        out: Tensor = self.c_proj(mixed.transpose(1, 2).flatten(1))  # [B, C]
        return out

    def dense(self, x: Tensor) -> Tensor:
        """Project the value of each position, [B, D, h, w] -> [B, C, h, w], without attention."""
        out: Tensor = self.c_proj(self.v_proj(x.movedim(1, -1))).movedim(-1, 1)
        return out


class ModifiedResNet(nn.Module):
    """CLIP's residual network; weights are loaded afterwards.

    Args:
        stem: Channels of the three convolutions of the stem.
        stages: Channels of the two inner convolutions of each bottleneck, by stage.
        widths: Channels of the residual stream after each stage.
        shortcuts: Dotted names of the bottlenecks whose shortcut has a convolution.
        heads: Number of heads of the attention pool.
        output_dim: C, the width of the embedding shared by images and texts.
        grid_size: Rows and columns of the last feature map for the native input.
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
            stride = 2 if i == 1 else 1
            self.add_module(f"conv{i}", nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(width))
            self.add_module(f"act{i}", nn.ReLU())
            inputs = width
        self.avgpool = nn.AvgPool2d(2)
        self.stages = [f"layer{i}" for i in range(1, len(stages) + 1)]
        for name, blocks, width in zip(self.stages, stages, widths, strict=True):
            stage = nn.Sequential()
            for j, (first, second) in enumerate(blocks):
                stride = 2 if j == 0 and name != self.stages[0] else 1
                shortcut = f"{name}.{j}" in shortcuts
                stage.append(Bottleneck(inputs, first, second, width, stride, shortcut))
                inputs = width
            self.add_module(name, stage)
        self.attnpool = AttentionPool(inputs, heads, output_dim, grid_size)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the embedding of each image, [B, 3, H, W] -> [B, C]."""
        out: Tensor = self.attnpool(self.features(images))
        return out

    def dense(self, images: Tensor) -> Tensor:
        """Compute the embedding of each position, [B, 3, H, W] -> [B, C, H // 32, W // 32].

        Applies the value and output projections of the attention pool to each position of the
        last feature map, without the mean token and without positional embedding, as MaskCLIP
        does (Zhou, Loy and Dai, ECCV 2022, section 3.3).
        """
        out: Tensor = self.attnpool.dense(self.features(images))
        return out

    def features(self, images: Tensor) -> Tensor:
        """Compute the output of the last stage, [B, D, H // 32, W // 32].

        Raises:
            OptionError: The images are smaller than 32 x 32 pixels, or are not [B, 3, H, W].
        """
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < STRIDE:
            raise OptionError(
                f"images have shape {tuple(images.shape)}, expected [B, 3, H, W] with H and W of "
                f"at least {STRIDE} pixels"
            )
        x = images
        stem = [f"{layer}{i}" for i in range(1, 4) for layer in ("conv", "bn", "act")]
        for name in (*stem, "avgpool", *self.stages):
            x = self.get_submodule(name)(x)
        return x
