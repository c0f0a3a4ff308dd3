"""CLIP's vision transformer with individual widths for every block.

Parameter names are those of open_clip's ``VisionTransformer``; with the same weights the outputs
are the same, too. Input sizes other than the native one are supported: positions are interpolated
in the way that open_clip does when it loads a checkpoint into a model of another size.

Letters: B images, N tokens, D the width of the residual stream, C the width of the embedding,
h rows and w columns of patches.
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
        """Apply the function elementwise to a tensor of any shape."""
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
        kept_heads: Kept heads, by their index in the base model; empty if the attention is removed.
        head_dim: Width of one head.
        mlp_width: Hidden units of the MLP; 0 if the MLP is removed.
    """

    num_heads: int
    kept_heads: tuple[int, ...]
    head_dim: int
    mlp_width: int


class LayerScale(nn.Module):
    """Multiplication by a learnt factor for each channel (Touvron et al., ICCV 2021, CaiT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x`` [..., D] -> [..., D]."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each added to the residual stream."""

    def __init__(
        self, width: int, shape: BlockShape, activation: str, layer_scale: bool, eps: float
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = SlimAttention(width, shape.num_heads, shape.kept_heads, head_dim=shape.head_dim)
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
        """Map the residual stream [B, N, D] -> [B, N, D]."""
        y = self.ln_1(x)
        y, _ = self.attn(y, y, y, need_weights=False, attn_mask=attn_mask)
        x = x + self.ls_1(y)
        out: Tensor = x + self.ls_2(self.mlp(self.ln_2(x)))
        return out


class Transformer(nn.Module):
    """Sequence of blocks, under the name that open_clip gives them."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream [B, N, D] -> [B, N, D]."""
        for block in self.resblocks:
            x = block(x)
        return x


class VisionTransformer(nn.Module):
    """CLIP's vision transformer; weights are loaded afterwards.

    Args:
        width: D, the width of the residual stream.
        blocks: Widths of each block.
        patch_size: Height and width of a patch in pixels.
        grid_size: Rows and columns of patches of the native input.
        output_dim: C, the width of the embedding shared by images and texts.
        activation: One of :data:`ovsprune.slim.spec.ACTIVATIONS`.
        pool: ``"tok"`` (the class token) or ``"avg"`` (the mean of the patch tokens).
        norm_after_pool: Apply ``ln_post`` after the pooling instead of before it.
        pre_norm: Apply a LayerNorm before the blocks.
        layer_scale: Scale the branches of the blocks by a learnt factor for each channel.
        projection: Apply ``proj`` to the pooled token; without it C is D.
        patch_bias: Add a bias to the patch embedding.
        eps: Constant that the LayerNorms add to the variance.
        pooler: Widths of the attention pool that reduces the tokens to its queries. ``pool`` then
            selects the first query or the mean of the others. None for no attention pool.

    All methods that take images or a size raise an ``OptionError`` if these are smaller than one
    patch, or are not [B, 3, H, W].
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
        self.transformer = Transformer(
            [Block(width, shape, activation, layer_scale, eps) for shape in blocks]
        )
        self.attn_pool = None if pooler is None else AttentionalPooler(pooler, eps)
        width = width if pooler is None else pooler.width
        self.ln_post = nn.LayerNorm(width, eps)
        self.proj = nn.Parameter(torch.zeros(width, output_dim)) if projection else None

    def forward(self, images: Tensor) -> Tensor:
        """Compute the embedding of each image, [B, 3, H, W] -> [B, C]."""
        return self._pooled(self.tokens(images))

    def dense(self, images: Tensor) -> Tensor:
        """Compute the embedding of each patch, [B, 3, H, W] -> [B, C, H // patch, W // patch].

        ``ln_post`` and ``proj`` are applied to every patch token as they are to the class token.
        A tower with an attention pool first applies
        :func:`ovsprune.slim.pooling.pool_each_position`.
        """
        return self._dense(self.tokens(images), self.grid(images))

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute :meth:`forward` and :meth:`dense`, [B, C] and [B, C, h, w], in one pass."""
        x = self.tokens(images)
        return self._pooled(x), self._dense(x, self.grid(images))

    def set_size(self, size: tuple[int, int]) -> None:
        """Make ``size``, height and width in pixels, the native input size.

        The positions are interpolated once, so images of that size need no interpolation later.
        The outputs stay the same up to rounding.
        """
        grid = self.grid(torch.empty(1, 3, *size, device="meta"))
        old = self.positional_embedding
        new = resize_positions(old.detach(), self.grid_size, grid)
        self.positional_embedding = nn.Parameter(new, old.requires_grad)
        self.grid_size = grid

    def _pooled(self, x: Tensor) -> Tensor:
        """Pool tokens, [B, 1 + h * w, D] -> [B, C]."""
        if self.attn_pool is not None:
            x = self.attn_pool(x)  # [B, queries, pooler.width]
        if not self.norm_after_pool:
            x = self.ln_post(x)
        pooled = x[:, 0] if self.pool == "tok" else x[:, 1:].mean(dim=1)  # [B, D]
        if self.norm_after_pool:
            pooled = self.ln_post(pooled)
        out: Tensor = pooled if self.proj is None else pooled @ self.proj
        return out

    def _dense(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Project every patch token, [B, 1 + h * w, D] -> [B, C, h, w]."""
        x = x[:, 1:]  # [B, h * w, D]
        if self.attn_pool is not None:
            x = pool_each_position(self.attn_pool, x)
        x = self.ln_post(x)
        x = x if self.proj is None else x @ self.proj  # [B, h * w, C]
        out: Tensor = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)  # [B, C, h, w]
        return out

    def tokens(self, images: Tensor) -> Tensor:
        """Compute class and patch tokens after the last block, [B, 1 + h * w, D]."""
        grid = self.grid(images)
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [B, h * w, D]
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)  # [B, 1, D]
        positions = resize_positions(self.positional_embedding, self.grid_size, grid)
        # [B, 1 + h * w, D]
        x = self.ln_pre(torch.cat([class_token, x], dim=1) + positions.to(x.dtype))
        out: Tensor = self.transformer(x)
        return out

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Return the rows and columns of patches in ``images`` [B, 3, H, W]."""
        rows, columns = (n // p for n, p in zip(images.shape[-2:], self.patch_size, strict=True))
        if images.dim() != 4 or images.shape[1] != 3 or not rows or not columns:
            raise OptionError(
                f"images have shape {tuple(images.shape)}, expected [B, 3, H, W] with H and W of "
                f"at least one patch {self.patch_size}"
            )
        return rows, columns


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate a positional embedding to another grid: bicubic, antialiased, as in open_clip.

    Args:
        positions: [1 + h_old * w_old, D]; the first row belongs to the class token.
        old: h_old and w_old, the grid of ``positions``.
        new: h and w, the requested grid.

    Returns:
        [1 + h * w, D]; ``positions`` itself if the grids are equal.
    """
    # Dynamic sizes of an exporter are no ints; comparing them would fix them to one value.
    fixed = all(type(n) is int for n in new)
    if fixed and old == new:
        return positions
    class_position, grid = positions[:1], positions[1:]
    # float32, because torch has no bicubic interpolation in half precision on CPUs
    image = grid.float().T.reshape(1, -1, *old)  # [1, D, h_old, w_old]
    if fixed:
        image = F.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    else:
        rows, columns = (bicubic_matrix(o, n, image.device) for o, n in zip(old, new, strict=True))
        image = rows @ image @ columns.T  # [1, D, h, w]
    return torch.cat([class_position, image[0].flatten(1).T.to(positions.dtype)])


def bicubic_matrix(old: int, new: int, device: torch.device) -> Tensor:
    """Return bicubic interpolation of ``old`` to ``new`` values as a matrix, float32 [new, old].

    Equals ``F.interpolate(mode="bicubic", antialias=True, align_corners=False)`` on one axis: the
    kernel of Keys (IEEE ASSP 1981, equation 15, a = -1/2), widened by old / new when downsampling,
    with weights normalised to sum to 1, also at the borders. Unlike torch's operator, the matrix
    product can be exported with dynamic sizes.
    """
    step = torch.ones((), dtype=torch.float32, device=device) * (old / new)
    # pixel centres of both grids, in units of the old one
    targets = (torch.arange(new, dtype=torch.float32, device=device) + 0.5) * step  # [new]
    sources = torch.arange(old, dtype=torch.float32, device=device) + 0.5  # [old]
    x = ((sources - targets[:, None]) / step.clamp(min=1.0)).abs()  # [new, old]
    near = (1.5 * x - 2.5) * x * x + 1.0  # kernel for |x| < 1
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0  # kernel for 1 <= |x| < 2
    weights = torch.where(x < 1.0, near, torch.where(x < 2.0, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)
