"""What every recovery must keep, and what the closed form must bring."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from ovsprune.core.progress import Silent
from ovsprune.core.protocols import RecoveryContext
from ovsprune.core.records import Plan
from ovsprune.graph.cut import cut
from ovsprune.recovery import RECOVERIES
from tests.contracts.conftest import Case


def recover(case: Case, slim: nn.Module, plan: Plan, name: str, batch_size: int = 5) -> None:
    RECOVERIES.get(name).recover(
        RecoveryContext(
            case.dense,
            slim,
            case.backbone.stages,
            case.groups,
            plan,
            case.pictures,
            batch_size,
            1e-2,
            0,
            Silent(),
        )
    )


@pytest.mark.parametrize("name", RECOVERIES.names())
def test_the_dense_tower_is_left_alone(case: Case, name: str) -> None:
    before = {k: v.clone() for k, v in case.dense.state_dict().items()}
    plan = case.random_plan(0)
    slim = deepcopy(case.dense)
    cut(slim, case.groups, plan)
    recover(case, slim, plan, name)
    after = case.dense.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("name", RECOVERIES.names())
def test_the_same_again(case: Case, name: str) -> None:
    plan = case.random_plan(0)
    towers = []
    for _ in range(2):
        slim = deepcopy(case.dense)
        cut(slim, case.groups, plan)
        recover(case, slim, plan, name)
        towers.append(slim.state_dict())
    assert all(torch.equal(towers[0][k], towers[1][k]) for k in towers[0])


@pytest.mark.parametrize("name", [n for n in RECOVERIES.names() if n != "none"])
def test_a_repaired_tower_is_closer_on_pictures_it_never_saw(case: Case, name: str) -> None:
    plan = case.random_plan(0)
    slim = deepcopy(case.dense)
    cut(slim, case.groups, plan)
    images = case.images(8)
    wanted = case.outputs(case.dense, images)
    before = (case.outputs(slim, images) - wanted).norm()
    recover(case, slim, plan, name)
    after = (case.outputs(slim, images) - wanted).norm()
    assert after < 0.8 * before


def test_batches_do_not_matter_to_the_closed_form(case: Case) -> None:
    plan = case.random_plan(2)
    outputs = []
    for batch_size in (3, 12):
        slim = deepcopy(case.dense)
        cut(slim, case.groups, plan)
        recover(case, slim, plan, "closed-form", batch_size)
        outputs.append(case.outputs(slim, case.images()))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-3, rtol=1e-3)
