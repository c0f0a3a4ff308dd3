"""CLIP's vision transformer with a width of its own in every block.

Parameter names are those of open_clip's ``VisionTransformer``, and with the same weights so are
the outputs. Other input sizes than the native one work: positions are interpolated as open_clip
does when it loads a checkpoint into a model of another size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.core.errors import OptionError
from ovsprune.slim.attention import SlimAttention
from ovsprune.slim.linear import linear
from ovsprune.slim.pooling import AttentionalPooler, PoolerShape, pool_each_position

__all__ = ["ACTIVATION_MODULES", "BlockShape", "QuickGELU", "VisionTransformer", "resize_positions"]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
}


@dataclass(frozen=True)
class BlockShape:
    """Widths of one block.

    Attributes:
        num_heads: Heads in the base model.
        kept_heads: Those that are left, by their index there; none if the attention is gone.
        head_dim: Width of one head.
        mlp_width: Hidden units of the MLP; 0 if it is gone.
    """

    num_heads: int
    kept_heads: tuple[int, ...]
    head_dim: int
    mlp_width: int


class LayerScale(nn.Module):
    """A learnt factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return x * self.gamma


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a residual stream."""

    def __init__(
        self, width: int, shape: BlockShape, activation: str, layer_scale: bool, eps: float
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = SlimAttention(
            width,
            shape.num_heads,
            shape.kept_heads,
            head_dim=shape.head_dim,
        )
        self.ls_1: nn.Module = LayerScale(width) if layer_scale else nn.Identity()
        self.ln_2 = nn.LayerNorm(width, eps)
        parts: list[tuple[str, nn.Module]] = [
            ("c_fc", linear(width, shape.mlp_width)),
            ("gelu", ACTIVATION_MODULES[activation]()),
            ("c_proj", linear(shape.mlp_width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(parts))
        self.ls_2: nn.Module = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """[B, N, width] -> [B, N, width]."""
        y = self.ln_1(x)
        y, _ = self.attn(y, y, y, need_weights=False, attn_mask=attn_mask)
        x = x + self.ls_1(y)
        out: Tensor = x + self.ls_2(self.mlp(self.ln_2(x)))
        return out


class Transformer(nn.Module):
    """The blocks, one after another."""

    def __init__(
        self,
        width: int,
        shapes: Sequence[BlockShape],
        activation: str,
        layer_scale: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            [Block(width, shape, activation, layer_scale, eps) for shape in shapes]
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, width]."""
        for block in self.resblocks:
            x = block(x)
        return x


class VisionTransformer(nn.Module):
    """CLIP's image tower, to be filled with weights: positions and projection start as zeros.

    Args:
        width: Of the residual stream.
        blocks: Widths of each block.
        patch_size: Height and width of a patch in pixels.
        grid_size: Patches of the native input, (rows, columns).
        output_dim: C, the width of the embedding that images and texts share.
        activation: One of :data:`ovsprune.slim.spec.ACTIVATIONS`.
        pool: ``"tok"`` (the class token) or ``"avg"`` (the mean of the patch tokens).
        norm_after_pool: Whether ``ln_post`` comes after the pooling.
        pre_norm: Whether there is a LayerNorm before the blocks.
        layer_scale: Whether the blocks scale their branches by a learnt factor.
        projection: Whether there is ``proj``; without it C is ``width``.
        patch_bias: Whether the patch embedding has a bias.
        eps: What the LayerNorms add to the variance.
        pooler: Widths of the attention that pools the tokens to queries, of which ``pool`` then
            takes the first or the mean of the others; None without one.
    """

    def __init__(
        self,
        *,
        width: int,
        blocks: Sequence[BlockShape],
        patch_size: tuple[int, int],
        grid_size: tuple[int, int],
        output_dim: int,
        activation: str,
        pool: str = "tok",
        norm_after_pool: bool = False,
        pre_norm: bool = True,
        layer_scale: bool = False,
        projection: bool = True,
        patch_bias: bool = False,
        eps: float = 1e-5,
        pooler: PoolerShape | None = None,
    ) -> None:
        super().__init__()
        if pool not in ("tok", "avg"):
            raise OptionError(f"pool is {pool!r}, expected 'tok' or 'avg'")
        self.patch_size = patch_size
        self.grid_size = grid_size
        self.pool = pool
        self.norm_after_pool = norm_after_pool
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=patch_bias)
        tokens = grid_size[0] * grid_size[1] + 1
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.ln_pre: nn.Module = nn.LayerNorm(width, eps) if pre_norm else nn.Identity()
        self.transformer = Transformer(width, blocks, activation, layer_scale, eps)
        self.attn_pool = None if pooler is None else AttentionalPooler(pooler, eps)
        width = width if pooler is None else pooler.width
        self.ln_post = nn.LayerNorm(width, eps)
        self.proj = nn.Parameter(torch.zeros(width, output_dim)) if projection else None

    def forward(self, images: Tensor) -> Tensor:
        """Embedding of each picture, [B, 3, H, W] -> [B, C].

        Raises:
            OptionError: The pictures are smaller than one patch or of another shape.
        """
        return self._pooled(self.tokens(images))

    def dense(self, images: Tensor) -> Tensor:
        """Embedding of each patch, [B, 3, H, W] -> [B, C, H // patch, W // patch].

        ``ln_post`` and ``proj`` of every patch token, as the class token is projected; where
        attention pools, of what it reads of that token
        (:func:`ovsprune.slim.pooling.pool_each_position`).

        Raises:
            OptionError: The pictures are smaller than one patch or of another shape.
        """
        return self._dense(self.tokens(images), self.grid(images))

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` and :meth:`dense` give, [B, C] and [B, C, h, w], in one pass.

        Raises:
            OptionError: The pictures are smaller than one patch or of another shape.
        """
        x = self.tokens(images)
        return self._pooled(x), self._dense(x, self.grid(images))

    def set_size(self, size: tuple[int, int]) -> None:
        """Make ``size`` (pixels) the native one: its positions are interpolated now and for good.

        The outputs stay, but for rounding, and pictures of that size cost no interpolation.

        Raises:
            OptionError: It is smaller than one patch.
        """
        grid = self.grid(torch.empty(1, 3, *size, device="meta"))
        old = self.positional_embedding
        new = resize_positions(old.detach(), self.grid_size, grid)
        self.positional_embedding = nn.Parameter(new, old.requires_grad)
        self.grid_size = grid

    def _pooled(self, x: Tensor) -> Tensor:
        """[B, 1 + h * w, width] -> [B, C]."""
        if self.attn_pool is not None:
            x = self.attn_pool(x)
        if not self.norm_after_pool:
            x = self.ln_post(x)
        pooled = x[:, 0] if self.pool == "tok" else x[:, 1:].mean(dim=1)
        if self.norm_after_pool:
            pooled = self.ln_post(pooled)
        out: Tensor = pooled if self.proj is None else pooled @ self.proj
        return out

    def _dense(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, 1 + h * w, width] -> [B, C, h, w]."""
        x = x[:, 1:]
        if self.attn_pool is not None:
            x = pool_each_position(self.attn_pool, x)
        x = self.ln_post(x)
        x = x if self.proj is None else x @ self.proj
        out: Tensor = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
        return out

    def tokens(self, images: Tensor) -> Tensor:
        """Class and patch tokens after the last block, [B, 1 + h * w, width].

        Raises:
            OptionError: The pictures are smaller than one patch or of another shape.
        """
        grid = self.grid(images)
        x = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        positions = resize_positions(self.positional_embedding, self.grid_size, grid)
        x = self.ln_pre(torch.cat([first, x], dim=1) + positions.to(x.dtype))
        out: Tensor = self.transformer(x)
        return out

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in ``images``.

        Raises:
            OptionError: The pictures are smaller than one patch or of another shape.
        """
        rows, columns = (n // p for n, p in zip(images.shape[-2:], self.patch_size, strict=True))
        if images.dim() != 4 or images.shape[1] != 3 or not rows or not columns:
            raise OptionError(
                f"images have shape {tuple(images.shape)}, expected [B, 3, H, W] with H and W of "
                f"at least one patch {self.patch_size}"
            )
        return rows, columns


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positional embedding for another grid, bicubic with antialiasing like open_clip's.

    Args:
        positions: [1 + old rows * old columns, width], the class token's first.
        old: Rows and columns that it was trained for.
        new: Rows and columns that are wanted.

    Returns:
        [1 + new rows * new columns, width]; ``positions`` itself if the grids are equal.
    """
    # sizes that an exporter leaves open are no ints: asking whether they are equal would fix them
    fixed = all(type(n) is int for n in new)
    if fixed and old == new:
        return positions
    first, grid = positions[:1], positions[1:]
    # in float32: CPUs have no half-precision bicubic, and this runs outside of autocast's reach
    image = grid.float().T.reshape(1, -1, *old)
    if fixed:
        image = F.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    else:
        rows, columns = (bicubic_matrix(o, n, image.device) for o, n in zip(old, new, strict=True))
        image = rows @ image @ columns.T
    return torch.cat([first, image[0].flatten(1).T.to(positions.dtype)])


def bicubic_matrix(old: int, new: int, device: torch.device) -> Tensor:
    """Bicubic resampling of ``old`` values to ``new`` ones as a matrix, float32 [new, old].

    What ``F.interpolate(mode="bicubic", antialias=True, align_corners=False)`` does on one axis:
    the kernel of Keys (IEEE ASSP 1981, eq. 15, a = -1/2), stretched where values become fewer, its
    weights made to sum to 1 at the borders too. As a matrix it can be exported for sizes that are
    not known yet, which torch's operator cannot. The identity if the sizes are equal.
    """
    step = torch.ones((), dtype=torch.float32, device=device) * (old / new)
    wanted = (torch.arange(new, dtype=torch.float32, device=device) + 0.5) * step
    there = torch.arange(old, dtype=torch.float32, device=device) + 0.5
    x = ((there - wanted[:, None]) / step.clamp(min=1.0)).abs()
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    weights = torch.where(x < 1.0, near, torch.where(x < 2.0, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)
