"""Power laws on samples whose exponent is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ovsprune.spectrum import FITS, hill, least_ks, peak

ERRORS = 4.0
"""Standard errors (alpha - 1) / sqrt(n) of the tail that an estimate may be off by."""


def pareto(alpha: float, count: int, seed: int, xmin: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return (xmin * (1 - uniform) ** (-1 / (alpha - 1))).sort().values


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("count", [200, 1000, 4000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_alpha_is_found(name: str, alpha: float, count: int, seed: int) -> None:
    found = FITS[name](pareto(alpha, count, seed, xmin=0.03))
    assert abs(found.alpha - alpha) < ERRORS * (alpha - 1) / math.sqrt(found.n_tail)
    assert found.ks_distance < 1.63 / math.sqrt(found.n_tail)  # The 1% point of the KS test.
    assert found.xmin >= 0.03


def test_the_tail_is_found_above_a_bulk_that_is_no_power_law() -> None:
    generator = torch.Generator().manual_seed(0)
    bulk = torch.rand(1000, generator=generator, dtype=torch.float64)
    values = torch.cat([bulk, pareto(2.5, 1000, 1)]).sort().values
    found = least_ks(values)
    assert 0.8 < found.xmin < 2
    assert found.alpha == pytest.approx(2.5, abs=ERRORS * 1.5 / math.sqrt(found.n_tail))


def test_hill_by_hand() -> None:
    found = hill(torch.tensor([0.1, 0.2, 0.5, 1.0, math.e, math.e**2], dtype=torch.float64))
    assert (found.xmin, found.n_tail) == (1.0, 3)
    assert found.alpha == pytest.approx(1 + 3 / (0 + 1 + 2))
    # Fit: 1 - x^-1; empirical 0, 1/3, 2/3.
    gaps = [0, abs(1 / 3 - (1 - math.exp(-1))), abs(2 / 3 - (1 - math.exp(-2)))]
    assert found.ks_distance == pytest.approx(max(gaps))


def test_peak_searches_near_the_fullest_bin_only() -> None:
    # 60 values about 1, and a long tail; the smallest values are far below the peak.
    values = torch.cat([
        torch.logspace(-4, -1, 20), torch.linspace(0.99, 1.01, 60), torch.logspace(0.1, 3, 30)
    ]).double()  # fmt: skip
    found = peak(values.sort().values)
    assert 0.9 < found.xmin < 1.6


def test_least_ks_is_the_minimum_over_all_tails() -> None:
    values = pareto(2.2, 300, 4) + torch.linspace(0, 1, 300, dtype=torch.float64)
    best = math.inf
    for start in range(299):
        tail = values[start:]
        n = len(tail)
        alpha = 1 + n / float((tail / tail[0]).log().sum())
        fit = 1 - (tail / tail[0]) ** (1 - alpha)
        best = min(best, float((torch.arange(n) / n - fit).abs().max()))
    assert least_ks(values).ks_distance == pytest.approx(best, rel=1e-9)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    values = pareto(2.0, 700, 5)
    whole = least_ks(values)
    monkeypatch.setattr("ovsprune.spectrum.fits._CHUNK", 13)
    assert least_ks(values) == whole


def test_scale_changes_xmin_alone() -> None:
    values = pareto(3.0, 500, 6)
    for fit in FITS.values():
        one, other = fit(values), fit(values * 1024)
        assert (other.alpha, other.n_tail) == (pytest.approx(one.alpha), one.n_tail)
        assert other.xmin == pytest.approx(1024 * one.xmin)


@pytest.mark.parametrize("name", FITS)
def test_equal_values_have_no_power_law(name: str) -> None:
    found = FITS[name](torch.ones(8))
    assert math.isinf(found.alpha) and found.ks_distance == 1.0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (torch.ones(1), "at least 2 values"),
        (torch.ones(2, 2), "at least 2 values"),
        (torch.tensor([0.0, 1.0]), "above 0"),
        (torch.tensor([1.0, math.inf]), "finite"),
        (torch.tensor([2.0, 1.0]), "ascending"),
    ],
)
@pytest.mark.parametrize("name", FITS)
def test_invalid_values_are_refused(name: str, values: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FITS[name](values)
