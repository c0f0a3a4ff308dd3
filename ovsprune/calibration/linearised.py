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
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ovsprune.calibration.activation_cache import Enough, capture
from ovsprune.calibration.moments import SecondMoments
from ovsprune.calibration.ridge import regularised

__all__ = ["Metric", "Segment", "Tensors", "added", "conjugate_gradients"]

Tensors = dict[str, Tensor]
"""Parameters, or a change of them, by dotted name."""


class Segment:
    """A block up to the output of one layer, as a function of the parameters of others.

    Args:
        block: Maps stream -> stream.
        layers: Dotted names inside ``block``: whose parameters change. None comes after another.
        consumer: Dotted name inside ``block``.

    Attributes:
        parameters: Weights and biases of ``layers`` as they were at first, by dotted name.
    """

    def __init__(self, block: nn.Module, layers: Sequence[str], consumer: str) -> None:
        self.block, self.consumer = block, consumer
        self.parameters: Tensors = {
            f"{layer}.{name}": parameter.detach().clone()
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
        with _derivatives(self.parameters) as leaves:
            with forward_ad.dual_level():
                duals = {
                    name: forward_ad.make_dual(leaf, change[name].to(leaf))  # type: ignore[no-untyped-call]
                    for name, leaf in leaves.items()
                }
                out, tangent = forward_ad.unpack_dual(self._output(duals, stream))  # type: ignore[no-untyped-call]
                assert tangent is not None
                tangent = tangent.detach()
            # Outside, where the run back has no tangents: not every function has such derivatives.
            return _pulled(out, leaves, weight * tangent)

    @torch.no_grad()
    def put(self, change: Tensors, step: float) -> None:
        """Set the parameters, in place, to what they were at first plus a part of a change."""
        for name, first in self.parameters.items():
            new = first.double() + step * change[name].to(first.device)
            self.block.get_parameter(name).copy_(new.to(first) if step else first)

    def _output(self, parameters: Tensors, stream: Tensor) -> Tensor:
        """The consumer's output; the rest of the block does not run."""
        tap = self.consumer, "output"
        with capture(self.block, [tap], stop=True) as seen, suppress(Enough):
            functional_call(self.block, parameters, (stream,))
        return seen[tap]


@contextmanager
def _derivatives(parameters: Tensors) -> Iterator[Tensors]:
    """The parameters as leaves of a graph, and kernels that have both kinds of derivatives."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield {name: p.clone().requires_grad_() for name, p in parameters.items()}


def _pulled(out: Tensor, leaves: Tensors, rows: Tensor) -> Tensors:
    found = torch.autograd.grad(out, list(leaves.values()), rows)
    return {name: part.double().cpu() for name, part in zip(leaves, found, strict=True)}


class Metric:
    """Second moments of what layers read: the preconditioner of :func:`conjugate_gradients`.

    Args:
        ridge: Relative to the mean variance.
    """

    def __init__(self, ridge: float) -> None:
        self.ridge = ridge
        self._moments: dict[str, SecondMoments] = {}
        self._same: dict[str, str] = {}
        self._factors: dict[str, Tensor] = {}

    def update(self, read: Mapping[str, Tensor], weight: Tensor) -> None:
        """Add what layers read.

        Args:
            read: Rows [b, ..., n] by layer; what several layers read counts once.
            weight: Of each picture, [b].
        """
        self._factors.clear()
        for name, rows in read.items():
            first = next(other for other, theirs in read.items() if theirs is rows)
            self._same[name] = first
            if first == name:
                each = weight.view(-1, *[1] * (rows.ndim - 2)).expand(rows.shape[:-1])
                self._moments.setdefault(name, SecondMoments(rows.shape[-1])).update(rows, each)

    def precondition(self, values: Tensors) -> Tensors:
        """Weights times the inverse of their layer's second moment, biases over the whole weight.

        Args:
            values: ``layer.weight`` [m, n] or [m, channels, ...] and ``layer.bias`` [m].
        """
        result = {}
        for name, value in values.items():
            layer = self._same[name.rpartition(".")[0]]
            if value.ndim == 1:
                result[name] = value / self._moments[layer].total
            else:
                solved = torch.cholesky_solve(value.flatten(1).T, self._factor(layer))
                result[name] = solved.T.reshape(value.shape)
        return result

    def _factor(self, layer: str) -> Tensor:
        if layer not in self._factors:
            found = self._moments[layer].result()
            square = found.covariance + torch.outer(found.mean, found.mean)
            whole = regularised(square, self.ridge) * self._moments[layer].total
            self._factors[layer] = torch.linalg.cholesky(whole)
        return self._factors[layer]


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
        change = added(change, direction, step)
        left = added(left, product, -step)
        ahead = precondition(left)
        before, power = power, _inner(left, ahead)
        direction = added(ahead, direction, power / before)
    return change


def _inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return float(sum((a[name] * b[name]).sum() for name in a))


def added(a: Tensors, b: Tensors, factor: float = 1.0) -> Tensors:
    """``a + factor * b``."""
    return {name: part + factor * b[name] for name, part in a.items()}
