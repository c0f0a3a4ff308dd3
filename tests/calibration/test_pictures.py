"""Calibration pictures: folders with all sorts of files, and procedural scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ovsprune.calibration import pictures as pictures_module
from ovsprune.calibration.leaves import render_leaves
from ovsprune.calibration.pictures import (
    RenderedPictures,
    calibration_hash,
    open_pictures,
    unseen_pictures,
)
from ovsprune.calibration.preprocess import to_tensor
from ovsprune.core.errors import DataError, OptionError
from ovsprune.core.progress import Silent
from ovsprune.core.records import Preprocess

PREPROCESS = Preprocess((32, 32))


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_folder_is_read_with_its_sub_folders_and_split(tmp_path: Path) -> None:
    for i in range(8):
        picture(tmp_path / ("a" if i % 2 else "b") / f"{i}.png", i)
    first, held = open_pictures(str(tmp_path), PREPROCESS, 4, 2, seed=0)
    assert (len(first), len(held)) == (4, 2)
    assert not set(first.files) & set(held.files)  # type: ignore[attr-defined]
    batches = list(first.batches(3))
    assert [tuple(b.shape) for b in batches] == [(3, 3, 32, 32), (1, 3, 32, 32)]
    again = list(first.batches(3))
    assert all(torch.equal(x, y) for x, y in zip(batches, again, strict=True))


def test_broken_files_are_skipped_and_listed(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "broken.jpg").write_bytes(b"no picture at all")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    progress = Silent()
    first, held = open_pictures(str(tmp_path), PREPROCESS, 10, 1, 0, progress)
    assert len(first) + len(held) == 3
    skipped = [note for note in progress.notes if note.startswith("skipped")]
    assert len(skipped) == 2
    assert any("broken.jpg" in note for note in skipped)
    assert any("half.png" in note for note in skipped)
    assert any("2 calibration images instead of 10" in note for note in progress.notes)


@pytest.mark.parametrize(
    ("there", "asked", "got", "held"),
    [(60, 16, 16, 32), (40, 16, 16, 24), (20, 16, 16, 4), (16, 16, 13, 3), (3, 16, 2, 1)],
)
def test_as_many_as_asked_for_and_the_rest_held_out(
    tmp_path: Path, there: int, asked: int, got: int, held: int
) -> None:
    for i in range(there):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    first, others = open_pictures(str(tmp_path), PREPROCESS, asked, 32, seed=0)
    assert (len(first), len(others)) == (got, held)


@pytest.mark.parametrize(("there", "unseen"), [(80, 20), (68, 20), (56, 8), (55, 0), (20, 0)])
def test_unseen_pictures_are_none_of_the_others(tmp_path: Path, there: int, unseen: int) -> None:
    for i in range(there):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    asked = (str(tmp_path), PREPROCESS, 16, 32, 0)
    first, held = open_pictures(*asked)
    found = unseen_pictures(*asked, 20)
    assert (0 if found is None else len(found)) == unseen
    files = [*first.files, *held.files, *(found.files if found else ())]  # type: ignore[attr-defined]
    assert len(set(files)) == len(files)


def test_unseen_made_pictures_are_others_too() -> None:
    asked = ("leaves", PREPROCESS, 4, 4, 0)
    made = [*open_pictures(*asked), unseen_pictures(*asked, 4)]
    seen = torch.cat([torch.cat(list(some.batches(4))) for some in made if some is not None])
    assert len(seen) == 12 and len({float(picture.sum()) for picture in seen}) == 12


def test_a_folder_of_broken_pictures_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match=r"no image can be read .1 image files, 1 of them"):
        open_pictures(str(tmp_path), PREPROCESS, 4, 2, 0)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image can be read .0 image files"):
        open_pictures(str(tmp_path), PREPROCESS, 4, 2, 0)


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder; --calibration takes a folder"):
        open_pictures(str(tmp_path / "nowhere"), PREPROCESS, 4, 2, 0)


def test_one_picture_is_too_few(tmp_path: Path) -> None:
    picture(tmp_path / "only.png", 0)
    with pytest.raises(DataError, match="only one image can be read; give at least 2"):
        open_pictures(str(tmp_path), PREPROCESS, 4, 2, 0)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(OptionError, match="--samples 0: give at least 1"):
        open_pictures("procedural", PREPROCESS, 0, 2, 0)


def test_scenes_differ_by_seed_and_repeat_by_seed() -> None:
    same, other = RenderedPictures(2, PREPROCESS, 1), RenderedPictures(2, PREPROCESS, 2)
    assert calibration_hash(same) == calibration_hash(RenderedPictures(2, PREPROCESS, 1))
    assert calibration_hash(same) != calibration_hash(other)
    first, held = open_pictures("procedural", PREPROCESS, 2, 2, 1)
    assert calibration_hash(first) == calibration_hash(same)
    assert calibration_hash(held) != calibration_hash(first)


def test_a_picture_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def counted(index: int, seed: int, size: int) -> np.ndarray:
        drawn.append(index)
        return render_leaves(index, seed=seed, size=size)

    monkeypatch.setattr(pictures_module, "RENDERED", {"leaves": counted})
    made = RenderedPictures(5, PREPROCESS, 1, start=3, source="leaves")
    assert drawn == []
    first = torch.cat(list(made.batches(2)))
    assert torch.equal(torch.cat(list(made.batches(5))), first)
    assert drawn == [3, 4, 5, 6, 7]
    further = next(made.endless())
    assert len(drawn) == 6 and not any(torch.equal(further, one) for one in first)
    assert torch.equal(torch.cat(list(made.batches(3))), first)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [(64, 20), (20, 64), (32, 32), (7, 5)])
def test_every_resize_mode_gives_the_towers_size(mode: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (255, 255, 255))
    out = to_tensor(image, Preprocess((32, 24), resize_mode=mode))
    assert out.shape == (3, 32, 24)
    white = (1 - torch.tensor(PREPROCESS.mean)) / torch.tensor(PREPROCESS.std)
    torch.testing.assert_close(out[:, 16, 12], white)


def test_preprocessing_is_open_clips_own() -> None:
    open_clip = pytest.importorskip("open_clip")
    pixels = np.random.default_rng(0).integers(0, 256, (45, 71, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    config = open_clip.transform.PreprocessCfg(size=(32, 32))
    theirs = open_clip.transform.image_transform_v2(config, is_train=False)(image)
    assert (to_tensor(image, PREPROCESS) - theirs).abs().max() < 0.05


def test_unknown_modes_are_named() -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(OptionError, match="unknown resize mode 'stretch'"):
        to_tensor(image, Preprocess((8, 8), resize_mode="stretch"))
    with pytest.raises(OptionError, match="unknown interpolation 'cubic'"):
        to_tensor(image, Preprocess((8, 8), interpolation="cubic"))
