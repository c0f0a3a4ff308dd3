"""The surgeon against brute force and against least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ovsprune.calibration.moments import SecondMoments
from ovsprune.calibration.obs import prune_columns
from ovsprune.calibration.ridge import regularised


def problem(n: int = 40, m: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(n, n, dtype=torch.float64, generator=generator)
    x = torch.randn(500, n, dtype=torch.float64, generator=generator) @ mix
    weight = torch.randn(m, n, dtype=torch.float64, generator=generator)
    return weight, regularised(x.T @ x / 500, 1e-3)


def least_squares(weight: Tensor, covariance: Tensor, kept: Tensor) -> Tensor:
    inner = covariance[kept][:, kept]
    return torch.linalg.solve(inner, covariance[kept] @ weight.T).T


@pytest.mark.parametrize("width", [1, 5])
def test_weights_on_the_way_are_least_squares_refits(width: int) -> None:
    weight, covariance = problem()
    columns = torch.randperm(40, generator=torch.Generator().manual_seed(1)).view(-1, width)
    units = len(columns)
    found = prune_columns(weight, covariance, columns, snapshots=[units, units // 2, 2])
    assert torch.equal(found.weights[units], weight)
    for left in (units // 2, 2):
        kept = columns[found.order[units - left :]].flatten().sort().values
        gone = torch.ones(40, dtype=torch.bool)
        gone[kept] = False
        torch.testing.assert_close(
            found.weights[left][:, kept], least_squares(weight, covariance, kept)
        )
        assert not found.weights[left][:, gone].any()


@pytest.mark.parametrize("width", [1, 4])
def test_costs_add_up_to_the_error(width: int) -> None:
    weight, covariance = problem()
    columns = torch.arange(40).view(-1, width)
    found = prune_columns(weight, covariance, columns, snapshots=[3])
    change = found.weights[3] - weight
    error = (change @ covariance * change).sum()
    spent = found.costs[found.order[: len(columns) - 3]].sum()
    torch.testing.assert_close(spent, error)


@pytest.mark.parametrize("width", [1, 4])
def test_each_step_is_the_greedy_choice(width: int) -> None:
    weight, covariance = problem(24)
    columns = torch.arange(24).view(-1, width)
    found = prune_columns(weight, covariance, columns)
    alive = list(range(len(columns)))
    for step in range(len(columns) - 1):
        errors = {}
        for unit in alive:
            kept = columns[[u for u in alive if u != unit]].flatten()
            refit = torch.zeros_like(weight)
            refit[:, kept] = least_squares(weight, covariance, kept)
            change = refit - weight
            errors[unit] = float((change @ covariance * change).sum())
        assert int(found.order[step]) == min(errors, key=errors.__getitem__)
        alive.remove(int(found.order[step]))


def test_a_given_order_is_followed() -> None:
    weight, covariance = problem()
    columns = torch.arange(40)[:, None]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    found = prune_columns(weight, covariance, columns, order=order, snapshots=[10])
    assert torch.equal(found.order, order)
    kept = order[30:].sort().values
    torch.testing.assert_close(found.weights[10][:, kept], least_squares(weight, covariance, kept))


def test_the_lazy_updates_span_several_flushes() -> None:
    weight, covariance = problem(200, 5)
    found = prune_columns(weight, covariance, torch.arange(200)[:, None], snapshots=[30])
    assert sorted(found.order.tolist()) == list(range(200))
    kept = found.order[170:].sort().values
    torch.testing.assert_close(found.weights[30][:, kept], least_squares(weight, covariance, kept))


def test_moments_in_chunks_equal_moments_at_once() -> None:
    rows = torch.randn(300, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 50
    sums = SecondMoments(9)
    for part in rows.split(37):
        sums.update(part)
    found = sums.result()
    assert found.count == 300
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.covariance, torch.cov(rows.T, correction=0))
