"""Cutting tensors by a mask: plain state dicts, with queries, keys and values fused or apart."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ovsprune.core.errors import CheckpointError
from ovsprune.slim.spec import LayerSpec, SlimSpec

__all__ = [
    "Run",
    "cut_state",
    "fuse_qkv",
    "head_runs",
    "keep_index",
    "layer_runs",
    "tensor_axes",
]

_SPLIT = re.compile(r"(?P<stem>.+)\.(?P<which>[qkv])_proj[._](?P<what>weight|bias)")
_OUT_PROJECTIONS = ("out_proj.weight", "proj.weight")
_TENSORS = {"out": ("weight", "bias", "running_mean", "running_var"), "in": ("weight",)}


@dataclass(frozen=True, eq=False)
class Run:
    """Units that lie one after another on an axis, and which of them stay.

    Attributes:
        offset: Where unit 0 starts.
        units: How many there are.
        unit_width: Indices that make up one.
        kept: int64 [kept], ascending.
        layer: Name of the layer, for messages.
    """

    offset: int
    units: int
    unit_width: int
    kept: Tensor
    layer: str

    @property
    def end(self) -> int:
        """First index behind the last unit."""
        return self.offset + self.units * self.unit_width


def keep_index(size: int, runs: Sequence[Run]) -> Tensor:
    """int64: the indices within [0, size) that stay when ``runs`` are cut.

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
        unit = torch.zeros(run.units, dtype=torch.bool)
        unit[run.kept.to("cpu")] = True
        keep[run.offset : run.end] &= unit.repeat_interleave(run.unit_width)
    return keep.nonzero().flatten()


def head_runs(layer: LayerSpec, kept: Tensor) -> dict[str, tuple[int, list[Run]]]:
    """Tensor of an attention module, by its name there, to the axis and the runs that are cut."""
    width = layer.units * layer.unit_width

    def runs(*offsets: int) -> list[Run]:
        return [Run(o, layer.units, layer.unit_width, kept, layer.name) for o in offsets]

    fused = ("in_proj_weight", "in_proj_bias", "qkv.weight", "qkv.bias")
    found = {name: (0, runs(0, width, 2 * width)) for name in fused}
    found |= {name: (1, runs(0)) for name in _OUT_PROJECTIONS}
    for which in "qkv":
        for what in ("_proj_weight", "_proj.weight", "_proj.bias", "_bias"):
            found[which + what] = (0, runs(0))
    return found | {name: (0, runs(0)) for name in ("norm.weight", "norm.bias")}


def layer_runs(spec: SlimSpec, mask: Mapping[str, Tensor]) -> dict[str, dict[str, list[Run]]]:
    """Layer of the tower to axis (``"out"``, ``"in"``) to the cut runs; whole attentions apart."""
    found: dict[str, dict[str, list[Run]]] = {}
    for layer in spec.layers:
        if layer.is_whole_attention or layer.kept == layer.units:
            continue
        for part in layer.slices:
            run = Run(part.offset, layer.units, layer.unit_width, mask[layer.name], layer.name)
            found.setdefault(part.module, {}).setdefault(part.axis, []).append(run)
    return found


def tensor_axes(module: str, axis: str, names: Container[str]) -> dict[str, int]:
    """Tensors that a slice means, and the axis of each that it cuts; none if they are not there.

    Args:
        module: Dotted name of a layer.
        axis: ``"out"`` or ``"in"``.
        names: Of the tensors that there are.

    Example:
        >>> tensor_axes("ln", "out", {"ln.weight", "ln.bias"})
        {'ln.weight': 0, 'ln.bias': 0}
    """
    if f"{module}.weight" not in names:
        return {}
    found = (f"{module}.{what}" for what in _TENSORS[axis])
    return {name: 0 if axis == "out" else 1 for name in found if name in names}


def cut_state(
    state: Mapping[str, Tensor], spec: SlimSpec, mask: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Cut a dense tower's tensors by a mask; what the mask does not touch is passed on.

    Args:
        state: Canonical name to tensor, dense; attention may be fused (``attn.in_proj_weight``)
            or apart (``attn.q_proj_weight``, ``attn.q_proj.weight``), and stays as it is.
        spec: Of the slim checkpoint.
        mask: Its kept indices.

    Returns:
        The same names, in the same order, with copies of what was cut.

    Raises:
        CheckpointError: A tensor is missing, or not of the model that the mask was made for.
    """
    cut = dict(state)
    for layer in spec.layers:
        if layer.is_whole_attention and layer.kept < layer.units:
            _cut_heads(cut, layer, mask[layer.name])
    for module, axes in layer_runs(spec, mask).items():
        for axis, runs in axes.items():
            found = tensor_axes(module, axis, cut)
            if not found:
                raise CheckpointError(
                    f"the tensor {module}.weight is missing; expected a dense tower"
                )
            for name, dim in found.items():
                cut[name] = _select(cut[name], dim, runs)
    return cut


def _cut_heads(state: dict[str, Tensor], layer: LayerSpec, kept: Tensor) -> None:
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
        size = state[full].shape[axis]
        if size != max(run.end for run in parts):
            raise CheckpointError(
                f"{full} has {size} channels on axis {axis}, expected "
                f"{max(run.end for run in parts)} for {layer.units} heads of width "
                f"{layer.unit_width}; these are not the dense weights of the model that the mask "
                "was made for"
            )
        state[full] = _select(state[full], axis, parts)


def _select(tensor: Tensor, axis: int, runs: Sequence[Run]) -> Tensor:
    index = keep_index(tensor.shape[axis], runs)
    return tensor.detach().index_select(axis, index.to(tensor.device))


def fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put separate queries, keys and values together as ``nn.MultiheadAttention`` names them.

    ``x.q_proj.weight`` or ``x.q_proj_weight`` (with its k and v) becomes ``x.in_proj_weight``, and
    ``x.q_proj.bias`` becomes ``x.in_proj_bias``; every other tensor is passed on, and so are
    queries, keys and values that read different widths, which have no fused form.
    """
    fused = dict(state)
    parts: dict[tuple[str, str], dict[str, str]] = {}
    for name in state:
        found = _SPLIT.fullmatch(name)
        if found:
            key = found["stem"], found["what"]
            parts.setdefault(key, {})[found["which"]] = name
    for (stem, what), names in parts.items():
        if set(names) == set("qkv") and len({state[n].shape[1:] for n in names.values()}) == 1:
            fused[f"{stem}.in_proj_{what}"] = torch.cat([fused.pop(names[w]) for w in "qkv"])
    return fused
