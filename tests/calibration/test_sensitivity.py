"""At how many widths a group's curve is measured."""

from __future__ import annotations

import pytest
from torch import nn

from ovsprune.calibration.pictures import RenderedPictures
from ovsprune.calibration.sensitivity import grid, points_for
from ovsprune.calibration.survey import Survey
from ovsprune.core.progress import Silent
from ovsprune.core.records import Preprocess
from ovsprune.graph.groups import find_groups
from ovsprune.importance import find_criterion
from tests.contracts.conftest import NormedTower, Sublayer


@pytest.mark.parametrize(
    ("blocks", "points"), [(1, 8), (12, 8), (16, 8), (24, 5), (32, 4), (100, 4)]
)
def test_deep_towers_are_measured_at_fewer_widths(blocks: int, points: int) -> None:
    assert points_for(blocks) == points
    widths = grid(1000, 1, points)
    assert len(widths) == points + 1
    assert list(widths) == sorted(set(widths)) and (widths[0], widths[-1]) == (1, 1000)


@pytest.mark.parametrize(("blocks", "points"), [(2, 8), (26, 4)])
def test_a_survey_measures_as_many_widths_as_the_depth_allows(blocks: int, points: int) -> None:
    tower = NormedTower()
    tower.blocks = nn.ModuleList(Sublayer(24, 40) for _ in range(blocks))
    groups = find_groups(tower.eval(), tower.prunable_layers(), (32, 32))[:2]
    survey = Survey(
        tower,
        tower.stages(),
        groups,
        find_criterion("reconstruction"),
        RenderedPictures(2, Preprocess((32, 32))),
        batch_size=2,
        ridge=1e-2,
        seed=0,
        probe=1,
        progress=Silent(),
    )
    _, curves = survey.run()
    assert curves is not None
    assert {len(curves.widths[group.name]) for group in groups} == {points + 1}
