"""A layer refitted from rows that arrive in chunks: weighted, checked on held-out pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ovsprune.calibration.moments import CrossMoments, Joint
from ovsprune.calibration.ridge import correction
from ovsprune.graph.layers import bias_of, weight_of

__all__ = ["Refit", "capped", "held_out", "median_of", "row_weights", "squared_norms"]

HELD_OUT = 8
"""One calibration picture in this many is not fitted to, but checked against."""


def held_out(pictures: int) -> Tensor:
    """Every eighth of the pictures, the last of fewer than eight, none of a single one.

    Returns:
        bool [pictures].

    Example:
        >>> held_out(3).tolist()
        [False, False, True]
    """
    mask = torch.zeros(pictures, dtype=torch.bool)
    mask[HELD_OUT - 1 :: HELD_OUT] = True
    if 1 < pictures < HELD_OUT:
        mask[-1] = True
    return mask


def squared_norms(rows: Tensor) -> Tensor:
    """Squared norms [...] of rows [..., n]."""
    return rows.square().sum(-1)


def capped(values: Tensor, reference: float | Tensor) -> Tensor:
    """``min(1, reference / values)``, for values >= 0; 1 where a value is 0."""
    return torch.where(values > reference, reference / values, torch.ones_like(values))


def median_of(values: Tensor) -> Tensor:
    """The median of those of ``values`` [n] (>= 0) that are not 0; 0 if none is.

    What is fitted exactly already is no measure of what is massive.
    """
    positive = values[values > 0]
    return positive.median() if len(positive) else values.new_zeros(())


def row_weights(rows: Tensor, median: float) -> Tensor:
    """Weights ``min(1, median / |row|^2)`` [...] of rows [..., n]: a massive row counts as one.

    Every consumer behind a norm reads a row relative to its length, so an error in a long row does
    less than the same error in a short one; and in CLIP's towers a few tokens are a hundred times
    as long as the others (Darcet et al. 2024, Sun et al. 2024) and would decide the whole fit.
    Half of the rows have weight 1, so what one row in N has (a class token among N - 1 patches) is
    at most 2/N of the whole weight.

    Args:
        rows: What the layer is fitted to, in the dense tower.
        median: Of the rows' squared norms.
    """
    return capped(squared_norms(rows), median)


STRENGTHS = (1, 10, 100)
"""Ridges that are tried, as multiples of the one asked for."""

Change = tuple[Tensor, Tensor]
"""What is added to a weight [m, n] and to a bias [m], float64."""


class Refit:
    """Ridge regression of a layer's weight and bias towards a residual, prior: what they are.

    Moments of the held-out pictures are kept apart, so the held-out error of any change is a
    quadratic form of them and takes no further pass. It decides between no change, a change of the
    bias alone, and ridges of rising strength; so the old weights stay where a refit would do
    harm, and fewer pictures mean a stronger ridge. What is chosen is solved again from all
    pictures.

    Args:
        layer: What is corrected, in place, by :meth:`apply`.
        held: bool [pictures], see :func:`held_out`.
        ridge: Relative to the mean variance of the layer's input.
    """

    def __init__(self, layer: nn.Module, held: Tensor, ridge: float) -> None:
        self.layer, self.held, self.ridge = layer, held, ridge
        outputs, inputs = weight_of(layer).flatten(1).shape
        self._fit, self._check = CrossMoments(inputs, outputs), CrossMoments(inputs, outputs)

    def update(self, part: slice, x: Tensor, e: Tensor, weight: Tensor) -> None:
        """Add the pictures ``part``: inputs x [b, ..., n], residuals e [b, ..., m], weights."""
        checked = self.held[part].to(x.device)
        for sums, mine in ((self._fit, ~checked), (self._check, checked)):
            if mine.any():
                sums.update(x[mine], e[mine], weight[mine])

    @torch.no_grad()
    def apply(self) -> None:
        """Change the layer in place."""
        more_weight, more_bias = self._best()
        weight, bias = weight_of(self.layer), bias_of(self.layer)
        new = weight.detach().double().cpu().flatten(1) + more_weight
        weight.copy_(new.view_as(weight).to(weight))
        if bias is not None:
            bias.copy_((bias.detach().double().cpu() + more_bias).to(bias))

    def _best(self) -> Change:
        fit = self._fit.result()
        if not self._check.count:
            return self._full(fit)
        check = self._check.result()
        before = check.error(*_nothing(fit))
        share = capped(before, median_of(before))  # A massive output counts as one, too.
        steps: list[Callable[[Joint], Change]]
        steps = [_nothing, self._shift, *(partial(self._full, strength=k) for k in STRENGTHS)]
        errors = [float((share * check.error(*step(fit))).sum()) for step in steps]
        # The first of equals: with a residual of zero, nothing is changed.
        return steps[errors.index(min(errors))](fit + check)

    def _shift(self, joint: Joint) -> Change:
        return torch.zeros_like(joint.cross.T), joint.mean * self._has_bias

    def _full(self, joint: Joint, strength: float = 1.0) -> Change:
        solved = joint if self._has_bias else joint.about_zero()
        weight = correction(solved.inputs, solved.cross, strength * self.ridge)
        return weight, solved.mean - weight @ solved.inputs.mean

    @property
    def _has_bias(self) -> bool:
        return bias_of(self.layer) is not None


def _nothing(joint: Joint) -> Change:
    return torch.zeros_like(joint.cross.T), torch.zeros_like(joint.mean)
