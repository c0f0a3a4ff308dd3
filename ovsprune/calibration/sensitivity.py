"""Sensitivity curves: change of the final features if one group alone is cut and refitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.calibration.feature_loss import OUTPUT_WEIGHTS, total_variance
from ovsprune.core.protocols import Moments
from ovsprune.core.records import Group
from ovsprune.graph.layers import bias_of, weight_of

__all__ = ["FeatureError", "measure_curve", "points_for_depth", "width_grid"]

POINTS = (4, 8)
"""Minimum and maximum number of measured widths per group of many units."""


def points_for_depth(blocks: int) -> int:
    """Return the number of widths to measure per group in a tower of ``blocks`` blocks.

    Each measurement runs the rest of the tower, so the total time would grow with the square of the
    depth. Deep towers have more groups, each of which matters less, and are measured at fewer
    widths: about 128 for all groups of a kind together.

    >>> [points_for_depth(blocks) for blocks in (12, 24, 32)]
    [8, 5, 4]
    """
    fewest, most = POINTS
    return max(fewest, min(most, 128 // blocks))


def width_grid(units: int, min_units: int, points: int) -> tuple[int, ...]:
    """Return the widths at which to measure a group, ascending; the last is ``units``.

    Small groups are measured at every width. Otherwise ``points`` widths are used, denser at small
    widths, where the curve bends.

    Args:
        units: Number of units of the group.
        min_units: Smallest width.
        points: Number of intervals.
    """
    if units - min_units < points:
        return tuple(range(min_units, units + 1))
    fractions = torch.linspace(0, 1, points + 1) ** 1.5
    widths = {min_units + round(float(f) * (units - min_units)) for f in fractions}
    return tuple(sorted(widths))


class FeatureError:
    """Relative squared change of the normalised dense tokens and the pooled output.

    Zero-shot heads compare directions, so tokens are L2-normalised first. The change is relative to
    the total variance of the dense model's tokens, so that it does not depend on the anisotropy of
    the embedding. With equal weights of both outputs, allocations would preserve the tokens less.

    Args:
        pooled: [B, C] of the dense tower.
        dense: [B, C, h, w] of the dense tower.
    """

    def __init__(self, pooled: Tensor, dense: Tensor) -> None:
        self._reference = (F.normalize(pooled, dim=1), F.normalize(dense, dim=1))
        self._scales = tuple(total_variance(part) for part in self._reference)

    def __call__(self, pooled: Tensor, dense: Tensor) -> float:
        """Return the change: 0 for equal outputs, about 2 for unrelated outputs."""
        total = 0.0
        for part, reference, scale, weight in zip(
            (pooled, dense), self._reference, self._scales, OUTPUT_WEIGHTS, strict=True
        ):
            error = (F.normalize(part, dim=1) - reference).square().sum(1).mean()
            total += weight * float(error) / scale
        return total


@torch.no_grad()
def measure_curve(
    group: Group,
    consumer: nn.Module,
    moments: Moments,
    weights: Mapping[int, Tensor],
    run: Callable[[], float],
) -> dict[int, float]:
    """Return the error by width of one group.

    Args:
        group: The group.
        consumer: Its consumer in the dense tower. Changed during the measurement, then restored.
        moments: Moments of the consumer's input, from which the new bias is computed.
        weights: Width to refitted weight [m, n], zero in the columns of removed units.
        run: Runs the rest of the tower and returns the error of its output.
    """
    errors = {group.units: 0.0} if group.units in weights else {}
    for width, weight in weights.items():
        if width < group.units:
            with _patched(consumer, weight, moments.mean):
                errors[width] = run()
    return errors


@contextmanager
def _patched(layer: nn.Module, weight: Tensor, mean: Tensor) -> Iterator[None]:
    """Replace the weight, and change the bias so that the mean output stays the same."""
    old_weight, old_bias = weight_of(layer), bias_of(layer)
    change = old_weight.detach().cpu().double().flatten(1) - weight  # [m, n]
    # The output at the mean input changes by (W - W') mu; the bias compensates.
    shift = (change @ mean).to(old_weight)  # [m]
    layer.weight = nn.Parameter(weight.to(old_weight).view_as(old_weight), requires_grad=False)
    if old_bias is not None:
        layer.bias = nn.Parameter(old_bias.detach() + shift, requires_grad=False)
    try:
        yield
    finally:
        layer.weight = old_weight
        if old_bias is not None:
            layer.bias = old_bias
