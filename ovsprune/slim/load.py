"""Build a slim tower from its checkpoint alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import CheckpointError, MissingLibraryError
from ovsprune.slim.check import TOWER
from ovsprune.slim.narrowing import build_narrowed
from ovsprune.slim.read import SlimCheckpoint, read
from ovsprune.slim.resnet import ModifiedResNet
from ovsprune.slim.resnet_shape import build_modified_resnet
from ovsprune.slim.shape import build_vision_transformer
from ovsprune.slim.spec import CONFIG
from ovsprune.slim.timm_tower import build_timm_tower, timm_pooled_and_dense
from ovsprune.slim.timm_vit import timm_vit_pooled_and_dense
from ovsprune.slim.transformers_build import build_tower
from ovsprune.slim.transformers_tower import TransformersTower
from ovsprune.slim.vit import VisionTransformer

__all__ = ["SlimTower", "load", "shape_mismatches", "tower_of"]


class SlimTower(nn.Module):
    """Image tower that was loaded from a slim checkpoint.

    Attributes:
        tower: The module itself, with parameters by canonical names.
        spec: Content of the checkpoint's config.
        mask: Layer name to int64 [kept], indices of units of the base model.
        path: Directory of the checkpoint.
    """

    def __init__(self, tower: nn.Module, checkpoint: SlimCheckpoint) -> None:
        super().__init__()
        self.tower = tower
        self.spec = checkpoint.spec
        self.mask = checkpoint.mask
        self.path = checkpoint.path

    def checkpoint(self) -> SlimCheckpoint:
        """Return the current, perhaps trained, tower in the form of :func:`ovsprune.read`.

        It has no text tower. Its tensors share memory with the parameters.
        """
        tensors = {f"{TOWER}{name}": t.detach() for name, t in self.tower.state_dict().items()}
        return SlimCheckpoint(self.path, self.spec, self.mask, tensors)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the embedding of each image, [B, 3, H, W] -> [B, C], not normalised."""
        out: Tensor = self.tower(images)
        return out

    def dense(self, images: Tensor) -> Tensor:
        """Compute the embedding of each patch, [B, 3, H, W] -> [B, C, h, w], not normalised."""
        builder = _BUILDERS[self.spec.family]
        if builder.dense is None:
            return self.outputs(images)[1]
        return builder.dense(self.tower, images)

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute :meth:`forward` and :meth:`dense`, in one pass if the family supports it."""
        builder = _BUILDERS[self.spec.family]
        if builder.outputs is None:
            return self(images), self.dense(images)
        return builder.outputs(self.tower, images)

    def set_size(self, size: tuple[int, int]) -> None:
        """Interpolate the positions once, for images of ``size`` (height and width in pixels).

        Raises:
            OptionError: ``size`` is too small for the tower.
        """
        resize = _BUILDERS[self.spec.family].set_size
        if resize is not None:
            resize(self.tower, size)


def load(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    size: tuple[int, int] | None = None,
) -> SlimTower:
    """Load a slim tower, in evaluation mode.

    CLIP's own towers need no other library. Towers of timm are built by open_clip and timm, those
    of transformers by transformers, which must be installed.

    Args:
        directory: Directory that ``ovsprune prune`` wrote.
        device: Device of the tower.
        dtype: Type of the parameters; by default the stored one.
        size: Height and width in pixels of the images, for which the positions are interpolated
            once. Without it, images of any size are supported, too, but positions for another
            size than the native one are interpolated in each pass.

    Raises:
        CheckpointError: The checkpoint is damaged or inconsistent.
        MissingLibraryError: This version does not build the family, or a library is not installed.
        OptionError: ``size`` is too small for the tower.
    """
    loaded = tower_of(read(directory))
    if size is not None:
        loaded.set_size(size)
    return loaded.to(device=device, dtype=dtype)


def tower_of(checkpoint: SlimCheckpoint) -> SlimTower:
    """Build the tower of a checkpoint, with its weights, in evaluation mode on the CPU.

    Raises:
        CheckpointError: The tensors do not fit the tower that the config describes.
        MissingLibraryError: This version does not build the family, or a library is not installed.
    """
    spec = checkpoint.spec
    builder = _BUILDERS.get(spec.family)
    if builder is None:
        raise MissingLibraryError(
            f"{checkpoint.path} is of the family {spec.family!r}, which this ovsprune does not "
            f"build (it builds {', '.join(sorted(_BUILDERS))}); build the tower with "
            f"{spec.library} {spec.library_version} and call ovsprune.apply(tower, "
            "ovsprune.read(directory))"
        )
    state = checkpoint.tower()
    with torch.device("meta"):  # allocates no memory and skips the initialisation
        tower = builder.build(checkpoint)
    wrong = shape_mismatches(state, tower.state_dict())
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path}: the tensors do not make the tower that {CONFIG} describes: "
            f"{'; '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}; copy or write the "
            "checkpoint again"
        )
    _fill(tower, state)
    return SlimTower(tower, checkpoint).eval()


def _fill(tower: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace the tensors of ``tower`` by copies of the stored ones, with the stored type.

    Buffers that are not saved stay as the builder made them.
    """
    for path, module in tower.named_modules():
        prefix = f"{path}." if path else ""
        # Replaced, not filled: the parameters are on "meta" and may have another type.
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # a copy: training must not change the checkpoint that the caller holds
                value = state[prefix + name].clone()
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and prefix + name in state:
                module._buffers[name] = state[prefix + name].clone()


def shape_mismatches(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Describe the tensors that are missing, unexpected or of another shape, by name."""
    shapes, wanted = ({k: tuple(v.shape) for k, v in s.items()} for s in (state, expected))
    return [
        f"{name} {shapes.get(name)} instead of {wanted.get(name)}"
        for name in sorted(shapes.keys() | wanted.keys())
        if shapes.get(name) != wanted.get(name)
    ]


@dataclass(frozen=True)
class _Builder:
    """Functions that build a family's tower, without weights, and compute its outputs."""

    build: Callable[[SlimCheckpoint], nn.Module]
    # pooled and dense output in one pass; without it, two passes
    outputs: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None = None
    # dense output alone; by default from ``outputs``
    dense: Callable[[Any, Tensor], Tensor] | None = None
    # change of the native size in place, if the tower has one
    set_size: Callable[[Any, tuple[int, int]], None] | None = None


_build_timm = partial(build_narrowed, build=build_timm_tower)
_TIMM = _Builder(_build_timm, timm_pooled_and_dense)

# Families whose towers can be built here, by their names in the config.
_BUILDERS = {
    "open_clip-vit": _Builder(
        build_vision_transformer,
        outputs=VisionTransformer.outputs,
        dense=VisionTransformer.dense,
        set_size=VisionTransformer.set_size,
    ),
    "open_clip-resnet": _Builder(build_modified_resnet, dense=ModifiedResNet.dense),
    "open_clip-convnext": _TIMM,
    "open_clip-efficientnet": _TIMM,
    "open_clip-fastvit": _TIMM,
    "open_clip-swin": _TIMM,
    "open_clip-timm-vit": _Builder(_build_timm, timm_vit_pooled_and_dense),
    "transformers-vit": _Builder(
        partial(build_narrowed, build=build_tower), TransformersTower.outputs
    ),
}
