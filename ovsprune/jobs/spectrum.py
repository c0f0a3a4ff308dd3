"""Power-law fits of the spectra of a tower's layers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ovsprune import backbones
from ovsprune.core.errors import OptionError, OutputError
from ovsprune.core.progress import Progress, Silent
from ovsprune.report.figures import need_matplotlib
from ovsprune.spectrum import matrices, spectra
from ovsprune.spectrum.measure import check_options

__all__ = ["spectrum"]


def spectrum(
    model: str,
    *,
    pretrained: str | None = None,
    fit: str = "peak",
    convolution: str = "slices",
    layers: Sequence[str] = (),
    plot: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the spectra of an image tower's layers, dense or slim.

    Args:
        model: Model name or slim directory.
        pretrained: Weights, as for ``ovsprune prune``.
        fit: Choice of the start of the tail: ``"peak"``, ``"least-ks"`` or ``"hill"``.
        convolution: ``"slices"`` or ``"unfolded"``.
        layers: ``fnmatch`` patterns of layer names; by default all layers.
        plot: PNG file for a plot of the spectra and alphas.
        progress: Progress reporter.

    Returns:
        ``model, trained, fit, convolution, layers[{name, kind, shape, alpha, ks_distance, xmin,
        n_tail, n_eigenvalues, alpha_hat, stable_rank, spectral_norm}], median_alpha,
        kinds{kind: median alpha}, plot, seconds``.

    Raises:
        UnknownNameError: A name is unknown.
        WeightsError: The weights cannot be loaded or do not fit.
        CheckpointError: A slim directory is damaged.
        OptionError: ``convolution`` is unknown, or a pattern matches no layer.
        OutputError: The plot cannot be written.
        MissingLibraryError: A plot is requested and matplotlib is not installed.
    """
    start = time.perf_counter()
    progress = progress or Silent()
    check_options(fit, convolution)
    if plot is not None:
        _check_plot(plot)
    backbone = backbones.load_backbone(model, pretrained=pretrained)
    selected = matrices(backbone.tower)
    for pattern in layers:
        if not any(fnmatchcase(matrix.name, pattern) for matrix in selected):
            names = ", ".join(matrix.name for matrix in selected[:3])
            raise OptionError(
                f"--layer {pattern!r} matches none of the {len(selected)} layers of {model}; the "
                f"first are {names}"
            )
    if layers:
        selected = [m for m in selected if any(fnmatchcase(m.name, pattern) for pattern in layers)]
    measured = spectra(selected, fit=fit, convolution=convolution, progress=progress)
    if plot is not None:
        from ovsprune.report.spectra import draw

        draw(measured, plot, title=f"{backbone.name}, fit {fit}")
    return {
        "model": model,
        "trained": backbone.trained,
        "fit": fit,
        "convolution": convolution,
        "layers": [layer.record() for layer in measured],
        "median_alpha": _median([layer.alpha for layer in measured]),
        "kinds": {
            kind: _median([layer.alpha for layer in measured if layer.kind == kind])
            # dict.fromkeys: each kind once, in the order of the model.
            for kind in dict.fromkeys(layer.kind for layer in measured)
        },
        "plot": None if plot is None else str(plot),
        "seconds": time.perf_counter() - start,
    }


def _check_plot(path: Path) -> None:
    """Check that a plot can be written to ``path``, before the computation starts."""
    need_matplotlib()
    if path.suffix.lower() != ".png":
        raise OutputError(f"--plot {path}: plots are PNG files; give a name that ends in .png")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OutputError(
            f"--plot {path} is a directory, or its directory does not exist; create it first"
        )


def _median(alphas: Sequence[float]) -> float | None:
    # alpha is infinite for a layer without a fit
    finite = [alpha for alpha in alphas if math.isfinite(alpha)]
    return statistics.median(finite) if finite else None
