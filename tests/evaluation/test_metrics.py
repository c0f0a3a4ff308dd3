from __future__ import annotations

import pytest
import torch

from ovsprune.core.errors import DataError
from ovsprune.evaluation import ConfusionMatrix


def test_scores_by_hand() -> None:
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, -1]]))
    scores = confusion.scores(["a", "b", "c"])
    assert scores.per_class == {"a": 0.5, "b": 0.5}  # c is absent from the labels
    assert scores.miou == 0.5
    assert scores.pixel_accuracy == pytest.approx(2 / 3)
    assert scores.pixels == 3


def test_predictions_of_an_absent_class_count_as_errors() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert confusion.scores(["a", "b"]).miou == 0.5


def test_updates_can_be_split() -> None:
    g = torch.Generator().manual_seed(0)
    label = torch.randint(-1, 5, (4, 9, 7), generator=g)
    guess = torch.randint(0, 5, (4, 9, 7), generator=g)
    at_once, split = ConfusionMatrix(5), ConfusionMatrix(5)
    at_once.update(guess, label)
    for p, y in zip(guess, label, strict=True):
        split.update(p, y)
    assert torch.equal(at_once.counts, split.counts)
    assert int(at_once.counts.sum()) == int((label >= 0).sum())


def test_mean_over_the_scored_classes_only() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
    assert confusion.scores(["a", "b"], scored=[1]).miou == 0.5
    assert confusion.scores(["a", "b"]).miou == pytest.approx((2 / 3 + 0.5) / 2)


def test_errors() -> None:
    confusion = ConfusionMatrix(2)
    with pytest.raises(DataError, match="upsample the prediction"):
        confusion.update(torch.zeros(2, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    with pytest.raises(DataError, match="label contains class indices from 0 to 2"):
        confusion.update(torch.tensor([0, 1]), torch.tensor([0, 2]))
    with pytest.raises(DataError, match="prediction contains"):
        confusion.update(torch.tensor([5, 1]), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="no pixel of a scored class"):
        confusion.scores(["a", "b"])
    with pytest.raises(DataError, match="1 class names for 2 classes"):
        confusion.scores(["a"])
