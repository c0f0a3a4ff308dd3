"""Figures of matplotlib, which is an extra, and PNGs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ovsprune.core.errors import MissingLibraryError
from ovsprune.core.files import staged_file

__all__ = ["need_matplotlib", "new_figure", "save"]


def need_matplotlib() -> None:
    """Refuse to draw without it.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingLibraryError(
            "matplotlib is not installed, and plots need it: pip install 'ovsprune[plots]'"
        ) from error


def new_figure(width: float, height: float, dpi: int = 150) -> Any:
    """An empty figure of so many inches that no window shows.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=dpi)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a PNG, complete or not at all; the same figure gives the same bytes."""
    with staged_file(path) as new:
        figure.savefig(new, format="png", metadata={"Software": None})
