"""The same repairs on an accelerator."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from ovsprune.core.protocols import Distillation
from ovsprune.jobs.prune import prune
from ovsprune.jobs.settings import recovery_chain
from ovsprune.recovery import RECOVERIES
from tests.contracts.conftest import open_clip_vit, prepared

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator"),
]


@pytest.mark.parametrize("name", [n for n in RECOVERIES.names() if not RECOVERIES.get(n).trains])
def test_repairs_agree_with_those_on_the_cpu(name: str) -> None:
    case = prepared(open_clip_vit())
    plan = case.random_plan(0)
    towers = []
    for device in ("cpu", "cuda"):
        here = deepcopy(case)
        here.dense.to(device)
        slim = here.cut(plan)
        for recovery in recovery_chain(name):
            recovery.recover(here.context(slim, plan))
        towers.append(slim.cpu())
    one, two = (case.outputs(tower, case.images()) for tower in towers)
    assert (one - two).norm() < 1e-2 * one.norm()


@pytest.mark.parametrize("recovery", RECOVERIES.names())
def test_a_prune_on_the_accelerator(recovery: str) -> None:
    small = open_clip_vit()
    small.tower.cuda()
    result = prune(
        small, 0.5, recovery=recovery, samples=8, probe=4, rounds=2, distill=Distillation(steps=4)
    )
    assert abs(result.achieved - 0.5) <= 0.01
    assert {p.device.type for p in result.tower.parameters()} == {"cuda"}
    assert all(p.isfinite().all() for p in result.tower.parameters())
