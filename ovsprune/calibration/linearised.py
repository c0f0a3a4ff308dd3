"""Linearised least squares for layers that act on a consumer through a nonlinearity.

The producers of a group's units act on the consumer's output through an activation function or
through attention. To first order, a change D of their parameters changes that output by ``J D``,
where J is the Jacobian. The D that best explains the residual r, with row weights w, solves

    (J^T w J) D = J^T w r

which is one Gauss-Newton step (Nocedal and Wright, Numerical Optimization, 2006, section 10.3).

J is never formed. Conjugate gradients (Hestenes and Stiefel 1952) need only products with
``J^T w J``: a forward-mode product J D, then a reverse-mode product with J^T. The second moment of
the layers' inputs, one of the two Kronecker factors of K-FAC (Martens and Grosse 2015), serves as
the preconditioner, so that few products suffice. The whole computation solves linear equations
inside one block: no loss is propagated through the tower, and there is no learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ovsprune.calibration.activation_cache import StopForward, capture
from ovsprune.calibration.moments import SecondMoments
from ovsprune.calibration.ridge import regularised

__all__ = ["InputPreconditioner", "Segment", "Tensors", "add_scaled", "conjugate_gradients"]

Tensors = dict[str, Tensor]
"""Parameters, or a change D of parameters, by dotted name."""


class Segment:
    """Part of a block up to a consumer's output, as a function of the producers' parameters.

    Args:
        block: Maps the stream to the stream.
        layers: Dotted names in ``block`` of the producers, whose parameters change. None of them
            may depend on the output of another.
        consumer: Dotted name of the consumer in ``block``.

    Attributes:
        parameters: Initial weights and biases of ``layers``, by dotted name.
    """

    def __init__(self, block: nn.Module, layers: Sequence[str], consumer: str) -> None:
        self.block, self.consumer = block, consumer
        # Copies: the block's own parameters are overwritten by set_parameters().
        self.parameters: Tensors = {
            f"{layer}.{name}": parameter.detach().clone()
            for layer in layers
            for name, parameter in block.get_submodule(layer).named_parameters()
        }

    def transposed_product(self, stream: Tensor, residual: Tensor) -> Tensors:
        """Return ``J^T r``, one float64 tensor of each parameter's shape on the CPU.

        Args:
            stream: Input of the block, [b, ...].
            residual: r, in the shape of the consumer's output.
        """
        with _differentiable(self.parameters) as leaves:
            return _vjp(self._output(leaves, stream), leaves, residual)

    def normal_product(self, stream: Tensor, weight: Tensor, change: Tensors) -> Tensors:
        """Return ``J^T w J D`` in the layout of ``J^T r``, with one forward and one backward pass.

        Args:
            stream: Input of the block, [b, ...].
            weight: w, broadcastable to the consumer's output.
            change: D, one tensor of each parameter's shape.
        """
        with _differentiable(self.parameters) as leaves:
            with forward_ad.dual_level():
                duals = {
                    name: forward_ad.make_dual(leaf, change[name].to(leaf))  # type: ignore[no-untyped-call]
                    for name, leaf in leaves.items()
                }
                # J D is the tangent of the same forward pass that records the graph for J^T.
                out, JD = forward_ad.unpack_dual(self._output(duals, stream))  # type: ignore[no-untyped-call]
                assert JD is not None
                JD = JD.detach()
            # The backward pass must run without tangents: some functions have no mixed derivatives.
            return _vjp(out, leaves, weight * JD)

    @torch.no_grad()
    def set_parameters(self, change: Tensors, step: float) -> None:
        """Set the parameters of the block, in place, to the initial ones plus ``step * change``."""
        for name, initial in self.parameters.items():
            # float64, so that rounding to the parameter's type happens once.
            new = initial.double() + step * change[name].to(initial.device)
            # A step of 0 restores the initial values bit for bit, also if D is not finite.
            self.block.get_parameter(name).copy_(new.to(initial) if step else initial)

    def _output(self, parameters: Tensors, stream: Tensor) -> Tensor:
        """Return the consumer's output; the layers after it do not run."""
        hook_point = self.consumer, "output"
        with capture(self.block, [hook_point], stop=True) as captured, suppress(StopForward):
            functional_call(self.block, parameters, (stream,))
        return captured[hook_point]


@contextmanager
def _differentiable(parameters: Tensors) -> Iterator[Tensors]:
    """Yield copies of the parameters as leaves of a graph."""
    # Fused attention kernels have no forward-mode derivative, so the plain one is selected.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield {name: p.clone().requires_grad_() for name, p in parameters.items()}


def _vjp(out: Tensor, leaves: Tensors, residual: Tensor) -> Tensors:
    """Return ``J^T r`` by reverse mode, J being the derivative of ``out`` by ``leaves``."""
    gradients = torch.autograd.grad(out, list(leaves.values()), residual)
    return {name: part.double().cpu() for name, part in zip(leaves, gradients, strict=True)}


class InputPreconditioner:
    """Preconditioner of :func:`conjugate_gradients`: second moments of the layers' inputs.

    For one linear layer ``y = W x`` without a nonlinearity after it, ``J^T w J`` maps a change D
    of W to ``D E[x x^T]`` times the sum of weights. Its inverse is exact in that case and a good
    approximation otherwise.

    Args:
        ridge: Relative to the mean variance of the input.
    """

    def __init__(self, ridge: float) -> None:
        self.ridge = ridge
        self._moments: dict[str, SecondMoments] = {}
        self._first_reader: dict[str, str] = {}  # layer -> the layer that has its moments
        self._factors: dict[str, Tensor] = {}

    def update(self, inputs: Mapping[str, Tensor], weight: Tensor) -> None:
        """Add inputs of the layers.

        Args:
            inputs: Layer to rows [b, ..., n]. A tensor that several layers share is added once.
            weight: Weight of each image, [b].
        """
        self._factors.clear()  # they depend on all rows
        for name, rows in inputs.items():
            # Query, key and value projections read the same tensor and share one matrix.
            first = next(layer for layer, others in inputs.items() if others is rows)
            self._first_reader[name] = first
            if first == name:
                w = weight.view(-1, *[1] * (rows.ndim - 2)).expand(rows.shape[:-1])  # [b, ...]
                self._moments.setdefault(name, SecondMoments(rows.shape[-1])).update(rows, w)

    def precondition(self, values: Tensors) -> Tensors:
        """Multiply by the inverse of the approximate normal matrix.

        A weight is multiplied by the inverse second moment of its layer's input. A bias, whose
        input is the constant 1, is divided by the sum of the weights.

        Args:
            values: ``layer.weight`` [m, n] or [m, channels, ...], and ``layer.bias`` [m].
        """
        result = {}
        for name, value in values.items():
            layer = self._first_reader[name.rpartition(".")[0]]
            if value.ndim == 1:
                result[name] = value / self._moments[layer].total
            else:
                L = self._factor(layer)  # [n, n]
                solved = torch.cholesky_solve(value.flatten(1).T, L)  # [n, m]
                result[name] = solved.T.reshape(value.shape)
        return result

    def _factor(self, layer: str) -> Tensor:
        """Return the Cholesky factor L [n, n] of the summed second moment of a layer's input."""
        if layer not in self._factors:
            moments = self._moments[layer].result()
            # E[x x^T] = Sigma + mu mu^T: unlike in the ridge refit, the mean is not removed.
            second_moment = moments.covariance + torch.outer(moments.mean, moments.mean)
            summed = regularised(second_moment, self.ridge) * self._moments[layer].total
            self._factors[layer] = torch.linalg.cholesky(summed)
        return self._factors[layer]


def conjugate_gradients(
    normal: Callable[[Tensors], Tensors],
    target: Tensors,
    precondition: Callable[[Tensors], Tensors],
    steps: int,
) -> Tensors:
    """Solve ``A D = b`` approximately by preconditioned conjugate gradients, starting from zero.

    Early stopping regularises: directions that the data hardly determine are reached last (Hansen
    1998, section 6.3).

    Args:
        normal: Product with A, a symmetric, positive semidefinite linear map.
        target: b, float64.
        precondition: Product with M^-1, an approximation of A^-1; symmetric and positive definite.
        steps: Maximum number of products with A; fewer if the residual becomes zero.

    Returns:
        D, float64.
    """
    # Letters of the standard algorithm: residual r = b - A D, z = M^-1 r, search direction p.
    D = {name: torch.zeros_like(part) for name, part in target.items()}
    r, z = target, precondition(target)
    p, rz = z, _inner(target, z)
    for _ in range(steps):
        Ap = normal(p)
        pAp = _inner(p, Ap)
        if not (rz > 0 and pAp > 0):  # solved, or no curvature is left; also false for nan
            break
        alpha = rz / pAp  # exact minimiser along p
        D = add_scaled(D, p, alpha)
        r = add_scaled(r, Ap, -alpha)
        z = precondition(r)
        previous, rz = rz, _inner(r, z)
        p = add_scaled(z, p, rz / previous)
    return D


def _inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return float(sum((a[name] * b[name]).sum() for name in a))


def add_scaled(a: Tensors, b: Tensors, factor: float = 1.0) -> Tensors:
    """Return ``a + factor * b``."""
    return {name: part + factor * b[name] for name, part in a.items()}
