"""Building a slim tower from nothing but its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import CheckpointError, MissingLibraryError
from ovsprune.slim.check import TOWER
from ovsprune.slim.read import SlimCheckpoint, read
from ovsprune.slim.resnet import ModifiedResNet
from ovsprune.slim.resnet_shape import build_modified_resnet
from ovsprune.slim.shape import build_vision_transformer
from ovsprune.slim.spec import CONFIG, SlimSpec
from ovsprune.slim.timm_tower import narrow_timm_tower, timm_dense, timm_pooled_and_dense
from ovsprune.slim.timm_vit import timm_vit_dense, timm_vit_pooled_and_dense
from ovsprune.slim.transformers_build import narrow_tower
from ovsprune.slim.transformers_tower import TransformersTower
from ovsprune.slim.vit import VisionTransformer

__all__ = ["SlimTower", "build", "load", "tower_of"]


class SlimTower(nn.Module):
    """An image tower that was loaded from a slim checkpoint.

    Attributes:
        tower: The module itself, its parameters by their canonical names.
        spec: What the checkpoint's config says.
        mask: Layer name to int64 [kept], in the base model's coordinates.
        path: Directory that it was loaded from.
    """

    def __init__(
        self,
        tower: nn.Module,
        spec: SlimSpec,
        mask: Mapping[str, Tensor],
        *,
        path: Path = Path(),
    ) -> None:
        super().__init__()
        self.tower = tower
        self.spec = spec
        self.mask = mask
        self.path = path

    def checkpoint(self) -> SlimCheckpoint:
        """The tower as it is now (trained on, perhaps), as :func:`ovsprune.read` gives one.

        There is no text tower in it. Tensors are those of the tower, not copies.
        """
        tensors = {f"{TOWER}{name}": t.detach() for name, t in self.tower.state_dict().items()}
        return SlimCheckpoint(self.path, self.spec, self.mask, tensors)

    def forward(self, images: Tensor) -> Tensor:
        """Embedding of each picture, [B, 3, H, W] -> [B, C], not normalised."""
        out: Tensor = self.tower(images)
        return out

    def dense(self, images: Tensor) -> Tensor:
        """Embedding of each patch, [B, 3, H, W] -> [B, C, h, w], not normalised."""
        return _BUILDERS[self.spec.family].dense(self.tower, images)

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both, [B, 3, H, W] -> ([B, C], [B, C, h, w]), in one pass where the family can."""
        builder = _BUILDERS[self.spec.family]
        if builder.outputs is None:
            return self(images), self.dense(images)
        return builder.outputs(self.tower, images)

    def set_size(self, size: tuple[int, int]) -> None:
        """Make ``size`` (height and width in pixels) the one that costs no interpolation.

        Raises:
            OptionError: It is too small for the tower.
        """
        fix = _BUILDERS[self.spec.family].set_size
        if fix is not None:
            fix(self.tower, size)


def load(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    size: tuple[int, int] | None = None,
) -> SlimTower:
    """Load a slim tower, in evaluation mode; needs the library of no framework for a CLIP tower.

    A tower of timm's is built by open_clip and timm, one of transformers' by that library, which
    must be installed.

    Args:
        directory: What ``ovsprune prune`` wrote.
        device: Where to.
        dtype: Of the parameters; as they were stored by default.
        size: Height and width in pixels of the pictures that will come, for which positions are
            then interpolated once. Without it pictures of any size are taken too, and the positions
            for another size than the native one are interpolated whenever they come.

    Raises:
        CheckpointError: The checkpoint is damaged, or its parts do not fit each other.
        MissingLibraryError: The family is not one that this version builds, or what it needs for
            that is not installed.
        OptionError: ``size`` is too small for the tower.
    """
    loaded = tower_of(read(directory))
    if size is not None:
        loaded.set_size(size)
    return loaded.to(device=device, dtype=dtype)


def tower_of(checkpoint: SlimCheckpoint) -> SlimTower:
    """The tower of a checkpoint in memory, in evaluation mode on the CPU.

    Raises:
        CheckpointError: The tensors do not make the tower that the config describes.
        MissingLibraryError: The family is not one that this version builds, or what it needs for
            that is not installed.
    """
    return SlimTower(
        build(checkpoint),
        checkpoint.spec,
        checkpoint.mask,
        path=checkpoint.path,
    ).eval()


def build(checkpoint: SlimCheckpoint) -> nn.Module:
    """The tower of ``checkpoint``, with its weights, on the CPU.

    Raises:
        CheckpointError: The tensors do not make the tower that the config describes.
        MissingLibraryError: The family is not one that this version builds, or what it needs for
            that is not installed.
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
    with torch.device("meta"):
        tower = builder.build(checkpoint)
    own = tower.state_dict()
    wrong = [
        f"{name} {_shape(state, name)} instead of {_shape(own, name)}"
        for name in sorted(own.keys() | state.keys())
        if _shape(own, name) != _shape(state, name)
    ]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path}: the tensors do not make the tower that {CONFIG} describes: "
            f"{'; '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}; copy or write the "
            "checkpoint again"
        )
    _fill(tower, state)
    return tower


def _fill(tower: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put tensors, as stored, so that what is loaded is bit for bit what was saved, in a tower.

    Buffers that are not saved stay as the builder made them.
    """
    for path, module in tower.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = state[prefix + name].clone()
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and prefix + name in state:
                module._buffers[name] = state[prefix + name].clone()


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


@dataclass(frozen=True)
class _Builder:
    """How a family's tower is built, without weights, and what it gives.

    Attributes:
        build: The tower.
        dense: (tower, images) to the dense output.
        outputs: (tower, images) to the pooled and the dense output, in one pass; None for two.
        set_size: Makes, in place, a size the tower's native one; None where it has none.
    """

    build: Callable[[SlimCheckpoint], nn.Module]
    dense: Callable[[Any, Tensor], Tensor]
    outputs: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None = None
    set_size: Callable[[Any, tuple[int, int]], None] | None = None


# Families whose towers can be built here, by the name that the config gives.
_BUILDERS = {
    "open_clip-vit": _Builder(
        build_vision_transformer,
        VisionTransformer.dense,
        VisionTransformer.outputs,
        VisionTransformer.set_size,
    ),
    "open_clip-resnet": _Builder(build_modified_resnet, ModifiedResNet.dense),
    "open_clip-convnext": _Builder(narrow_timm_tower, timm_dense, timm_pooled_and_dense),
    "open_clip-efficientnet": _Builder(narrow_timm_tower, timm_dense, timm_pooled_and_dense),
    "open_clip-fastvit": _Builder(narrow_timm_tower, timm_dense, timm_pooled_and_dense),
    "open_clip-swin": _Builder(narrow_timm_tower, timm_dense, timm_pooled_and_dense),
    "open_clip-timm-vit": _Builder(narrow_timm_tower, timm_vit_dense, timm_vit_pooled_and_dense),
    "transformers-vit": _Builder(narrow_tower, TransformersTower.dense, TransformersTower.outputs),
}
