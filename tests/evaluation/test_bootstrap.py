from __future__ import annotations

import pytest
import torch

from ovsprune.core.errors import DataError
from ovsprune.evaluation.bootstrap import bootstrap_miou


def test_equal_images_give_an_empty_interval() -> None:
    one = torch.tensor([[8, 2], [1, 9]])
    low, high = bootstrap_miou(one.expand(20, 2, 2), draws=50)
    assert low == pytest.approx(high) == pytest.approx((8 / 11 + 9 / 12) / 2)


def test_interval_for_one_class_of_single_pixels_is_binomial() -> None:
    hits, pictures = 60, 100
    counts = torch.zeros(pictures, 2, 2, dtype=torch.int64)
    counts[:hits, 0, 0] = 1  # right
    counts[hits:, 0, 1] = 1  # class 1 has no label: class 0's IoU is the share of hits
    low, high = bootstrap_miou(counts, draws=4000)
    half = 1.96 * (0.6 * 0.4 / pictures) ** 0.5
    assert low == pytest.approx(0.6 - half, abs=0.02)
    assert high == pytest.approx(0.6 + half, abs=0.02)


def test_class_without_pixels_in_a_draw_is_skipped() -> None:
    counts = torch.zeros(2, 2, 2, dtype=torch.int64)
    counts[0, 0, 0] = counts[1, 1, 1] = 5  # each image has another class, all correct
    assert bootstrap_miou(counts, draws=100) == (1.0, 1.0)


def test_only_scored_classes_count() -> None:
    counts = torch.tensor([[[4, 0], [5, 0]]])
    assert bootstrap_miou(counts, scored=[0])[0] == pytest.approx(4 / 9)
    assert bootstrap_miou(counts)[0] == pytest.approx(2 / 9)


def test_the_same_seed_gives_the_same_interval() -> None:
    counts = torch.randint(0, 9, (12, 3, 3), generator=torch.Generator().manual_seed(0))
    assert bootstrap_miou(counts, seed=3) == bootstrap_miou(counts, seed=3)
    assert bootstrap_miou(counts, seed=3) != bootstrap_miou(counts, seed=4)


def test_bad_arguments() -> None:
    with pytest.raises(DataError, match="one matrix per image"):
        bootstrap_miou(torch.zeros(3, 3))
    with pytest.raises(DataError, match="outside"):
        bootstrap_miou(torch.ones(1, 2, 2), level=1.0)
    with pytest.raises(DataError, match="no pixel"):
        bootstrap_miou(torch.zeros(4, 2, 2))
