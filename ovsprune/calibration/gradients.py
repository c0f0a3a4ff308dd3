"""Derivatives of an objective with respect to unit masks, picture by picture, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import allocate
from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Forward, Objective, Pictures, Stages
from ovsprune.core.records import Group
from ovsprune.graph.layers import input_axis, weight_of

__all__ = ["mask_gradients"]

_SHARE = 4
"""The graph of a whole tower is held for a batch: it is this many times smaller than others."""


def mask_gradients(
    tower: nn.Module,
    stages: Stages,
    groups: Sequence[Group],
    objective: Objective,
    pictures: Pictures,
    *,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> dict[str, Tensor]:
    """Gradient of ``objective`` with respect to every unit's mask, for every picture.

    A mask is a factor of 1 on the unit's columns of whatever reads it, one for each picture, so
    that one backward pass gives the gradients of all pictures of a batch, and of all groups.
    Weights get no gradient. Memory does not grow with the number of pictures, apart from the
    result; that is mapped to a temporary file above
    :data:`ovsprune.calibration.activation_cache.MEMORY_LIMIT`.

    Args:
        tower: The dense, rewritten tower, in evaluation mode.
        stages: Its blocks.
        groups: Whose units get masks.
        objective: [b] or [b, r] values of b pictures.
        pictures: Calibration pictures.
        batch_size: Pictures at a time elsewhere; here a quarter of them, for the graph's sake.
        seed: Of what the objective draws.
        progress: Shows the pass.

    Returns:
        Group name to float32 [samples, units]; samples is the number of pictures times r, the
        values of one picture one after another.

    Raises:
        OptionError: What the objective gives is of a wrong shape, cannot be differentiated, or has
            gradients that are not finite or all zero.
    """
    generator = torch.Generator().manual_seed(seed)
    found: Tensor | None = None
    done = 0
    with progress.stage("mask gradients", len(pictures)) as advance, _frozen(tower):
        for images in pictures.batches(max(1, batch_size // _SHARE)):
            part = _batch(tower, stages, groups, objective, images, generator)
            if found is None:
                found = allocate((len(pictures) * (len(part) // len(images)), part.shape[1]))
            found[done : done + len(part)] = part
            done += len(part)
            advance(len(images))
    assert found is not None
    _check_finite(objective, found)
    parts = torch.split(found, [g.units for g in groups], dim=1)
    return {g.name: part for g, part in zip(groups, parts, strict=True)}


@torch.enable_grad()
def _batch(
    tower: nn.Module,
    stages: Stages,
    groups: Sequence[Group],
    objective: Objective,
    images: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Gradients of one batch, float32 [b * r, units of all groups] on the CPU."""
    parameter = next(tower.parameters())
    precision = torch.promote_types(parameter.dtype, torch.float32)
    masks = {
        g.name: torch.ones(
            len(images), g.units, device=parameter.device, dtype=precision, requires_grad=True
        )
        for g in groups
    }
    with _masked(tower, groups, masks):
        values = objective(_forward(stages, len(images)), images.to(parameter.device), generator)
    columns = _columns(objective, values, len(images))
    rows = []
    for i, column in enumerate(columns):
        # Pictures do not mix, so the gradient of the sum holds each picture's own.
        gradients = torch.autograd.grad(
            column.sum(),
            list(masks.values()),
            retain_graph=i + 1 < len(columns),
            materialize_grads=True,
        )
        rows.append(torch.cat(gradients, 1).float().cpu())
    return torch.stack(rows, 1).flatten(0, 1)


def _forward(stages: Stages, count: int) -> Forward:
    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) != count:
            raise OptionError(
                f"the objective was given {count} pictures and asks for the outputs of "
                f"{len(images)}: every picture has masks of its own, so call forward once for each "
                f"view, with {count} pictures"
            )
        return stages.outputs(images)

    return forward


@contextmanager
def _frozen(tower: nn.Module) -> Iterator[None]:
    """No gradient for weights: the graph would keep what every layer reads."""
    wanted = [p for p in tower.parameters() if p.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _masked(
    tower: nn.Module, groups: Sequence[Group], masks: Mapping[str, Tensor]
) -> Iterator[None]:
    """Multiply what each group's readers read by the units' masks [b, units]."""
    handles = []
    try:
        for group in groups:
            for part in group.readers:
                layer = tower.get_submodule(part.module)
                hook = _hook(part.rows, layer, masks[group.name])
                handles.append(layer.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    columns: Tensor, layer: nn.Module, mask: Tensor
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    axis = input_axis(layer)
    units, width = columns.shape
    # Unit of each input column; columns of no unit come last, and have a factor that stays 1.
    unit = torch.full((weight_of(layer).shape[1],), units, device=mask.device)
    unit[columns.flatten().to(mask.device)] = torch.arange(
        units, device=mask.device
    ).repeat_interleave(width)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read, *rest = args
        factor = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)[:, unit]
        shape = [1] * read.ndim
        shape[0], shape[axis] = factor.shape
        return (read * factor.view(shape).to(read), *rest)

    return hook


def _columns(objective: Objective, values: Tensor, count: int) -> Sequence[Tensor]:
    """The objective's values, as r tensors [b]."""
    if not isinstance(values, Tensor) or values.ndim not in (1, 2) or len(values) != count:
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise OptionError(
            f"{_name(objective)} gave {given} for {count} pictures, expected a tensor [{count}] or "
            f"[{count}, r]: one value, or r values, for each picture, not their mean"
        )
    if not values.requires_grad:
        raise OptionError(
            f"{_name(objective)} gave values without a gradient: compute them from what forward "
            "returns, outside torch.no_grad() and without detach()"
        )
    return values.reshape(count, -1).unbind(1)


def _check_finite(objective: Objective, found: Tensor) -> None:
    total = sum(float(row.abs().sum()) for row in found)
    if total == 0:
        raise OptionError(
            f"the gradient of {_name(objective)} is zero for every unit and picture: is it a "
            "distance to the dense tower's own output, which has its minimum there?"
        )
    if not total < float("inf"):
        raise OptionError(
            f"{_name(objective)} has gradients that are not finite; look for a square root or a "
            "logarithm of zero in it"
        )


def _name(objective: Objective) -> str:
    return f"the objective {getattr(objective, '__qualname__', type(objective).__name__)}"
