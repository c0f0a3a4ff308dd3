"""Gradients of an objective with respect to unit masks, for every image, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import allocate
from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Forward, Objective, Pictures, Stages
from ovsprune.core.records import Group
from ovsprune.graph.layers import input_axis, requires_grad_as, weight_of

__all__ = ["mask_gradients"]

_BATCH_DIVISOR = 4
"""Divisor of the batch size, because the autograd graph of the whole tower is kept in memory."""


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
    """Return the gradient of ``objective`` with respect to every unit's mask, for every image.

    A mask is a factor of 1 on the unit's columns of every layer that reads it. Each image has masks
    of its own, so one backward pass yields the gradients of all images of a batch and of all
    groups. Weights get no gradient. Memory does not grow with the number of images, except for the
    result, which is memory-mapped to a temporary file above
    :data:`ovsprune.calibration.activation_cache.MEMORY_LIMIT`.

    Args:
        tower: Dense tower in rewritten form, in evaluation mode.
        stages: The tower as a sequence of blocks.
        groups: Groups whose units get masks.
        objective: Returns [b] or [b, r] values for b images.
        pictures: Calibration images.
        batch_size: Images per batch of forward passes. A quarter of it is used here.
        seed: Seed of the objective's random generator.
        progress: Progress reporter.

    Returns:
        Group name to float32 [samples, units]. The number of samples is the number of images times
        r; the r values of one image are consecutive.

    Raises:
        OptionError: The objective returns a wrong shape, is not differentiable, or has gradients
            that are not finite or all zero.
    """
    generator = torch.Generator().manual_seed(seed)
    gradients: Tensor | None = None  # [samples, units of all groups]
    done = 0
    # Weights that required gradients would make the graph keep the input of every layer.
    with progress.stage("mask gradients", len(pictures)) as advance, requires_grad_as(tower, False):
        for images in pictures.batches(max(1, batch_size // _BATCH_DIVISOR)):
            part = _batch(tower, stages, groups, objective, images, generator)
            if gradients is None:
                samples = len(pictures) * (len(part) // len(images))
                gradients = allocate((samples, part.shape[1]))
            gradients[done : done + len(part)] = part
            done += len(part)
            advance(len(images))
    assert gradients is not None
    _check_finite(objective, gradients)
    parts = torch.split(gradients, [g.units for g in groups], dim=1)
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
    """Return the gradients of one batch, float32 [b * r, units of all groups] on the CPU."""
    parameter = next(tower.parameters())
    # Masks of towers in half precision are float32: their gradients are small.
    precision = torch.promote_types(parameter.dtype, torch.float32)
    masks = {
        g.name: torch.ones(
            len(images), g.units, device=parameter.device, dtype=precision, requires_grad=True
        )
        for g in groups
    }
    with _masked(tower, groups, masks):
        values = objective(_forward(stages, len(images)), images.to(parameter.device), generator)
    columns = _columns(objective, values, len(images))  # r tensors [b]
    results = []
    for i, column in enumerate(columns):
        # Images do not interact, so the gradient of the sum contains the gradient of each image.
        gradients = torch.autograd.grad(
            column.sum(),
            list(masks.values()),
            retain_graph=i + 1 < len(columns),
            materialize_grads=True,
        )
        results.append(torch.cat(gradients, 1).float().cpu())  # [b, units of all groups]
    return torch.stack(results, 1).flatten(0, 1)


def _forward(stages: Stages, count: int) -> Forward:
    """Return the tower as a function of exactly ``count`` images."""

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) != count:
            raise OptionError(
                f"the objective received {count} images and called forward with {len(images)}. "
                f"Every image has its own masks, so call forward once per view, with {count} "
                f"images each"
            )
        return stages.outputs(images)

    return forward


@contextmanager
def _masked(
    tower: nn.Module, groups: Sequence[Group], masks: Mapping[str, Tensor]
) -> Iterator[None]:
    """Multiply the inputs of each group's readers by the units' masks [b, units]."""
    with ExitStack() as hooks:
        for group in groups:
            for part in group.readers:
                layer = tower.get_submodule(part.module)
                hook = _mask_hook(part.rows, layer, masks[group.name])
                hooks.enter_context(layer.register_forward_pre_hook(hook))
        yield


def _mask_hook(
    columns: Tensor, layer: nn.Module, mask: Tensor
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return a hook that multiplies a layer's input channels [units, width] by [b, units]."""
    axis = input_axis(layer)
    units, width = columns.shape
    # Unit of each input channel. Channels of no unit get the index ``units``, whose factor is 1.
    unit = torch.full((weight_of(layer).shape[1],), units, device=mask.device)
    unit[columns.flatten().to(mask.device)] = torch.arange(
        units, device=mask.device
    ).repeat_interleave(width)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read, *rest = args
        factor = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)[:, unit]  # [b, channels]
        shape = [1] * read.ndim
        shape[0], shape[axis] = factor.shape
        return (read * factor.view(shape).to(read), *rest)

    return hook


def _columns(objective: Objective, values: Tensor, count: int) -> Sequence[Tensor]:
    """Return the objective's values as r tensors [b], after checking them."""
    if not isinstance(values, Tensor) or values.ndim not in (1, 2) or len(values) != count:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise OptionError(
            f"{_name(objective)} returned {shape} for {count} images, expected a tensor [{count}] "
            f"or [{count}, r]. Return one value, or r values, per image, and not their mean"
        )
    if not values.requires_grad:
        raise OptionError(
            f"{_name(objective)} returned values without a gradient. Compute them from the output "
            "of forward, outside of torch.no_grad() and without detach()"
        )
    return values.reshape(count, -1).unbind(1)


def _check_finite(objective: Objective, gradients: Tensor) -> None:
    total = sum(float(row.abs().sum()) for row in gradients)
    if total == 0:
        raise OptionError(
            f"the gradient of {_name(objective)} is zero for every unit and image. A distance to "
            "the dense tower's own output has its minimum there, so use another objective"
        )
    if not total < float("inf"):
        raise OptionError(
            f"{_name(objective)} has gradients that are not finite. Check it for a square root or "
            "a logarithm of zero"
        )


def _name(objective: Objective) -> str:
    return f"the objective {getattr(objective, '__qualname__', type(objective).__name__)}"
