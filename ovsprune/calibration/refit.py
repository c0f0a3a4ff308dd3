"""Weighted ridge refit of one layer from streamed rows, validated on held-out images.

Letters: inputs x [n], residuals e [m] = reference minus current output, weight W [m, n], bias
b [m], row weights w.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ovsprune.calibration.moments import CrossMoments, JointMoments
from ovsprune.calibration.ridge import ridge_correction
from ovsprune.graph.layers import bias_of, weight_of

__all__ = [
    "Refit",
    "capped_weights",
    "held_out_mask",
    "positive_median",
    "row_weights",
    "squared_norms",
]

HELD_OUT = 8
"""One calibration image in this number is not fitted, but used for validation."""


def held_out_mask(images: int) -> Tensor:
    """Return a mask of the held-out images, bool [images].

    Every eighth image is held out; of fewer than eight images the last one; of a single image none.

    >>> held_out_mask(3).tolist()
    [False, False, True]
    """
    mask = torch.zeros(images, dtype=torch.bool)  # deterministic: no random draw
    mask[HELD_OUT - 1 :: HELD_OUT] = True
    if 1 < images < HELD_OUT:
        mask[-1] = True
    return mask


def squared_norms(rows: Tensor) -> Tensor:
    """Return the squared norms [...] of rows [..., n]."""
    return rows.square().sum(-1)


def capped_weights(values: Tensor, reference: float | Tensor) -> Tensor:
    """Return ``min(1, reference / values)`` for values >= 0; 1 where a value is 0."""
    return torch.where(values > reference, reference / values, torch.ones_like(values))


def positive_median(values: Tensor) -> Tensor:
    """Return the median of the nonzero entries of ``values`` [n] (>= 0), or 0 if there are none.

    Zeros are excluded: rows that are fitted exactly do not tell which others are massive.
    """
    positive = values[values > 0]
    return positive.median() if len(positive) else values.new_zeros(())


def row_weights(rows: Tensor, median: float) -> Tensor:
    """Return the weights ``w = min(1, median / |row|^2)`` that limit the influence of massive rows.

    A layer after a norm depends on the direction of a row, so an error in a long row matters less
    than the same error in a short row. In CLIP's towers a few tokens have norms a hundred times
    larger than the others (Darcet et al. 2024, Sun et al. 2024). Without weights they would
    determine the whole fit. Half of the rows have weight 1, so a share 1/N of the rows (such as one
    class token per N - 1 patch tokens) has at most 2/N of the total weight.

    Args:
        rows: [..., n], the reference of the fit, from the dense tower.
        median: Median of the squared norms of the rows.

    Returns:
        [...].
    """
    return capped_weights(squared_norms(rows), median)


RIDGE_MULTIPLES = (1, 10, 100)
"""Candidate ridges, as multiples of the requested ridge."""

Change = tuple[Tensor, Tensor]
"""Additive changes of a weight [m, n] and of a bias [m], float64."""


class Refit:
    """Ridge regression of a layer's residual, with the present weight and bias as the prior mean.

    The moments of the held-out images are kept separately. The held-out error of any change is a
    quadratic form of them (:meth:`JointMoments.error`), so candidates are compared without another
    forward pass. The candidates are: no change, a change of the bias only, and full refits with
    increasing ridge. Therefore the old weights remain if a refit would increase the held-out error,
    and fewer images lead to a stronger ridge. The best candidate is solved again with all images.

    Args:
        layer: Layer to refit, in place, by :meth:`apply`.
        held_out: bool [images], see :func:`held_out_mask`.
        ridge: Relative to the mean variance of the layer's input.
    """

    def __init__(self, layer: nn.Module, held_out: Tensor, ridge: float) -> None:
        self.layer, self.held_out, self.ridge = layer, held_out, ridge
        m, n = weight_of(layer).flatten(1).shape
        # Weights of convolutions are flattened; rows are image patches then.
        self._fit_moments, self._held_out_moments = CrossMoments(n, m), CrossMoments(n, m)

    def update(self, part: slice, x: Tensor, e: Tensor, weight: Tensor) -> None:
        """Add a batch of images.

        Args:
            part: Indices of the images.
            x: Inputs of the layer as rows [b, ..., n].
            e: Residuals [b, ..., m]: the reference minus the present output.
            weight: Row weights [b, ...].
        """
        # Whole images are held out: rows of one image are correlated.
        held_out = self.held_out[part].to(x.device)  # [b]
        for moments, chosen in ((self._fit_moments, ~held_out), (self._held_out_moments, held_out)):
            if chosen.any():
                moments.update(x[chosen], e[chosen], weight[chosen])

    @torch.no_grad()
    def apply(self) -> None:
        """Change the layer in place."""
        weight_change, bias_change = self._best_change()
        weight, bias = weight_of(self.layer), bias_of(self.layer)
        # Added in float64 and rounded once: a change of zero leaves every bit as it was.
        new = weight.detach().double().cpu().flatten(1) + weight_change  # [m, n]
        weight.copy_(new.view_as(weight).to(weight))
        if bias is not None:
            bias.copy_((bias.detach().double().cpu() + bias_change).to(bias))

    def _best_change(self) -> Change:
        """Return the candidate with the least held-out error, solved again with all images."""
        fit = self._fit_moments.result()
        # A single image is not validated.
        if not self._held_out_moments.count:
            return self._ridge(fit)
        held_out = self._held_out_moments.result()
        before = held_out.error(*_no_change(fit))  # [m]
        # Like massive rows, massive output channels must not decide alone.
        share = capped_weights(before, positive_median(before))  # [m]
        candidates: list[Callable[[JointMoments], Change]] = [
            _no_change,
            self._bias_only,
            *(partial(self._ridge, multiple=k) for k in RIDGE_MULTIPLES),
        ]
        # Summed over outputs, weighted by share: one candidate for the whole layer.
        errors = [float((share * held_out.error(*solve(fit))).sum()) for solve in candidates]
        # index() returns the first minimum, so a residual of zero leads to no change.
        return candidates[errors.index(min(errors))](fit + held_out)

    def _bias_only(self, joint: JointMoments) -> Change:
        return torch.zeros_like(joint.cross.T), joint.mean * self._has_bias

    def _ridge(self, joint: JointMoments, multiple: float = 1.0) -> Change:
        # Without a bias the means are part of what the weight must explain.
        solved = joint if self._has_bias else joint.about_zero()
        weight = ridge_correction(solved.inputs, solved.cross, multiple * self.ridge)  # [m, n]
        # The bias takes over what is left at the mean input: b = mu_e - W mu_x, [m].
        return weight, solved.mean - weight @ solved.inputs.mean

    @property
    def _has_bias(self) -> bool:
        return bias_of(self.layer) is not None


def _no_change(joint: JointMoments) -> Change:
    return torch.zeros_like(joint.cross.T), torch.zeros_like(joint.mean)
