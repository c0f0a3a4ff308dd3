"""Refit of one layer: least squares, outliers, few rows, validation on held-out images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ovsprune.calibration.moments import CrossMoments
from ovsprune.calibration.refit import Refit, held_out_mask, positive_median, row_weights
from ovsprune.calibration.ridge import regularised, ridge_correction

RIDGE = 1e-2


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


def refit(
    layer: nn.Linear, x: Tensor, wanted: Tensor, weight: Tensor | None = None, size: int = 3
) -> None:
    """Refit ``layer`` to ``wanted`` [pictures, rows, m] from ``x`` [pictures, rows, n]."""
    fit = Refit(layer, held_out_mask(len(x)), RIDGE)
    weight = torch.ones(x.shape[:-1]) if weight is None else weight
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        fit.update(part, x[part], wanted[part] - layer(x[part]), weight[part])
    fit.apply()


def test_correction_equals_ridge_regression_with_the_present_weight_as_prior() -> None:
    x = normal(400, 6, dtype=torch.float64) + 3
    e = normal(400, 2, seed=1, dtype=torch.float64) + x[:, :2]
    sums = CrossMoments(6, 2)
    for start in range(0, 400, 90):
        sums.update(x[start : start + 90], e[start : start + 90])
    joint = sums.result()
    torch.testing.assert_close(joint.mean, e.mean(0))
    torch.testing.assert_close(joint.power, e.var(0, correction=0))
    centred = x - x.mean(0)
    level = 0.1 * centred.square().mean(0).mean()
    inner = centred.T @ centred / 400 + level * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.solve(inner, centred.T @ (e - e.mean(0)) / 400).T
    torch.testing.assert_close(ridge_correction(joint.inputs, joint.cross, 0.1), expected)


def test_a_row_of_weight_two_counts_as_two_rows() -> None:
    x, e = normal(20, 4, dtype=torch.float64), normal(20, 3, seed=1, dtype=torch.float64)
    twice, weighted = CrossMoments(4, 3), CrossMoments(4, 3)
    twice.update(torch.cat([x, x[:5]]), torch.cat([e, e[:5]]))
    weighted.update(x, e, torch.tensor([2.0] * 5 + [1.0] * 15, dtype=torch.float64))
    one, two = twice.result(), weighted.result()
    torch.testing.assert_close(one.inputs.mean, two.inputs.mean)
    torch.testing.assert_close(one.inputs.covariance, two.inputs.covariance)
    for name in ("mean", "cross", "power"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name))


def test_sum_of_moments_equals_moments_of_the_union() -> None:
    x, e = normal(50, 4, dtype=torch.float64) + 5, normal(50, 3, seed=1, dtype=torch.float64) - 2
    parts = []
    for chosen in (slice(0, 17), slice(17, 50), slice(0, 50)):
        sums = CrossMoments(4, 3)
        sums.update(x[chosen], e[chosen])
        parts.append(sums.result())
    summed, union = parts[0] + parts[1], parts[2]
    torch.testing.assert_close(summed.inputs.mean, union.inputs.mean)
    torch.testing.assert_close(summed.inputs.covariance, union.inputs.covariance)
    for name in ("mean", "cross", "power"):
        torch.testing.assert_close(getattr(summed, name), getattr(union, name))


def test_error_from_moments_equals_error_from_rows() -> None:
    x, e = normal(50, 4, dtype=torch.float64) + 5, normal(50, 3, seed=1, dtype=torch.float64)
    weight, bias = normal(3, 4, seed=2, dtype=torch.float64), normal(3, seed=3).double()
    sums = CrossMoments(4, 3)
    sums.update(x, e)
    expected = (e - x @ weight.T - bias).square().mean(0)
    torch.testing.assert_close(sums.result().error(weight, bias), expected)


@pytest.mark.parametrize("biased", [True, False])
def test_a_zero_residual_changes_nothing(biased: bool) -> None:
    weight, bias = normal(3, 8), normal(3, seed=1)
    layer = linear(weight, bias if biased else None)
    x = normal(16, 5, 8, seed=2)
    refit(layer, x, layer(x))
    assert torch.equal(layer.weight, weight)
    assert not biased or torch.equal(layer.bias, bias)


@pytest.mark.parametrize("biased", [True, False])
def test_a_known_layer_is_recovered(biased: bool) -> None:
    weight, bias = normal(3, 8), normal(3, seed=1) * biased
    x = normal(64, 20, 8, seed=2) + 1
    layer = linear(torch.zeros(3, 8), torch.zeros(3) if biased else None)
    refit(layer, x, x @ weight.T + bias)
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=0.06)
    assert layer.bias is None or (layer.bias - bias).abs().max() < 0.1


def test_the_batch_size_does_not_matter() -> None:
    x, wanted = normal(20, 6, 8), normal(20, 6, 3, seed=1)
    layers = [linear(torch.zeros(3, 8), torch.zeros(3)) for _ in range(2)]
    for layer, size in zip(layers, (3, 20), strict=True):
        refit(layer, x, wanted, size=size)
    torch.testing.assert_close(layers[0].weight, layers[1].weight)


def test_a_refit_that_increases_the_held_out_error_is_rejected() -> None:
    """Fit noise with more columns than rows."""
    weight, bias = normal(3, 64), normal(3, seed=1)
    layer = linear(weight, bias)
    x = normal(8, 5, 64, seed=2)
    refit(layer, x, layer(x) + normal(8, 5, 3, seed=3))
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("ridge", [1e-2, 1e-12])
def test_two_images_and_many_units_give_a_finite_refit(ridge: float) -> None:
    weight, bias = normal(6, 300), normal(6, seed=1)
    basis = normal(20, 300, seed=2)
    x = normal(2, 10, 20, seed=3) @ basis  # Low rank, as activations are.
    layer = linear(torch.zeros(6, 300), bias)
    fit = Refit(layer, held_out_mask(2), ridge)
    wanted = x @ weight.T + bias
    fit.update(slice(0, 2), x, wanted - layer(x), torch.ones(2, 10))
    fit.apply()
    assert layer.weight.isfinite().all() and layer.bias.isfinite().all()
    others = normal(50, 20, seed=4) @ basis
    goal = others @ weight.T + bias
    assert (layer(others) - goal).norm() < (bias - goal).norm()


def test_regularised_is_positive_definite_with_massive_channels_and_a_small_ridge() -> None:
    rows = normal(40, 200)  # Of rank 40, and in float32.
    rows[:, :3] *= 1e4
    covariance = rows.T @ rows / 40
    assert torch.linalg.cholesky_ex(covariance.double()).info > 0
    found = regularised(covariance, 1e-9)
    assert torch.linalg.cholesky_ex(found).info == 0
    scale = found.diagonal().rsqrt()
    assert torch.linalg.eigvalsh(scale[:, None] * found * scale).min() > 5e-6


def test_massive_channels_do_not_raise_the_ridge() -> None:
    rows = normal(4000, 50, dtype=torch.float64)
    plain = regularised(rows.T @ rows / 4000, RIDGE) - rows.T @ rows / 4000
    rows[:, 0] *= 100
    massive = regularised(rows.T @ rows / 4000, RIDGE) - rows.T @ rows / 4000
    assert massive[1, 1] < 1.5 * plain[1, 1]


def outliers() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows with one linear relation and a few massive rows with another one."""
    rule, other = normal(4, 16), normal(4, 16, seed=1)
    x = normal(32, 50, 16, seed=2)
    x[:, 0] *= 100
    wanted = x @ rule.T
    wanted[:, 0] = x[:, 0] @ other.T
    return rule, x, wanted, row_weights(wanted, float(wanted.square().sum(-1).median()))


def test_massive_rows_do_not_dominate_the_refit() -> None:
    rule, x, wanted, weight = outliers()
    errors = []
    for given in (weight, None):
        layer = linear(torch.zeros(4, 16), torch.zeros(4))
        refit(layer, x, wanted, given)
        errors.append(float((layer.weight - rule).norm() / rule.norm()))
    assert errors[0] < 0.1
    assert errors[1] > 0.9


def test_a_share_of_one_nth_of_the_rows_has_at_most_two_nths_of_the_weight() -> None:
    _, x, _, weight = outliers()
    share = weight[:, 0].sum() / weight.sum()
    assert weight.max() == 1.0
    assert 0 < share < 2 / x.shape[1]
    assert (weight == 1.0).float().mean() >= 0.5


@pytest.mark.parametrize(("pictures", "held"), [(1, 0), (2, 1), (7, 1), (8, 1), (16, 2), (256, 32)])
def test_number_of_held_out_images(pictures: int, held: int) -> None:
    assert int(held_out_mask(pictures).sum()) == held


def test_a_single_image_is_fitted() -> None:
    rule, x = normal(3, 8), normal(1, 400, 8, seed=1)
    layer = linear(torch.zeros(3, 8), torch.zeros(3))
    refit(layer, x, x @ rule.T)
    torch.testing.assert_close(layer.weight, rule, rtol=0, atol=0.1)


def test_outputs_without_a_residual_do_not_prevent_the_refit_of_others() -> None:
    """Guard against a median error of 0, which would give all outputs weight 0."""
    x = normal(16, 5, 4, dtype=torch.float32)
    layer, true = linear(torch.zeros(8, 4)), normal(8, 4, seed=1)
    true[:5] = 0.0
    refit(layer, x, x @ true.T)
    assert (layer.weight - true).norm() < 0.05 * true.norm()


def test_zero_rows_do_not_reduce_the_weights_of_others() -> None:
    rows = torch.cat([torch.zeros(6, 3), normal(4, 3)])
    median = float(positive_median(rows.square().sum(-1)))
    assert median > 0 and (row_weights(rows, median) > 0.05).all()
    assert float(positive_median(torch.zeros(3))) == 0.0
