"""Command ``ovsprune launch``: run a framework's own script with slim towers."""

from __future__ import annotations

from pathlib import Path

__all__ = ["start_directory"]


def start_directory() -> Path:
    """Return the directory to add to PYTHONPATH; every Python runs its ``sitecustomize``."""
    return Path(__file__).parent / "start"
