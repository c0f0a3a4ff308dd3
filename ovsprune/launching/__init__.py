"""The part of ``ovsprune launch`` that runs inside the launched command."""

from __future__ import annotations

from pathlib import Path

__all__ = ["start_directory"]


def start_directory() -> Path:
    """Return the directory for PYTHONPATH; its ``sitecustomize`` runs in every Python."""
    return Path(__file__).parent / "start"
