"""Lists the weight matrices of a model, of which spectra are computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Matrix", "matrices"]

_FUSED_QKV = "in_proj_weight"  # nn.MultiheadAttention with equal input widths
_SEPARATE_QKV = ("q_proj_weight", "k_proj_weight", "v_proj_weight")  # with different ones
_KINDS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out",
    "query": "q", "key": "k", "value": "v",
}  # fmt: skip
_OUTPUT_NAMES = ("proj", "out_proj", "projection")
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True, eq=False)
class Matrix:
    """Weight matrix of a model.

    Attributes:
        name: Dotted name of the layer or of a part of it (``"resblocks.0.attn.q"``).
        parameter: Dotted name of the parameter that contains it.
        kind: ``"q"``, ``"k"``, ``"v"`` or ``"out"`` in attention; elsewhere the name of the layer
            in its block (``"c_fc"``, ``"conv2"``; ``"downsample"`` for ``"downsample.0"``).
        weight: View of the parameter: [out, in], or [out, in, *kernel] for a convolution.
    """

    name: str
    parameter: str
    kind: str
    weight: Tensor


def matrices(model: nn.Module) -> list[Matrix]:
    """List every weight matrix of a model, in the order of its modules.

    These are the weights of linear layers and convolutions. Fused queries, keys and values are
    split (``nn.MultiheadAttention`` and similar modules; timm's ``qkv`` and ``kv`` with equal
    widths). Excluded are norms, biases, embedding tables, position embeddings, bare projections,
    and depthwise convolutions, whose channels are vectors. A parameter that two modules share is
    listed once.
    """
    listed: list[Matrix] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        parent = model.get_submodule(path.rpartition(".")[0])
        # Compare parameters, not weights: the parts of a fused parameter are new views each time.
        new = [
            matrix
            for matrix in _module_matrices(path, module, parent)
            if id(model.get_parameter(matrix.parameter)) not in seen
        ]
        listed += [matrix for matrix in new if matrix.weight.numel()]
        seen.update(id(parameter) for parameter in module.parameters(recurse=False))
    return listed


def _module_matrices(path: str, module: nn.Module, parent: nn.Module) -> Iterator[Matrix]:
    """Yield the matrices of a module's own parameters."""
    start = f"{path}." if path else ""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if _FUSED_QKV in parameters:
        rows = len(parameters[_FUSED_QKV]) // 3
        yield from _parts(start, f"{start}{_FUSED_QKV}", parameters[_FUSED_QKV], "qkv", [rows] * 3)
    for name in _SEPARATE_QKV:
        if name in parameters:
            yield Matrix(f"{start}{name[0]}", f"{start}{name}", name[0], parameters[name])
    if not isinstance(module, _LAYERS) or "weight" not in parameters:
        return
    weight, parameter = parameters["weight"], f"{start}weight"
    if getattr(module, "groups", 1) > 1 and weight.shape[1] == 1:
        return  # depthwise
    names = path.split(".")
    kind = next((n for n in reversed(names) if n and not n.isdigit()), type(module).__name__)
    if kind in ("qkv", "kv") and _has_equal_parts(weight, len(kind), parent):
        start = path.removesuffix(kind)
        yield from _parts(start, parameter, weight, kind, [len(weight) // len(kind)] * len(kind))
        return
    if kind == "proj" and any(hasattr(parent, name) for name in ("qkv", "kv", "q_proj")):
        kind = "out"
    yield Matrix(path or kind, parameter, _KINDS.get(kind, kind), weight)


def _has_equal_parts(weight: Tensor, count: int, parent: Any) -> bool:
    """Return True if timm's fused projection is ``count`` stacked projections of equal width.

    It is not if heads share keys, or if the rows of q, k and v are interleaved head by head.
    """
    if getattr(parent, "head_first", False):
        return False
    out = next(
        (m for m in (getattr(parent, n, None) for n in _OUTPUT_NAMES) if isinstance(m, _LAYERS)),
        None,
    )
    width = len(weight) // count if out is None else out.weight.shape[1]
    return len(weight) == count * width


def _parts(
    start: str, parameter: str, weight: Tensor, kinds: str, rows: list[int]
) -> Iterator[Matrix]:
    """Yield the parts of a fused projection, stacked along its rows."""
    for kind, part in zip(kinds, torch.split(weight, rows), strict=True):
        yield Matrix(f"{start}{kind}", parameter, kind, part)
