"""Modules of a framework that are cut, and their slim copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.cutting import Run, keep_index, layer_runs
from ovsprune.slim.modules import slim_attention, slim_module
from ovsprune.slim.spec import LayerSpec
from ovsprune.targets.layout import Layout

__all__ = ["Cut", "HeadlessAttention", "cuts_of", "dense_shapes", "slim_copy"]

_ROWS = ("bias", "running_mean", "running_var")  # one entry for every row of the weight


@dataclass(frozen=True, eq=False)
class Cut:
    """Cut of one module of the tower.

    Attributes:
        path: Path of the module in the framework.
        heads: Kept heads, for an attention that is replaced as one module; None for a layer.
        num_heads: Heads of the dense attention; 0 for a layer.
        rows: int64, kept outputs of a layer; None keeps all.
        columns: int64, kept inputs of a layer; None keeps all.
        units: Description of the removed units for the report.
    """

    path: str
    heads: tuple[int, ...] | None = None
    num_heads: int = 0
    rows: Tensor | None = None
    columns: Tensor | None = None
    units: str = ""

    def owns(self, name: str) -> bool:
        """Return True if the tensor ``name`` belongs to the slim module and not to the dense one.

        A cut layer shares its submodules with the dense layer; a slim attention shares nothing.
        """
        if self.heads is not None:
            return name.startswith(f"{self.path}.")
        # direct tensors only, not those of submodules such as a norm inside a convolution
        return name.rpartition(".")[0] == self.path

    def __str__(self) -> str:
        if self.heads is not None:
            return f"{len(self.heads)} of {self.num_heads} heads"
        parts = (("outputs", self.rows), ("inputs", self.columns))
        kept = " and ".join(f"{len(kept)} {name}" for name, kept in parts if kept is not None)
        return f"{self.units}, {kept}" if self.units else kept


def cuts_of(checkpoint: SlimCheckpoint, layout: Layout) -> tuple[Cut, ...]:
    """List the modules that the checkpoint's mask cuts, by the framework's names.

    Raises TargetError if the framework needs one of them at full width.
    """
    shapes = dense_shapes(checkpoint)
    cuts: list[Cut] = []
    for layer in checkpoint.spec.layers:
        if layer.kept == layer.units:
            continue  # nothing was removed
        for module in (part.module for part in layer.slices):
            if not module.startswith(f"{layer.block}."):  # it would change the residual stream
                raise _protected(module)
        if layer.is_whole_attention:
            cuts += _head_cuts(layer, checkpoint.mask[layer.name], layout)
    for module, axes in layer_runs(checkpoint.spec, checkpoint.mask).items():
        # axis 0 of a weight are its outputs (rows), axis 1 its inputs (columns)
        index = {
            axis: keep_index(shapes[f"{module}.weight"][0 if axis == "out" else 1], runs)
            for axis, runs in axes.items()
        }
        cuts.append(Cut(_path(layout, module), rows=index.get("out"), columns=index.get("in")))
    return tuple(cuts)


def _head_cuts(layer: LayerSpec, mask: Tensor, layout: Layout) -> list[Cut]:
    """Cut the attention as one module if it owns its in projection, else its linear layers."""
    heads, parts = tuple(map(int, mask)), layout.paths(f"{layer.name}.in_proj_weight")
    attention = layout.name(layer.name)
    fused = all(part.rpartition(".")[0] == attention for part in parts)  # one or three parameters
    if fused or not heads:  # without heads the framework's attention could not reshape its layers
        return [Cut(path=_path(layout, layer.name), heads=heads, num_heads=layer.units)]
    # separate layers for q, k and v: keep head_dim rows of each for every kept head
    kept = keep_index(
        layer.units * layer.unit_width,
        [
            Run(
                offset=0,
                units=layer.units,
                unit_width=layer.unit_width,
                kept=mask,
                layer=layer.name,
            )
        ],
    )
    units = f"{len(heads)} of {layer.units} heads"
    cuts = [Cut(part.removesuffix(".weight"), rows=kept, units=units) for part in parts]
    return [*cuts, Cut(_path(layout, f"{layer.name}.out_proj"), columns=kept, units=units)]


def _path(layout: Layout, module: str) -> str:
    """Return the framework's path of ``module``; raise TargetError if it has none or several."""
    path = layout.name(module)
    if path is None:
        raise _protected(module)
    return path


def _protected(module: str) -> TargetError:
    return TargetError(
        f"the slim checkpoint cuts {module}, which this framework reads at full width; prune "
        f"again with --protect '{module}'"
    )


class HeadlessAttention(nn.Module):
    """Attention of transformers without heads; returns the bias of the out projection."""

    kept_heads: tuple[int, ...] = ()

    def __init__(self, dense: Any) -> None:
        super().__init__()
        self.num_heads: int = dense.num_heads
        no_rows = torch.empty(0, dtype=torch.int64)
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, slim_module(getattr(dense, name), {"out": no_rows}))
        # in and out axes differ: q, k, v lose all rows, the out projection all columns
        self.out_proj = slim_module(dense.out_proj, {"in": no_rows})

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Map [B, L, E] to the bias at every token, [B, L, E], and no attention weights."""
        # a product with no columns: out_proj adds its bias to zeros
        return self.out_proj(hidden_states[..., :0]), None


def slim_copy(dense: nn.Module, cut: Cut) -> nn.Module:
    """Create the slim copy of ``dense`` with the units that ``cut`` keeps.

    Device, dtype, training mode and ``requires_grad`` are those of ``dense``. A module of a kind
    that cannot be cut this way is refused.
    """
    if cut.heads is None:
        axes = {"out": cut.rows, "in": cut.columns}
        try:
            return slim_module(dense, {k: index for k, index in axes.items() if index is not None})
        except TargetError as error:
            raise TargetError(f"{cut.path}: {error}") from None
    separate = isinstance(getattr(dense, "q_proj", None), nn.Linear)
    if separate and cut.heads:
        raise TargetError(
            f"{cut.path} has separate layers for queries, keys and values; cut these layers instead"
        )
    slim: nn.Module = HeadlessAttention(dense) if separate else slim_attention(dense, cut.heads)
    # new parameters train by default; the framework may have frozen the dense ones
    trainable = {name: p.requires_grad for name, p in dense.named_parameters()}
    for name, parameter in slim.named_parameters():
        parameter.requires_grad_(trainable.get(name, False))
    return slim.train(dense.training)


def dense_shapes(checkpoint: SlimCheckpoint) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every tensor of the tower before it was cut, by canonical name."""
    # Stored shapes are slim; the loop below adds the removed rows and columns again.
    shapes = {name: list(tensor.shape) for name, tensor in checkpoint.tower().items()}
    for layer in checkpoint.spec.layers:
        removed = (layer.units - layer.kept) * layer.unit_width
        if layer.is_whole_attention:
            for part, axis, times in (
                ("in_proj_weight", 0, 3),  # rows of q, k and v
                ("in_proj_bias", 0, 3),
                ("out_proj.weight", 1, 1),
            ):
                if f"{layer.name}.{part}" in shapes:
                    shapes[f"{layer.name}.{part}"][axis] += removed * times
            continue
        for piece in layer.slices:
            shapes[f"{piece.module}.weight"][0 if piece.axis == "out" else 1] += removed
            for name in _ROWS if piece.axis == "out" else ():
                if f"{piece.module}.{name}" in shapes:
                    shapes[f"{piece.module}.{name}"][0] += removed
    return {name: tuple(shape) for name, shape in shapes.items()}
