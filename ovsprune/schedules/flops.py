"""FLOPs of a training step: forward pass, gradients of activations, gradients of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ovsprune.core.errors import ScheduleError
from ovsprune.core.flops import unfused_attention

__all__ = ["StepFlops", "TrainingFlops", "step_flops"]


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step; a multiply-accumulate counts as two, as in torch.

    Attributes:
        forward: FLOPs of the forward pass and the loss.
        activations: FLOPs of the gradients of activations.
        weights: FLOPs of the gradients of weights.
    """

    forward: int
    activations: int
    weights: int

    @property
    def step(self) -> int:
        """FLOPs of the whole step."""
        return self.forward + self.activations + self.weights


@dataclass(frozen=True)
class TrainingFlops(StepFlops):
    """FLOPs of a training: of the current step, and of all steps.

    Attributes:
        steps: Number of optimiser steps.
        known: FLOPs of all steps if their costs differ; None if every step costs the same.
    """

    steps: int
    known: int | None = None

    @property
    def total(self) -> int:
        """FLOPs of all steps."""
        return self.step * self.steps if self.known is None else self.known

    def record(self) -> dict[str, int]:
        """Return plain JSON data."""
        names = ("forward", "activations", "weights", "step", "total")
        return {name: getattr(self, name) for name in names}


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Counts FLOPs with torch's formulas, in total and by the parameter that an operation reads.

    Parameters are recognised by their storage. A view shares it, so the parts of a fused projection
    count for the fused parameter. A copy in another dtype (autocast) is not recognised.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.total = 0
        self.by_parameter: dict[str, int] = {}
        self._names = {p.untyped_storage()._cdata: name for name, p in parameters.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        out = func(*args, **named)
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            return out
        flops = int(formula(*args, **named, out_val=out))
        self.total += flops
        if not torch.is_grad_enabled():
            return out  # no gradient of the weight will be computed for this product
        for tensor in (*args, *named.values()):
            name = self._name(tensor)
            if name is not None:
                self.by_parameter[name] = self.by_parameter.get(name, 0) + flops
        return out

    def _name(self, value: Any) -> str | None:
        # A bias is an argument of the same product as its weight (addmm), which counts once.
        if not isinstance(value, Tensor) or value.ndim < 2:
            return None
        return self._names.get(value.untyped_storage()._cdata)


def step_flops(model: nn.Module, loss: Callable[[], Tensor]) -> StepFlops:
    """Count one forward and one backward pass with the current ``requires_grad`` flags.

    The gradient of a weight costs as much as the product that reads it in the forward pass
    (``dW = dY^T X`` has the size of ``Y = X W^T``). The rest of the backward pass is counted as
    gradients of activations. Under autocast, weights are copied before they are read, and the whole
    backward pass is counted as ``activations``.

    Args:
        model: The model. Its gradients are restored afterwards.
        loss: Runs the model and returns a scalar.

    Raises:
        ScheduleError: ``loss`` does not return a scalar.
    """
    parameters = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        # Otherwise the backward pass adds to the saved gradients in place.
        for parameter in parameters.values():
            parameter.grad = None
        with unfused_attention(), torch.enable_grad():
            with _Counter(parameters) as forward:
                value = loss()
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ScheduleError(
                    f"the loss must return a tensor of one number to count FLOPs, not {value!r:.70}"
                )
            backward = _Counter(parameters)
            if value.requires_grad:
                with backward:
                    value.backward()  # type: ignore[no-untyped-call, unused-ignore]
    finally:
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
    # Without a backward pass, no gradient is computed.
    counted = forward.by_parameter.items() if value.requires_grad else ()
    weights = sum(flops for name, flops in counted if parameters[name].requires_grad)
    return StepFlops(forward.total, backward.total - weights, weights)
