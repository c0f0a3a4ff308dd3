"""Layers refitted through what reads them: least squares, linearised.

The layers that make a group's units act on the consumer's output through a nonlinearity or through
attention. To first order a change D of their parameters changes that output by ``J D``, and the D
that explains a residual e best, row r with weight w_r, solves ``J^T w J D = J^T w e``: one
Gauss-Newton step (Nocedal and Wright, Numerical Optimization, 2006, section 10.3). J is never
formed. Conjugate gradients (Hestenes and Stiefel 1952) need its products only, and the second
moment of what the layers read as preconditioner, one factor of K-FAC's (Martens and Grosse 2015),
makes a few of them enough. What is taken is a solution of linear equations inside one block: no
loss goes through the tower, and there is no learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Segment", "Tensors", "conjugate_gradients"]

Tensors = dict[str, Tensor]
"""Parameters, or a change of them, by dotted name."""


class _Done(Exception):
    """The consumer has run; what comes after it is not wanted."""


class Segment:
    """A block up to the output of one layer, as a function of the parameters of others.

    Args:
        block: Maps stream -> stream.
        layers: Dotted names inside ``block``: whose parameters change. None comes after another.
        consumer: Dotted name inside ``block``.
    """

    def __init__(self, block: nn.Module, layers: Sequence[str], consumer: str) -> None:
        self.block, self.consumer = block, block.get_submodule(consumer)
        self.parameters: Tensors = {
            f"{layer}.{name}": parameter.detach()
            for layer in layers
            for name, parameter in block.get_submodule(layer).named_parameters()
        }

    def transposed(self, stream: Tensor, rows: Tensor) -> Tensors:
        """``J^T rows``.

        Args:
            stream: Before the block, [b, ...].
            rows: Of the shape of the consumer's output.

        Returns:
            float64, on the CPU, a tensor of each parameter's shape.
        """
        with _derivatives(self.parameters) as leaves:
            return _pulled(self._output(leaves, stream), leaves, rows)

    def normal(self, stream: Tensor, weight: Tensor, change: Tensors) -> Tensors:
        """``J^T w J D``, in one run forward and one back.

        Args:
            stream: Before the block, [b, ...].
            weight: w, to be multiplied with the consumer's output.
            change: D, a tensor of each parameter's shape.

        Returns:
            As :meth:`transposed`.
        """
        with _derivatives(self.parameters) as leaves, forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(leaf, change[name].to(leaf))
                for name, leaf in leaves.items()
            }
            out, tangent = forward_ad.unpack_dual(self._output(duals, stream))
            assert tangent is not None
            return _pulled(out, leaves, weight * tangent.detach())

    def _output(self, parameters: Tensors, stream: Tensor) -> Tensor:
        """The consumer's output; the rest of the block does not run."""
        found: list[Tensor] = []

        def stop(_: nn.Module, __: Any, out: Tensor) -> None:
            found.append(out)
            raise _Done

        handle = self.consumer.register_forward_hook(stop)
        try:
            functional_call(self.block, parameters, (stream,))
        except _Done:
            pass
        finally:
            handle.remove()
        return found[0]


@contextmanager
def _derivatives(parameters: Tensors) -> Iterator[Tensors]:
    """The parameters as leaves of a graph, and kernels that have both kinds of derivatives."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield {name: p.clone().requires_grad_() for name, p in parameters.items()}


def _pulled(out: Tensor, leaves: Tensors, rows: Tensor) -> Tensors:
    found = torch.autograd.grad(out, list(leaves.values()), rows)
    return {name: part.double().cpu() for name, part in zip(leaves, found, strict=True)}


def conjugate_gradients(
    normal: Callable[[Tensors], Tensors],
    target: Tensors,
    precondition: Callable[[Tensors], Tensors],
    steps: int,
) -> Tensors:
    """Solves ``normal(D) = target`` approximately, from zero.

    Stopped early it is a regularised solution: what the rows say least about is not touched yet
    (Hansen 1998, section 6.3).

    Args:
        normal: A symmetric, positive semidefinite linear map.
        target: float64.
        precondition: Approximately its inverse; symmetric and positive definite.
        steps: Products with ``normal``; fewer are taken if nothing is left to explain.
    """
    change = {name: torch.zeros_like(part) for name, part in target.items()}
    left, ahead = target, precondition(target)
    direction, power = ahead, _inner(target, ahead)
    for _ in range(steps):
        product = normal(direction)
        curvature = _inner(direction, product)
        if not (power > 0 and curvature > 0):
            break
        step = power / curvature
        change = _plus(change, step, direction)
        left = _plus(left, -step, product)
        ahead = precondition(left)
        before, power = power, _inner(left, ahead)
        direction = _plus(ahead, power / before, direction)
    return change


def _inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return float(sum((a[name] * b[name]).sum() for name in a))


def _plus(a: Tensors, factor: float, b: Tensors) -> Tensors:
    return {name: part + factor * b[name] for name, part in a.items()}
