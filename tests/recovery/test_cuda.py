"""The same repairs on an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from ovsprune.backbones import load_backbone
from ovsprune.baselines.imp_weights import imp
from ovsprune.core.distillation import Distillation
from ovsprune.core.protocols import Backbone
from ovsprune.jobs.prune import prune
from ovsprune.profiling import latency
from ovsprune.recovery import RECOVERIES, recovery_chain
from tests.contracts.conftest import (
    open_clip_convnext,
    open_clip_resnet,
    open_clip_vit,
    prepared,
)
from tests.pruning.test_prune_convolutions import as_the_width

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


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "taylor"},
        {"criterion": "fisher"},
        {"criterion": "activation"},
        {"allocation": "spectral"},
        {"allocation": "isomorphic"},
        {"prune_depth": True},
        {"budget": "latency", "allocation": "uniform", "criterion": "magnitude"},
        {"method": "imp", "imp_structured": True, "imp_steps": 1, "recovery": "none"},
    ],
    ids=lambda options: "-".join(str(part) for pair in options.items() for part in pair),
)
def test_every_way_on_the_accelerator(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(latency, "_measured", as_the_width)  # so small a tower has but overhead
    small = open_clip_vit()
    small.tower.cuda()
    result = prune(small, 0.3, samples=8, output=tmp_path / "slim", **options)
    assert abs(result.achieved - 0.3) <= 0.01
    there = load_backbone(str(tmp_path / "slim"))
    images = torch.randn(2, 3, *small.preprocess.size)
    with torch.no_grad():
        found, again = result.tower(images.cuda()).cpu(), there.tower(images)
    assert (found - again).norm() < 1e-3 * again.norm()


@pytest.mark.parametrize("build", [open_clip_resnet, open_clip_convnext])
def test_convolutions_on_the_accelerator(build: Callable[[], Backbone]) -> None:
    backbone = build()
    backbone.tower.cuda()
    result = prune(backbone, 0.3, samples=8)
    assert abs(result.achieved - 0.3) <= 0.01
    assert all(p.isfinite().all() for p in result.tower.parameters())


def test_single_weights_on_the_accelerator() -> None:
    small = open_clip_vit()
    small.tower.cuda()
    found = imp(small, 0.5, imp_steps=1, samples=4, batch_size=4)
    zeros = sum(int((~mask).sum()) for mask in found.masks.values())
    assert zeros == pytest.approx(0.5 * sum(m.numel() for m in found.masks.values()), abs=1)
