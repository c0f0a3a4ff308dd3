"""The pool: which weights of a model a schedule may train or freeze, and what goes with each.

Never in it: embedding tables, positions, class tokens, norms and biases, which are no matrices of a
layer. They follow a layer (``rest="follow"``), so that frozen layers at the beginning of a model
run without a graph: a parameter follows the weights of its own module; if there are none the next
layer of the model after it, and behind the last layer the last one. Batch norms come after a
convolution and follow it; a bare projection (CLIP's ``proj``) is registered first and used last,
and follows the last layer of the module that holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ovsprune.core.errors import ScheduleError
from ovsprune.core.protocols import Layer

__all__ = ["REST", "matching", "pool_of"]

PROJECTIONS = ("proj", "image_projection", "text_projection", "visual_projection")
"""Names of parameters that are matrices, and the last thing that their module does."""
REST = ("follow", "train", "freeze", "keep")
"""What becomes of the rest of the pool's part of the model: norms, biases, positions."""


def pool_of(
    model: nn.Module,
    matrices: Collection[str],
    tower: Callable[[str], bool],
    touched: Collection[str],
) -> tuple[Layer, ...]:
    """The layers of a pool, in the order of the model.

    Args:
        model: The model.
        matrices: Names of the parameters that are weights of layers.
        tower: Whether a parameter, by its name, is part of the image tower.
        touched: Names of the parameters that a schedule may touch; those that follow a layer are
            among them, too.

    Raises:
        ScheduleError: No layer is among them.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    wanted, may = set(matrices), set(touched)
    allowed = [name for name in sizes if name in may]
    heads = [name for name in allowed if name in wanted]
    if not heads:
        raise ScheduleError(
            f"no weight of a layer is in the pool: of {type(model).__name__}'s {len(sizes)} "
            f"parameters a schedule may touch {len(allowed)}, none a matrix of a layer; name "
            "patterns of parameters that hold some (pool=['backbone.*'])"
        )
    followers: dict[str, list[str]] = {name: [] for name in heads}
    behind = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name in module._parameters
    }
    for name in allowed:
        if name not in wanted:
            for head in _followed(name, allowed, heads, name in behind):
                followers[head].append(name)
    return tuple(Layer(n, sizes[n], tower(n), tuple(followers[n])) for n in heads)


def matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of a model's parameters that match one of the ``fnmatch`` patterns.

    Raises:
        ScheduleError: A pattern matches none.
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
    name: str, allowed: Sequence[str], heads: Sequence[str], behind: bool
) -> Iterable[str]:
    """The layers that a parameter follows; ``behind``: the one before it rather than after."""
    module, _, last = name.rpartition(".")
    own = [head for head in heads if head.rpartition(".")[0] == module]
    if own:
        return own
    known = set(heads)
    if last in PROJECTIONS:
        start = f"{module}." if module else ""
        below = [head for head in heads if head.startswith(start)]
        return (below[-1] if below else heads[-1],)
    place = allowed.index(name)
    before = next((other for other in reversed(allowed[:place]) if other in known), None)
    after = next((other for other in allowed[place + 1 :] if other in known), None)
    order = (before, after) if behind else (after, heads[-1])
    return (next(other for other in order if other is not None),)
