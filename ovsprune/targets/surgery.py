"""Which modules of a framework get slim, and the slim modules that take their places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.cutting import keep_index, layer_runs
from ovsprune.slim.modules import slim_attention, slim_linear
from ovsprune.targets.layout import Layout

__all__ = ["Cut", "cuts_of", "dense_shapes", "slim_copy"]


@dataclass(frozen=True, eq=False)
class Cut:
    """One module of the tower, and what stays of it.

    Attributes:
        path: Its path in the framework.
        heads: Kept heads, for attention; None for a linear layer.
        num_heads: Heads of the dense attention; 0 for a linear layer.
        rows: int64, kept outputs of a linear layer; None keeps all.
        columns: int64, kept inputs of a linear layer; None keeps all.
    """

    path: str
    heads: tuple[int, ...] | None = None
    num_heads: int = 0
    rows: Tensor | None = None
    columns: Tensor | None = None

    def __str__(self) -> str:
        if self.heads is not None:
            return f"{len(self.heads)} of {self.num_heads} heads"
        parts = (("outputs", self.rows), ("inputs", self.columns))
        return " and ".join(f"{len(kept)} {name}" for name, kept in parts if kept is not None)


def cuts_of(checkpoint: SlimCheckpoint, layout: Layout) -> tuple[Cut, ...]:
    """The modules that the checkpoint's mask cuts, in the framework's names.

    Raises:
        TargetError: The mask cuts something that the framework needs at full width.
    """
    shapes = dense_shapes(checkpoint)
    cuts = []
    for layer in checkpoint.spec.layers:
        if layer.whole and layer.kept < layer.units:
            heads = tuple(map(int, checkpoint.mask[layer.name]))
            cuts.append(Cut(_place(layout, layer.name), heads, layer.units))
    for module, axes in layer_runs(checkpoint.spec, checkpoint.mask).items():
        index = {
            axis: keep_index(shapes[f"{module}.weight"][0 if axis == "out" else 1], runs)
            for axis, runs in axes.items()
        }
        cuts.append(Cut(_place(layout, module), rows=index.get("out"), columns=index.get("in")))
    return tuple(cuts)


def _place(layout: Layout, module: str) -> str:
    path = layout.name(module)
    if path is None or not module.startswith("transformer.resblocks."):
        raise TargetError(
            f"the slim checkpoint cuts {module}, which this framework reads at full width; "
            f"prune again with --protect '{module}'"
        )
    return path


def slim_copy(dense: nn.Module, cut: Cut) -> nn.Module:
    """The slim module that does what ``dense`` does with the units that ``cut`` keeps.

    Device, dtype, training mode and ``requires_grad`` are those of ``dense``.

    Raises:
        TargetError: ``dense`` is of a kind that cannot be cut this way.
    """
    if cut.heads is not None:
        slim: nn.Module = slim_attention(dense, cut.heads)
    elif isinstance(dense, nn.Linear):
        slim = slim_linear(dense, cut.rows, cut.columns)
    else:
        raise TargetError(
            f"{cut.path} is a {type(dense).__name__}; expected a linear layer or an attention"
        )
    learns = {name: p.requires_grad for name, p in dense.named_parameters()}
    for name, parameter in slim.named_parameters():
        parameter.requires_grad_(learns.get(name, False))
    return slim.train(dense.training)


def dense_shapes(checkpoint: SlimCheckpoint) -> Mapping[str, tuple[int, ...]]:
    """Shape that every tensor of the slim tower had before it was cut, by canonical name."""
    shapes = {name: list(tensor.shape) for name, tensor in checkpoint.tower().items()}
    for layer in checkpoint.spec.layers:
        gone = (layer.units - layer.kept) * layer.unit_width
        if layer.whole:
            for part, axis, times in (
                ("in_proj_weight", 0, 3),
                ("in_proj_bias", 0, 3),
                ("out_proj.weight", 1, 1),
            ):
                if f"{layer.name}.{part}" in shapes:
                    shapes[f"{layer.name}.{part}"][axis] += gone * times
            continue
        for piece in layer.slices:
            shapes[f"{piece.module}.weight"][0 if piece.axis == "out" else 1] += gone
            if piece.axis == "out" and f"{piece.module}.bias" in shapes:
                shapes[f"{piece.module}.bias"][0] += gone
    return {name: tuple(shape) for name, shape in shapes.items()}
