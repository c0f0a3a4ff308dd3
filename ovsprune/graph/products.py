"""Weights that multiply a tower's activations, in the order of use, with their MACs.

The types of the layers are not used. A copy without weights runs once, and every matrix product
and convolution is checked for parameters among its operands. A fused query-key-value matrix is
therefore found; positional embeddings, norms and biases, which are added or scale, are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ovsprune.graph.costs import countable, macs

__all__ = ["Product", "find_products"]


@dataclass(frozen=True)
class Product:
    """Weight that is an operand of matrix products or convolutions.

    Attributes:
        name: Dotted name of the parameter.
        shape: Shape of the parameter.
        macs: Multiply-accumulates with this weight in one forward pass over one image.
    """

    name: str
    shape: tuple[int, ...]
    macs: int


def find_products(tower: nn.Module, size: tuple[int, int]) -> list[Product]:
    """Return the weights of ``tower`` that multiply activations, in the order of first use.

    These are the parameters with two or more axes whose name ends in ``weight`` and that a matrix
    product or convolution reads. A bare projection matrix, such as CLIP's ``proj``, is excluded.

    Args:
        tower: Image tower.
        size: Native height and width in pixels, for the costs.
    """
    empty_tower, image = countable(tower, size)
    names = {
        parameter.untyped_storage()._cdata: name
        for name, parameter in empty_tower.named_parameters()
        if parameter.ndim > 1 and name.endswith("weight")
    }
    with _MacsByWeight(names) as counter:
        macs(empty_tower, image)
    shapes = {name: tuple(p.shape) for name, p in empty_tower.named_parameters()}
    return [Product(name, shapes[name], count) for name, count in counter.macs.items()]


class _MacsByWeight(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counter of the MACs of operations per parameter; names by id of the parameter's storage."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.macs: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count_flops = flop_registry.get(func._overloadpacket)
        if count_flops is not None:
            flops = count_flops(*args, **(kwargs or {}), out_val=out)
            # Views (a transposed weight, a third of fused q, k, v) share the parameter's storage.
            storages = [a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)]
            for name in (self.names[s] for s in storages if s in self.names):
                self.macs[name] = self.macs.get(name, 0) + int(flops) // 2
        return out
