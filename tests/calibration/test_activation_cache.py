"""Streams: on disk above a limit, walked a batch at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ovsprune.calibration import activation_cache as streams
from ovsprune.calibration.activation_cache import Stream, allocate, spread_over, walk
from ovsprune.calibration.refit import held_out
from ovsprune.recovery import RECOVERIES, gauss_newton, pair
from tests.contracts.conftest import open_clip_vit, prepared


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the streams that were mapped to a file; made pictures are, too, and are bytes."""
    shapes = []

    def spy(*args: Any, **options: Any) -> Any:
        if options["dtype"] == np.float32:
            shapes.append(options["shape"])
        return real(*args, **options)

    real = np.memmap
    monkeypatch.setattr(streams.np, "memmap", spy)
    return shapes


def test_large_streams_lie_on_disk(mapped: list[tuple[int, ...]]) -> None:
    allocate((4, 8), limit=128)
    assert mapped == []
    large = allocate((4, 9), limit=128)
    assert mapped == [(4, 9)]
    large.copy_(torch.arange(36.0).view(4, 9))
    assert large[3, 8] == 35


def test_both_streams_of_the_closed_form_lie_on_disk(
    mapped: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy in memory of what was too large for it: of the streams, or of a consumer's goals."""
    for module in (streams, pair):
        monkeypatch.setattr(module, "allocate", lambda shape: allocate(shape, limit=0))
    case = prepared(open_clip_vit())
    plan = case.random_plan(0)
    RECOVERIES.get("closed-form").recover(case.context(case.cut(plan), plan))
    consumers = {group.consumer for group in case.groups}
    assert mapped == [mapped[0]] * (2 + len(consumers))


def test_what_is_held_out_is_read_from_disk_and_kept_there(
    mapped: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (streams, pair, gauss_newton):
        monkeypatch.setattr(module, "allocate", lambda shape: allocate(shape, limit=0))
    case = prepared(open_clip_vit())
    plan = case.random_plan(0)
    context = case.context(case.cut(plan), plan)
    RECOVERIES.get("gauss-newton").recover(context)
    held = int(held_out(len(context.pictures)).sum())
    # For every trial of a refit: the goals and the stream of the pictures that are held out.
    assert [shape[0] for shape in mapped].count(held) >= 2 * len(case.groups)


def test_some_pictures_of_a_stream() -> None:
    stream = Stream(torch.randn(6, 2, 3))
    some = stream.only(torch.tensor([1, 4]))
    assert torch.equal(some[:], stream[:][[1, 4]])
    some[slice(0, 1)] = torch.zeros(1, 2, 3)
    assert stream[1].any()


def test_a_walk_sees_every_batch_once_and_advances_only_if_told() -> None:
    block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    before = torch.randn(5, 2, 3)
    stream = Stream(before.clone())
    with torch.no_grad():
        inner, after = block[0](before), block(before)
    for advance in (False, True):
        parts = []
        for part, seen in walk(block, stream, 2, [("top.0", "output")], "top", advance):
            parts.append(part)
            torch.testing.assert_close(seen["top.0", "output"], inner[part])
        assert parts == [slice(0, 2), slice(2, 4), slice(4, 6)]
        torch.testing.assert_close(stream[:], after if advance else before)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_a_block_may_change_the_shape_of_the_stream(size: int) -> None:
    block = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2))
    before = torch.randn(5, 2, 9, 7)
    stream, other = Stream(before.clone()), Stream(before.clone())
    for part, _ in walk(block, stream, size, advance=True):
        # What is not read yet is as it was, also in the middle of the walk.
        if part.stop < 5:
            assert torch.equal(stream[part.stop :], before[part.stop :])
    with torch.no_grad():
        torch.testing.assert_close(stream[:], block(before))
    copied = stream.copy()
    other.copy_(stream)
    stream[0:5] = torch.zeros(5, 3, 4, 3)
    assert torch.equal(other[:], copied[:]) and bool(copied[:].any())


def test_samples_are_spread_over_the_pictures() -> None:
    assert spread_over(100, 5).tolist() == [0, 25, 50, 74, 99]
    assert spread_over(3, 32).tolist() == [0, 1, 2]
