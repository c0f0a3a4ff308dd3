"""Image towers of transformers with the interface of other towers: images -> embeddings.

The table :data:`TOWER_LAYOUTS` describes the differences between the classes. Their attention
infers the number of heads from its linear layers, so heads are removed by slicing these layers.

Letters: B images, N tokens, D the width of the residual stream, C the width of the embedding,
h rows and w columns of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.core.errors import CheckpointError
from ovsprune.slim.forwards import with_forward

__all__ = ["TOWER_LAYOUTS", "TowerLayout", "TransformersTower"]


def _interpolated_inputs(model: Any, images: Tensor) -> Mapping[str, Any]:
    """Return inputs of a model that interpolates positions if it is asked to."""
    return {"pixel_values": images, "interpolate_pos_encoding": True}


def _plain_inputs(model: Any, images: Tensor) -> Mapping[str, Any]:
    """Return inputs of a model that takes images of any size."""
    return {"pixel_values": images}


def _patch_inputs(model: Any, images: Tensor) -> Mapping[str, Any]:
    """Return inputs of a model that takes patches, without padding."""
    side = model.config.patch_size
    cells = images.unfold(2, side, side).unfold(3, side, side)  # [B, 3, h, w, patch, patch]
    # [B, h * w, patch * patch * 3]
    rows = cells.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    shape = torch.tensor([cells.shape[2:4]] * images.shape[0], device="cpu")
    return {"pixel_values": rows, "spatial_shapes": shape}


@dataclass(frozen=True)
class TowerLayout:
    """Structure of the towers of one class.

    Attributes:
        inputs: Maps (model, images [B, 3, H, W]) to keyword arguments of the embeddings and of
            the model.
        unused_masks: Required keyword arguments of the model that are passed as None.
        trunk: Dotted path of the module with embeddings and blocks; empty for the model itself.
        pre_norm: Norm before the blocks, or None.
        blocks: Dotted path of the list of blocks in the trunk.
        attention: Name of the attention in a block.
        mlp_norm: Name of the norm before the MLP in a block.
        post_norm: Norm after the blocks.
        pool: Attention pool after that norm; None if the first token is a class token.
        projection: Linear projection of the pooled embedding, or None.
        pooled_output: Name of the pooled embedding in the output of the model.
        min_version: First version of transformers, (major, minor), with this layout and an
            attention that supports removed heads.
    """

    inputs: Callable[[Any, Tensor], Mapping[str, Any]]
    unused_masks: tuple[str, ...] = ()
    trunk: str = ""
    pre_norm: str | None = None
    blocks: str = "encoder.layers"
    attention: str = "self_attn"
    mlp_norm: str = "layer_norm2"
    post_norm: str = "post_layernorm"
    pool: str | None = None
    projection: str | None = None
    pooled_output: str = "pooler_output"
    min_version: tuple[int, int] = (5, 6)


_CLIP = TowerLayout(_interpolated_inputs, pre_norm="pre_layrnorm")
_SIGLIP = TowerLayout(_interpolated_inputs, pool="head")

TOWER_LAYOUTS = {
    "CLIPVisionModel": _CLIP,
    "CLIPVisionModelWithProjection": replace(
        _CLIP, trunk="vision_model", projection="visual_projection", pooled_output="image_embeds"
    ),
    "SiglipVisionModel": _SIGLIP,
    "Siglip2VisionModel": replace(
        _SIGLIP, inputs=_patch_inputs, unused_masks=("pixel_attention_mask",)
    ),
    "Dinov2Model": TowerLayout(
        _plain_inputs,
        blocks="encoder.layer",
        attention="attention",
        mlp_norm="norm2",
        post_norm="layernorm",
        min_version=(5, 18),
    ),
}
"""Layout of every supported class, by its name in transformers."""


class TransformersTower(nn.Module):
    """View of a vision model of transformers as an image tower.

    The tower shares the tables of modules, parameters and buffers with the model, under the same
    names. A layer that is replaced in the tower is replaced in the model, too.

    Args:
        model: Instance of a class in :data:`TOWER_LAYOUTS`.

    Raises:
        CheckpointError: The class has an attention pool, but the model is configured without it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        name = type(model).__name__
        if TOWER_LAYOUTS[name].pool is not None and not getattr(model, "use_head", True):
            raise CheckpointError(
                f"this {name} has no attention pool (vision_use_head is false) and so no "
                "pooled embedding; use a model with an attention pool"
            )
        self._model = (model,)  # in a tuple it is not registered as a submodule
        # The same dict objects as the model's, not copies.
        for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[table] = model.__dict__[table]
        self.training = model.training

    @property
    def model(self) -> Any:
        """Wrapped model of transformers."""
        return self._model[0]

    @property
    def layout(self) -> TowerLayout:
        """Layout of the model's class."""
        return TOWER_LAYOUTS[type(self.model).__name__]

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """Encoder layers by dotted name, in order."""
        path = self.trunk_path(self.layout.blocks)
        return {f"{path}.{i}": b for i, b in self.get_submodule(path).named_children()}

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the positions were trained for."""
        config = self.model.config
        if hasattr(config, "image_size"):
            return _pair(config.image_size)
        side = int(config.num_patches**0.5) * config.patch_size
        return side, side

    def trunk_path(self, name: str) -> str:
        """Return the dotted path of a module of the trunk."""
        return f"{self.layout.trunk}.{name}" if self.layout.trunk else name

    def trunk_module(self, name: str) -> Any:
        """Return a module of the trunk."""
        return self.get_submodule(self.trunk_path(name))

    def forward(self, images: Tensor) -> Tensor:
        """Compute the pooled embedding, [B, 3, H, W] -> [B, C], with transformers' forward."""
        inputs = self.layout.inputs(self.model, images)
        out = self.model(**inputs, **dict.fromkeys(self.layout.unused_masks))
        pooled: Tensor = getattr(out, self.layout.pooled_output)
        return pooled

    def stem(self, images: Tensor) -> Tensor:
        """Embed patches and positions, [B, 3, H, W] -> [B, N, D]."""
        stream: Tensor = self.trunk_module("embeddings")(**self.layout.inputs(self.model, images))
        if self.layout.pre_norm is not None:
            stream = self.trunk_module(self.layout.pre_norm)(stream)
        return stream

    def steps(self) -> dict[str, nn.Module]:
        """Return the blocks by dotted name; each maps the stream [B, N, D] to the stream.

        An attention pool is the last of them. Its output is the pooled token, followed by the
        pooled token for each position alone.
        """
        blocks: dict[str, nn.Module] = {
            name: with_forward(block, partial(_forward, block))
            for name, block in self.blocks.items()
        }
        if self.layout.pool is not None:
            pool = self.trunk_module(self.layout.pool)
            forward = partial(_pool_each, pool, self.trunk_module(self.layout.post_norm))
            blocks[self.trunk_path(self.layout.pool)] = with_forward(pool, forward)
        return blocks

    def read_out(
        self, stream: Tensor, grid: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map the stream after the last block to pooled [B, C] and dense [B, C, h, w] embeddings.

        The dense embedding of a position is the pooled embedding for that position alone: the
        position replaces the class token, or is the only token of the attention pool.

        Args:
            stream: [B, 1 + h * w, D].
            grid: h and w; those of the native size by default.
        """
        if self.layout.pool is None:
            stream = self.trunk_module(self.layout.post_norm)(stream)
        if self.layout.projection is not None:
            stream = self.get_submodule(self.layout.projection)(stream)
        height, width = grid or self._grid(self.native_size)
        patches = stream[:, 1:].transpose(1, 2)  # [B, C, h * w]
        return stream[:, 0], patches.reshape(*patches.shape[:2], height, width)

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute pooled [B, C] and dense [B, C, h, w] embeddings of images [B, 3, H, W]."""
        stream = self.stem(images)
        for block in self.steps().values():
            stream = block(stream)
        return self.read_out(stream, self._grid(images.shape[-2:]))

    def _grid(self, size: Any) -> tuple[int, int]:
        """Return rows and columns of patches in an image of ``size`` pixels."""
        patch = _pair(self.model.config.patch_size)
        return size[0] // patch[0], size[1] // patch[1]


def _pair(size: Any) -> tuple[int, int]:
    """Return height and width; an integer means a square."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _forward(block: nn.Module, stream: Tensor) -> Tensor:
    """Apply an encoder layer without attention mask, [B, N, D] -> [B, N, D]."""
    out: Tensor = type(block).forward(block, stream, None)
    return out


def _pool_each(pool: Any, norm: nn.Module, stream: Tensor) -> Tensor:
    """Apply SigLIP's attention pool to all tokens and to each alone, [B, N, D] -> [B, 1 + N, D].

    Attention to a single token has weight 1, so its output is the projected value of that token.
    """
    tokens, attention = norm(stream), pool.attention  # [B, N, D]
    # [B, 1, D]
    mixed = attention(pool.probe.expand(tokens.shape[0], -1, -1), tokens, tokens)[0]
    width = attention.embed_dim
    # the last third of the fused projection belongs to the values; [B, N, D]
    values = F.linear(
        tokens, attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :]
    )
    x = torch.cat([mixed, attention.out_proj(values)], dim=1)  # [B, 1 + N, D]
    out: Tensor = x + pool.mlp(pool.layernorm(x))
    return out
