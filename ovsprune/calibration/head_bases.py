"""The bases in which the directions inside heads lie in the order of what they matter.

The logits of a head are ``q . k``. Over a token that asks and one that is asked, taken at random
and independently, dropping directions after a change of basis ``q' = T q``, ``k' = T^-T k`` makes
a squared error that is least, for every number of directions, where the second moments of q' and
of k' are the same diagonal matrix S: then dropping the directions i costs the sum of ``S_i^2``,
the squared singular values of the logits in the metric of the activations (Eckart and Young 1936).
A basis with two equal diagonal moments is that of balanced truncation (Moore 1981). Whitening by
the activations before the singular values are taken is that of SVD-LLM (Wang et al. 2025) for one
linear map; here the map is the product of two.

The head's part of the output, ``W_out v``, is a product likewise, of the columns of W_out and the
attended values, which are what the out projection reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ovsprune.calibration.moments import SecondMoments
from ovsprune.calibration.ridge import regularised
from ovsprune.calibration.streams import run_stem, walk
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Moments, Pictures, Seed, Stages
from ovsprune.graph.layers import weight_of

__all__ = ["HeadBases", "balance", "find_bases"]

RIDGE = 1e-4
"""Relative to the mean variance: keeps a basis invertible, far below what decides the order."""


@dataclass(frozen=True, eq=False)
class HeadBases:
    """What :func:`find_bases` found, by name of the seed.

    Attributes:
        bases: T, float32 [heads, width, width].
        energies: float64 [width], falling: what dropping each direction costs, summed over heads.
    """

    bases: dict[str, Tensor] = field(default_factory=dict)
    energies: dict[str, Tensor] = field(default_factory=dict)


def balance(first: Tensor, second: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """The basis T in which two second moments are one falling diagonal matrix.

    With ``first = A A^T``, ``second = B B^T`` and ``A^T B = U S V^T``, it is
    ``T = S^-1/2 V^T B^T``: both ``T first T^T`` and ``T^-T second T^-1`` are S (Laub et al. 1987).

    Args:
        first: [d, d], of what T is applied to.
        second: [d, d], of what T^-T is applied to.
        ridge: What is added to both, relative to their mean variance
            (:func:`ovsprune.calibration.ridge.regularised`); > 0.

    Returns:
        T and the diagonal of S, float64 [d, d] and [d].
    """
    a, b = (torch.linalg.cholesky(regularised(moment, ridge)) for moment in (first, second))
    _, values, right = torch.linalg.svd(a.T @ b)
    return values.rsqrt()[:, None] * (right @ b.T), values


def find_bases(
    tower: nn.Module,
    stages: Stages,
    seeds: Sequence[Seed],
    pictures: Pictures,
    *,
    batch_size: int,
    progress: Progress,
) -> HeadBases:
    """The bases of directions inside heads, from one walk through the dense tower.

    Queries count with their mean. Keys do not: what all keys have in common moves the logits of a
    query by one number, which the softmax does not see. Nor do attended values: the bias of the
    out projection takes their mean over, wherever a recovery follows.

    Args:
        tower: The rewritten dense tower.
        stages: Its blocks.
        seeds: Of kind ``"qk"`` and ``"vo"``; their layer is the attention.
        pictures: Calibration pictures.
        batch_size: Pictures at a time.
        progress: Shows the walk.
    """
    found = HeadBases()
    last = max((i for i, b in enumerate(stages.blocks) if any(s.block == b for s in seeds)))
    with progress.stage("bases of heads", last + 2) as advance:
        stream = run_stem(stages, pictures, batch_size)
        advance(1)
        for name, block in list(stages.blocks.items())[: last + 1]:
            mine = [seed for seed in seeds if seed.block == name]
            sums = {tap: SecondMoments(_width(tower, tap)) for seed in mine for tap in _taps(seed)}
            for _, seen in walk(block, stream, batch_size, list(sums), name, advance=True):
                for tap, moments in sums.items():
                    moments.update(seen[tap])
            results = {tap: moments.result() for tap, moments in sums.items()}
            for seed in mine:
                heads = int(tower.get_submodule(seed.layer).num_heads)  # type: ignore[arg-type]
                pairs = [_per_head(matrix, heads) for matrix in _pair(tower, seed, results)]
                both = [balance(*pair) for pair in zip(*pairs, strict=True)]
                found.bases[seed.name] = torch.stack([basis for basis, _ in both]).float()
                spread = torch.stack([values for _, values in both])
                found.energies[seed.name] = spread.square().sum(0)
            advance(1)
    return found


def _taps(seed: Seed) -> list[tuple[str, str]]:
    if seed.kind == "qk":
        return [(f"{seed.layer}.q_proj", "output"), (f"{seed.layer}.k_proj", "output")]
    return [(f"{seed.layer}.out_proj", "input")]


def _width(tower: nn.Module, tap: tuple[str, str]) -> int:
    return int(weight_of(tower.get_submodule(tap[0])).shape[0 if tap[1] == "output" else 1])


def _pair(
    tower: nn.Module, seed: Seed, results: Mapping[tuple[str, str], Moments]
) -> tuple[Tensor, Tensor]:
    """The two second moments, over all heads, float64 [heads * d, heads * d]."""
    moments = [results[tap] for tap in _taps(seed)]
    first = moments[0].covariance
    if seed.kind == "qk":
        return first + torch.outer(moments[0].mean, moments[0].mean), moments[1].covariance
    weight = weight_of(tower.get_submodule(f"{seed.layer}.out_proj")).detach().double().cpu()
    return first, weight.T @ weight


def _per_head(matrix: Tensor, heads: int) -> Tensor:
    """The diagonal blocks [heads, d, d] of [heads * d, heads * d]."""
    width = matrix.shape[0] // heads
    return matrix.view(heads, width, heads, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
