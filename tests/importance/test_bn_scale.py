"""Norm scales computed by hand; refusals are in the contract tests."""

from __future__ import annotations

import pytest
import torch

from ovsprune.importance import CRITERIA
from tests.importance.by_hand import context, normal


def test_cost_is_the_absolute_scale() -> None:
    scale = torch.tensor([0.5, -2.0, 0.0, 1.0])
    ranking = CRITERIA.get("bn-scale").score(context(normal(4, 3), normal(2, 4), scale=scale))
    assert ranking.costs.tolist() == pytest.approx([0.5, 2.0, 0.0, 1.0])
    assert ranking.order.tolist() == [2, 0, 3, 1]


def test_channels_of_a_unit_are_summed() -> None:
    scale = torch.tensor([0.5, -2.0, 0.25, 1.0])
    ctx = context(normal(4, 3), normal(2, 4), width=2, scale=scale)
    assert CRITERIA.get("bn-scale").score(ctx).costs.tolist() == pytest.approx([2.5, 1.25])
