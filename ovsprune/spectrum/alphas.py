"""Power-law exponents (alphas) of pruning groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ovsprune.core.progress import Progress
from ovsprune.core.records import Group
from ovsprune.spectrum.eigenvalues import eigenvalues
from ovsprune.spectrum.fits import hill

__all__ = ["group_alphas"]


def group_alphas(tower: nn.Module, groups: Sequence[Group], progress: Progress) -> dict[str, float]:
    """Return the mean alpha of the layers in each group, with the Hill fit.

    AlphaPruning (Lu et al. 2024) takes the mean over the matrices of a block; here it is the mean
    over the matrices of a group. Norms and weights of rank below 2 are skipped. A group without any
    other weight has an infinite alpha.

    Args:
        tower: The tower that contains the groups.
        groups: The groups.
        progress: Progress reporter.

    Returns:
        Map of group name to alpha.
    """
    mean_alphas = {}
    with progress.stage("spectra of the weights", len(groups)) as advance:
        for group in groups:
            alphas = []
            # A module may have several slices in a group; its weight counts once.
            for name in dict.fromkeys(part.module for part in group.slices):
                layer: Any = tower.get_submodule(name)
                weight: Tensor = layer.weight  # [out, in, *kernel]; not always a parameter
                if weight.ndim > 1 and len(values := eigenvalues(weight)) > 1:
                    alphas.append(hill(values).alpha)
            mean_alphas[group.name] = sum(alphas) / len(alphas) if alphas else math.inf
            advance(1)
    return mean_alphas
