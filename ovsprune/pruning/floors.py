"""Parsing of ``--floor PATTERN=N``."""

from __future__ import annotations

import math

from ovsprune.core.errors import OptionError

__all__ = ["parse_floor"]


def parse_floor(text: str) -> tuple[str, float]:
    """Split ``"*.mlp=0.25"`` into a pattern and a fraction in (0, 1) or a number of units.

    Raises:
        OptionError: ``text`` does not have that form.
    """
    # Split at the last "=": the number contains none.
    pattern, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan  # NaN fails both comparisons below, so every wrong form gets one message
    if not pattern or not (0 < value < 1 or (value >= 1 and value.is_integer())):
        raise OptionError(
            f"--floor {text!r}: give PATTERN=N; N is a number of units (1, 2, ...) or a fraction "
            "of them in (0, 1), as in '*.mlp=0.25'"
        )
    return pattern, value
