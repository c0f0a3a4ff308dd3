from __future__ import annotations

import numpy as np
import pytest

from ovsprune.report.pictures import GAP, PANEL, TEXT, paint, palette, side_by_side

TOP = GAP + 2 * TEXT
NAMES = ["ball", "star", "grass"]


def test_palette_colours_are_distinct_for_40_classes():
    colours = palette(range(40))
    assert len(set(colours.values())) == 40


def test_paint_leaves_unknown_ids_grey():
    labels = np.array([[0, 1], [1, 9]])
    painted = paint(labels, {0: (255, 0, 0), 1: (0, 0, 255)})
    assert painted[0, 0].tolist() == [255, 0, 0]
    assert painted[1, 0].tolist() == [0, 0, 255]
    assert len(set(painted[1, 1].tolist())) == 1


def panel(image, row, column):
    left, top = GAP + column * (PANEL + GAP), TOP + row * (PANEL + GAP)
    return np.asarray(image)[top : top + PANEL, left : left + PANEL]


def test_panels_are_in_order_and_the_legend_has_the_classes_shown():
    scene = np.full((20, 20, 3), 77, dtype=np.uint8)
    truth, guess = np.zeros((20, 20), int), np.zeros((20, 20), int)
    guess[:10] = 2
    image = side_by_side([(scene, [truth, guess])], ["scene", "labels", "dense"], NAMES)
    colours = palette([0, 2])
    assert (panel(image, 0, 0) == 77).all()
    assert (panel(image, 0, 1) == colours[0]).all()
    assert (panel(image, 0, 2)[: PANEL // 2 - 1] == colours[2]).all()
    assert (panel(image, 0, 2)[PANEL // 2 + 1 :] == colours[0]).all()
    legend = np.asarray(image)[TOP + PANEL + GAP :].reshape(-1, 3).tolist()
    assert list(colours[0]) in legend
    assert list(colours[2]) in legend


def test_legend_wraps_into_lines():
    labels = np.arange(30).reshape(5, 6)
    scene = np.zeros((5, 6, 3), dtype=np.uint8)
    names = [f"a class with a long name {i}" for i in range(30)]
    few = side_by_side([(scene, [labels % 2])], ["scene", "labels"], names)
    many = side_by_side([(scene, [labels])], ["scene", "labels"], names)
    assert few.width == many.width
    assert many.height > few.height + 5 * TEXT


def test_a_row_without_a_map_for_each_title_is_refused():
    scene = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="1 label maps in a row, expected 2"):
        side_by_side([(scene, [np.zeros((4, 4), int)])], ["scene", "labels", "dense"], NAMES)
