"""The optimal brain surgeon over units of columns: one order that serves every width.

For a consumer ``y = W a`` whose input has the (regularised) covariance C, the least increase of
``E|W a - W' a|^2`` when the columns g are removed and all others re-fitted is
``tr(W_g ([C^-1]_gg)^-1 W_g^T)``, reached by ``W <- W - W_g ([C^-1]_gg)^-1 [C^-1]_g:``
(Hassibi and Stork 1993; in blocks of columns, Frantar and Alistarh 2022, Kurtic et al. 2023).
Removing the cheapest unit, updating W and C^-1, and going on gives the order. The weight at any
width on the way is the exact least-squares refit for what stays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Elimination", "prune_columns"]

_LAZY = 64
"""Rank-one updates that are gathered before they are applied as one matrix product."""


@dataclass(frozen=True, eq=False)
class Elimination:
    """What :func:`prune_columns` found.

    Attributes:
        order: int64 [units]: in the order of removal.
        costs: float64 [units]: increase of the squared error, summed over outputs, when the unit
            was removed.
        weights: Width -> float64 [m, n]: the refitted weight when that many units are left, zero
            in the columns that are gone.
    """

    order: Tensor
    costs: Tensor
    weights: dict[int, Tensor] = field(default_factory=dict)


def prune_columns(
    weight: Tensor,
    covariance: Tensor,
    columns: Tensor,
    *,
    order: Tensor | None = None,
    snapshots: Collection[int] = (),
) -> Elimination:
    """Remove units one after another, the cheapest first, re-fitting what is left.

    Args:
        weight: W [m, n].
        covariance: C [n, n], positive definite: :func:`ovsprune.calibration.ridge.regularised`.
        columns: int64 [units, width], the columns of each unit, disjoint.
        order: Remove in this order instead; int64 [units].
        snapshots: Widths (numbers of units left) whose refitted weight is wanted.

    Raises:
        torch.linalg.LinAlgError: ``covariance`` is not positive definite.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance.double()))
    steps = _single if columns.shape[1] == 1 else _blocks
    units = columns.shape[0]
    removed, costs = [], torch.zeros(units, dtype=torch.float64)
    wanted = set(snapshots)
    kept: dict[int, Tensor] = {}
    if units in wanted:
        kept[units] = weight.double().clone()
    for unit, cost, current in steps(weight.double(), inverse, columns, order, wanted):
        removed.append(unit)
        costs[unit] = cost
        if units - len(removed) in wanted:
            assert current is not None
            kept[units - len(removed)] = current
    return Elimination(torch.tensor(removed), costs, kept)


Step = tuple[int, float, Tensor | None]
"""Unit, its cost, and a copy of the weight if this width is wanted."""


def _blocks(
    weight: Tensor, inverse: Tensor, columns: Tensor, order: Tensor | None, wanted: Collection[int]
) -> Iterator[Step]:
    """Units of several columns: heads, channels that a k x k convolution reads.

    As in :func:`_single`, updates of C^-1 are applied lazily. W, and the blocks of C^-1 on its
    diagonal, which every unit's cost is made of, are brought up to date at once.
    """
    (m, n), width = weight.shape, columns.shape[1]
    alive = torch.arange(len(columns))
    flat = columns.flatten()
    parts = weight[:, flat].view(m, -1, width).permute(1, 2, 0).contiguous()  # [units, width, m]
    inverse = inverse[flat][:, flat]
    one = torch.eye(width, dtype=weight.dtype)
    step = 0
    while len(alive):
        lazy = min(max(1, _LAZY // width), len(alive))
        blocks = inverse.view(len(alive), width, len(alive), width).diagonal(dim1=0, dim2=2)
        inner = blocks.permute(2, 0, 1).clone()  # [units, width, width]
        u = weight.new_zeros(len(flat), lazy * width)
        here = torch.ones(len(alive), dtype=torch.bool)
        for t in range(0, lazy * width, width):
            cost = (torch.linalg.solve(inner, parts) * parts).sum((1, 2))
            cost = torch.where(here, cost, torch.inf)
            at = int(cost.argmin() if order is None else (alive == order[step]).nonzero())
            rows = slice(at * width, (at + 1) * width)
            root = torch.linalg.cholesky(inner[at])
            column = inverse[:, rows] - u[:, :t] @ u[rows, :t].T
            column = torch.linalg.solve_triangular(root, column.T, upper=False).T
            gone = torch.linalg.solve_triangular(root, parts[at], upper=False)
            u[:, t : t + width], here[at] = column, False
            beside = column.reshape(-1, width, width)
            inner -= beside @ beside.transpose(1, 2)
            parts -= beside @ gone
            # What is gone stays so: rounding would leave traces of it.
            inner[~here], parts[~here] = one, 0.0
            step += 1
            current = None
            if int(here.sum()) in wanted:
                current = weight.new_zeros(m, n)
                current[:, flat] = parts.flatten(0, 1).T
            yield int(alive[at]), float(cost[at]), current
        kept = here.repeat_interleave(width)
        inverse = (inverse - u @ u.T)[kept][:, kept]
        alive, parts, flat = alive[here], parts[here], flat[kept]


def _single(
    weight: Tensor, inverse: Tensor, columns: Tensor, order: Tensor | None, wanted: Collection[int]
) -> Iterator[Step]:
    """Units of one column (MLP): thousands, so rank-one updates are applied lazily.

    Between two flushes the true C^-1 is ``inverse - u u^T`` and the true W is ``weight - v u^T``
    with one column of u and v for each unit removed since. Only the diagonal of C^-1, the squared
    norms of W's columns, and the two columns of the unit that goes are ever brought up to date.
    """
    m, n = weight.shape
    alive = columns.flatten()  # Column of each position.
    of_unit = torch.arange(len(alive))
    weight, inverse = weight[:, alive], inverse[alive][:, alive]
    step = 0
    while len(alive):
        lazy = min(_LAZY, len(alive))
        diagonal, norms = inverse.diagonal().clone(), weight.square().sum(0)
        u, v = weight.new_zeros(len(alive), lazy), weight.new_zeros(m, lazy)
        here = torch.ones(len(alive), dtype=torch.bool)
        for t in range(lazy):
            cost = torch.where(here, norms / diagonal, torch.inf)
            at = int(cost.argmin() if order is None else (of_unit == order[step]).nonzero())
            root = diagonal[at].sqrt()
            column = (inverse[:, at] - u[:, :t] @ u[at, :t]) / root
            gone = (weight[:, at] - v[:, :t] @ u[at, :t]) / root
            overlap = weight.T @ gone - u[:, :t] @ (v[:, :t].T @ gone)
            price = float(norms[at] / diagonal[at])
            diagonal = (diagonal - column.square()).clamp_min(torch.finfo(diagonal.dtype).tiny)
            norms = norms - 2 * column * overlap + column.square() * gone.square().sum()
            u[:, t], v[:, t], here[at] = column, gone, False
            step += 1
            left = int(here.sum())
            current = None
            if left in wanted:
                current = weight.new_zeros(m, n)
                current[:, alive[here]] = (weight - v[:, : t + 1] @ u[:, : t + 1].T)[:, here]
            yield int(of_unit[at]), price, current
        weight = (weight - v @ u.T)[:, here]
        inverse = (inverse - u @ u.T)[here][:, here]
        alive, of_unit = alive[here], of_unit[here]
