"""Gradients for a tower that its framework runs under ``torch.no_grad()``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ovsprune.slim.attach import Applied, Swap, exchange

__all__ = ["enable_tower_grad"]


@dataclass
class _WithGradients:
    """Method of a part of a model that runs with gradients while the model trains.

    An object and not a function, so that a copied or pickled model has its own.
    """

    model: nn.Module
    method: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Evaluation keeps the framework's no_grad and its low memory.
        if not self.model.training:
            return self.method(*args, **kwargs)
        with torch.enable_grad():
            return self.method(*args, **kwargs)


def enable_tower_grad(model: nn.Module, methods: Iterable[str]) -> Applied:
    """Enable gradients in some methods of a model while the model is in training mode.

    Their results then depend on the trained parameters even if the caller is inside
    ``torch.no_grad()``. Methods that were changed before stay as they are. ``methods`` are dotted
    paths from the model (``"backbone.extract_features"``).
    """
    swaps = []
    for path in methods:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        method = getattr(owner, name)
        # With a second wrapper on top, the first caller could not detach.
        if not isinstance(method, _WithGradients):
            # An instance attribute hides the class's method; other models keep theirs.
            swaps.append(Swap.attribute(path, owner, name, _WithGradients(model, method)))
    return exchange(swaps)
