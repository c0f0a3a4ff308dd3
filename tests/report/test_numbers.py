from __future__ import annotations

import doctest

import pytest

from ovsprune.report import numbers, pictures


@pytest.mark.parametrize("module", [numbers, pictures])
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999_600, "1.00 M"),
        (1_000, "1.00 k"),
        (17_563_000_000, "17.6 G"),
        (999_499_999, "999 M"),
        (2.5e13, "25.0 T"),
    ],
)
def test_count_has_three_digits_below_1000(value, text):
    assert numbers.count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0004, "0.40 ms"),
        (0.25, "250 ms"),
        (59.96, "60.0 s"),
        (60, "1 min 00 s"),
        (119.6, "2 min 00 s"),
    ],
)
def test_duration(seconds, text):
    assert numbers.duration(seconds) == text


def test_change_from_nothing_is_not_a_number():
    assert numbers.change(0, 5) == "n/a"
