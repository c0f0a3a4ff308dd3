from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovsprune.calibration.scenes import CLASS_NAMES, HELD_OUT, OBJECTS, render_scene
from ovsprune.core.errors import DataError
from ovsprune.evaluation import VOID, FolderData, ScenesData


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for i, stem in enumerate(("b", "a")):
        Image.fromarray(np.full((4, 6, 3), 50 * i, np.uint8)).save(tmp_path / f"images/{stem}.png")
        label = np.full((4, 6), 9, np.uint8)
        label[:2, :2], label[:2, 2:], label[3] = 3, 4, 7
        Image.fromarray(label).save(tmp_path / f"labels/{stem}.png")
    write_classes(tmp_path)
    return tmp_path


def write_classes(folder: Path, **change: object) -> None:
    content: dict[str, object] = {
        "void": 9,
        "classes": {"3": "face", "4": "cow", "7": "body"},
        "aliases": {"face": "person", "body": "person"},
    }
    content.update(change)
    (folder / "classes.json").write_text(json.dumps(content))


def test_folder_maps_ids_aliases_and_void(folder: Path) -> None:
    data = FolderData(folder)
    assert data.prompts == ("person", "cow")
    assert data.class_names == ("face/body", "cow")
    samples = list(data)
    assert [s.stem for s in samples] == ["a", "b"]
    assert len(data) == 2
    expected = np.full((4, 6), VOID)
    expected[:2, :2], expected[:2, 2:], expected[3] = 0, 1, 0
    assert np.array_equal(samples[0].label, expected)
    assert samples[0].image.shape == (4, 6, 3)
    assert samples[0].image[0, 0, 0] == 50


def test_classes_json_in_the_parent_folder(folder: Path) -> None:
    val = folder / "val"
    val.mkdir()
    for name in ("images", "labels"):
        (folder / name).rename(val / name)
    assert len(FolderData(val)) == 2


def test_list_file_and_limit(folder: Path) -> None:
    (folder / "one.txt").write_text("b\n\n")
    assert [s.stem for s in FolderData(folder, "one.txt")] == ["b"]
    assert [s.stem for s in FolderData(folder, limit=1)] == ["a"]


def test_palette_labels_are_ids(folder: Path) -> None:
    label = Image.fromarray(np.full((4, 6), 4, np.uint8), mode=None).convert("P")
    indexed = Image.new("P", (6, 4), 4)
    indexed.putpalette([i // 3 for i in range(768)])
    indexed.save(folder / "labels/a.png")
    assert label.mode == indexed.mode
    assert set(np.unique(next(iter(FolderData(folder))).label)) == {1}


def break_folder(folder: Path, how: str) -> None:
    labels = folder / "labels"
    if how == "no images":
        (folder / "images").rename(folder / "pictures")
    elif how == "empty":
        for path in (folder / "images").iterdir():
            path.unlink()
    elif how == "no classes":
        (folder / "classes.json").unlink()
    elif how == "not json":
        (folder / "classes.json").write_text("{")
    elif how == "no class names":
        write_classes(folder, classes={})
    elif how == "bad ids":
        write_classes(folder, classes={"x": "face"})
    elif how == "stray alias":
        write_classes(folder, aliases={"horse": "pony"})
    elif how == "no label":
        (labels / "a.png").unlink()
    elif how == "broken image":
        (folder / "images/a.png").write_bytes(b"\x89PNG nothing")
    elif how == "rgb label":
        Image.new("RGB", (6, 4)).save(labels / "a.png")
    elif how == "size":
        Image.new("L", (5, 4), 3).save(labels / "a.png")
    elif how == "unknown id":
        Image.new("L", (6, 4), 200).save(labels / "a.png")
    elif how == "two stems":
        Image.new("RGB", (6, 4)).save(folder / "images/a.jpg")
    elif how == "unlisted":
        (folder / "list.txt").write_text("c\n")
    elif how == "empty list":
        (folder / "list.txt").write_text("\n")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no images", "no folder images/"),
        ("empty", "no images in .*images"),
        ("no classes", "has no classes.json"),
        ("not json", "classes.json does not have the form"),
        ("no class names", "classes.json names no class"),
        ("bad ids", "classes.json does not have the form"),
        ("stray alias", "aliases for horse"),
        ("no label", "a.png has no label map: expected .*labels.a.png"),
        ("broken image", r"images.a\.png cannot be read"),
        ("rgb label", r"labels.a\.png is not a map of class ids"),
        ("size", r"labels.a\.png is 5x4, but .*a\.png is 6x4"),
        ("unknown id", r"labels.a\.png contains the class id 200"),
        ("two stems", "the same stem"),
    ],
)
def test_errors_name_the_file(folder: Path, how: str, message: str) -> None:
    break_folder(folder, how)
    with pytest.raises(DataError, match=message):
        list(FolderData(folder))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("none", "list file .*list.txt does not exist"),
        ("unlisted", "lists 'c', but there is no such image"),
        ("empty list", "names no image"),
    ],
)
def test_list_errors(folder: Path, how: str, message: str) -> None:
    break_folder(folder, how)
    with pytest.raises(DataError, match=message):
        FolderData(folder, folder / "list.txt")


def test_scenes_equal_those_of_the_renderer() -> None:
    data = ScenesData(3, split="val", seed=2)
    assert data.class_names == data.prompts == CLASS_NAMES
    samples = list(data)
    assert len(samples) == len(data) == 3
    scene = render_scene(2, split="val", seed=2)
    assert np.array_equal(samples[2].image, scene.image)
    assert np.array_equal(samples[2].label, scene.labels)
    assert len({s.stem for s in samples}) == 3


def test_combinations_are_labelled_by_full_phrases() -> None:
    data = ScenesData(4, split="combinations", combinations=True)
    assert data.scored == tuple(range(len(HELD_OUT)))
    assert len(data.class_names) == len(HELD_OUT) + len(CLASS_NAMES) - len(OBJECTS)
    for index, sample in enumerate(data):
        scene = render_scene(index, split="combinations")
        for number, thing in enumerate(scene.objects, start=1):
            names = {
                data.class_names[i] for i in np.unique(sample.label[scene.instances == number])
            }
            assert names == {thing.combination.phrase}
        rest = {data.class_names[i] for i in np.unique(sample.label[scene.instances == 0])}
        assert rest <= set(scene.backgrounds)


def test_scenes_errors() -> None:
    with pytest.raises(DataError, match="0 procedural scenes"):
        ScenesData(0)
    with pytest.raises(DataError, match="unknown split 'x'"):
        ScenesData(1, split="x")
    with pytest.raises(DataError, match="not on 'test'"):
        ScenesData(1, combinations=True)
