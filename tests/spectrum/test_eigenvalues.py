"""Spectra of weights, and the alphas of groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ovsprune.core.progress import Silent
from ovsprune.core.records import Group, Slice
from ovsprune.spectrum import eigenvalues, group_alphas, hill


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30), (250, 500), (700, 401)])
def test_eigenvalues_are_squared_singular_values(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = eigenvalues(weight)
    expected = torch.linalg.svdvals(weight.double()).square().flip(0)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_zero_eigenvalues_are_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    right = torch.randn(3, 30, generator=generator, dtype=torch.float64)
    assert len(eigenvalues(left @ right)) == 3
    assert len(eigenvalues(torch.zeros(4, 5))) == 0


def test_convolutions_are_slices() -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    slices = [torch.linalg.svdvals(weight[:, :, i, j].double()) for i in range(3) for j in range(3)]
    expected = (0.5 * torch.cat(slices).square()).sort().values
    torch.testing.assert_close(eigenvalues(weight), expected)


def test_a_vector_has_no_spectrum() -> None:
    with pytest.raises(ValueError, match=r"shape \(5,\) is not a matrix"):
        eigenvalues(torch.ones(5))


def test_a_group_has_the_mean_alpha_of_its_layers() -> None:
    torch.manual_seed(0)
    tower = nn.ModuleDict(
        {"one": nn.Linear(12, 8), "norm": nn.LayerNorm(8), "two": nn.Linear(8, 12)}
    )
    rows = torch.arange(8)[:, None]
    group = Group(
        "g", "mlp", 8,
        (Slice("one", "out", rows), Slice("norm", "out", rows), Slice("two", "in", rows)),
        "two", "g",
    )  # fmt: skip
    alphas = [hill(eigenvalues(tower[name].weight)).alpha for name in ("one", "two")]
    assert group_alphas(tower, [group], Silent()) == {"g": pytest.approx(sum(alphas) / 2)}
    for name in ("one", "two"):
        nn.init.zeros_(tower[name].weight)
    assert group_alphas(tower, [group], Silent()) == {"g": math.inf}
