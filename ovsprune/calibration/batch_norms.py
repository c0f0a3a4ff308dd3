"""Running statistics of batch norms, moved by what a cut has moved; outputs stay as they are.

A repair puts the mean of what was cut into a norm's bias and leaves its running statistics. In
evaluation that is all the same. A framework that trains the norms takes the statistics of its own
batches instead, so what the bias makes up for would be made up for twice. Stated anew, the slim
norm's statistics are those of what it reads now, and scale and bias give what they gave:
``s (x - m) + b = s (x - m') + b'`` with ``s = w / sqrt(v + eps) = w' / sqrt(v' + eps)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Pictures, Stages
from ovsprune.core.records import Axis

__all__ = ["recalibrate_batchnorm"]

_FARTHEST = 100.0
"""Most by which a variance is multiplied or divided: a channel may be silent on few pictures."""


@torch.no_grad()
def recalibrate_batchnorm(
    dense: nn.Module,
    slim: nn.Module,
    rows: Mapping[tuple[str, Axis], Tensor],
    stages: Callable[[nn.Module], Stages],
    pictures: Pictures,
    batch_size: int,
    progress: Progress,
) -> None:
    """Move the running statistics of the slim tower's batch norms, in place.

    Means move by the difference of slim and dense on the pictures, variances by their ratio, so
    that a norm that reads what it read before stays bit for bit as it was, whatever the pictures.

    Args:
        dense: The tower before the cut, in evaluation mode.
        slim: The tower after it, in its final form and in evaluation mode.
        rows: (layer, axis) to the channels that stayed, int64; the others lost none.
        stages: A tower's blocks and head.
        pictures: Calibration pictures.
        batch_size: Pictures at a time.
        progress: Shows the two passes.
    """
    there = dict(dense.named_modules())
    norms = {
        name: module
        for name, module in slim.named_modules()
        if isinstance(module, _BatchNorm) and module.affine and module.running_mean is not None
        if isinstance(there.get(name), _BatchNorm)
    }
    if not norms:
        return
    with progress.stage("batch norms", 2) as advance:
        found = []
        for tower in (dense, slim):
            found.append(_moments(tower, norms, stages(tower), pictures, batch_size))
            advance(1)
    for name in found[0].keys() & found[1].keys():
        kept = rows.get((name, "out"))
        before, after = found[0][name], found[1][name]
        before = before if kept is None else before[:, kept]
        if not torch.equal(before, after):
            _move(norms[name], before, after)


def _move(norm: _BatchNorm, before: Tensor, after: Tensor) -> None:
    """Means and variances, float64 [2, channels], of what the norm read and reads."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None and var is not None
    old_mean, old_var = mean.cpu().double(), var.cpu().double() + norm.eps
    ratio = (after[1] + norm.eps) / (before[1] + norm.eps)
    new_mean = old_mean + after[0] - before[0]
    new_var = old_var * ratio.clamp(1 / _FARTHEST, _FARTHEST)
    scale = norm.weight.cpu().double() / old_var.sqrt()
    norm.bias.copy_(norm.bias.cpu().double() + scale * (new_mean - old_mean))
    norm.weight.copy_(scale * new_var.sqrt())
    mean.copy_(new_mean)
    var.copy_((new_var - norm.eps).clamp_min(0))


def _moments(
    tower: nn.Module,
    names: Iterable[str],
    stages: Stages,
    pictures: Pictures,
    batch_size: int,
) -> dict[str, Tensor]:
    """Mean and variance, float64 [2, channels], of what each norm that ran has read."""
    sums: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].double().transpose(0, 1).flatten(1)
            now = torch.stack([x.new_full((len(x),), x.shape[1]), x.sum(1), x.square().sum(1)])
            sums[name] = sums.get(name, 0) + now.cpu()

        return hook

    handles = [
        tower.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names
    ]
    device = next(tower.parameters()).device
    try:
        for images in pictures.batches(batch_size):
            stages.outputs(images.to(device))
    finally:
        for handle in handles:
            handle.remove()
    means = {name: total[1:] / total[0] for name, total in sums.items()}
    return {
        name: torch.stack([first, (second - first.square()).clamp_min(0)])
        for name, (first, second) in means.items()
    }
