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
_OUT = ("proj", "out_proj", "projection")
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
    (``nn.MultiheadAttention`` and its like, timm's ``qkv`` and ``kv``). Norms, biases, embedding
    tables and positions are none, nor are bare projections, and depthwise convolutions have no
    matrix: each of their channels is a vector. A parameter that two modules share is listed once.
    """
    found: list[Matrix] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        above = model.get_submodule(path.rpartition(".")[0])
        # By the parameter: parts of a fused one are views, other objects at every module.
        new = [m for m in _of(path, module, above) if id(_owner(model, m)) not in seen]
        found += [matrix for matrix in new if matrix.weight.numel()]
        seen.update(id(parameter) for parameter in module.parameters(recurse=False))
    return found


def _owner(model: nn.Module, matrix: Matrix) -> nn.Parameter:
    return model.get_parameter(matrix.parameter)


def _of(path: str, module: nn.Module, above: nn.Module) -> Iterator[Matrix]:
    """The matrices that a module holds itself; ``above`` is the module that holds it."""
    start = f"{path}." if path else ""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if _FUSED in own:
        rows = len(own[_FUSED]) // 3
        yield from _parts(start, f"{start}{_FUSED}", own[_FUSED], "qkv", [rows] * 3)
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
    if kind in ("qkv", "kv") and _in_equal_parts(weight, len(kind), above):
        start = path.removesuffix(kind)
        yield from _parts(start, parameter, weight, kind, [len(weight) // len(kind)] * len(kind))
        return
    if kind == "proj" and any(hasattr(above, name) for name in ("qkv", "kv", "q_proj")):
        kind = "out"
    yield Matrix(path or kind, parameter, _KINDS.get(kind, kind), weight)


def _in_equal_parts(weight: Tensor, count: int, above: Any) -> bool:
    """Whether timm's fused map is so many maps of one width, one below the other.

    Not where heads share keys, nor where each head has its queries, keys and values together.
    """
    if getattr(above, "head_first", False):
        return False
    out = next((m for m in (getattr(above, n, None) for n in _OUT) if isinstance(m, _LAYERS)), None)
    width = len(weight) // count if out is None else out.weight.shape[1]
    return len(weight) == count * width


def _parts(
    start: str, parameter: str, weight: Tensor, kinds: str, rows: list[int]
) -> Iterator[Matrix]:
    """The parts of a fused map, one below the other."""
    for kind, part in zip(kinds, torch.split(weight, rows), strict=True):
        yield Matrix(f"{start}{kind}", parameter, kind, part)
