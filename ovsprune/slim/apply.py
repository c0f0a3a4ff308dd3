"""Slim a built tower in place, reversibly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.slim.activation import check_activation
from ovsprune.slim.attach import Applied, Replacements
from ovsprune.slim.attention import SlimAttention
from ovsprune.slim.cutting import head_runs, keep_index, layer_runs, tensor_axes
from ovsprune.slim.modules import slim_attention, slim_module
from ovsprune.slim.read import SlimCheckpoint
from ovsprune.slim.resnet import STRIDE
from ovsprune.slim.shape import native_grid
from ovsprune.slim.spec import LayerSpec
from ovsprune.slim.timm_attention import TimmAttention
from ovsprune.slim.vit import resize_positions

__all__ = ["apply", "map_name"]


def apply(
    tower: nn.Module,
    checkpoint: SlimCheckpoint,
    *,
    weights: Literal["slim", "target"] = "slim",
    prefix_map: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    activation: str | None = None,
) -> Applied:
    """Slim a dense tower in place. Everything is checked before anything is changed.

    Changed parameters are new objects, so create the optimiser afterwards.

    Args:
        tower: Dense tower of the architecture that was pruned, or a model that contains it.
        checkpoint: Result of :func:`ovsprune.read`.
        weights: ``"slim"`` loads the checkpoint's tensors; ``"target"`` keeps the weights of the
            tower, without the removed units, for a tower that was finetuned.
        prefix_map: Map of dotted canonical prefix to dotted path in ``tower``, if the tower does
            not have canonical names. The longest matching prefix is replaced; other names stay.
        keep: Canonical names (or dotted prefixes) of tensors that are not loaded.
        activation: Activation function of the tower, if it is no module (a call of ``F.gelu``).

    Returns:
        Record of the changes; its ``detach()`` restores the original.

    Raises:
        TargetError: The tower is not dense, or has another architecture or activation function.
        OptionError: ``weights`` or ``activation`` is unknown.
    """
    if weights not in ("slim", "target"):
        raise OptionError(f"weights is {weights!r}, expected 'slim' or 'target'")
    if isinstance(tower, torch.jit.ScriptModule):
        raise TargetError("the tower is a TorchScript module; load it without jit and try again")
    plan = _Plan(tower, checkpoint, dict(prefix_map or {}), tuple(keep))
    # Names first: a whole CLIP or another framework gets a message about that.
    plan.check_names()
    check_activation(plan.block_modules(), checkpoint.spec.activation, activation)
    plan.replace_modules()
    if weights == "slim":
        plan.load_tensors()
    applied = plan.new.commit()
    applied.unused = tuple(name for name in checkpoint.tower() if plan.is_kept(name))
    return applied


def map_name(name: str, prefix_map: Mapping[str, str]) -> str:
    """Replace the longest dotted prefix of ``name`` that is in ``prefix_map``.

    Example:
        >>> map_name("transformer.resblocks.1.attn", {"transformer.resblocks": "layers"})
        'layers.1.attn'
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):  # longest prefix first
        prefix = ".".join(parts[:end])
        if prefix in prefix_map:
            # A prefix may be mapped to the empty path, the tower itself.
            return ".".join([x for x in (prefix_map[prefix], *parts[end:]) if x])
    return name


class _Plan:
    """Checks of a tower against a checkpoint, and the replacements to make."""

    def __init__(
        self,
        tower: nn.Module,
        checkpoint: SlimCheckpoint,
        prefix_map: dict[str, str],
        keep: tuple[str, ...],
    ) -> None:
        self.tower = tower
        self.spec, self.mask = checkpoint.spec, checkpoint.mask
        self.checkpoint = checkpoint
        self.state = checkpoint.tower()
        self.prefix_map = prefix_map
        self.keep = keep
        self.new = Replacements(tower)

    def path(self, name: str) -> str:
        """Return the path in the tower of a canonical name."""
        return map_name(name, self.prefix_map)

    def is_kept(self, name: str) -> bool:
        """Return True if the tensor ``name`` is not to be loaded."""
        return any(name == k or name.startswith(f"{k}.") for k in self.keep)

    def module(self, name: str) -> nn.Module:
        """Return the dense module with a canonical name."""
        try:
            return self.tower.get_submodule(self.path(name))
        except AttributeError:
            raise self._wrong_tower(f"module {self.path(name)}") from None

    def check_names(self) -> None:
        """Check that the tower has every tensor of the checkpoint, whichever weights are used."""
        paths = [self.path(name) for name in self.state if not self.is_kept(name)]
        missing = [path for path in paths if self.new.find(path) is None]
        if missing:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise self._wrong_tower(f"tensor {', '.join(missing[:4])}{more}")

    def _wrong_tower(self, missing: str) -> TargetError:
        """Return the error for a tower that lacks something."""
        hint = "a framework with other names needs its target or a prefix_map"
        for part in ("visual", "vision_model"):
            if hasattr(self.tower, part):
                hint = f"this looks like a whole CLIP: pass its .{part}"
                break
        return TargetError(
            f"the tower has no {missing}; expected the tower of a dense {self.spec.base.model} "
            f"({hint})"
        )

    def block_modules(self) -> Iterator[nn.Module]:
        """Yield the modules of the blocks that have prunable units."""
        for layer in self.spec.layers:
            for part in layer.slices:
                # prefix_map may map the layers without mapping their block
                for scope in (self.path(layer.block), self.path(part.module).rpartition(".")[0]):
                    try:
                        yield from self.tower.get_submodule(scope).modules()
                    except AttributeError:
                        continue
                    break

    def replace_modules(self) -> None:
        """Build the slim copies of all modules that lose units."""
        for layer in self.spec.layers:
            if layer.is_whole_attention:
                self._replace_attention(layer, self.mask[layer.name])
        for name, axes in layer_runs(self.spec, self.mask).items():
            index = {}
            for axis, runs in axes.items():
                size = self._dense_size(name, axis)
                self._check_size(name, axis, size)
                index[axis] = keep_index(size, runs)
            dense = self.module(name)
            self.new.modules[self.path(name)] = (dense, slim_module(dense, index))

    def _dense_size(self, name: str, axis: str) -> int:
        """Return the channels of a layer in the base model: the stored and the removed ones."""
        size = max(self.state[n].shape[d] for n, d in tensor_axes(name, axis, self.state).items())
        removed = (
            (layer.units - layer.kept) * layer.unit_width
            for layer in self.spec.layers
            for part in layer.slices
            if part.module == name and part.axis == axis
        )
        return size + sum(removed)

    def _check_size(self, name: str, axis: str, size: int) -> None:
        """Check that the tensors of a layer of the tower have ``size`` channels on an axis."""
        for tensor_name, dim in tensor_axes(name, axis, self.state).items():
            tensor = self.new.find(self.path(tensor_name))
            if tensor is not None and (tensor.dim() <= dim or tensor.shape[dim] != size):
                raise TargetError(
                    f"{self.path(name)} has a {tensor_name.rpartition('.')[2]} of shape "
                    f"{tuple(tensor.shape)}, expected {size} on axis {dim} for a dense "
                    f"{self.spec.base.model}; detach a slim tower, or check the model's name"
                )

    def _replace_attention(self, layer: LayerSpec, kept: Tensor) -> None:
        """Build the slim copy of an attention module, if it loses heads."""
        dense: Any = self.module(layer.name)
        path = self.path(layer.name)
        if isinstance(dense, SlimAttention | TimmAttention):
            raise TargetError(f"{path} is slim already; detach the slim tower first")
        if getattr(dense, "num_heads", layer.units) != layer.units:
            raise TargetError(
                f"{path} has {dense.num_heads} heads, expected {layer.units} of a dense "
                f"{self.spec.base.model}; check the model's name"
            )
        for name, (axis, runs) in head_runs(layer, kept).items():
            tensor = self.new.find(f"{path}.{name}")
            size = max(run.end for run in runs)
            if tensor is not None and tensor.shape[axis] != size:
                raise TargetError(
                    f"{path}.{name} has shape {tuple(tensor.shape)}, expected {size} on axis "
                    f"{axis} for {layer.units} heads of width {layer.unit_width}; check the "
                    "model's name"
                )
        if layer.kept < layer.units:
            self.new.modules[path] = (dense, slim_attention(dense, kept))

    def load_tensors(self) -> None:
        """Give the slim copies and the other tensors of the tower the checkpoint's values."""
        wrong = []
        for name, value in self.state.items():
            if self.is_kept(name):
                continue
            path = self.path(name)
            old = self.new.find(path)
            assert old is not None  # check_names found it, and slim copies have the same names
            if name in ("positional_embedding", "attnpool.positional_embedding"):
                value = self._positions(name, value, old)
            if not self.new.load(path, value):
                wrong.append(f"{path} {tuple(old.shape)} instead of {tuple(value.shape)}")
        if wrong:
            raise TargetError(
                f"the tower has other shapes than the checkpoint: {'; '.join(wrong[:4])}; check "
                "the model's name"
            )

    def _positions(self, name: str, value: Tensor, old: Tensor) -> Tensor:
        """Interpolate the positions of a CLIP ViT or an attention pool to the tower's grid.

        Without an attribute ``grid_size``, a tower with another number of positions than the
        checkpoint is assumed to have a square grid.
        """
        kernel = self.state["conv1.weight"].shape[-2:]
        step = (kernel[0], kernel[1]) if name == "positional_embedding" else (STRIDE, STRIDE)
        native = native_grid(self.checkpoint, step, value.shape[0] - 1)
        count = old.shape[-2] - 1 if old.dim() > 1 else 0  # without the class token
        side = round(count**0.5) if count > 0 else 0
        owner = self.tower.get_submodule(self.path(name).rpartition(".")[0])
        grid = getattr(owner, "grid_size", None)
        if isinstance(grid, (tuple, list)) and len(grid) == 2 and grid[0] * grid[1] == count:
            return resize_positions(value, native, (grid[0], grid[1]))
        if count != value.shape[0] - 1 and side * side == count > 0:
            return resize_positions(value, native, (side, side))
        return value
