"""Distillation: reduction of the loss, validation, optimisers, limits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.calibration.pictures import RenderedPictures
from ovsprune.core.distillation import Distillation
from ovsprune.core.errors import OptionError, UnknownNameError
from ovsprune.core.progress import Silent
from ovsprune.core.protocols import Pictures
from ovsprune.core.records import Plan, Preprocess
from ovsprune.recovery import RECOVERIES
from ovsprune.recovery.distill import Student, optimizer_class
from tests.contracts.conftest import Case, open_clip_vit, prepared


@pytest.fixture(scope="module")
def case() -> Case:
    return prepared(open_clip_vit())


def distilled(case: Case, options: Distillation, **others: Any) -> tuple[nn.Module, float, float]:
    """Return a cut tower after distillation, and its validation loss before and after."""
    plan = case.random_plan(0)
    slim = case.cut(plan)
    ctx = case.context(slim, plan, distill=options, **others)
    before = Student(ctx).error()
    RECOVERIES.get("distill").recover(ctx)
    return slim, before, Student(ctx).error()


def test_training_reduces_the_validation_loss(case: Case) -> None:
    slim, before, after = distilled(case, Distillation(steps=30))
    assert after < 0.7 * before
    changed = case.cut(case.random_plan(0)).state_dict()
    assert all(not torch.equal(v, changed[k]) for k, v in slim.state_dict().items())


def test_validation_images_are_unseen_by_the_refits(case: Case) -> None:
    """Compare with calibration images, whose error is too low because they were fitted."""
    plan = case.random_plan(0)
    slim = case.cut(plan)
    ctx = case.context(slim, plan)
    for name in ("closed-form", "gauss-newton"):
        RECOVERIES.get(name).recover(ctx)
    unseen = RenderedPictures(8, case.backbone.preprocess, 9, start=1000)
    student, without = Student(replace(ctx, unseen=unseen)), Student(ctx)
    assert torch.equal(student.validation, torch.cat(list(unseen.batches(8))))
    assert len(student.train_indices) == len(case.pictures)
    assert len(without.train_indices) + len(without.validation) == len(case.pictures)
    assert without.error() < 0.9 * student.error()  # same tower


def test_only_a_prune_with_training_draws_validation_images(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ovsprune.jobs.prune import prune
    from ovsprune.pruning import pipeline as steps

    validations: list[Tensor] = []
    original = Student.__init__

    def spy(self: Student, ctx: Any) -> None:
        original(self, ctx)
        validations.append(self.validation)

    monkeypatch.setattr(Student, "__init__", spy)
    quick = {"samples": 8, "batch_size": 4, "criterion": "random", "allocation": "uniform"}
    prune(case.backbone, 0.3, recovery="distill", distill=Distillation(2), **quick)
    assert [len(images) for images in validations] == [steps.HELD_OUT]
    monkeypatch.setattr(steps, "unseen_pictures", None)
    prune(case.backbone, 0.3, recovery="closed-form", **quick)


def test_rendered_images_are_new_at_every_step_and_others_augmented(case: Case) -> None:
    plan = case.random_plan(0)
    slim = case.cut(plan)

    class Files:
        """Images without a source of further ones."""

        def __init__(self, pictures: Pictures) -> None:
            self.pictures = pictures

        def __len__(self) -> int:
            return len(self.pictures)

        def batches(self, size: int) -> Iterator[Tensor]:
            return self.pictures.batches(size)

    size = tuple(next(iter(case.pictures.batches(1))).shape[-2:])
    rendered = RenderedPictures(4, Preprocess(size), source="leaves")
    first = torch.cat(list(rendered.batches(4)))
    seen = []
    for pictures in (rendered, rendered, Files(rendered)):
        student = Student(replace(case.context(slim, plan), pictures=pictures))
        batches = student._batches()
        seen.append(torch.cat([next(batches) for _ in range(3)]))
    assert torch.equal(seen[0], seen[1])  # reproducible
    assert len({picture.sum().item() for picture in seen[0]}) == len(seen[0]) > len(rendered)
    assert not any(torch.equal(new, old) for new in seen[0] for old in first)
    means = first.mean((2, 3))
    near = torch.cdist(seen[2].mean((2, 3)), means).min(1).values
    assert near.mean() < torch.cdist(seen[0].mean((2, 3)), means).min(1).values.mean()


@pytest.mark.parametrize("name", ["AdamW", "Muon", "SGD", "RMSprop", "LBFGS", "Rprop", "Adafactor"])
def test_optimisers_of_torch_reduce_the_loss(case: Case, name: str) -> None:
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    lr = {"SGD": 0.05, "LBFGS": 0.1}.get(name, 1e-3)
    _, before, after = distilled(case, Distillation(steps=4, optimizer=name, lr=lr))
    assert after < before


def test_an_incompatible_optimiser_is_refused(case: Case) -> None:
    with pytest.raises(OptionError, match="--distill-optimizer SparseAdam cannot train this tower"):
        distilled(case, Distillation(steps=4, optimizer="SparseAdam"))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_trains_matrices_and_adamw_the_rest(case: Case) -> None:
    plan = case.random_plan(0)
    slim = case.cut(plan)
    options = Distillation(optimizer="Muon", lr=2e-4)
    student = Student(replace(case.context(slim, plan), distill=options))
    student.whitened = student._whiten()
    rest, matrices = student._optimizers()
    assert type(rest).__name__ == "AdamW" and type(matrices).__name__ == "Muon"
    found = [p for optimizer in (rest, matrices) for p in optimizer.param_groups[0]["params"]]
    assert len(found) == len(set(found)) == len(list(slim.parameters()))
    linear = {m.weight for m in slim.modules() if isinstance(m, torch.nn.Linear)}
    free = {layer.weight: layer.free for layer in student.whitened}
    assert free and set(matrices.param_groups[0]["params"]) == {free.get(p, p) for p in linear}
    assert matrices.param_groups[0]["lr"] == pytest.approx(2e-3)


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_a_tower_without_one_mlp_can_be_trained(case: Case, name: str) -> None:
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    kept = dict(case.random_plan(0).kept)
    removed = next(group.name for group in case.groups if group.kind == "mlp")
    plan = Plan({**kept, removed: kept[removed][:0]})
    slim = case.cut(plan)
    assert any(p.numel() == 0 for p in slim.parameters())
    ctx = case.context(slim, plan, distill=Distillation(steps=4, optimizer=name, lr=1e-3))
    before = Student(ctx).error()
    RECOVERIES.get("distill").recover(ctx)
    assert Student(ctx).error() < before


@pytest.mark.parametrize("name", ["adamw", "Optimizer", "lr_scheduler"])
def test_unknown_optimisers_are_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown optimizer '{name}'.*Known: .*AdamW"):
        optimizer_class(name)


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_the_validation_loss_never_increases(case: Case, lr: float) -> None:
    progress = Silent()
    options = Distillation(steps=8, optimizer="SGD", lr=lr)
    slim, before, after = distilled(case, options, progress=progress)
    assert after <= before
    assert all(tensor.isfinite().all() for tensor in slim.state_dict().values())
    if lr == 1e30:
        assert any("distillation diverged at step" in note for note in progress.notes)


def test_a_time_limit_ends_the_training(case: Case) -> None:
    start = time.monotonic()
    _, before, after = distilled(case, Distillation(seconds=1.5))
    assert 1.5 <= time.monotonic() - start < 30
    assert after < before


def test_the_first_limit_that_is_reached_ends_the_training(case: Case) -> None:
    start = time.monotonic()
    distilled(case, Distillation(steps=2, seconds=300.0))
    assert time.monotonic() - start < 100


def test_limits_are_divided_among_rounds() -> None:
    assert Distillation().limit == 1000
    assert Distillation(seconds=9.0).limit is None
    assert Distillation(steps=10, seconds=9.0).shared(3) == Distillation(4, 3.0)
    assert Distillation().shared(1).limit == 1000


def test_a_single_image_can_be_trained_on(case: Case) -> None:
    one = prepared(open_clip_vit(), pictures=1)
    _, before, after = distilled(one, Distillation(steps=4))
    assert after <= before


def test_the_progress_bar_reaches_its_end(case: Case) -> None:
    class Counting(Silent):
        done: dict[str, list[int]]

        def stage(self, description: str, total: int) -> Any:
            from contextlib import contextmanager

            counts = self.__dict__.setdefault("done", {}).setdefault(description, [total, 0])

            @contextmanager
            def opened() -> Any:
                def advance(steps: int) -> None:
                    counts[1] += steps

                yield advance

            return opened()

    for options in (Distillation(steps=7), Distillation(seconds=0.5)):
        progress = Counting()
        distilled(case, options, progress=progress)
        total, done = progress.done["distillation"]
        assert done == total
