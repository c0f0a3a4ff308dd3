"""What every criterion must give."""

from __future__ import annotations

import pytest
import torch

from ovsprune.calibration.survey import Survey
from ovsprune.core.progress import Silent
from ovsprune.core.records import Curves, Scores
from ovsprune.importance import CRITERIA
from tests.contracts.conftest import Case


def survey(case: Case, name: str, seed: int = 0, probe: int = 0) -> tuple[Scores, Curves | None]:
    return Survey(
        case.dense,
        case.backbone.stages(case.dense),
        case.groups,
        CRITERIA.get(name),
        case.pictures,
        batch_size=6,
        ridge=1e-2,
        seed=seed,
        probe=probe,
        progress=Silent(),
    ).run()


@pytest.mark.parametrize("name", CRITERIA.names())
def test_every_unit_is_ranked_once(case: Case, name: str) -> None:
    scores, curves = survey(case, name)
    assert curves is None
    for group in case.groups:
        assert sorted(scores.orders[group.name].tolist()) == list(range(group.units))
        assert scores.costs[group.name].shape == (group.units,)
        assert torch.isfinite(scores.costs[group.name]).all()


@pytest.mark.parametrize("name", CRITERIA.names())
def test_the_same_seed_gives_the_same_order(case: Case, name: str) -> None:
    first, second = survey(case, name)[0], survey(case, name)[0]
    for group in case.groups:
        assert torch.equal(first.orders[group.name], second.orders[group.name])


def test_another_seed_gives_another_random_order(case: Case) -> None:
    first, second = survey(case, "random", 0)[0], survey(case, "random", 1)[0]
    assert any(not torch.equal(first.orders[g.name], second.orders[g.name]) for g in case.groups)


@pytest.mark.parametrize("name", CRITERIA.names())
def test_curves_end_at_nothing(case: Case, name: str) -> None:
    scores, curves = survey(case, name, probe=4)
    assert curves is not None
    for group in case.groups:
        widths, errors = curves.widths[group.name], curves.errors[group.name]
        assert int(widths[-1]) == group.units
        assert float(errors[-1]) == 0.0
        assert bool((widths.diff() > 0).all())
        assert float(errors[0]) > 0.0
    plain = survey(case, name)[0]
    assert all(torch.equal(scores.orders[g.name], plain.orders[g.name]) for g in case.groups)


def test_measuring_leaves_the_tower_alone(case: Case) -> None:
    before = {k: v.clone() for k, v in case.dense.state_dict().items()}
    survey(case, "reconstruction", probe=4)
    after = case.dense.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)
