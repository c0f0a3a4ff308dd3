"""Pictures with the spectra of photographs."""

import numpy as np
import pytest
import torch

from ovsprune.calibration.leaves import render_leaves
from ovsprune.calibration.pictures import open_pictures
from ovsprune.core.errors import DataError
from ovsprune.core.records import Preprocess


def test_the_same_numbers_give_the_same_picture() -> None:
    picture = render_leaves(3, seed=1, size=64)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, render_leaves(3, seed=1, size=64))
    for other in (render_leaves(4, seed=1, size=64), render_leaves(3, seed=2, size=64)):
        assert (picture != other).mean() > 0.5


def test_amplitudes_fall_about_as_one_over_the_frequency() -> None:
    size = 128
    power = np.zeros((size, size // 2 + 1))
    for index in range(24):
        grey = render_leaves(index, seed=0, size=size).mean(2)
        power += np.abs(np.fft.rfft2(grey - grey.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    band = (frequency > 2 / size) & (frequency < 0.25)
    slope, _ = np.polyfit(np.log(frequency[band]), 0.5 * np.log(power[band]), 1)
    assert -1.6 < slope < -0.9


@pytest.mark.parametrize(("index", "seed", "size"), [(-1, 0, 64), (0, -1, 64), (0, 0, 15)])
def test_numbers_out_of_range_are_refused(index: int, seed: int, size: int) -> None:
    with pytest.raises(DataError, match="give numbers of 0 or more, and at least 16 pixels"):
        render_leaves(index, seed=seed, size=size)


@pytest.mark.parametrize("size", [(16, 16), (32, 48)])
def test_they_calibrate_and_others_are_held_out(size: tuple[int, int]) -> None:
    pictures, held_out = open_pictures("leaves", Preprocess(size), 3, 2, seed=0)
    (seen,), (others,) = pictures.batches(4), held_out.batches(4)
    assert seen.shape == (3, 3, *size)
    assert others.shape == (2, 3, *size)
    assert not torch.equal(seen[:2], others)
    scenes, _ = open_pictures("procedural", Preprocess(size), 3, 2, seed=0)
    assert not torch.equal(seen, next(scenes.batches(4)))
    mixed, _ = open_pictures("mixed", Preprocess(size), 4, 2, seed=0)
    (both,), (drawn,) = mixed.batches(4), scenes.batches(4)
    assert torch.equal(both[0::2], drawn[:2]) and torch.equal(both[1::2], seen[:2])
