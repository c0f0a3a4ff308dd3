"""Leverage scores of units in the leading directions of their consumer's output."""

from __future__ import annotations

import torch

from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.importance import CRITERIA
from ovsprune.importance.slices import consumer_weight

__all__ = ["Spectral"]


@CRITERIA.register("spectral")
class Spectral:
    """Leverage of a unit's columns in the leading singular directions of W C^(1/2).

    Args:
        energy: Fraction of the squared singular values in the leading directions, in (0, 1].

    Raises:
        OptionError: ``energy`` is outside (0, 1].
    """

    needs = frozenset({"moments"})

    def __init__(self, energy: float = 0.9) -> None:
        if not 0 < energy <= 1:
            raise OptionError(f"energy is {energy:g}, expected a fraction in (0, 1]")
        self.energy = energy

    def score(self, ctx: GroupContext) -> Ranking:
        """Compute ``1/k sum of V_ji^2`` over the unit's columns j and the k leading directions i.

        ``W C^(1/2) = U S V^T``, with the consumer's weight W, the covariance C of its input, and
        the symmetric root, whose columns stay closest to the units. k is the least number of
        directions that hold :attr:`energy` of the variance of the consumer's output. Statistical
        leverage: Mahoney and Drineas, CUR matrix decompositions for improved data analysis, PNAS
        2009, eq. 3. Costs sum to 1 in each group, so they are not comparable across groups.
        """
        assert ctx.moments is not None
        W, columns = consumer_weight(ctx)  # [m, n], [units, k]
        values, Q = torch.linalg.eigh(ctx.moments.covariance)  # C = Q diag(values) Q^T
        # W C^(1/2) in the eigenbasis of C. U and S^2 come from its Gram matrix, which is smaller
        # than the factor itself where m < n.
        WC = (W @ Q) * values.clamp_min(0).sqrt()  # [m, n]
        s2, U = torch.linalg.eigh(WC @ WC.T)  # [m], [m, m], ascending
        s2, U = s2.flip(0).clamp_min(0), U.flip(1)
        total = s2.sum()
        if not total > 0:
            costs = torch.zeros(ctx.group.units, dtype=torch.float64)
            return Ranking(costs, torch.arange(ctx.group.units))
        # Directions below the numerical rank have no defined V.
        numeric = s2 > s2[0] * len(s2) * torch.finfo(s2.dtype).eps
        enough = int((s2.cumsum(0) < self.energy * total).sum()) + 1
        k = min(enough, int(numeric.sum()))
        V = Q @ (WC.T @ U[:, :k] / s2[:k].sqrt())  # [n, k]
        costs = V.square().sum(1)[columns].sum(1) / k
        return Ranking(costs, torch.argsort(costs, stable=True))
