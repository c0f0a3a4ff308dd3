"""Scales of norms by hand; refusals are in the contract tests."""

from __future__ import annotations

import pytest
import torch

from ovsprune.importance import CRITERIA
from tests.importance.by_hand import context, normal


def test_a_scale_of_zero_goes_first_and_signs_do_not_matter() -> None:
    scale = torch.tensor([0.5, -2.0, 0.0, 1.0])
    ranking = CRITERIA.get("bn-scale").score(context(normal(4, 3), normal(2, 4), scale=scale))
    assert ranking.costs.tolist() == pytest.approx([0.5, 2.0, 0.0, 1.0])
    assert ranking.order.tolist() == [2, 0, 3, 1]


def test_a_unit_of_several_channels_has_the_sum() -> None:
    scale = torch.tensor([0.5, -2.0, 0.25, 1.0])
    item = context(normal(4, 3), normal(2, 4), width=2, scale=scale)
    assert CRITERIA.get("bn-scale").score(item).costs.tolist() == pytest.approx([2.5, 1.25])
