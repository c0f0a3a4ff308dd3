"""Figures of matplotlib (an optional dependency), saved as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ovsprune.core.errors import MissingLibraryError
from ovsprune.core.files import staged_file

__all__ = ["need_matplotlib", "new_figure", "save"]


def need_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingLibraryError(
            "plots need matplotlib, which is not installed: pip install 'ovsprune[plots]'"
        ) from error


def new_figure(width: float, height: float, dpi: int = 150) -> Any:
    """Return an empty off-screen figure of the given size in inches.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    need_matplotlib()
    # Not pyplot, which keeps every figure and may choose a backend that needs a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=dpi)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a PNG atomically; equal figures give equal bytes."""
    with staged_file(path) as new:
        # By default matplotlib writes its version as Software.
        figure.savefig(new, format="png", metadata={"Software": None})
