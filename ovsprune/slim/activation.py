"""Find the activation functions of a built tower, and refuse a wrong one.

A tower with GELU instead of QuickGELU loads and runs without an error, but its features are wrong.
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

# timm's network that computes the biases of relative positions, in lower case
_POSITION_NETWORK = "relposmlp"


def find_activations(modules: Iterable[nn.Module]) -> set[str]:
    """Return the activation functions among ``modules``, by their names in the spec.

    Those of networks that compute the biases of relative positions are ignored: these networks do
    not process images.
    """
    known = list(modules)
    networks = [m for m in known if type(m).__name__.lower() == _POSITION_NETWORK]
    ignored = {id(part) for network in networks for part in network.modules()}
    activations = set()
    for module in (m for m in known if id(m) not in ignored):
        name = type(module).__name__.lower()
        if name in _NAMES:
            activations.add(_NAMES[name])
        elif name == "gelu":
            # nn.GELU computes two functions; timm's own GELU class has no such attribute.
            tanh = getattr(module, "approximate", "none") == "tanh"
            activations.add("gelu_tanh" if tanh else "gelu")
    return activations


def check_activation(modules: Iterable[nn.Module], expected: str, given: str | None = None) -> None:
    """Check that a tower has the activation function that its weights were trained with.

    Args:
        modules: Modules of its blocks.
        expected: Activation function in the spec.
        given: Activation function of the tower, if it is no module (a call of ``F.gelu``).

    Raises:
        TargetError: The tower has another activation function, or none was found nor given.
        OptionError: ``given`` is no activation function.
    """
    if given is not None:
        if given not in ACTIVATIONS:
            raise OptionError(f"activation is {given!r}, expected one of {', '.join(ACTIVATIONS)}")
        present = {given}
    else:
        present = find_activations(modules)
    if not present:
        raise TargetError(
            "the tower's blocks contain no known activation module; name the activation function "
            f"by activation=..., one of {', '.join(ACTIVATIONS)} (the checkpoint's is {expected!r})"
        )
    if present != {expected}:
        raise TargetError(
            f"the tower uses {' and '.join(sorted(present))}, the checkpoint was pruned with "
            f"{expected}; build the tower with {expected} (open_clip: a model name "
            f"{'with' if expected == 'quick_gelu' else 'without'} '-quickgelu')"
        )
