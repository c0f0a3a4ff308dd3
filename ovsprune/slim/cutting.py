"""Remove the masked units from the tensors of a state dict.

The weights of queries, keys and values may be fused in one tensor or separate.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ovsprune.core.errors import CheckpointError
from ovsprune.slim.spec import LayerSpec, SlimSpec

__all__ = [
    "AXIS_TENSORS",
    "Run",
    "cut_state",
    "fuse_qkv",
    "head_runs",
    "keep_index",
    "layer_runs",
    "tensor_axes",
]

_SPLIT = re.compile(r"(?P<stem>.+)\.(?P<letter>[qkv])_proj[._](?P<tensor>weight|bias)")
_OUT_PROJECTIONS = ("out_proj.weight", "proj.weight")
# Parameters and buffers of a layer that have the channels of an axis.
AXIS_TENSORS = {"out": ("weight", "bias", "running_mean", "running_var"), "in": ("weight",)}


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive units on an axis of a tensor, some of which are kept.

    Attributes:
        offset: First index of unit 0.
        units: Number of units.
        unit_width: Number of indices per unit.
        kept: int64 [kept], the kept units, ascending.
        layer: Name of the layer, for messages.
    """

    offset: int
    units: int
    unit_width: int
    kept: Tensor
    layer: str

    @property
    def end(self) -> int:
        """First index after the last unit."""
        return self.offset + self.units * self.unit_width


def keep_index(size: int, runs: Sequence[Run]) -> Tensor:
    """Return the indices within [0, size) that remain without the removed units, int64 [remaining].

    Example:
        >>> import torch
        >>> keep_index(6, [Run(2, 2, 2, torch.tensor([1]), "a")]).tolist()
        [0, 1, 4, 5]

    Raises:
        CheckpointError: A run reaches beyond ``size``.
    """
    keep = torch.ones(size, dtype=torch.bool)
    for run in runs:
        if run.end > size:
            raise CheckpointError(
                f"{run.layer} has {run.units} units of width {run.unit_width} from index "
                f"{run.offset} on, which needs {run.end} channels, but there are {size}; these are "
                "not the dense weights of the model that the mask was made for"
            )
        is_kept = torch.zeros(run.units, dtype=torch.bool)  # [units]
        is_kept[run.kept.to("cpu")] = True
        # Runs may overlap: an index is kept if every run keeps it.
        keep[run.offset : run.end] &= is_kept.repeat_interleave(run.unit_width)
    return keep.nonzero().flatten()


def head_runs(layer: LayerSpec, kept: Tensor) -> dict[str, tuple[int, list[Run]]]:
    """Map the possible tensor names of an attention module to axis and runs of its heads."""
    width = layer.units * layer.unit_width

    def runs(*offsets: int) -> list[Run]:
        return [
            Run(
                offset=o,
                units=layer.units,
                unit_width=layer.unit_width,
                kept=kept,
                layer=layer.name,
            )
            for o in offsets
        ]

    # Fused: the rows of all queries, then those of all keys, then those of all values.
    fused = ("in_proj_weight", "in_proj_bias", "qkv.weight", "qkv.bias")
    ends = ("_proj_weight", "_proj.weight", "_proj.bias", "_bias")
    separate = [letter + end for letter in "qkv" for end in ends]
    return {
        **{name: (0, runs(0, width, 2 * width)) for name in fused},
        **{name: (1, runs(0)) for name in _OUT_PROJECTIONS},
        # A norm here is the one over the concatenated heads, before the output projection.
        **{name: (0, runs(0)) for name in (*separate, "norm.weight", "norm.bias")},
    }


def layer_runs(spec: SlimSpec, mask: Mapping[str, Tensor]) -> dict[str, dict[str, list[Run]]]:
    """Map each layer to its runs per axis; without uncut layers and attention cut by head."""
    result: dict[str, dict[str, list[Run]]] = {}
    for layer in spec.layers:
        if layer.is_whole_attention or layer.kept == layer.units:
            continue
        for part in layer.slices:
            run = Run(
                offset=part.offset,
                units=layer.units,
                unit_width=layer.unit_width,
                kept=mask[layer.name],
                layer=layer.name,
            )
            # Several groups may cut the same axis of one layer, each at its own offset.
            result.setdefault(part.module, {}).setdefault(part.axis, []).append(run)
    return result


def tensor_axes(module: str, axis: str, names: Container[str]) -> dict[str, int]:
    """Map the tensors of a layer that have its ``axis`` to the number of that axis.

    Only tensors in ``names`` count; without the layer's weight the result is empty.

    Example:
        >>> tensor_axes("ln", "out", {"ln.weight", "ln.bias"})
        {'ln.weight': 0, 'ln.bias': 0}
    """
    if f"{module}.weight" not in names:
        return {}
    candidates = (f"{module}.{tensor}" for tensor in AXIS_TENSORS[axis])
    return {name: 0 if axis == "out" else 1 for name in candidates if name in names}


def cut_state(
    state: Mapping[str, Tensor], spec: SlimSpec, mask: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Remove the masked units from the tensors of a dense tower.

    Args:
        state: Canonical name to tensor of the dense tower. Queries, keys and values may be fused
            (``attn.in_proj_weight``) or separate (``attn.q_proj_weight``, ``attn.q_proj.weight``).
        spec: Spec of the slim checkpoint.
        mask: Mask of the slim checkpoint.

    Returns:
        The same names in the same order. Tensors that lost units are copies, others are shared.

    Raises:
        CheckpointError: A tensor is missing, or does not belong to the model of the mask.
    """
    cut = dict(state)
    for layer in spec.layers:
        if layer.is_whole_attention and layer.kept < layer.units:
            _cut_heads(cut, layer, mask[layer.name])
    for module, axes in layer_runs(spec, mask).items():
        for axis, runs in axes.items():
            dims = tensor_axes(module, axis, cut)
            if not dims:
                raise CheckpointError(
                    f"the tensor {module}.weight is missing; expected a dense tower"
                )
            for name, dim in dims.items():
                cut[name] = _select(cut[name], dim, runs)
    return cut


def _cut_heads(state: dict[str, Tensor], layer: LayerSpec, kept: Tensor) -> None:
    """Remove heads from the tensors of an attention module, in place."""
    runs = head_runs(layer, kept)
    present = [name for name in runs if f"{layer.name}.{name}" in state]
    if not set(_OUT_PROJECTIONS) & set(present) or len(present) < 2:
        raise CheckpointError(
            f"the attention {layer.name} has no out_proj.weight (nor proj.weight) or no "
            "in_proj_weight (nor qkv, nor q_proj, k_proj and v_proj); expected a dense tower with "
            "canonical names"
        )
    for name in present:
        axis, parts = runs[name]
        full = f"{layer.name}.{name}"
        size, expected = state[full].shape[axis], max(run.end for run in parts)
        if size != expected:
            raise CheckpointError(
                f"{full} has {size} channels on axis {axis}, expected {expected} for "
                f"{layer.units} heads of width {layer.unit_width}; these are not the dense weights "
                "of the model that the mask was made for"
            )
        state[full] = _select(state[full], axis, parts)


def _select(tensor: Tensor, axis: int, runs: Sequence[Run]) -> Tensor:
    """Return a copy without the removed units."""
    index = keep_index(tensor.shape[axis], runs)
    return tensor.detach().index_select(axis, index.to(tensor.device))


def fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fuse separate weights of queries, keys and values, with ``nn.MultiheadAttention``'s names.

    ``x.q_proj.weight`` or ``x.q_proj_weight`` (with its k and v) becomes ``x.in_proj_weight``, and
    ``x.q_proj.bias`` becomes ``x.in_proj_bias``. All other tensors are unchanged, also queries,
    keys and values of inputs of different widths, which have no fused form.
    """
    fused = dict(state)
    parts: dict[tuple[str, str], dict[str, str]] = {}
    for name in state:
        if split := _SPLIT.fullmatch(name):
            parts.setdefault((split["stem"], split["tensor"]), {})[split["letter"]] = name
    for (stem, tensor), names in parts.items():
        # shape[1:] is (E,) for weights and () for biases.
        if set(names) == set("qkv") and len({state[n].shape[1:] for n in names.values()}) == 1:
            # [3 * heads * head_dim, E] for weights, [3 * heads * head_dim] for biases
            fused[f"{stem}.in_proj_{tensor}"] = torch.cat([fused.pop(names[x]) for x in "qkv"])
    return fused
