from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from ovsprune.calibration.scenes import (
    CLASS_NAMES,
    COLOURS,
    GROUNDS,
    HELD_OUT,
    MATERIALS,
    OBJECTS,
    SEEN,
    SKIES,
    SPLITS,
    Combination,
    is_held_out,
    render_scene,
)
from ovsprune.calibration.scenes.backgrounds import TEXTURES
from ovsprune.calibration.scenes.layout import draw_layout
from ovsprune.calibration.scenes.shapes import SHAPES
from ovsprune.core.errors import DataError


def digest(index: int, **options: object) -> str:
    scene = render_scene(index, **options)  # type: ignore[arg-type]
    parts = scene.image.tobytes() + scene.labels.tobytes() + scene.caption.encode()
    return hashlib.sha256(parts).hexdigest()


def test_vocabulary_is_rich_enough() -> None:
    assert len(OBJECTS) >= 24
    assert len(GROUNDS) + len(SKIES) >= 6
    assert len(set(CLASS_NAMES)) == len(CLASS_NAMES)
    assert set(SHAPES) == set(OBJECTS)
    assert set(TEXTURES) == set(GROUNDS + SKIES)


def test_held_out_is_an_eighth_and_leaves_every_pair_of_words() -> None:
    total = len(OBJECTS) * len(COLOURS) * len(MATERIALS)
    assert len(HELD_OUT) == total // 8
    assert len(HELD_OUT) + len(SEEN) == total
    assert not set(HELD_OUT) & set(SEEN)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        pairs = {(c[first], c[second]) for c in SEEN}
        lengths = (len(COLOURS), len(MATERIALS), len(OBJECTS))
        assert len(pairs) == lengths[first] * lengths[second]


def test_the_same_arguments_give_the_same_scene_and_others_do_not() -> None:
    assert digest(3) == digest(3)
    others = [digest(3, seed=1), digest(4), *(digest(3, split=s) for s in SPLITS)]
    assert len(set(others)) == len(others)
    assert digest(3) in others


def test_splits_are_disjoint_ranges() -> None:
    numbers = sorted((s.start, s.start + s.scenes) for s in SPLITS.values())
    assert all(a[1] <= b[0] for a, b in pairwise(numbers))


@pytest.mark.parametrize("split", SPLITS)
def test_only_the_combinations_split_shows_held_out_ones(split: str) -> None:
    shown = [o.combination for i in range(40) for o in render_scene(i, split=split).objects]
    assert len(shown) > 60
    assert {is_held_out(c) for c in shown} == {split == "combinations"}


@pytest.mark.parametrize("size", [64, 112, 200])
def test_maps_agree_with_the_objects(size: int) -> None:
    for index in range(5):
        scene = render_scene(index, split="val", size=size)
        assert scene.image.shape == (size, size, 3)
        assert scene.image.dtype == scene.labels.dtype == scene.instances.dtype == np.uint8
        assert scene.labels.shape == scene.instances.shape == (size, size)
        assert set(np.unique(scene.instances)) <= set(range(len(scene.objects) + 1))
        for number, thing in enumerate(scene.objects, start=1):
            mask = scene.instances == number
            assert mask.sum() == thing.area > 0
            assert set(np.unique(scene.labels[mask])) == {thing.class_id}
            assert CLASS_NAMES[thing.class_id] == thing.combination.shape
            x0, y0, x1, y1 = thing.box
            assert mask[y0:y1, x0:x1].sum() == thing.area
            assert mask[y0].any() and mask[y1 - 1].any()
            assert mask[:, x0].any() and mask[:, x1 - 1].any()
        ground = scene.labels[scene.instances == 0]
        assert {CLASS_NAMES[i] for i in np.unique(ground)} <= set(scene.backgrounds)


def test_a_scene_looks_the_same_at_another_size() -> None:
    small, large = (render_scene(5, split="val", size=s) for s in (112, 224))
    assert [o.combination for o in small.objects] == [o.combination for o in large.objects]
    assert (small.labels == large.labels[::2, ::2]).mean() > 0.95


def test_objects_are_wide_enough_and_overlap() -> None:
    widths, hidden = [], 0
    for index in range(60):
        scene = render_scene(index, split="test")
        layout_objects = len(scene.objects)
        assert 1 <= layout_objects <= 5
        widths += [max(o.box[2] - o.box[0], o.box[3] - o.box[1]) for o in scene.objects]
        boxes = [o.box for o in scene.objects]
        hidden += any(
            a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
            for i, a in enumerate(boxes)
            for b in boxes[:i]
        )
    assert np.median(widths) >= 24
    assert 10 <= hidden <= 58


def test_every_class_and_colour_and_material_comes_up() -> None:
    seen: Counter[str] = Counter()
    for index in range(300):
        layout = draw_layout(np.random.default_rng(index), "train")
        seen.update(layout.backgrounds)
        for placement in layout.placements:
            seen.update(placement.combination)
    assert set(seen) == set(CLASS_NAMES) | set(COLOURS) | set(MATERIALS)


def test_the_caption_names_the_largest_objects() -> None:
    scene = render_scene(7, split="val")
    largest = max(scene.objects, key=lambda o: o.area)
    assert largest.combination.phrase in scene.caption
    assert all(name in scene.caption for name in scene.backgrounds)
    assert "a orange" not in " ".join(render_scene(i).caption for i in range(30))


def test_colours_can_be_told_apart_in_the_pixels() -> None:
    means: dict[str, list[np.ndarray]] = {}
    for index in range(150):
        scene = render_scene(index, split="val")
        for number, thing in enumerate(scene.objects, start=1):
            if thing.combination.material == "plain" and thing.area > 200:
                pixels = scene.image[scene.instances == number]
                means.setdefault(thing.combination.colour, []).append(np.median(pixels, axis=0))
    centres = {name: np.mean(values, axis=0) for name, values in means.items()}
    assert set(centres) == set(COLOURS)
    names = list(centres)
    gaps = [np.linalg.norm(centres[a] - centres[b]) for i, a in enumerate(names) for b in names[:i]]
    assert min(gaps) > 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": 0, "split": "dev"}, "unknown split 'dev'.*use one of train"),
        ({"index": -1}, "scene -1 of split 'train' does not exist"),
        ({"index": 10**6}, "give an index from 0 to 999999"),
        ({"index": 0, "seed": -2}, "seed -2"),
        ({"index": 0, "size": 8}, "size 8.*at least 16"),
    ],
)
def test_bad_arguments_are_clear_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        render_scene(**options)  # type: ignore[arg-type]


def test_phrase() -> None:
    assert Combination("red", "striped", "mug").phrase == "red striped mug"
