"""Building a slim tower from nothing but its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ovsprune.core.errors import CheckpointError, MissingLibraryError
from ovsprune.slim.read import SlimCheckpoint, read
from ovsprune.slim.shape import build_vision_transformer
from ovsprune.slim.spec import CONFIG, SlimSpec
from ovsprune.slim.vit import VisionTransformer

__all__ = ["SlimTower", "build", "load"]


class SlimTower(nn.Module):
    """An image tower that was loaded from a slim checkpoint.

    Attributes:
        tower: The module itself, its parameters by their canonical names.
        spec: What the checkpoint's config says.
        mask: Layer name to int64 [kept], in the base model's coordinates.
    """

    def __init__(
        self, tower: VisionTransformer, spec: SlimSpec, mask: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.tower = tower
        self.spec = spec
        self.mask = mask

    def forward(self, images: Tensor) -> Tensor:
        """Embedding of each picture, [B, 3, H, W] -> [B, C], not normalised."""
        out: Tensor = self.tower(images)
        return out

    def dense(self, images: Tensor) -> Tensor:
        """Embedding of each patch, [B, 3, H, W] -> [B, C, h, w], not normalised."""
        return self.tower.dense(images)


def load(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> SlimTower:
    """Load a slim tower, in evaluation mode; needs the library of no framework for a CLIP ViT.

    Args:
        directory: What ``ovsprune prune`` wrote.
        device: Where to.
        dtype: Of the parameters; as they were stored by default.

    Raises:
        CheckpointError: The checkpoint is damaged, or its parts do not fit each other.
        MissingLibraryError: The family is not one that this version builds itself.
    """
    checkpoint = read(directory)
    tower = build(checkpoint)
    loaded = SlimTower(tower, checkpoint.spec, checkpoint.mask).eval()
    return loaded.to(device=device, dtype=dtype)


def build(checkpoint: SlimCheckpoint) -> VisionTransformer:
    """The tower of ``checkpoint``, with its weights, on the CPU.

    Raises:
        CheckpointError: The tensors do not make the tower that the config describes.
        MissingLibraryError: The family is not one that this version builds itself.
    """
    spec = checkpoint.spec
    builder = _BUILDERS.get(spec.family)
    if builder is None:
        raise MissingLibraryError(
            f"{checkpoint.path} is of the family {spec.family!r}, which this ovsprune does not "
            f"build by itself (it builds {', '.join(sorted(_BUILDERS))}); build the tower with "
            f"{spec.library} {spec.library_version} and call ovsprune.apply(tower, "
            "ovsprune.read(directory))"
        )
    state = checkpoint.tower()
    with torch.device("meta"):
        tower = builder(checkpoint)
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
    tower.to_empty(device="cpu")
    for name, parameter in tower.named_parameters():
        # as stored, so that what is loaded is bit for bit what was saved
        parameter.data = state[name].clone()
    return tower


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


# Families whose towers we build ourselves, by the name that the config gives.
_BUILDERS: dict[str, Callable[[SlimCheckpoint], VisionTransformer]] = {
    "open_clip-vit": build_vision_transformer,
}
