"""What runs inside a command that ``ovsprune launch`` started: core, slim and targets only."""

from __future__ import annotations

from pathlib import Path

__all__ = ["start_directory"]


def start_directory() -> Path:
    """The directory that goes onto PYTHONPATH: its ``sitecustomize`` runs in every Python."""
    return Path(__file__).parent / "start"
