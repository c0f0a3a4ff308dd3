"""Letting gradients reach a tower that a framework runs without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ovsprune.slim.apply import ABSENT, Applied, Swap

__all__ = ["lift"]


@dataclass
class _WithGradients:
    """A method of a part of a model, run with gradients while the model trains.

    An object and no function, so that a copied or pickled model gets one of its own.
    """

    model: nn.Module
    method: Callable[..., Any]

    def __call__(self, *args: Any, **given: Any) -> Any:
        if not self.model.training:
            return self.method(*args, **given)
        with torch.enable_grad():
            return self.method(*args, **given)


def lift(model: nn.Module, methods: Iterable[str]) -> Applied:
    """Have these methods of parts of a model build a graph while the model is in training mode.

    Whoever calls them inside ``torch.no_grad()`` gets what depends on parameters that train.

    Args:
        model: The framework's model.
        methods: Dotted paths from the model (``"backbone.extract_features"``).

    Returns:
        What was changed; its ``detach()`` undoes it. What was lifted before stays as it is.
    """
    swaps = []
    for path in methods:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        method = getattr(owner, name)
        if not isinstance(method, _WithGradients):
            old = vars(owner).get(name, ABSENT)
            new = _WithGradients(model, method)
            swaps.append(Swap(path, owner, "__dict__", name, old, new))
    for swap in swaps:
        swap.put(swap.new)
    return Applied(tuple(swap.path for swap in swaps), _swaps=swaps)
