"""Contract of policies."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ovsprune.core.protocols import Layer, ScheduleContext
from ovsprune.schedules import POLICIES

LAYERS = tuple(Layer(f"blocks.{i}.weight", 10 + i, tower=i < 7) for i in range(9))
ALPHAS = {layer.name: 2 + (5 * i % 9) / 3 for i, layer in enumerate(LAYERS)}


def context(name: str, **changed: object) -> ScheduleContext:
    given = ScheduleContext(
        layers=LAYERS,
        fraction=0.5,
        count=None,
        step=0,
        total_steps=100,
        generator=torch.Generator().manual_seed(4),
        alphas=ALPHAS if POLICIES.get(name).needs_spectra else None,
    )
    return dataclasses.replace(given, **changed)


@pytest.mark.parametrize("name", list(POLICIES))
def test_moments_begin_at_0_and_rise_below_the_end(name: str) -> None:
    for total, every in ((1, 1), (100, 7), (5, 50)):
        moments = list(POLICIES.get(name).decision_steps(total, every))
        assert moments[0] == 0 and moments == sorted(set(moments)) and moments[-1] < total


@pytest.mark.parametrize("name", list(POLICIES))
def test_names_are_of_the_pool_and_the_same_again(name: str) -> None:
    policy = POLICIES.get(name)
    chosen = set(policy.choose(context(name)))
    assert chosen <= {layer.name for layer in LAYERS}
    assert chosen == set(policy.choose(context(name)))
    assert POLICIES.summary(name)


@pytest.mark.parametrize("name", list(POLICIES))
def test_policies_that_go_by_a_share_train_it(name: str) -> None:
    policy = POLICIES.get(name)
    if name in ("all", "none", "adapters-only"):
        sizes = {"all": 9, "none": 0, "adapters-only": 2}
        assert len(policy.choose(context(name))) == sizes[name]
        return
    for fraction, many in ((0.0, 0), (0.3, 3), (0.5, 5), (1.0, 9)):
        assert len(policy.choose(context(name, fraction=fraction))) == many
    assert len(policy.choose(context(name, count=4))) == 4
    assert len(policy.choose(context(name, count=40))) == 9


@pytest.mark.parametrize("name", [n for n in POLICIES if POLICIES.get(n).needs_spectra])
def test_alphas_decide(name: str) -> None:
    ranked = sorted(ALPHAS, key=ALPHAS.__getitem__)
    expected = ranked[:4] if name == "inverse" else ranked[-4:]
    assert set(POLICIES.get(name).choose(context(name, count=4))) == set(expected)


def test_half_of_an_odd_number_is_at_or_above_the_median() -> None:
    median = sorted(ALPHAS.values())[4]
    chosen = POLICIES.get("alpha").choose(context("alpha"))
    assert set(chosen) == {name for name, alpha in ALPHAS.items() if alpha >= median}
