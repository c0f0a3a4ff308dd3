"""Feature distillation under masks."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from ovsprune.baselines.masked_training import MaskedTraining, _endless
from ovsprune.calibration.feature_loss import feature_loss
from ovsprune.calibration.pictures import RenderedPictures
from ovsprune.core.protocols import Backbone
from tests.contracts.conftest import open_clip_vit


def features(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(3, 8, generator=generator),
        torch.randn(3, 8, 2, 5, generator=generator),
    )


def test_the_loss_is_a_mean_of_cosines() -> None:
    found, wanted = features(0), features(1)
    cosines = [F.cosine_similarity(a, b, dim=1).mean() for a, b in zip(found, wanted, strict=True)]
    torch.testing.assert_close(feature_loss(found, wanted), 2 - cosines[0] - cosines[1])


def test_the_loss_does_not_depend_on_the_norm() -> None:
    found = features(0)
    longer = (3 * found[0], 0.1 * found[1])
    assert float(feature_loss(longer, found)) == pytest.approx(0, abs=1e-6)
    opposite = (-found[0], -found[1])
    assert float(feature_loss(opposite, found)) == pytest.approx(4, abs=1e-5)


def test_the_loss_can_be_differentiated() -> None:
    found = tuple(f.requires_grad_() for f in features(0))
    feature_loss((found[0], found[1]), features(1)).backward()
    assert all(f.grad is not None and f.grad.abs().sum() > 0 for f in found)


@pytest.fixture
def small() -> Backbone:
    return open_clip_vit()


def training(small: Backbone, seed: int = 0, rate: float = 1e-3) -> MaskedTraining:
    return MaskedTraining(
        deepcopy(small.tower), small.tower, small.stages, RenderedPictures(6, small.preprocess, 0),
        batch_size=4, rate=rate, seed=seed,
    )  # fmt: skip


NAMES = ("transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.1.mlp.c_fc.weight")


def half(small: Backbone) -> dict[str, torch.Tensor]:
    parameters = dict(small.tower.named_parameters())
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(parameters[n].shape, generator=generator) > 0.5 for n in NAMES}


def test_masked_weights_stay_zero_and_the_others_train(small: Backbone) -> None:
    work, masks = training(small), half(small)
    before = {k: v.clone() for k, v in small.tower.named_parameters()}
    steps: list[int] = []
    losses = work.run(masks, 12, steps.append)
    assert len(losses) == len(steps) == 12
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    after = dict(work.student.named_parameters())
    for name, mask in masks.items():
        assert (after[name][~mask] == 0).all() and (after[name][mask] != 0).all()
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert {"conv1.weight", "ln_pre.weight", "proj"} <= set(changed)
    assert all(torch.equal(v, before[k]) for k, v in small.tower.named_parameters())


def test_without_steps_only_zeros_are_set(small: Backbone) -> None:
    work, masks = training(small), half(small)
    assert work.run(masks, 0, lambda _: None) == []
    for name, parameter in work.student.named_parameters():
        mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, dict(small.tower.named_parameters())[name] * mask)


def test_rewinding_restores_the_dense_weights(small: Backbone) -> None:
    work = training(small)
    work.run(half(small), 2, lambda _: None)
    work.rewind()
    dense = dict(small.tower.named_parameters())
    assert all(torch.equal(p, dense[n]) for n, p in work.student.named_parameters())


def test_the_result_depends_on_the_seed_only(small: Backbone) -> None:
    losses = [training(small, seed).run(half(small), 3, lambda _: None) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_every_image_occurs_once_per_pass() -> None:
    batches = _endless(10, 4, 0)
    drawn = torch.cat([next(batches) for _ in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert len(next(_endless(3, 16, 0))) == 3
