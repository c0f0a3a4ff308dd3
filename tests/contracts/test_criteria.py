"""Contract of criteria: an order of the units, costs, and error curves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from ovsprune.calibration.survey import Survey
from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Silent
from ovsprune.core.protocols import NEEDS
from ovsprune.core.records import Curves, Group, Scores
from ovsprune.importance import CRITERIA, find_criterion
from tests.contracts.conftest import FAMILY_CASES, OF_NO_FAMILY, Case, case_of, pairs

EVERYWHERE = ("reconstruction", "taylor")
"""Criteria for the towers of every family by default: one from activations, one from gradients."""


@pytest.fixture(params=CRITERIA.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclass(frozen=True)
class Ranked:
    """Groups and a criterion that can rank them; surveys with the same settings are shared."""

    case: Case
    name: str

    @property
    def groups(self) -> list[Group]:
        return self.case.groups

    def survey(self, **settings: int) -> tuple[Scores, Curves | None]:
        key = ("survey", self.name, *sorted(settings.items()))
        result: tuple[Scores, Curves | None] = self.case.once(
            key, lambda: survey(self.case, self.name, **settings)
        )
        return result


@pytest.fixture(params=pairs((*FAMILY_CASES, *OF_NO_FAMILY), CRITERIA.names(), EVERYWHERE))
def ranked(request: pytest.FixtureRequest) -> Ranked:
    case, name = case_of(request.param[0]), request.param[1]
    if refused(case, name):
        pytest.skip(f"{name} refuses these groups, which have no norms")
    return Ranked(case, name)


def refused(case: Case, name: str) -> bool:
    return "norms" in CRITERIA.get(name).needs and any(not g.norms for g in case.groups)


def survey(
    case: Case, name: str, seed: int = 0, probe: int = 0, batch_size: int = 5
) -> tuple[Scores, Curves | None]:
    return Survey(
        case.dense,
        case.backbone.stages(case.dense),
        case.groups,
        CRITERIA.get(name),
        case.pictures,
        batch_size=batch_size,
        ridge=1e-2,
        seed=seed,
        probe=probe,
        progress=Silent(),
    ).run()


def test_the_tower_with_norms_has_them(normed: Case) -> None:
    assert [len(g.norms) for g in normed.groups] == [1, 1]


def test_needs_are_known(name: str) -> None:
    assert CRITERIA.get(name).needs <= NEEDS
    assert find_criterion(CRITERIA.get(name)) is CRITERIA.get(name)
    assert CRITERIA.summary(name).endswith(".")


@pytest.mark.parametrize("name", [n for n in CRITERIA if "norms" in CRITERIA.get(n).needs])
def test_groups_without_norms_are_refused_before_any_work(normed: Case, name: str) -> None:
    bare = replace(normed.groups[1], norms=())
    case = replace(normed, groups=[normed.groups[0], bare], pictures=None)
    message = rf"{bare.name} \(1 of 2 groups\) has no norm .*--criterion reconstruction.*--protect"
    with pytest.raises(OptionError, match=message):
        survey(case, name, probe=4)


def test_every_criterion_ranks_some_groups(normed: Case, name: str) -> None:
    assert not refused(normed, name)


def test_every_unit_is_ranked_once(ranked: Ranked) -> None:
    scores, curves = ranked.survey()
    assert curves is None
    for group in ranked.groups:
        assert sorted(scores.orders[group.name].tolist()) == list(range(group.units))
        costs = scores.costs[group.name]
        assert costs.shape == (group.units,) and costs.dtype == torch.float64
        assert bool((costs >= 0).all()) and torch.isfinite(costs).all()
        assert len(costs.unique()) > 1


def test_the_same_seed_gives_the_same_order(ranked: Ranked) -> None:
    first, second = ranked.survey()[0], survey(ranked.case, ranked.name)[0]
    for group in ranked.groups:
        assert torch.equal(first.costs[group.name], second.costs[group.name])
        assert torch.equal(first.orders[group.name], second.orders[group.name])


@pytest.mark.parametrize("batch_size", [1, 24])
def test_batches_do_not_matter(ranked: Ranked, batch_size: int) -> None:
    """Twelve images in batches of 5, 5 and 2 give what single images and one batch give."""
    first = ranked.survey()[0]
    second = survey(ranked.case, ranked.name, batch_size=batch_size)[0]
    for group in ranked.groups:
        one, two = second.costs[group.name], first.costs[group.name]
        torch.testing.assert_close(one, two, rtol=1e-2, atol=float(one.max()) * 1e-3)


def test_another_seed_gives_another_random_order(case: Case) -> None:
    first, second = survey(case, "random", 0)[0], survey(case, "random", 1)[0]
    assert any(not torch.equal(first.orders[g.name], second.orders[g.name]) for g in case.groups)


def test_curves_end_at_nothing(ranked: Ranked) -> None:
    scores, curves = ranked.survey(probe=4)
    assert curves is not None
    for group in ranked.groups:
        widths, errors = curves.widths[group.name], curves.errors[group.name]
        assert int(widths[-1]) == group.units
        assert float(errors[-1]) == 0.0
        assert bool((widths.diff() > 0).all())
        assert float(errors[0]) > 0.0
    plain = ranked.survey()[0]
    assert all(torch.equal(scores.orders[g.name], plain.orders[g.name]) for g in ranked.groups)


def test_measuring_leaves_the_tower_alone(ranked: Ranked) -> None:
    """Compared with a copy from before every survey, those of earlier tests included."""
    tower, before = ranked.case.dense, ranked.case.original
    ranked.survey(probe=4)
    after = tower.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in tower.modules())
    assert all(p.grad is None for p in tower.parameters())
