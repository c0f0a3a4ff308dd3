"""Running statistics of batch norms after a cut: outputs stay, and batches agree with them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.calibration.pictures import RenderedPictures
from ovsprune.core.protocols import Backbone
from ovsprune.jobs.prune import PruneResult, prune
from ovsprune.pruning import pipeline as steps
from tests.contracts.conftest import open_clip_resnet

QUICK: dict[str, Any] = {"samples": 24, "batch_size": 8, "allocation": "uniform"}


def pictures(backbone: Backbone) -> Tensor:
    """The calibration pictures."""
    made = RenderedPictures(QUICK["samples"], backbone.preprocess, source="mixed")
    return torch.cat(list(made.batches(8)))


def norms(tower: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in tower.named_modules() if isinstance(m, nn.BatchNorm2d)}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """A network whose statistics are those of its pictures, as a training leaves them."""
    made = open_clip_resnet()
    for norm in norms(made.tower).values():
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        made.tower.train()(pictures(made))
    made.tower.eval()
    return made


@pytest.fixture(scope="module")
def both(backbone: Backbone) -> tuple[PruneResult, PruneResult]:
    """Pruned to half, and the same with the statistics left as they were."""
    done = prune(backbone, 0.5, **QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "recalibrate_batchnorm", lambda *_: None)
        return done, prune(backbone, 0.5, **QUICK)


def test_outputs_stay(backbone: Backbone, both: tuple[PruneResult, PruneResult]) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, *backbone.preprocess.size)
    with torch.no_grad():
        stated, left = (done.tower(images) for done in both)
    torch.testing.assert_close(stated, left, rtol=1e-4, atol=1e-4 * float(left.std()))


def test_a_training_framework_sees_the_repaired_tower(
    backbone: Backbone, both: tuple[PruneResult, PruneResult]
) -> None:
    images = pictures(backbone)
    with torch.no_grad():
        goal = deepcopy(backbone.tower).train()(images)
        found = [deepcopy(done.tower).train()(images) for done in both]
    stated, left = (float((out - goal).norm() / goal.norm()) for out in found)
    assert stated < 0.95 * left


def test_statistics_are_those_of_the_slim_tower(
    backbone: Backbone, both: tuple[PruneResult, PruneResult]
) -> None:
    # Up to what a training's own batches differ from evaluation, the dense statistics were exact.
    read: dict[str, Tensor] = {}
    reader = deepcopy(both[0].tower).eval()
    for name, norm in norms(reader).items():
        norm.register_forward_pre_hook(
            lambda _, args, name=name: read.__setitem__(name, args[0].mean((0, 2, 3)))
        )
    with torch.no_grad():
        reader(pictures(backbone))
    distances = []
    for done in both:
        found = {name: norm.running_mean for name, norm in norms(done.tower).items()}
        distances.append(max(float((mean - read[n]).norm()) for n, mean in found.items()))  # type: ignore[operator]
    assert distances[0] < 0.05 * distances[1]


def test_a_norm_that_reads_what_it_read_is_left(
    backbone: Backbone, both: tuple[PruneResult, PruneResult]
) -> None:
    before, after = norms(backbone.tower)["bn1"], norms(both[0].tower)["bn1"]
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor)


def test_without_a_repair_norms_are_cut_and_no_more(backbone: Backbone) -> None:
    done = prune(backbone, 0.5, **QUICK, recovery="none")
    kept = done.plan.kept["layer2.0.conv1"]
    before = norms(backbone.tower)["layer2.0.bn1"].state_dict()
    after = norms(done.tower)["layer2.0.bn1"].state_dict()
    assert torch.equal(after["running_mean"], before["running_mean"][kept])
    assert torch.equal(after["weight"], before["weight"][kept])
