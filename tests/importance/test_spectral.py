"""Leverage against a plain singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Ranking
from ovsprune.importance.spectral import Spectral
from tests.importance.by_hand import context, normal


def score(read: Tensor, covariance: Tensor, *, width: int = 1, energy: float = 0.9) -> Ranking:
    n = read.shape[1]
    return Spectral(energy).score(context(normal(n, 3), read, width=width, covariance=covariance))


def mixed(n: int, seed: int) -> Tensor:
    mix = normal(n, n, seed=seed).double()
    return mix @ mix.T


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("outputs", [4, 20])
def test_costs_are_leverage_in_the_leading_directions(outputs: int, width: int) -> None:
    read, covariance = normal(outputs, 12, seed=2), mixed(12, 3)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T
    _, s, vh = torch.linalg.svd(read.double() @ root, full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum()
    k = int((share < 0.9).sum()) + 1
    assert 1 < k < len(s) or outputs == 4
    expected = vh[:k].square().sum(0).view(-1, width).sum(1) / k
    found = score(read, covariance, width=width)
    torch.testing.assert_close(found.costs, expected)
    torch.testing.assert_close(found.costs.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert torch.equal(found.order, found.costs.argsort(stable=True))


def test_zero_and_constant_units_have_no_leverage() -> None:
    read, variance = normal(3, 5), torch.ones(5)
    read[:, 1], variance[3] = 0, 0
    found = score(read, variance.diag(), energy=1.0)
    assert sorted(found.order[:2].tolist()) == [1, 3]
    assert found.costs[[1, 3]].max() < 1e-12 < found.costs[[0, 2, 4]].min()


def test_duplicates_share_leverage_and_weak_directions_do_not_count() -> None:
    # Units 0 and 1 always agree; unit 2 alone drives a weak output.
    covariance = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    read = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.1]])
    found = score(read, covariance)
    assert found.costs.tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert score(read, covariance, energy=1.0).costs.tolist() == pytest.approx([0.25, 0.25, 0.5])


def test_zero_consumer_weight_gives_zero_costs() -> None:
    found = score(torch.zeros(3, 4), torch.eye(4))
    assert found.costs.tolist() == [0.0] * 4
    assert found.order.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("energy", [0.0, 1.1, float("nan")])
def test_energy_outside_its_range_is_refused(energy: float) -> None:
    with pytest.raises(OptionError, match=r"energy is .*, expected a fraction in \(0, 1\]"):
        Spectral(energy)
