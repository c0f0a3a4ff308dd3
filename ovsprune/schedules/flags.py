"""Flags ``requires_grad`` of a model's parameters, and optimiser groups."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ovsprune.core.protocols import Layer

__all__ = ["ParameterFlags", "parameter_groups"]


class ParameterFlags:
    """Sets ``requires_grad`` of parameters from the names of the layers that train.

    Args:
        model: The model.
        layers: The layers of the pool.
        others: Names of parameters that always train (True) or never train (False).

    Attributes:
        parameters: Parameters of the model by name.
        original: ``requires_grad`` of each parameter at construction.
        optimizers: Optimisers that drop their state of frozen parameters.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], others: Mapping[str, bool]
    ) -> None:
        self.layers, self.others = tuple(layers), dict(others)
        self.parameters = dict(model.named_parameters())
        self.original = {name: p.requires_grad for name, p in self.parameters.items()}
        self.optimizers: tuple[Any, ...] = ()

    def trainable(self, requires_grad: bool = True) -> tuple[str, ...]:
        """Return the names of the parameters with this flag, in the order of the model."""
        return tuple(n for n, p in self.parameters.items() if p.requires_grad == requires_grad)

    def governed(self, layers: Collection[str]) -> tuple[str, ...]:
        """Return the names of the parameters that train together with the named layers."""
        pool = [layer for layer in self.layers if layer.name in layers]
        names = [name for layer in pool for name in (layer.name, *layer.followers)]
        always = [name for name, trains in self.others.items() if trains]
        return tuple(dict.fromkeys(names + always))  # a parameter may follow several layers

    def apply(self, chosen: Collection[str]) -> None:
        """Let the chosen layers and their followers train, and freeze the rest of the pool."""
        for name, trains in self._decisions(chosen).items():
            self.parameters[name].requires_grad_(trains)
        self.clear_frozen()

    def enable(self, names: Collection[str]) -> None:
        """Set ``requires_grad`` of the named parameters."""
        for name in names:
            self.parameters[name].requires_grad_(True)

    def restore(self) -> None:
        """Set every flag to its original value and forget the optimisers."""
        for name, trains in self.original.items():
            self.parameters[name].requires_grad_(trains)
        self.optimizers = ()

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Keep gradients and optimiser states while parameters are frozen for a short time."""
        optimizers, self.optimizers = self.optimizers, ()  # clear_frozen then finds no optimiser
        gradients = {parameter: parameter.grad for parameter in self.parameters.values()}
        try:
            yield
        finally:
            self.optimizers = optimizers
            for parameter, gradient in gradients.items():
                parameter.grad = gradient

    def clear_frozen(self) -> None:
        """Delete the gradients and the optimiser state of the parameters that the plan froze.

        Otherwise momentum and weight decay would still move a frozen parameter. Parameters that
        the plan does not decide about keep both.
        """
        for name in self._decisions(()):
            parameter = self.parameters[name]
            if not parameter.requires_grad:
                parameter.grad = None
                for optimizer in self.optimizers:
                    optimizer.state.pop(parameter, None)

    def _decisions(self, chosen: Collection[str]) -> dict[str, bool]:
        """Map every parameter that the plan decides about to True if it trains."""
        decisions, training = dict(self.others), set(chosen)
        for layer in self.layers:
            decisions[layer.name] = layer.name in training
            # A follower of several layers trains if at least one of them trains.
            for name in layer.followers:
                decisions[name] = decisions.get(name, False) or decisions[layer.name]
        return decisions


def parameter_groups(
    parameters: Mapping[str, nn.Parameter],
    lr: float,
    weight_decay: float,
    multipliers: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Group parameters by learning rate and decay; see ``TrainPlan.groups``."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}  # (lr, weight decay) to its group
    for name, parameter in parameters.items():
        factor = next((f for p, f in multipliers.items() if fnmatchcase(name, p)), 1.0)
        key = lr * factor, weight_decay if parameter.ndim > 1 else 0.0
        empty = {"params": [], "lr": key[0], "weight_decay": key[1], "names": []}
        group = groups.setdefault(key, empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
