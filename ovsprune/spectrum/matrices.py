"""The weight matrices of a model: of which layers a spectrum is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Matrix", "matrices"]

_FUSED, _APART = "in_proj_weight", ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_KINDS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out",
    "query": "q", "key": "k", "value": "v",
}  # fmt: skip
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight matrix.

    Attributes:
        name: Dotted name, of the layer or of a part of one (``"resblocks.0.attn.q"``).
        parameter: Dotted name of the parameter that holds it.
        kind: ``"q"``, ``"k"``, ``"v"`` and ``"out"`` in attention, elsewhere the layer's own name
            in its block (``"c_fc"``, ``"conv2"``; ``"downsample"`` of ``"downsample.0"``).
        weight: [out, in], or [out, in, *kernel] of a convolution; a view of the parameter.
    """

    name: str
    parameter: str
    kind: str
    weight: Tensor


def matrices(model: nn.Module) -> list[Matrix]:
    """Every weight matrix of a model, in the order of its modules.

    Linear layers and convolutions; queries, keys and values apart where one parameter holds them
    (``nn.MultiheadAttention`` and its like, timm's ``qkv``), whatever their widths. Norms, biases,
    embedding tables and positions are none, nor are bare projections, and depthwise convolutions
    have no matrix: each of their channels is a vector. A parameter that two modules share is
    listed once.
    """
    found: list[Matrix] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        for matrix in _of(path, module):
            if matrix.weight.numel() and id(matrix.weight) not in seen:
                seen.add(id(matrix.weight))
                found.append(matrix)
    return found


def _of(path: str, module: nn.Module) -> Iterator[Matrix]:
    """The matrices that a module holds itself."""
    start = f"{path}." if path else ""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if _FUSED in own:
        yield from _parts(start, f"{start}{_FUSED}", own[_FUSED], _values(module))
    for name in _APART:
        if name in own:
            yield Matrix(f"{start}{name[0]}", f"{start}{name}", name[0], own[name])
    if not isinstance(module, _LAYERS) or "weight" not in own:
        return
    weight, parameter = own["weight"], f"{start}weight"
    if getattr(module, "groups", 1) > 1 and weight.shape[1] == 1:
        return
    names = path.split(".")
    kind = next((n for n in reversed(names) if n and not n.isdigit()), type(module).__name__)
    if kind == "qkv" and weight.shape[0] % 3 == 0:
        above = path.rpartition(".")[0]
        yield from _parts(f"{above}." if above else "", parameter, weight, weight.shape[0] // 3)
        return
    yield Matrix(path or kind, parameter, _KINDS.get(kind, kind), weight)


def _values(module: Any) -> int:
    """Rows of the values in a fused projection: what the output projection reads."""
    out = getattr(module, "out_proj", None)
    return out.in_features if isinstance(out, nn.Linear) else len(module.in_proj_weight) // 3


def _parts(start: str, parameter: str, weight: Tensor, values: int) -> Iterator[Matrix]:
    """Queries, keys and values, the last of which have so many rows."""
    keys = (weight.shape[0] - values) // 2
    for kind, part in zip("qkv", torch.split(weight, [keys, keys, values]), strict=True):
        yield Matrix(f"{start}{kind}", parameter, kind, part)
