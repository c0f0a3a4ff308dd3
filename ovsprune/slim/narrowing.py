"""Narrowing a dense tower that a library built to the widths of a slim checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ovsprune.core.errors import CheckpointError
from ovsprune.slim.cutting import Run, keep_index, layer_runs
from ovsprune.slim.modules import slim_attention, slim_module
from ovsprune.slim.read import SlimCheckpoint

__all__ = ["narrowed"]


def narrowed(checkpoint: SlimCheckpoint, build: Callable[[], nn.Module]) -> nn.Module:
    """A tower of the widths of ``checkpoint``, without its weights.

    Args:
        checkpoint: Says what is cut.
        build: Makes the dense tower, on torch's default device.

    Raises:
        CheckpointError: The dense tower has no layer of a name that the config gives.
    """
    spec, mask = checkpoint.spec, checkpoint.mask
    tower = build()
    if _unsaved(tower):  # what a library computes when it builds has values only if it is built
        with torch.device("cpu"):
            tower = build()
    with torch.device("cpu"):  # where the mask is, whatever the tower is built on
        for layer in spec.layers:
            if layer.is_whole_attention and layer.kept < layer.units:
                heads = partial(slim_attention, kept_heads=mask[layer.name])
                _replace(checkpoint, tower, layer.name, heads)
        for name, axes in layer_runs(spec, mask).items():
            _replace(checkpoint, tower, name, partial(_narrow, axes=axes))
    return tower


def _unsaved(tower: nn.Module) -> bool:
    """Whether it has buffers that no checkpoint holds."""
    return any(module._non_persistent_buffers_set for module in tower.modules())


def _replace(
    checkpoint: SlimCheckpoint,
    tower: nn.Module,
    name: str,
    change: Callable[[Any], Any],
) -> None:
    """Replace the layer ``name`` by what ``change`` makes of it."""
    parent, _, own = name.rpartition(".")
    try:
        owner = tower.get_submodule(parent)
        setattr(owner, own, change(getattr(owner, own)))
    except AttributeError:
        spec = checkpoint.spec
        raise CheckpointError(
            f"{checkpoint.path}: the architecture has no layer {name}; copy or write the "
            f"checkpoint again, or install {spec.library} {spec.library_version}, which built it"
        ) from None


def _narrow(part: Any, axes: Mapping[str, Sequence[Run]]) -> nn.Module:
    sizes = {axis: part.weight.shape[0 if axis == "out" else 1] for axis in axes}
    return slim_module(part, {axis: keep_index(sizes[axis], runs) for axis, runs in axes.items()})
