"""spectrum: how heavy the tails of a tower's layers are."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ovsprune.core.errors import OptionError, OutputError
from ovsprune.core.progress import Progress, Silent
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
        model: A model name or a slim directory.
        pretrained: As of ``ovsprune prune``.
        fit: Where the tail begins: ``"peak"``, ``"least-ks"`` or ``"hill"``.
        convolution: ``"slices"`` or ``"unfolded"``.
        layers: ``fnmatch`` patterns of the layers' names; all by default.
        plot: A PNG to draw the spectra and the alphas into.
        progress: Who hears about it.

    Returns:
        ``model, trained, fit, convolution, layers[{name, kind, shape, alpha, ks_distance, xmin,
        n_tail, n_eigenvalues, alpha_hat, stable_rank, spectral_norm}], median_alpha,
        kinds{kind: median alpha}, plot, seconds``.

    Raises:
        UnknownNameError: A name is unknown.
        WeightsError: The weights cannot be had or do not fit.
        CheckpointError: A slim directory is damaged.
        OptionError: ``convolution`` is unknown, or a pattern matches no layer.
        OutputError: The plot cannot be written there.
        MissingLibraryError: A plot is asked and matplotlib is not installed.
    """
    from ovsprune.backbones import load_backbone

    start = time.perf_counter()
    progress = progress or Silent()
    check_options(fit, convolution)
    if plot is not None:
        check_picture(plot)
    backbone = load_backbone(model, pretrained=pretrained)
    found = matrices(backbone.tower)
    for pattern in layers:
        if not any(fnmatchcase(matrix.name, pattern) for matrix in found):
            names = ", ".join(matrix.name for matrix in found[:3])
            raise OptionError(
                f"--layer {pattern!r} matches none of the {len(found)} layers of {model}; the "
                f"first are {names}"
            )
    if layers:
        found = [m for m in found if any(fnmatchcase(m.name, pattern) for pattern in layers)]
    measured = spectra(found, fit=fit, convolution=convolution, progress=progress)
    if plot is not None:
        from ovsprune.report.spectra import draw

        draw(measured, plot, title=f"{backbone.name}, fit {fit}")
    return {
        "model": model,
        "trained": backbone.trained,
        "fit": fit,
        "convolution": convolution,
        "layers": [one.record() for one in measured],
        "median_alpha": _median([one.alpha for one in measured]),
        "kinds": _by_kind([(one.kind, one.alpha) for one in measured]),
        "plot": None if plot is None else str(plot),
        "seconds": time.perf_counter() - start,
    }


def check_picture(path: Path) -> None:
    """Make sure that a picture can be drawn there; asked before the work.

    Raises:
        OutputError: It is no PNG's name, or there is no such directory.
        MissingLibraryError: matplotlib is not installed.
    """
    from ovsprune.report.figures import need_matplotlib

    need_matplotlib()
    if path.suffix.lower() != ".png":
        raise OutputError(f"--plot {path}: the picture is a PNG; give a name that ends with .png")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OutputError(
            f"--plot {path} is a directory, or its directory is not there; make it first"
        )


def _median(alphas: Sequence[float]) -> float | None:
    finite = [alpha for alpha in alphas if math.isfinite(alpha)]
    return statistics.median(finite) if finite else None


def _by_kind(pairs: Sequence[tuple[str, float]]) -> Mapping[str, float | None]:
    kinds = dict.fromkeys(kind for kind, _ in pairs)
    return {kind: _median([alpha for other, alpha in pairs if other == kind]) for kind in kinds}
