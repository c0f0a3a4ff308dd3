"""Leverage of a unit in the leading directions of what its consumer computes."""

from __future__ import annotations

import torch

from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.importance import CRITERIA
from ovsprune.importance.slices import consumer

__all__ = ["Spectral"]


@CRITERIA.register("spectral")
class Spectral:
    """Leverage of a unit's columns in the leading singular directions of W C^(1/2).

    Args:
        energy: Share of the squared singular values that the leading directions hold, in (0, 1].

    Raises:
        OptionError: ``energy`` is out of its range.
    """

    needs = frozenset({"moments"})

    def __init__(self, energy: float = 0.9) -> None:
        if not 0 < energy <= 1:
            raise OptionError(f"energy {energy:g} is outside (0, 1]: it is a share, 0.9 by default")
        self.energy = energy

    def score(self, ctx: GroupContext) -> Ranking:
        """``sum of V_ji^2`` over the unit's columns j and the k leading directions i, over k.

        ``W C^(1/2) = U S V^T``, W being the consumer's weight, C the covariance of what it reads,
        and the root the symmetric one, whose columns stay nearest to the units. k is the least
        number of directions that hold :attr:`energy` of the variance of the consumer's output.
        Statistical leverage as the measure of a column: Mahoney and Drineas, CUR matrix
        decompositions for improved data analysis, PNAS 2009, eq. 3. Costs sum to 1 in each group;
        what they say is a unit's share of its own group.
        """
        assert ctx.moments is not None
        weight, columns = consumer(ctx)
        values, vectors = torch.linalg.eigh(ctx.moments.covariance)
        # W C^(1/2) on the eigenvectors of C; the singular values are those of the output's spread.
        scaled = (weight @ vectors) * values.clamp_min(0).sqrt()
        spread, basis = torch.linalg.eigh(scaled @ scaled.T)
        spread, basis = spread.flip(0).clamp_min(0), basis.flip(1)
        total = spread.sum()
        if not total > 0:
            costs = torch.zeros(ctx.group.units, dtype=torch.float64)
            return Ranking(costs, torch.arange(ctx.group.units))
        numeric = spread > spread[0] * len(spread) * torch.finfo(spread.dtype).eps
        enough = int((spread.cumsum(0) < self.energy * total).sum()) + 1
        k = min(enough, int(numeric.sum()))
        right = vectors @ (scaled.T @ basis[:, :k] / spread[:k].sqrt())  # V [n, k]
        costs = right.square().sum(1)[columns].sum(1) / k
        return Ranking(costs, torch.argsort(costs, stable=True))
