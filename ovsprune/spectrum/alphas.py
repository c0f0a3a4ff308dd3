"""Alphas of what can be cut: how heavy the tails of a group's layers are."""

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
    """Group name to the mean alpha of the layers of its slices, by the Hill fit.

    The mean over a block's matrices is AlphaPruning's (Lu et al. 2024); here it is over a group's.
    Norms have no spectrum and are left out, as is a weight of rank below 2; a group of such
    weights alone has an infinite alpha.

    Args:
        tower: The tower in which the groups were found.
        groups: The groups.
        progress: Shows the walk.
    """
    found = {}
    with progress.stage("spectra of the weights", len(groups)) as advance:
        for group in groups:
            alphas = []
            for name in dict.fromkeys(part.module for part in group.slices):
                layer: Any = tower.get_submodule(name)
                weight: Tensor = layer.weight  # of an index, no parameter
                if weight.ndim > 1 and len(values := eigenvalues(weight)) > 1:
                    alphas.append(hill(values).alpha)
            found[group.name] = sum(alphas) / len(alphas) if alphas else math.inf
            advance(1)
    return found
