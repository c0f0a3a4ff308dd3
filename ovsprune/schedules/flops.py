"""What a training step costs, counted: forward, gradients to activations, gradients to weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ovsprune.core.errors import ScheduleError
from ovsprune.core.flops import slow_path

__all__ = ["StepFlops", "TrainingFlops", "step_flops"]


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step: two for a multiply-accumulate, as torch counts them.

    Attributes:
        forward: Of the forward pass and the loss.
        activations: Of the gradients that flow back.
        weights: Of the gradients of weights.
    """

    forward: int
    activations: int
    weights: int

    @property
    def step(self) -> int:
        """All three."""
        return self.forward + self.activations + self.weights


@dataclass(frozen=True)
class TrainingFlops(StepFlops):
    """FLOPs of a training: of the step that comes now, and of all.

    Attributes:
        steps: How many steps there are.
        known: FLOPs of all steps where they differ; None where each costs as much as this one.
    """

    steps: int
    known: int | None = None

    @property
    def total(self) -> int:
        """FLOPs of all steps."""
        return self.step * self.steps if self.known is None else self.known

    def record(self) -> dict[str, int]:
        """As plain JSON."""
        parts = {"forward": self.forward, "activations": self.activations, "weights": self.weights}
        return {**parts, "step": self.step, "total": self.total}


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Counts with torch's own formulas, and says for which parameters an operation reads them.

    A view of a parameter shares its storage, so a fused projection that is taken apart is known;
    a copy in another type (autocast) is not.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.total = 0
        self.of: dict[str, int] = {}
        self._names = {p.untyped_storage()._cdata: name for name, p in parameters.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            return out
        flops = int(formula(*args, **given, out_val=out))
        self.total += flops
        if not torch.is_grad_enabled():
            return out  # what reads it here asks for no gradient of it
        for tensor in (*args, *given.values()):
            name = self._name(tensor)
            if name is not None:
                self.of[name] = self.of.get(name, 0) + flops
        return out

    def _name(self, value: Any) -> str | None:
        if not isinstance(value, Tensor) or value.ndim < 2:
            return None
        return self._names.get(value.untyped_storage()._cdata)


def step_flops(model: nn.Module, loss: Callable[[], Tensor]) -> StepFlops:
    """Count one forward and one backward pass with what wants gradients now.

    The gradient of a weight costs as much as the product that reads it in the forward pass; what is
    left of the backward pass is gradients of activations. Under autocast weights are copied before
    they are read, and all of the backward pass is then told as ``activations``.

    Args:
        model: The model; its gradients are as before afterwards.
        loss: Runs the model, and gives a scalar.

    Raises:
        ScheduleError: ``loss`` gives no scalar.
    """
    parameters = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.grad = None
        with slow_path(), torch.enable_grad():
            with _Counter(parameters) as forward:
                value = loss()
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ScheduleError(
                    f"the loss must be a tensor of one number to count a step, not {value!r:.80}"
                )
            backward = _Counter(parameters)
            if value.requires_grad:
                with backward:
                    value.backward()  # type: ignore[no-untyped-call, unused-ignore]
    finally:
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
    weights = 0
    if value.requires_grad:
        weights = sum(n for name, n in forward.of.items() if parameters[name].requires_grad)
    return StepFlops(forward.total, backward.total - weights, weights)
