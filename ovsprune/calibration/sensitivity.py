"""How much the tower's final features change when one group alone is narrowed and refitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.calibration.feature_loss import SHARES, spread
from ovsprune.core.protocols import Moments
from ovsprune.core.records import Group
from ovsprune.graph.layers import bias_of, weight_of

__all__ = ["FeatureError", "grid", "measure_curve", "points_for"]

POINTS = (4, 8)
"""Fewest and most widths at which a group of many units is measured."""


def points_for(blocks: int) -> int:
    """Widths to measure of each group in a tower of so many blocks.

    Every measurement runs the rest of the tower, so the time of all of them grows with the square
    of the depth. Deep towers have more groups, of which each matters less, and are measured at
    fewer widths: about 128 for all groups of a kind together.

    >>> [points_for(blocks) for blocks in (12, 24, 32)]
    [8, 5, 4]
    """
    fewest, most = POINTS
    return max(fewest, min(most, 128 // blocks))


def grid(units: int, floor: int = 1, points: int = POINTS[1]) -> tuple[int, ...]:
    """Widths at which a group of ``units`` units is measured, ascending, the dense width last.

    Every width for small groups; otherwise ``points`` fractions, closer together where a group is
    narrow, because that is where the error bends.
    """
    if units - floor < points:
        return tuple(range(floor, units + 1))
    fractions = torch.linspace(0, 1, points + 1) ** 1.5
    widths = {floor + round(float(f) * (units - floor)) for f in fractions}
    return tuple(sorted(widths))


class FeatureError:
    """Relative squared change of the normalised dense tokens and the pooled output.

    Zero-shot heads compare directions, so tokens are L2-normalised first; the change is relative
    to the spread of the dense model's own tokens, so that it does not depend on how anisotropic
    the embedding is. The pooled output counts a tenth: what is pruned for segmentation is read
    token by token, and an allocation for both in equal parts keeps less of the tokens.

    Args:
        pooled: [B, C] of the dense tower.
        dense: [B, C, h, w] of the dense tower.
    """

    def __init__(self, pooled: Tensor, dense: Tensor) -> None:
        self._reference = (F.normalize(pooled, dim=1), F.normalize(dense, dim=1))
        self._spread = tuple(spread(part) for part in self._reference)

    def __call__(self, pooled: Tensor, dense: Tensor) -> float:
        """The change, 0 for the same outputs, about 2 for unrelated ones."""
        total = 0.0
        for part, before, scale, share in zip(
            (pooled, dense), self._reference, self._spread, SHARES, strict=True
        ):
            error = (F.normalize(part, dim=1) - before).square().sum(1).mean()
            total += share * float(error) / scale
        return total


@torch.no_grad()
def measure_curve(
    group: Group,
    consumer: nn.Module,
    moments: Moments,
    weights: Mapping[int, Tensor],
    run: Callable[[], float],
) -> dict[int, float]:
    """Error by width of one group.

    Args:
        group: The group.
        consumer: Its consumer in the dense tower; changed while measuring, restored after.
        moments: Of the consumer's input, for the bias that goes with a refitted weight.
        weights: Width -> refitted weight [m, n], zero in the columns that are gone.
        run: Runs the rest of the tower and returns the error of its output.
    """
    errors = {}
    for width, weight in weights.items():
        if width == group.units:
            errors[width] = 0.0
            continue
        with _patched(consumer, weight, moments.mean):
            errors[width] = run()
    return errors


@contextmanager
def _patched(layer: nn.Module, weight: Tensor, mean: Tensor) -> Iterator[None]:
    """The layer with another weight, and the bias that keeps its mean output."""
    old_weight, old_bias = weight_of(layer), bias_of(layer)
    change = old_weight.detach().cpu().double().flatten(1) - weight
    # A masked column reads zero and not its mean: the mean that is lost goes to the bias.
    shift = (change @ mean).to(old_weight)
    layer.weight = nn.Parameter(weight.to(old_weight).view_as(old_weight), requires_grad=False)
    if old_bias is not None:
        layer.bias = nn.Parameter(old_bias.detach() + shift, requires_grad=False)
    try:
        yield
    finally:
        layer.weight = old_weight
        if old_bias is not None:
            layer.bias = old_bias
