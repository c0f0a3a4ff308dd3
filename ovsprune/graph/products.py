"""Which weights of a tower multiply its activations, in the order in which they do, and how often.

No layer is asked for its type: the tower runs once on meta tensors, and every matrix product and
convolution is watched for a parameter among its operands. So a fused query-key-value matrix counts
as the others do, and positions, norms and biases, which are added or scaled, do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ovsprune.graph.costs import macs, on_meta

__all__ = ["Product", "find_products"]


@dataclass(frozen=True)
class Product:
    """A weight that multiplies.

    Attributes:
        name: Its parameter's dotted name.
        shape: Of the parameter.
        macs: Multiply-accumulates over one picture, of all its entries together.
    """

    name: str
    shape: tuple[int, ...]
    macs: int


def find_products(tower: nn.Module, size: tuple[int, int]) -> list[Product]:
    """The weights of ``tower``'s layers, the first that the picture meets first.

    Args:
        tower: An image tower.
        size: Native height and width in pixels, for the costs.

    Returns:
        Parameters of two axes and more that a layer calls its weight (the name ends in
        ``weight``) and a matrix product or convolution reads; a bare projection matrix such as
        CLIP's ``proj`` is a parameter of the tower itself and stays out.
    """
    shell = on_meta(tower)
    names = {
        parameter.untyped_storage()._cdata: name
        for name, parameter in shell.named_parameters()
        if parameter.ndim > 1 and name.endswith("weight")
    }
    with _Watch(names) as watch:
        macs(shell, torch.empty(1, 3, *size, device="meta"))
    shapes = {name: tuple(p.shape) for name, p in shell.named_parameters()}
    return [Product(name, shapes[name], count) for name, count in watch.found.items()]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the MACs of operations by the parameter that they read."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.found: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            flops = counted(*args, **(kwargs or {}), out_val=out)
            for operand in args:
                name = self._name_of(operand)
                if name is not None:
                    self.found[name] = self.found.get(name, 0) + int(flops) // 2
        return out

    def _name_of(self, operand: Any) -> str | None:
        # views (a transposed weight, a third of fused q, k, v) share their parameter's storage
        if not isinstance(operand, Tensor):
            return None
        return self.names.get(operand.untyped_storage()._cdata)
