"""Shallow copies of modules with another forward.

Used where a block reads more than the residual stream, to get a module that maps stream to stream.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["with_forward"]


def with_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a shallow copy of ``module`` with another forward.

    The copy shares all submodules and parameters with ``module``, also those replaced later.
    """
    other = copy.copy(module)
    # an instance attribute, which hides the method of the class
    other.forward = forward
    return other
