"""Pool of a schedule: the weights that it may train or freeze, and the parameters that follow them.

Embedding tables, position embeddings, class tokens, norms and biases are never in the pool, because
they are not weight matrices of a layer. By default (``rest="follow"``) they follow a layer, so that
frozen layers at the beginning of a model run without an autograd graph. A parameter follows

1. the weights of its own module;
2. otherwise the next layer of the model, or the last layer if there is no next one.

There are two exceptions. A batch norm follows the convolution before it. A bare projection (CLIP's
``proj``) is registered first and used last, so it follows the last layer of its module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ovsprune.core.errors import ScheduleError
from ovsprune.core.protocols import Layer

__all__ = ["REST", "matching", "pool_of"]

PROJECTIONS = ("proj", "image_projection", "text_projection", "visual_projection")
"""Names of bare projection matrices, which their module applies last."""
REST = ("follow", "train", "freeze", "keep")
"""Choices for the other parameters of the pool's part of the model: norms, biases, positions."""


def pool_of(
    model: nn.Module,
    matrices: Collection[str],
    tower: Callable[[str], bool],
    touched: Collection[str],
) -> tuple[Layer, ...]:
    """Build the layers of a pool, in the order of the model.

    Args:
        model: The model.
        matrices: Names of the parameters that are weights of layers.
        tower: Returns True if the named parameter belongs to the image tower.
        touched: Names of the parameters that the schedule may change, followers included.

    Raises:
        ScheduleError: ``touched`` contains no weight matrix.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    matrix_names, touched_names = set(matrices), set(touched)
    allowed = [name for name in sizes if name in touched_names]
    weights = [name for name in allowed if name in matrix_names]
    if not weights:
        raise ScheduleError(
            f"no weight of a layer is in the pool: the schedule may change {len(allowed)} of the "
            f"{len(sizes)} parameters of {type(model).__name__}, and none of them is a weight "
            "matrix of a layer; give patterns that match some (pool=['backbone.*'])"
        )
    followers: dict[str, list[str]] = {name: [] for name in weights}
    batch_norms = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name in module._parameters
    }
    for name in allowed:
        if name not in matrix_names:
            for weight in _followed(name, allowed, weights, after=name in batch_norms):
                followers[weight].append(name)
    return tuple(Layer(n, sizes[n], tower(n), tuple(followers[n])) for n in weights)


def matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the parameters that match one of the ``fnmatch`` patterns.

    Raises:
        ScheduleError: A pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ScheduleError(
                f"the pattern {pattern!r} of the pool matches none of the {len(names)} parameters "
                f"of {type(model).__name__}; the first are {', '.join(names[:3])}"
            )
    return [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)]


def _followed(
    name: str, allowed: Sequence[str], weights: Sequence[str], *, after: bool
) -> Iterable[str]:
    """Return the weight matrices among ``allowed`` that a parameter follows.

    With ``after``, a parameter follows the weight before it instead of the one after it.
    """
    module, _, last = name.rpartition(".")
    same_module = [weight for weight in weights if weight.rpartition(".")[0] == module]
    if same_module:  # a bias
        return same_module
    if last in PROJECTIONS:
        prefix = f"{module}." if module else ""
        # The module applies its projection after all of its layers.
        inside = [weight for weight in weights if weight.startswith(prefix)]
        return (inside[-1] if inside else weights[-1],)
    known = set(weights)
    position = allowed.index(name)
    previous = next((other for other in reversed(allowed[:position]) if other in known), None)
    following = next((other for other in allowed[position + 1 :] if other in known), None)
    # A batch norm may have no convolution before it, and the last norm no layer after it.
    candidates = (previous, following) if after else (following, weights[-1])
    return (next(other for other in candidates if other is not None),)
