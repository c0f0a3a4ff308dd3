"""First-order Taylor expansion of a loss at unit masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ovsprune.core.protocols import Forward, GroupContext, Objective, Ranking
from ovsprune.importance import CRITERIA

__all__ = ["NOISE", "Taylor", "consistency"]

NOISE = 0.1
"""Standard deviation of the noise in :func:`consistency`, in units of preprocessed pixels."""


def consistency(forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
    """How far the dense tokens [b] of a mildly changed picture are from those of the clean one.

    The distance to the dense tower's own output has its minimum, and no gradient, at the dense
    tower. So the picture is changed: noise of standard deviation :data:`NOISE`, and a horizontal
    flip of every second picture on average, which is taken back in the tokens. The clean tokens are
    held fixed.

    Args:
        forward: The masked tower.
        images: [b, 3, H, W].
        generator: Draws a flip and the noise, picture by picture.

    Returns:
        Mean over tokens of the squared distance of the L2-normalised tokens, [b].
    """
    flips, noises = [], []
    for image in images:
        flips.append(bool(torch.randint(0, 2, (), generator=generator)))
        noises.append(torch.randn(image.shape, generator=generator))
    flipped = torch.tensor(flips, device=images.device)
    changed = _flip(images, flipped) + NOISE * torch.stack(noises).to(images)
    with torch.no_grad():
        clean = F.normalize(forward(images)[1], dim=1)
    tokens = F.normalize(_flip(forward(changed)[1], flipped), dim=1)
    return (tokens - clean).square().sum(1).mean((1, 2))


def _flip(x: Tensor, which: Tensor) -> Tensor:
    """Mirror the last axis of those of x [b, ...] that ``which`` [b] says."""
    return torch.where(which.view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)


@CRITERIA.register("taylor")
class Taylor:
    """First-order change of a loss when the unit goes (Taylor expansion).

    Args:
        loss: What the tower is wanted for, a value a picture: a
            :class:`~ovsprune.core.protocols.Objective`. By default :func:`consistency`, which needs
            no labels.
    """

    needs = frozenset({"gradients"})
    comparable = True

    def __init__(self, loss: Objective | None = None) -> None:
        self.objective: Objective = consistency if loss is None else loss

    def score(self, ctx: GroupContext) -> Ranking:
        """Mean over pictures of ``|d loss / d mask|``.

        The mask's gradient is ``sum of a dL/da`` over the unit's activations a: the first-order
        change of the loss if they were zero. Absolute values are taken picture by picture and then
        averaged, as in Molchanov, Tyree, Karras, Aila and Kautz, ICLR 2017; the mask is the gate of
        Molchanov, Mallya, Tyree, Frosio and Kautz, CVPR 2019, which needs no scaling between
        layers: costs are comparable across groups.
        """
        assert ctx.gradients is not None
        costs = ctx.gradients.abs().mean(0)
        return Ranking(costs, torch.argsort(costs, stable=True))
