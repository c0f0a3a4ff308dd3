"""Optimisers of ``torch.optim`` by name."""

from __future__ import annotations

import torch

from ovsprune.core.errors import UnknownNameError

__all__ = ["optimizer_class"]


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the optimiser class of ``torch.optim`` called ``name``.

    Raises:
        UnknownNameError: ``torch.optim`` has none of that name.
    """
    base = torch.optim.Optimizer
    known = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base
    }
    if name not in known:
        raise UnknownNameError("optimizer", name, known)
    return known[name]
