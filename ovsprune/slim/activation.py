"""Which activation function a built tower has; the wrong one is refused.

With GELU instead of QuickGELU everything loads and runs, and the features are quietly wrong.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.slim.spec import ACTIVATIONS

__all__ = ["check_activation", "find_activations"]

# Class names of open_clip, OpenAI's CLIP, transformers, timm and torch, in lower case.
_NAMES = {
    "quickgelu": "quick_gelu",
    "quickgeluactivation": "quick_gelu",
    "geluactivation": "gelu",
    "gelutanh": "gelu_tanh",
    "pytorchgelutanh": "gelu_tanh",
    "newgeluactivation": "gelu_tanh",
    "relu": "relu",
    "relu6": "relu6",
    "silu": "silu",
    "swish": "silu",
}

_POSITIONS = "relposmlp"
"""timm's network for biases by relative position, in lower case."""


def find_activations(modules: Iterable[nn.Module]) -> set[str]:
    """Activation functions that occur in ``modules``, as the spec names them.

    Not those of a network that makes the biases of relative positions: it reads no pictures.
    """
    known = list(modules)
    positions = [m for m in known if type(m).__name__.lower() == _POSITIONS]
    apart = {id(part) for network in positions for part in network.modules()}
    found = set()
    for module in (m for m in known if id(m) not in apart):
        name = type(module).__name__.lower()
        if name in _NAMES:
            found.add(_NAMES[name])
        elif name == "gelu":
            tanh = getattr(module, "approximate", "none") == "tanh"
            found.add("gelu_tanh" if tanh else "gelu")
    return found


def check_activation(modules: Iterable[nn.Module], expected: str, given: str | None = None) -> None:
    """Check that a tower has the activation function that its weights were trained with.

    Args:
        modules: Modules of its blocks.
        expected: What the spec says.
        given: What the caller says that the tower has, where no module shows it.

    Raises:
        TargetError: It has another one, or none that can be seen and none was given.
        OptionError: ``given`` is no activation.
    """
    if given is not None:
        if given not in ACTIVATIONS:
            raise OptionError(f"activation is {given!r}, expected one of {', '.join(ACTIVATIONS)}")
        found = {given}
    else:
        found = find_activations(modules)
    if not found:
        raise TargetError(
            "no activation function can be seen in the tower's blocks; say which one it has by "
            f"activation=..., one of {', '.join(ACTIVATIONS)} (the checkpoint's is {expected!r})"
        )
    if found != {expected}:
        raise TargetError(
            f"the tower uses {' and '.join(sorted(found))}, the checkpoint was pruned with "
            f"{expected}; build the tower with {expected} (open_clip: a model name "
            f"{'with' if expected == 'quick_gelu' else 'without'} '-quickgelu')"
        )
