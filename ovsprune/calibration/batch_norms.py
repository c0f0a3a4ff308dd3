"""Recalibration of batch norms: update running statistics after a cut, without changing outputs.

Pruning changes the distribution of a batch norm's input. A repair compensates in the bias and
leaves the running statistics, which is correct in evaluation mode. In training mode, however, a
framework normalises by batch statistics, so the change would be compensated twice. Therefore the
running mean m and variance v are replaced by those of the slim tower, m' and v', and weight w and
bias b are changed to w' and b' such that the output stays the same:

    s (x - m) + b = s (x - m') + b'    with    s = w / sqrt(v + eps) = w' / sqrt(v' + eps)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Pictures, Stages
from ovsprune.core.records import Axis

__all__ = ["recalibrate_batchnorm"]

_MAX_RATIO = 100.0
"""Largest factor or divisor of a variance. On few images a channel may be constant by chance."""


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
    """Update the running statistics of the slim tower's batch norms, in place.

    Means change by the difference between slim and dense tower on the calibration images, variances
    by the ratio. Therefore a norm whose input did not change stays identical bit for bit, even if
    the statistics of the calibration images differ from those of the training data.

    Args:
        dense: Tower before the cut, in evaluation mode.
        slim: Tower after the cut, in its final form and in evaluation mode.
        rows: (layer, axis) to the kept channels, int64; layers that lost none may be absent.
        stages: Returns a tower as a sequence of blocks.
        pictures: Calibration images.
        batch_size: Images per batch.
        progress: Progress reporter, for two passes.
    """
    dense_modules = dict(dense.named_modules())
    norms = {
        name: module
        for name, module in slim.named_modules()
        if isinstance(module, _BatchNorm) and module.affine and module.running_mean is not None
        if isinstance(dense_modules.get(name), _BatchNorm)
    }
    if not norms:
        return
    with progress.stage("batch norms", 2) as advance:
        dense_moments = _input_moments(dense, norms, stages(dense), pictures, batch_size)
        advance(1)
        slim_moments = _input_moments(slim, norms, stages(slim), pictures, batch_size)
        advance(1)
    # Norms that did not run in both towers are skipped.
    for name in dense_moments.keys() & slim_moments.keys():
        kept = rows.get((name, "out"))
        before, after = dense_moments[name], slim_moments[name]  # [2, channels], [2, kept channels]
        before = before if kept is None else before[:, kept]
        if not torch.equal(before, after):
            _update(norms[name], before, after)


def _update(norm: _BatchNorm, before: Tensor, after: Tensor) -> None:
    """Update one slim norm, given mean and variance of its dense and slim input, [2, channels]."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None and var is not None
    # Variances include eps, which is part of what the norm divides by. All are [channels].
    old_mean, old_var = mean.cpu().double(), var.cpu().double() + norm.eps
    ratio = (after[1] + norm.eps) / (before[1] + norm.eps)
    new_mean = old_mean + after[0] - before[0]
    new_var = old_var * ratio.clamp(1 / _MAX_RATIO, _MAX_RATIO)
    # s = w / sqrt(v + eps) stays the same; so w' = s sqrt(v' + eps) and b' = b + s (m' - m).
    scale = norm.weight.cpu().double() / old_var.sqrt()
    norm.bias.copy_(norm.bias.cpu().double() + scale * (new_mean - old_mean))
    norm.weight.copy_(scale * new_var.sqrt())
    mean.copy_(new_mean)
    var.copy_((new_var - norm.eps).clamp_min(0))


def _input_moments(
    tower: nn.Module, names: Iterable[str], stages: Stages, pictures: Pictures, batch_size: int
) -> dict[str, Tensor]:
    """Return mean and variance of each norm's input, float64 [2, channels], if the norm ran."""
    sums: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].double().transpose(0, 1).flatten(1)  # [channels, b * positions]
            # Count, sum and sum of squares of each channel, [3, channels].
            batch = torch.stack([x.new_full((len(x),), x.shape[1]), x.sum(1), x.square().sum(1)])
            sums[name] = sums.get(name, 0) + batch.cpu()

        return hook

    device = next(tower.parameters()).device
    with ExitStack() as hooks:
        for name in names:
            layer = tower.get_submodule(name)
            hooks.enter_context(layer.register_forward_pre_hook(hook_for(name)))
        for images in pictures.batches(batch_size):
            stages.outputs(images.to(device))
    # E[x] and E[x^2]; the variance is E[x^2] - E[x]^2.
    means = {name: total[1:] / total[0] for name, total in sums.items()}
    return {
        name: torch.stack([first, (second - first.square()).clamp_min(0)])
        for name, (first, second) in means.items()
    }
