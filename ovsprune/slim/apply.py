"""Slim a built tower in place, so that the original can be put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

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

    Changed parameters are new objects, so make the optimiser afterwards.

    Args:
        tower: A dense tower of the architecture that was pruned, or a model that holds one.
        checkpoint: From :func:`ovsprune.read`.
        weights: ``"slim"`` loads the checkpoint's tensors; ``"target"`` cuts the tower's own
            weights by the mask, for a tower that was finetuned.
        prefix_map: Where the tower does not have canonical names: dotted canonical prefix to
            dotted path in ``tower``; the longest prefix wins, names without one stay.
        keep: Canonical names (or dotted prefixes) of tensors that the tower keeps as they are.
        activation: What the tower's MLPs compute, where no module shows it.

    Returns:
        Record of the changes; its ``detach()`` puts the original back.

    Raises:
        TargetError: The tower is not dense, of another architecture, or has another activation.
        OptionError: ``weights`` or ``activation`` is unknown.
    """
    if weights not in ("slim", "target"):
        raise OptionError(f"weights is {weights!r}, expected 'slim' or 'target'")
    if isinstance(tower, torch.jit.ScriptModule):
        raise TargetError("the tower is a TorchScript module; load it without jit and try again")
    plan = _Plan(tower, checkpoint, dict(prefix_map or {}), tuple(keep))
    plan.find_tensors()
    check_activation(plan.block_modules(), checkpoint.spec.activation, activation)
    plan.replace_modules()
    if weights == "slim":
        plan.load_tensors()
    return plan.commit()


def map_name(name: str, prefix_map: Mapping[str, str]) -> str:
    """``name`` with its longest dotted prefix in ``prefix_map`` exchanged.

    Example:
        >>> map_name("transformer.resblocks.1.attn", {"transformer.resblocks": "layers"})
        'layers.1.attn'
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in prefix_map:
            return ".".join([x for x in (prefix_map[prefix], *parts[end:]) if x])
    return name


class _Plan:
    """Checks of a tower against a checkpoint, and the replacements that follow from it."""

    def __init__(
        self,
        tower: nn.Module,
        checkpoint: SlimCheckpoint,
        prefix_map: dict[str, str],
        keep: tuple[str, ...],
    ) -> None:
        self.tower = tower
        self.checkpoint = checkpoint
        self.prefix_map = prefix_map
        self.keep = keep
        self.new = Replacements(tower)
        self.modules, self.tensors = self.new.modules, self.new.tensors

    def path(self, name: str) -> str:
        return map_name(name, self.prefix_map)

    def kept(self, name: str) -> bool:
        return any(name == k or name.startswith(f"{k}.") for k in self.keep)

    def module(self, name: str) -> nn.Module:
        try:
            return self.tower.get_submodule(self.path(name))
        except AttributeError:
            raise TargetError(
                f"the tower has no module {self.path(name)}; expected the tower of a dense "
                f"{self.checkpoint.spec.base.model} ({self._hint()})"
            ) from None

    def find_tensors(self) -> None:
        """Check that the tower has every tensor of the checkpoint, whichever weights are used."""
        missing = [
            self.path(name)
            for name in self.checkpoint.tower()
            if not self.kept(name) and _tensor(self.tower, self.path(name)) is None
        ]
        if missing:
            raise TargetError(
                f"the tower has no tensor {', '.join(missing[:4])}"
                f"{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}; expected the "
                f"tower of a dense {self.checkpoint.spec.base.model} ({self._hint()})"
            )

    def _hint(self) -> str:
        for part in ("visual", "vision_model"):
            if hasattr(self.tower, part):
                return f"this looks like a whole CLIP: pass its .{part}"
        return "a framework with other names needs its target or a prefix_map"

    def block_modules(self) -> Iterator[nn.Module]:
        """Modules of the blocks in which something can be cut."""
        for layer in self.checkpoint.spec.layers:
            for part in layer.slices:
                # a map may know the layers, but not their block
                for scope in (self.path(layer.block), self.path(part.module).rpartition(".")[0]):
                    try:
                        yield from self.tower.get_submodule(scope).modules()
                    except AttributeError:
                        continue
                    break

    def replace_modules(self) -> None:
        spec, mask = self.checkpoint.spec, self.checkpoint.mask
        for layer in spec.layers:
            if layer.is_whole_attention:
                self._replace_heads(layer, mask[layer.name])
        for name, axes in layer_runs(spec, mask).items():
            index = {}
            for axis, runs in axes.items():
                self._check_size(name, axis)
                index[axis] = keep_index(self._dense_size(name, axis), runs)
            old = self.module(name)
            self.modules[self.path(name)] = (old, slim_module(old, index))

    def _check_size(self, name: str, axis: str) -> None:
        """The tower must have what the checkpoint's base had on an axis."""
        dense = self._dense_size(name, axis)
        for tensor, dim in tensor_axes(name, axis, self.checkpoint.tower()).items():
            found = _tensor(self.tower, self.path(tensor))
            if found is not None and (found.dim() <= dim or found.shape[dim] != dense):
                raise TargetError(
                    f"{self.path(name)} has a {tensor.rpartition('.')[2]} of shape "
                    f"{tuple(found.shape)}, expected {dense} on axis {dim} for a dense "
                    f"{self.checkpoint.spec.base.model}; detach a slim tower, or check the model's "
                    "name"
                )

    def _dense_size(self, name: str, axis: str) -> int:
        """Channels that a layer had before the cut: those it has now, and those cut."""
        spec, state = self.checkpoint.spec, self.checkpoint.tower()
        size = max(state[n].shape[dim] for n, dim in tensor_axes(name, axis, state).items())
        for layer in spec.layers:
            for part in layer.slices:
                if part.module == name and part.axis == axis:
                    size += (layer.units - layer.kept) * layer.unit_width
        return size

    def _replace_heads(self, layer: LayerSpec, kept: Tensor) -> None:
        old, path = self.module(layer.name), self.path(layer.name)
        if isinstance(old, SlimAttention | TimmAttention):
            raise TargetError(f"{path} is slim already; detach the slim tower first")
        if getattr(old, "num_heads", layer.units) != layer.units:
            raise TargetError(
                f"{path} has {old.num_heads} heads, expected {layer.units} of a dense "
                f"{self.checkpoint.spec.base.model}; check the model's name"
            )
        for name, (axis, runs) in head_runs(layer, kept).items():
            tensor = _tensor(old, name)
            size = max(run.end for run in runs)
            if tensor is not None and tensor.shape[axis] != size:
                raise TargetError(
                    f"{path}.{name} has shape {tuple(tensor.shape)}, expected {size} on axis "
                    f"{axis} for {layer.units} heads of width {layer.unit_width}; check the "
                    "model's name"
                )
        if layer.kept < layer.units:
            self.modules[path] = (old, slim_attention(old, kept))

    def load_tensors(self) -> None:
        """The checkpoint's values, into the new modules and for the tower's other tensors."""
        wrong = []
        for name, value in self.checkpoint.tower().items():
            if self.kept(name):
                continue
            path = self.path(name)
            old = self.new.find(path)
            assert old is not None  # find_tensors, and slim copies have the tensors of the dense
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
        """Positions of a CLIP ViT, or of an attention pool, for the tower's own grid.

        A tower that does not tell its grid has the checkpoint's if it has as many positions, and
        otherwise a square one, or one that does not fit.
        """
        kernel = self.checkpoint.tower()["conv1.weight"].shape[-2:]
        step = (kernel[0], kernel[1]) if name == "positional_embedding" else (STRIDE, STRIDE)
        native = native_grid(self.checkpoint, step, value.shape[0] - 1)
        count = old.shape[-2] - 1 if old.dim() > 1 else 0
        side = round(count**0.5) if count > 0 else 0
        owner = self.tower.get_submodule(self.path(name).rpartition(".")[0])
        told = getattr(owner, "grid_size", None)
        if isinstance(told, (tuple, list)) and len(told) == 2 and told[0] * told[1] == count:
            return resize_positions(value, native, (told[0], told[1]))
        if count != value.shape[0] - 1 and side * side == count > 0:
            return resize_positions(value, native, (side, side))
        return value

    def commit(self) -> Applied:
        """Exchange everything, wherever in the tower it is registered."""
        applied = self.new.commit()
        applied.unused = tuple(name for name in self.checkpoint.tower() if self.kept(name))
        return applied


def _tensor(root: nn.Module, path: str) -> Tensor | None:
    """Parameter or buffer at a dotted path, or None."""
    parent, _, name = path.rpartition(".")
    try:
        owner = root.get_submodule(parent)
    except AttributeError:
        return None
    found = owner._parameters.get(name)
    return owner._buffers.get(name) if found is None else found
