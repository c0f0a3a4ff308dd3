"""Recalibration of batch norms after a cut: same outputs, correct running statistics."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.calibration.pictures import RenderedPictures
from ovsprune.core.protocols import Backbone
from ovsprune.jobs.prune import PruneResult, prune
from ovsprune.pruning import pipeline
from tests.contracts.conftest import open_clip_resnet

QUICK: dict[str, Any] = {"samples": 24, "batch_size": 8, "allocation": "uniform"}


def pictures(backbone: Backbone) -> Tensor:
    """Return the calibration images."""
    network = RenderedPictures(QUICK["samples"], backbone.preprocess, source="mixed")
    return torch.cat(list(network.batches(8)))


def norms(tower: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in tower.named_modules() if isinstance(m, nn.BatchNorm2d)}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """Return a network whose running statistics are those of the calibration images."""
    network = open_clip_resnet()
    for norm in norms(network.tower).values():
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        network.tower.train()(pictures(network))
    network.tower.eval()
    return network


@pytest.fixture(scope="module")
def pruned(backbone: Backbone) -> tuple[PruneResult, PruneResult]:
    """Return a network pruned to half, with recalibration and without."""
    done = prune(backbone, 0.5, **QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "recalibrate_batchnorm", lambda *_: None)
        return done, prune(backbone, 0.5, **QUICK)


def test_outputs_do_not_change(backbone: Backbone, pruned: tuple[PruneResult, PruneResult]) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, *backbone.preprocess.size)
    with torch.no_grad():
        recalibrated, unchanged = (done.tower(images) for done in pruned)
    torch.testing.assert_close(
        recalibrated, unchanged, rtol=1e-4, atol=1e-4 * float(unchanged.std())
    )


def test_recalibration_reduces_the_error_in_training_mode(
    backbone: Backbone, pruned: tuple[PruneResult, PruneResult]
) -> None:
    images = pictures(backbone)
    with torch.no_grad():
        goal = deepcopy(backbone.tower).train()(images)
        found = [deepcopy(done.tower).train()(images) for done in pruned]
    recalibrated, unchanged = (float((out - goal).norm() / goal.norm()) for out in found)
    assert recalibrated < 0.95 * unchanged


def test_running_means_equal_those_of_the_slim_tower(
    backbone: Backbone, pruned: tuple[PruneResult, PruneResult]
) -> None:
    # The dense running statistics are exact, except for batch effects in training mode.
    read: dict[str, Tensor] = {}
    reader = deepcopy(pruned[0].tower).eval()
    for name, norm in norms(reader).items():
        norm.register_forward_pre_hook(
            lambda _, args, name=name: read.__setitem__(name, args[0].mean((0, 2, 3)))
        )
    with torch.no_grad():
        reader(pictures(backbone))
    distances = []
    for done in pruned:
        found = {name: norm.running_mean for name, norm in norms(done.tower).items()}
        distances.append(max(float((mean - read[n]).norm()) for n, mean in found.items()))  # type: ignore[operator]
    assert distances[0] < 0.05 * distances[1]


def test_a_norm_with_the_same_input_is_unchanged(
    backbone: Backbone, pruned: tuple[PruneResult, PruneResult]
) -> None:
    before, after = norms(backbone.tower)["bn1"], norms(pruned[0].tower)["bn1"]
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor)


def test_without_a_recovery_norms_are_only_cut(backbone: Backbone) -> None:
    done = prune(backbone, 0.5, **QUICK, recovery="none")
    kept = done.plan.kept["layer2.0.conv1"]
    before = norms(backbone.tower)["layer2.0.bn1"].state_dict()
    after = norms(done.tower)["layer2.0.bn1"].state_dict()
    assert torch.equal(after["running_mean"], before["running_mean"][kept])
    assert torch.equal(after["weight"], before["weight"][kept])
