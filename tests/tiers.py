"""Tiers of the parameters of a test: some run by default, the rest with ``make slow``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def by_default(values: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """Return the values as parameters; those that are not in ``default`` are marked slow."""
    return [pytest.param(v, marks=() if v in default else pytest.mark.slow) for v in values]
