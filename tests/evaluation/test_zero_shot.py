from __future__ import annotations

import numpy as np
import pytest
import torch

from ovsprune.core.errors import DataError
from ovsprune.core.records import Preprocess
from ovsprune.evaluation import DenseZeroShot, ScenesData, evaluate, prepare_image

PLAIN = Preprocess((32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear")
RGB = torch.eye(3)


def pooled_colours(images: torch.Tensor) -> torch.Tensor:
    """Return the mean colour of each 8 x 8 patch, as a dense tower that classifies pure colours."""
    return torch.nn.functional.avg_pool2d(images, 8)


def quadrants(height: int, width: int) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, :, 0] = 255
    image[height // 2 :, : width // 2, 1] = 255
    image[height // 2 :, width // 2 :, 2] = 255
    return image


@pytest.mark.parametrize("shape", [(32, 32), (50, 90)])
def test_segmentation_has_the_size_of_the_image(shape: tuple[int, int]) -> None:
    image = quadrants(*shape)
    found = DenseZeroShot(pooled_colours, RGB, PLAIN).segment(image)
    assert found.shape == shape
    assert (found == image.argmax(-1)).mean() > 0.9


def test_logits_are_cosines() -> None:
    head = DenseZeroShot(pooled_colours, 5 * RGB, PLAIN)
    logits = head.logits(torch.full((2, 3, 32, 32), 7.0))
    assert logits.shape == (2, 3, 4, 4)
    torch.testing.assert_close(logits, torch.full_like(logits, 3**-0.5))


def test_centring_removes_the_mean() -> None:
    common = torch.tensor([9.0, 0.0, 0.0, 0.0])
    own = torch.cat([torch.zeros(3, 1), torch.eye(3)], 1)
    text = DenseZeroShot(pooled_colours, common + own, PLAIN, centred=True).text()
    assert text[:, 0].abs().max() < 1e-5
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
    plain = DenseZeroShot(pooled_colours, common + own, PLAIN).text()
    assert plain[:, 0].min() > 0.9


def test_prepare_resizes_and_normalises() -> None:
    image = np.full((10, 20, 3), 255, np.uint8)
    found = prepare_image(image, Preprocess((4, 6), (0.5, 0.5, 0.0), (0.5, 0.25, 1.0), "bicubic"))
    assert found.shape == (3, 4, 6)
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([1.0, 2.0, 1.0]))


class Quadrants:
    class_names = prompts = ("red", "green", "blue")
    scored = None

    def __len__(self) -> int:
        return 5

    def __iter__(self):  # type: ignore[no-untyped-def]
        from ovsprune.evaluation import Sample

        for i in range(5):
            image = quadrants(32 + 16 * i, 64)
            label = image.argmax(-1).astype(np.int64)
            label[0] = -1
            yield Sample(image, label, str(i))


def test_evaluation_scores_and_reports_progress() -> None:
    seen: list[tuple[int, int]] = []
    head = DenseZeroShot(pooled_colours, RGB, PLAIN)
    found = evaluate(head, Quadrants(), batch_size=2, progress=lambda *a: seen.append(a))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert found.images == 5
    assert 0.85 < found.scores.miou <= 1.0
    wrong = DenseZeroShot(pooled_colours, RGB.roll(1, 0), PLAIN)
    assert evaluate(wrong, Quadrants()).scores.miou < 0.1


def test_batch_size_does_not_change_the_scores() -> None:
    head = DenseZeroShot(pooled_colours, RGB, PLAIN)
    first, second = (evaluate(head, Quadrants(), batch_size=n).scores for n in (1, 4))
    assert first == second


def test_errors() -> None:
    head = DenseZeroShot(pooled_colours, RGB, PLAIN)
    with pytest.raises(DataError, match="3 text embeddings for 34 classes"):
        evaluate(head, ScenesData(1))
    with pytest.raises(DataError, match="do not fit text embeddings"):
        DenseZeroShot(pooled_colours, torch.eye(4), PLAIN).segment(quadrants(32, 32))
    with pytest.raises(DataError, match="expected uint8"):
        head.segment(np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match="unknown interpolation 'box'"):
        prepare_image(quadrants(8, 8), Preprocess((4, 4), interpolation="box"))
