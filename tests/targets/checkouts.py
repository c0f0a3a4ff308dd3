"""Checkouts of frameworks, named by environment variables, for the tests marked ``upstream``."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest


def checkout(target: str, *needs: str, below: tuple[str, ...] = ("",)) -> Path:
    """Return the framework's checkout, with its packages importable; skip the test without one.

    Args:
        target: ``OVSPRUNE_<TARGET>_REPO`` names it.
        needs: Packages that the framework imports.
        below: Folders of the checkout that hold packages.
    """
    variable = f"OVSPRUNE_{target.upper().replace('-', '_')}_REPO"
    named = os.environ.get(variable)
    if not named:
        pytest.skip(f"{variable} names no checkout of the framework")
    path = Path(named)
    if not path.is_dir():
        pytest.skip(f"{variable} is {named}, which is no folder")
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{target}'s framework needs {', '.join(missing)}, not installed here")
    for folder in below:
        if str(path / folder) not in sys.path:
            sys.path.insert(0, str(path / folder))
    return path
