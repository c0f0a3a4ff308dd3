"""Reduce a dense tower built by a library to the widths of a slim checkpoint."""

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

__all__ = ["build_narrowed"]


def build_narrowed(
    checkpoint: SlimCheckpoint, build: Callable[[Mapping[str, Any]], nn.Module]
) -> nn.Module:
    """Build a tower with the layer widths of ``checkpoint``, without its weights.

    Args:
        checkpoint: Its config and mask give the kept units of each layer.
        build: Builds the dense tower from the architecture, on torch's default device.

    Raises:
        CheckpointError: The dense tower lacks a layer that the config names, or ``build`` fails.
        MissingLibraryError: A library that ``build`` needs is not installed, or too old.
    """
    spec, mask = checkpoint.spec, checkpoint.mask
    tower = build(spec.architecture)
    if any(module._non_persistent_buffers_set for module in tower.modules()):
        # the checkpoint does not hold these buffers, so they must be computed, not left on "meta"
        with torch.device("cpu"):
            tower = build(spec.architecture)
    changes: dict[str, Callable[[Any], nn.Module]] = {
        layer.name: partial(slim_attention, kept_heads=mask[layer.name])
        for layer in spec.layers
        if layer.is_whole_attention and layer.kept < layer.units
    }
    changes |= {n: partial(_narrow, axes=axes) for n, axes in layer_runs(spec, mask).items()}
    for name, change in changes.items():
        parent_name, _, attribute = name.rpartition(".")
        try:
            parent = tower.get_submodule(parent_name)
            with torch.device("cpu"):  # the mask is on the CPU, even if the tower is on "meta"
                setattr(parent, attribute, change(getattr(parent, attribute)))
        except AttributeError:
            raise CheckpointError(
                f"{checkpoint.path}: the architecture has no layer {name}, which the config lists; "
                f"install {spec.library} {spec.library_version}, with which the checkpoint was "
                "made, or copy the checkpoint again"
            ) from None
    return tower


def _narrow(layer: Any, axes: Mapping[str, Sequence[Run]]) -> nn.Module:
    """Copy a layer without the runs of channels given for each axis."""
    sizes = {axis: layer.weight.shape[0 if axis == "out" else 1] for axis in axes}
    return slim_module(layer, {axis: keep_index(sizes[axis], runs) for axis, runs in axes.items()})
