"""Optimal brain surgeon: compared with brute force and with least squares."""

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
def test_snapshots_are_least_squares_refits(width: int) -> None:
    weight, covariance = problem()
    columns = torch.randperm(40, generator=torch.Generator().manual_seed(1)).view(-1, width)
    units = len(columns)
    result = prune_columns(weight, covariance, columns, snapshots=[units, units // 2, 2])
    assert torch.equal(result.weights[units], weight)
    for left in (units // 2, 2):
        kept = columns[result.order[units - left :]].flatten().sort().values
        removed = torch.ones(40, dtype=torch.bool)
        removed[kept] = False
        torch.testing.assert_close(
            result.weights[left][:, kept], least_squares(weight, covariance, kept)
        )
        assert not result.weights[left][:, removed].any()


@pytest.mark.parametrize("width", [1, 4])
def test_costs_sum_to_the_error(width: int) -> None:
    weight, covariance = problem()
    columns = torch.arange(40).view(-1, width)
    result = prune_columns(weight, covariance, columns, snapshots=[3])
    change = result.weights[3] - weight
    error = (change @ covariance * change).sum()
    spent = result.costs[result.order[: len(columns) - 3]].sum()
    torch.testing.assert_close(spent, error)


@pytest.mark.parametrize("width", [1, 4])
def test_each_step_removes_the_unit_of_least_loss(width: int) -> None:
    weight, covariance = problem(24)
    columns = torch.arange(24).view(-1, width)
    result = prune_columns(weight, covariance, columns)
    alive = list(range(len(columns)))
    for step in range(len(columns) - 1):
        errors = {}
        for unit in alive:
            kept = columns[[u for u in alive if u != unit]].flatten()
            refit = torch.zeros_like(weight)
            refit[:, kept] = least_squares(weight, covariance, kept)
            change = refit - weight
            errors[unit] = float((change @ covariance * change).sum())
        assert int(result.order[step]) == min(errors, key=errors.__getitem__)
        alive.remove(int(result.order[step]))


def test_a_given_order_is_followed() -> None:
    weight, covariance = problem()
    columns = torch.arange(40)[:, None]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    result = prune_columns(weight, covariance, columns, order=order, snapshots=[10])
    assert torch.equal(result.order, order)
    kept = order[30:].sort().values
    torch.testing.assert_close(result.weights[10][:, kept], least_squares(weight, covariance, kept))


def test_lazy_updates_are_correct_over_several_flushes() -> None:
    weight, covariance = problem(200, 5)
    result = prune_columns(weight, covariance, torch.arange(200)[:, None], snapshots=[30])
    assert sorted(result.order.tolist()) == list(range(200))
    kept = result.order[170:].sort().values
    torch.testing.assert_close(result.weights[30][:, kept], least_squares(weight, covariance, kept))


def test_moments_of_batches_equal_moments_of_all_rows() -> None:
    rows = torch.randn(300, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 50
    sums = SecondMoments(9)
    for part in rows.split(37):
        sums.update(part)
    result = sums.result()
    assert result.count == 300
    torch.testing.assert_close(result.mean, rows.mean(0))
    torch.testing.assert_close(result.covariance, torch.cov(rows.T, correction=0))
