"""Fisher information of unit masks, without labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Forward, GroupContext, Ranking
from ovsprune.importance import CRITERIA

__all__ = ["Fisher"]


@CRITERIA.register("fisher")
class Fisher:
    """Mean squared gradient of random projections of the dense output, by unit masks.

    Args:
        projections: How many of each picture, 1 or more.

    Raises:
        OptionError: ``projections`` is out of its range.
    """

    needs = frozenset({"gradients"})
    comparable = True

    def __init__(self, projections: int = 4) -> None:
        if projections < 1:
            raise OptionError(f"projections {projections}: give at least 1")
        self.projections = projections

    def objective(self, forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
        """[b, r]: products of each picture's L2-normalised dense tokens with random signs.

        With signs z, ``E[(d<z, f>/dm)^2] = |df/dm|^2``: the diagonal of the Fisher information of
        ``N(f(m), I)``, whose labels come from the model itself (Hutchinson, 1990; Martens,
        2020).
        """
        tokens = F.normalize(forward(images)[1], dim=1)
        shape = (self.projections, *tokens.shape[1:])
        signs = torch.stack([torch.randint(0, 2, shape, generator=generator) for _ in images]).to(
            tokens
        )
        count = tokens[0, 0].numel()
        values: Tensor = (tokens[:, None] * (2 * signs - 1)).flatten(2).sum(2) / count**0.5
        return values

    def score(self, ctx: GroupContext) -> Ranking:
        """Mean over pictures and projections of the squared gradient.

        Theis, Korshunova, Tejani and Huszar, Faster gaze prediction with dense networks and Fisher
        pruning, 2018, with masks in the place of feature maps' gates. To first order it is the
        squared change of the tokens, on average, when the unit goes: costs are comparable across
        groups.
        """
        assert ctx.gradients is not None
        costs = ctx.gradients.square().mean(0)
        return Ranking(costs, torch.argsort(costs, stable=True))
