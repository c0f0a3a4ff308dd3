"""Vision towers of transformers, called as other towers are: pictures in, embeddings out.

What tells one class from another is in the table :data:`TOWER_LAYOUTS`. Their attention reads the number of
heads off its maps, so that heads are cut by cutting the maps.
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


def _any_size(model: Any, images: Tensor) -> Mapping[str, Any]:
    return {"pixel_values": images, "interpolate_pos_encoding": True}


def _as_it_is(model: Any, images: Tensor) -> Mapping[str, Any]:
    return {"pixel_values": images}


def _patches(model: Any, images: Tensor) -> Mapping[str, Any]:
    """Patches of a picture of one size, without padding: [B, h * w, patch * patch * 3]."""
    side = model.config.patch_size
    cells = images.unfold(2, side, side).unfold(3, side, side)  # [B, 3, h, w, patch, patch]
    rows = cells.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    shape = torch.tensor([cells.shape[2:4]] * images.shape[0], device="cpu")
    return {"pixel_values": rows, "spatial_shapes": shape}


@dataclass(frozen=True)
class TowerLayout:
    """How the towers of one class are put together.

    Attributes:
        inputs: (model, images [B, 3, H, W]) to the keyword arguments of its embeddings, which the
            model takes too.
        masks: What the model must be given besides, and is none here.
        trunk: Dotted path of what has the embeddings and the blocks; empty for the model itself.
        before: Norm before the blocks, or None.
        blocks: Dotted path of the list of blocks in the trunk.
        attention: A block's attention.
        middle: A block's norm between attention and MLP.
        after: Norm behind the blocks.
        pool: Attention pool behind that norm; None where the first token is a class token.
        projection: Linear map of the pooled embedding, or None.
        pooled: Name of the pooled embedding in what the model returns.
        since: First version of the library, major and minor, that has this layout and whose
            attention takes maps of fewer heads.
    """

    inputs: Callable[[Any, Tensor], Mapping[str, Any]]
    masks: tuple[str, ...] = ()
    trunk: str = ""
    before: str | None = None
    blocks: str = "encoder.layers"
    attention: str = "self_attn"
    middle: str = "layer_norm2"
    after: str = "post_layernorm"
    pool: str | None = None
    projection: str | None = None
    pooled: str = "pooler_output"
    since: tuple[int, int] = (5, 6)


_CLIP = TowerLayout(_any_size, before="pre_layrnorm")
_SIGLIP = TowerLayout(_any_size, pool="head")

TOWER_LAYOUTS = {
    "CLIPVisionModel": _CLIP,
    "CLIPVisionModelWithProjection": replace(
        _CLIP, trunk="vision_model", projection="visual_projection", pooled="image_embeds"
    ),
    "SiglipVisionModel": _SIGLIP,
    "Siglip2VisionModel": replace(_SIGLIP, inputs=_patches, masks=("pixel_attention_mask",)),
    "Dinov2Model": TowerLayout(
        _as_it_is,
        blocks="encoder.layer",
        attention="attention",
        middle="norm2",
        after="layernorm",
        since=(5, 18),
    ),
}
"""TowerLayout of every class, by its name in transformers."""


class TransformersTower(nn.Module):
    """A vision model of transformers as a tower.

    It has the model's own modules and parameters, by their names there: what is cut here is cut
    there.

    Args:
        model: Of a class in :data:`TOWER_LAYOUTS`.

    Raises:
        CheckpointError: It pools by attention, and is configured without the pool.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        name = type(model).__name__
        if TOWER_LAYOUTS[name].pool is not None and not getattr(model, "use_head", True):
            raise CheckpointError(
                f"this {name} has no attention pool (vision_use_head is false), and so no "
                "embedding of the picture; take a model that has one"
            )
        self._model = (model,)  # in a tuple it is no part of the tower, and its names get no prefix
        for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[table] = model.__dict__[table]
        self.training = model.training

    @property
    def model(self) -> Any:
        """The model itself, with transformers' own call."""
        return self._model[0]

    @property
    def layout(self) -> TowerLayout:
        """Of the model's class."""
        return TOWER_LAYOUTS[type(self.model).__name__]

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """Dotted name to encoder layer, in order."""
        path = self.path(self.layout.blocks)
        return {f"{path}.{i}": b for i, b in self.get_submodule(path).named_children()}

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures that the positions were made for."""
        config = self.model.config
        if hasattr(config, "image_size"):
            return _pair(config.image_size)
        side = int(config.num_patches**0.5) * config.patch_size
        return side, side

    def path(self, name: str) -> str:
        """Dotted path of a part of the trunk."""
        return f"{self.layout.trunk}.{name}" if self.layout.trunk else name

    def part(self, name: str) -> Any:
        """A part of the trunk."""
        return self.get_submodule(self.path(name))

    def forward(self, images: Tensor) -> Tensor:
        """Pooled embedding [B, C] of images [B, 3, H, W], by transformers' own forward."""
        inputs = self.layout.inputs(self.model, images)
        out = self.model(**inputs, **dict.fromkeys(self.layout.masks))
        pooled: Tensor = getattr(out, self.layout.pooled)
        return pooled

    def stem(self, images: Tensor) -> Tensor:
        """Patches and positions, [B, 3, H, W] -> [B, N, D]."""
        stream: Tensor = self.part("embeddings")(**self.layout.inputs(self.model, images))
        return stream if self.layout.before is None else self.part(self.layout.before)(stream)

    def steps(self) -> dict[str, nn.Module]:
        """Dotted name to block, each a map of one tensor to another; a pool is the last of them.

        The pool gives its own output and, behind it, what it would give for each position alone.
        """
        found: dict[str, nn.Module] = {
            name: with_forward(block, partial(_forward, block))
            for name, block in self.blocks.items()
        }
        if self.layout.pool is not None:
            pool, norm = self.part(self.layout.pool), self.part(self.layout.after)
            each = partial(_pooled_each, pool, norm)
            found[self.path(self.layout.pool)] = with_forward(pool, each)
        return found

    def read_out(
        self, stream: Tensor, grid: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The stream behind the last step to pooled [B, C] and dense [B, C, h, w] embeddings.

        The dense embedding of a position is what the pooled one would be of that position alone:
        it stands where the class token stands, or is all that the pool sees.

        Args:
            stream: [B, 1 + h * w, D].
            grid: h and w; those of the native size by default.
        """
        if self.layout.pool is None:
            stream = self.part(self.layout.after)(stream)
        if self.layout.projection is not None:
            stream = self.get_submodule(self.layout.projection)(stream)
        height, width = grid or self._grid(self.native_size)
        each = stream[:, 1:].transpose(1, 2)
        return stream[:, 0], each.reshape(*each.shape[:2], height, width)

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled [B, C] and dense [B, C, h, w] embeddings of images [B, 3, H, W] of any size."""
        stream = self.stem(images)
        for step in self.steps().values():
            stream = step(stream)
        return self.read_out(stream, self._grid(images.shape[-2:]))

    def dense(self, images: Tensor) -> Tensor:
        """Dense embeddings [B, C, h, w] of images [B, 3, H, W] of any size."""
        return self.outputs(images)[1]

    def _grid(self, size: Any) -> tuple[int, int]:
        patch = _pair(self.model.config.patch_size)
        return size[0] // patch[0], size[1] // patch[1]


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _forward(block: nn.Module, stream: Tensor) -> Tensor:
    out: Tensor = type(block).forward(block, stream, None)  # no mask
    return out


def _pooled_each(pool: Any, norm: nn.Module, stream: Tensor) -> Tensor:
    """The attention pool over all tokens, and over each position alone: [B, 1 + N, D].

    A position that is all there is gets all the attention, so what the pool mixes is its value.
    """
    tokens, attention = norm(stream), pool.attention
    mixed = attention(pool.probe.expand(tokens.shape[0], -1, -1), tokens, tokens)[0]
    width = attention.embed_dim
    values = F.linear(
        tokens, attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :]
    )
    x = torch.cat([mixed, attention.out_proj(values)], dim=1)
    out: Tensor = x + pool.mlp(pool.layernorm(x))
    return out
