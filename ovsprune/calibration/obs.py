"""Optimal brain surgeon for structured pruning: one greedy removal order for every width.

A consumer computes ``y = W x`` for inputs x with the regularised second moment H (in the literature
``H = X^T X``, the Hessian of the squared error up to a factor; here the covariance, because the
bias absorbs the mean). Removing the columns p of a unit, with the best update of all other columns,
increases ``E|W x - W' x|^2`` by

    loss = tr(W_p ([Hinv]_pp)^-1 W_p^T)

and the update is

    W    <- W    - W_p     ([Hinv]_pp)^-1 Hinv_p:
    Hinv <- Hinv - Hinv_:p ([Hinv]_pp)^-1 Hinv_p:

Sources: Hassibi and Stork, NeurIPS 1993 (single weights); Frantar and Alistarh, NeurIPS 2022, and
Kurtic et al., NeurIPS 2023 (blocks of columns). After each step, W is the exact least-squares
solution for the remaining columns, so one pass yields the refitted weight of every width.

The names are those of SparseGPT and ZipLM: W, H, Hinv, losses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ovsprune.core.protocols import Ranking

__all__ = ["prune_columns"]

_LAZY = 64
"""Number of rank-one updates that are collected and then applied as one matrix product."""


def prune_columns(
    weight: Tensor,
    covariance: Tensor,
    columns: Tensor,
    *,
    order: Tensor | None = None,
    snapshots: Collection[int] = (),
) -> Ranking:
    """Remove units one by one, always the one with the least loss, and update the other columns.

    Args:
        weight: W [m, n].
        covariance: H [n, n], positive definite, see :func:`ovsprune.calibration.ridge.regularised`.
        columns: int64 [units, width], the columns of each unit; units are disjoint.
        order: int64 [units], a fixed order of removal that replaces the greedy order.
        snapshots: Widths (numbers of remaining units) for which to return the refitted weight.

    Returns:
        ``costs`` are the losses: the increase of the squared error, summed over outputs, at the
        time of the removal. ``weights`` holds the refitted weight [m, n] of each width in
        ``snapshots``, with zeros in the columns of removed units.

    Raises:
        torch.linalg.LinAlgError: ``covariance`` is not positive definite.
    """
    H = covariance.double()  # [n, n]
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))  # [n, n]
    steps = _remove_single_columns if columns.shape[1] == 1 else _remove_blocks
    units = columns.shape[0]
    removed, losses = [], torch.zeros(units, dtype=torch.float64)
    weights: dict[int, Tensor] = {}
    if units in snapshots:
        weights[units] = weight.double().clone()
    for unit, loss, snapshot in steps(weight.double(), Hinv, columns, order, set(snapshots)):
        removed.append(unit)
        losses[unit] = loss
        if units - len(removed) in snapshots:
            assert snapshot is not None
            weights[units - len(removed)] = snapshot
    return Ranking(losses, torch.tensor(removed), weights)


Step = tuple[int, float, Tensor | None]
"""Removed unit, its loss, and a copy of W [m, n] if this width is among the snapshots."""


def _remove_blocks(
    W: Tensor, Hinv: Tensor, columns: Tensor, order: Tensor | None, snapshots: Collection[int]
) -> Iterator[Step]:
    """Remove units of several columns: attention heads, input channels of k x k convolutions.

    As in :func:`_remove_single_columns`, Hinv is updated lazily. W and the diagonal blocks of Hinv,
    from which the losses of all units are computed, are updated at every step.
    """
    (m, n), width = W.shape, columns.shape[1]
    alive = torch.arange(len(columns))  # [units], indices of the remaining units
    flat = columns.flatten()  # [units * width], their columns in W
    # W_p^T of each unit p, contiguous for the batched solve.
    Wt = W[:, flat].view(m, -1, width).permute(1, 2, 0).contiguous()  # [units, width, m]
    Hinv = Hinv[flat][:, flat]  # [units * width, units * width]
    identity = torch.eye(width, dtype=W.dtype)
    step = 0
    while len(alive):
        lazy = min(max(1, _LAZY // width), len(alive))
        blocks = Hinv.view(len(alive), width, len(alive), width).diagonal(dim1=0, dim2=2)
        Hinv_pp = blocks.permute(2, 0, 1).clone()  # [units, width, width]
        # Until the next flush, the current inverse is Hinv - U U^T.
        U = W.new_zeros(len(flat), lazy * width)
        remaining = torch.ones(len(alive), dtype=torch.bool)  # [units]
        for t in range(0, lazy * width, width):
            # tr(W_p Hinv_pp^-1 W_p^T) of all units in one batched solve.
            losses = (torch.linalg.solve(Hinv_pp, Wt) * Wt).sum((1, 2))  # [units]
            losses = torch.where(remaining, losses, torch.inf)
            p = int(losses.argmin() if order is None else (alive == order[step]).nonzero())
            rows = slice(p * width, (p + 1) * width)
            # With Hinv_pp = L L^T: Hinv loses C C^T, where C = Hinv_:p L^-T, and W^T loses C G.
            L = torch.linalg.cholesky(Hinv_pp[p])  # [width, width]
            C = Hinv[:, rows] - U[:, :t] @ U[rows, :t].T  # [units * width, width]
            C = torch.linalg.solve_triangular(L, C.T, upper=False).T
            G = torch.linalg.solve_triangular(L, Wt[p], upper=False)  # [width, m], L^-1 W_p^T
            U[:, t : t + width], remaining[p] = C, False
            C_blocks = C.reshape(-1, width, width)  # [units, width, width]
            Hinv_pp -= C_blocks @ C_blocks.transpose(1, 2)
            Wt -= C_blocks @ G
            # Rounding leaves small values in removed columns; reset them so that they stay zero.
            # The identity keeps the batched solve of the next step regular.
            Hinv_pp[~remaining], Wt[~remaining] = identity, 0.0
            step += 1
            snapshot = None
            if int(remaining.sum()) in snapshots:
                snapshot = W.new_zeros(m, n)
                snapshot[:, flat] = Wt.flatten(0, 1).T
            yield int(alive[p]), float(losses[p]), snapshot
        kept = remaining.repeat_interleave(width)  # [units * width]
        Hinv = (Hinv - U @ U.T)[kept][:, kept]
        alive, Wt, flat = alive[remaining], Wt[remaining], flat[kept]


def _remove_single_columns(
    W: Tensor, Hinv: Tensor, columns: Tensor, order: Tensor | None, snapshots: Collection[int]
) -> Iterator[Step]:
    """Remove units of one column each: the thousands of hidden units of an MLP.

    A rank-one update of Hinv [n, n] at each step would be limited by memory bandwidth. Therefore
    the updates are lazy: between two flushes the current inverse is ``Hinv - U U^T`` and the
    current weight is ``W - V U^T``, with one column of U and V per removed unit. Only the diagonal
    of Hinv, the squared column norms of W, and the two columns of the removed unit are updated at
    every step.
    """
    m, n = W.shape
    alive = columns.flatten()  # [units], column in the full W at each position
    of_unit = torch.arange(len(alive))  # [units], unit at each position
    W, Hinv = W[:, alive], Hinv[alive][:, alive]  # [m, units], [units, units]
    step = 0
    while len(alive):
        lazy = min(_LAZY, len(alive))
        diagonal, norms = Hinv.diagonal().clone(), W.square().sum(0)  # [units], [units]
        U, V = W.new_zeros(len(alive), lazy), W.new_zeros(m, lazy)
        remaining = torch.ones(len(alive), dtype=torch.bool)  # [units]
        for t in range(lazy):
            losses = torch.where(remaining, norms / diagonal, torch.inf)  # |W_p|^2 / [Hinv]_pp
            p = int(losses.argmin() if order is None else (of_unit == order[step]).nonzero())
            root = diagonal[p].sqrt()
            # u = Hinv_:p / sqrt([Hinv]_pp) and v = W_p / sqrt([Hinv]_pp), both at current values,
            # so that the update of this step is Hinv -= u u^T, W -= v u^T.
            u = (Hinv[:, p] - U[:, :t] @ U[p, :t]) / root  # [units]
            v = (W[:, p] - V[:, :t] @ U[p, :t]) / root  # [m]
            Wv = W.T @ v - U[:, :t] @ (V[:, :t].T @ v)  # [units], current W^T v
            loss = float(norms[p] / diagonal[p])
            # Rounding must not make the diagonal of a positive definite matrix negative.
            diagonal = (diagonal - u.square()).clamp_min(torch.finfo(diagonal.dtype).tiny)
            # |W_j - v u_j|^2 = |W_j|^2 - 2 u_j W_j^T v + u_j^2 |v|^2, without forming W.
            norms = norms - 2 * u * Wv + u.square() * v.square().sum()
            U[:, t], V[:, t], remaining[p] = u, v, False
            step += 1
            left = int(remaining.sum())
            snapshot = None
            if left in snapshots:
                current = W - V[:, : t + 1] @ U[:, : t + 1].T  # [m, units]
                snapshot = W.new_zeros(m, n)
                snapshot[:, alive[remaining]] = current[:, remaining]
            yield int(of_unit[p]), loss, snapshot
        # Flush: apply the collected updates and drop the removed positions.
        W = (W - V @ U.T)[:, remaining]
        Hinv = (Hinv - U @ U.T)[remaining][:, remaining]
        alive, of_unit = alive[remaining], of_unit[remaining]
