"""Activation cache: storage on disk above a limit, batches, changes of shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ovsprune.calibration import activation_cache
from ovsprune.calibration.activation_cache import (
    ActivationCache,
    allocate,
    evenly_spaced,
    run_block,
)
from ovsprune.calibration.refit import held_out_mask
from ovsprune.recovery import RECOVERIES, gauss_newton
from tests.contracts.conftest import open_clip_vit, prepared


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the shapes of float32 memory maps; rendered images are mapped as bytes."""
    shapes = []

    def spy(*args: Any, **options: Any) -> Any:
        if options["dtype"] == np.float32:
            shapes.append(options["shape"])
        return real(*args, **options)

    real = np.memmap
    monkeypatch.setattr(activation_cache.np, "memmap", spy)
    return shapes


def test_large_tensors_are_stored_on_disk(mapped: list[tuple[int, ...]]) -> None:
    allocate((4, 8), limit=128)
    assert mapped == []
    large = allocate((4, 9), limit=128)
    assert mapped == [(4, 9)]
    large.copy_(torch.arange(36.0).view(4, 9))
    assert large[3, 8] == 35


def test_caches_of_the_closed_form_are_stored_on_disk(
    mapped: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the caches nor the references of a consumer are copied to memory."""
    monkeypatch.setattr(activation_cache, "allocate", lambda shape: allocate(shape, limit=0))
    case = prepared(open_clip_vit())
    plan = case.random_plan(0)
    RECOVERIES.get("closed-form").recover(case.context(case.cut(plan), plan))
    consumers = {group.consumer for group in case.groups}
    assert mapped == [mapped[0]] * (2 + len(consumers))


def test_held_out_activations_are_stored_on_disk(
    mapped: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (activation_cache, gauss_newton):
        monkeypatch.setattr(module, "allocate", lambda shape: allocate(shape, limit=0))
    case = prepared(open_clip_vit())
    plan = case.random_plan(0)
    context = case.context(case.cut(plan), plan)
    RECOVERIES.get("gauss-newton").recover(context)
    held = int(held_out_mask(len(context.pictures)).sum())
    # For every trial of a refit: references and cached inputs of the held-out images.
    assert [shape[0] for shape in mapped].count(held) >= 2 * len(case.groups)


def test_selected_images_have_separate_storage() -> None:
    cache = ActivationCache(torch.randn(6, 2, 3))
    selected = cache.select(torch.tensor([1, 4]))
    assert torch.equal(selected[:], cache[:][[1, 4]])
    selected[slice(0, 1)] = torch.zeros(1, 2, 3)
    assert cache[1].any()


def test_a_block_runs_once_per_batch_and_advances_only_on_request() -> None:
    block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    before = torch.randn(5, 2, 3)
    cache = ActivationCache(before.clone())
    with torch.no_grad():
        inner, after = block[0](before), block(before)
    for advance in (False, True):
        parts = []
        for part, captured in run_block(block, cache, 2, [("top.0", "output")], "top", advance):
            parts.append(part)
            torch.testing.assert_close(captured["top.0", "output"], inner[part])
        assert parts == [slice(0, 2), slice(2, 4), slice(4, 6)]
        torch.testing.assert_close(cache[:], after if advance else before)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_a_block_may_change_the_shape_of_the_cache(size: int) -> None:
    block = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2))
    before = torch.randn(5, 2, 9, 7)
    cache, other = ActivationCache(before.clone()), ActivationCache(before.clone())
    for part, _ in run_block(block, cache, size, advance=True):
        # Batches that were not read yet are unchanged.
        if part.stop < 5:
            assert torch.equal(cache[part.stop :], before[part.stop :])
    with torch.no_grad():
        torch.testing.assert_close(cache[:], block(before))
    copied = cache.copy()
    other.copy_(cache)
    cache[0:5] = torch.zeros(5, 3, 4, 3)
    assert torch.equal(other[:], copied[:]) and bool(copied[:].any())


def test_samples_are_evenly_spaced() -> None:
    assert evenly_spaced(100, 5).tolist() == [0, 25, 50, 74, 99]
    assert evenly_spaced(3, 32).tolist() == [0, 1, 2]
