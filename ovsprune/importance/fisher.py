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
        projections: Number of random projections per image, at least 1.

    Raises:
        OptionError: ``projections`` is below 1.
    """

    needs = frozenset({"gradients"})
    comparable = True

    def __init__(self, projections: int = 4) -> None:
        if projections < 1:
            raise OptionError(f"projections is {projections}, expected at least 1")
        self.projections = projections

    def objective(self, forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
        """Project each image's L2-normalised dense tokens on r random sign vectors.

        With signs z, ``E[(d<z, f>/dm)^2] = |df/dm|^2``: the diagonal of the Fisher information of
        ``N(f(m), I)``, which needs no labels (Hutchinson, 1990; Martens, 2020).

        Returns:
            [b, r], each divided by the root of the number of token positions.
        """
        tokens = F.normalize(forward(images)[1], dim=1)  # [b, c, h, w]
        shape = (self.projections, *tokens.shape[1:])
        # One draw per image, so that the result does not depend on the batch size.
        signs = torch.stack([torch.randint(0, 2, shape, generator=generator) for _ in images]).to(
            tokens
        )
        count = tokens[0, 0].numel()  # h * w
        values: Tensor = (tokens[:, None] * (2 * signs - 1)).flatten(2).sum(2) / count**0.5
        return values

    def score(self, ctx: GroupContext) -> Ranking:
        """Average the squared gradient over images and projections.

        Theis, Korshunova, Tejani and Huszar, Faster gaze prediction with dense networks and Fisher
        pruning, 2018, with unit masks instead of gates of feature maps. To first order it is the
        mean squared change of the tokens when the unit is removed, so costs are comparable across
        groups.
        """
        assert ctx.gradients is not None
        costs = ctx.gradients.square().mean(0)  # [b * r, units] -> [units]
        return Ranking(costs, torch.argsort(costs, stable=True))
