"""Comparison of methods at several ratios and seeds, under one budget, on the same images."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ovsprune import backbones
from ovsprune.comparison.identity import (
    changed_options,
    comparison_identity,
    made_by,
    row_key,
)
from ovsprune.comparison.methods import DEFAULT, Method, parse_methods
from ovsprune.comparison.results import Earlier, Rows, check_place, take_over
from ovsprune.comparison.runner import ComparisonRunner
from ovsprune.comparison.scoring import Scorer
from ovsprune.core.errors import MissingLibraryError, OptionError, UnknownNameError
from ovsprune.core.files import write_text
from ovsprune.core.options import options_of
from ovsprune.core.progress import NoteOnce, Progress, Silent
from ovsprune.core.protocols import Backbone
from ovsprune.evaluation.backbone_scores import class_embeddings
from ovsprune.evaluation.datasets import FolderData, ScenesData, SegmentationData
from ovsprune.graph.costs import count_costs
from ovsprune.profiling.timing import device_and_dtype, thread_limit
from ovsprune.pruning.config import PruneConfig
from ovsprune.report.comparison import differences, makers, page, summary

__all__ = ["METHODS", "compare"]

METHODS = (
    "default",
    "magnitude+gauss-newton",
    "random+gauss-newton",
    "random+closed-form",
    "torch-pruning+gauss-newton",
    "torch-pruning",
    "reconstruction",
    "magnitude",
    "random",
)
"""Methods compared by default: with and without recovery, random, and Torch-Pruning."""

SCENE_SEED = 1_000_000
"""First seed of the test scenes; calibration scenes are of another split and start at 0."""


def compare(
    model: str | Backbone,
    ratios: Sequence[float],
    *,
    methods: Sequence[str] = METHODS,
    seeds: int = 3,
    data: str | Path | None = None,
    text_embeddings: str | Path | None = None,
    centred: bool = False,
    list_file: str | Path | None = None,
    scenes: int | None = None,
    pretrained: str | None = None,
    activation: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    earlier: Sequence[Earlier] = (),
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Prune by every method at every ratio and seed, and score what is left.

    Rows are kept in ``output`` as they are done. The same call goes on where it stopped, and more
    methods, ratios or seeds only add rows.

    Args:
        model: Name (see :func:`ovsprune.backbones.load_backbone`) or loaded backbone.
        ratios: Fractions of the tower's cost to remove, each in (0, 1).
        methods: Names (see :func:`ovsprune.comparison.methods.parse_method`), or lists of names
            with commas.
        seeds: Number of seeds: 0 to ``seeds - 1``. A seed selects the calibration images and
            the random choices of a method.
        data: Folder with ``images/``, ``labels/`` and ``classes.json``; None scores on procedural
            test scenes.
        text_embeddings: NPZ file with the embeddings of the classes, for a model without a text
            tower.
        centred: Subtract the mean of the classes' embeddings from each of them before scoring.
        list_file: File with the stems of ``data`` to use.
        scenes: Number of test scenes (500 by default), or, with ``data``, the maximum number of
            images.
        pretrained: Tag, file, or ``"none"``.
        activation: ``"gelu"`` or ``"quick_gelu"``, for a weights file that does not say which.
        device: Device of the towers.
        threads: CPU threads; None leaves the choice to PyTorch.
        output: Directory for rows, record, page and plot; by default ``compare/<model>``.
        overwrite: Start anew instead of continuing.
        earlier: Records of earlier comparisons (``compare.json``, or its contents) of the same
            model, images and options; their rows are used where ``output`` has none.
        progress: Progress reporter.
        options: Options of :class:`ovsprune.PruneConfig` that hold for all rows: ``budget``
            (``"macs"`` or ``"params"``), ``protect``, ``round_to``, ``calibration``, ``samples``,
            ``batch_size``. Options of one method follow its name.

    Returns:
        ``model, pretrained, trained, data, centred, images, calibration, samples, budget, protect,
        round_to, seeds, ratios, methods, dense{macs, params, miou, pixel_accuracy}, rows[{method,
        ratio, seed, status, reason, criterion, allocation, recovery, source, macs, params,
        achieved, miou, pixel_accuracy, retention, relative_error, seconds}], summary[],
        differences[], plot, output, seconds``;
        ``rows`` in the order of ratio, method and seed. Retention is mIoU over dense mIoU.

    Raises:
        OptionError: A value is out of its range, or ``earlier`` is of another comparison.
        UnknownNameError: A model or a part of a method is unknown.
        DataError: The data set, the embeddings or the calibration pictures cannot be used.
        WeightsError: The model cannot be loaded, or there is nothing to embed class names with.
        OutputError: ``output`` holds something else, or rows of other settings.
    """
    start = time.perf_counter()
    progress = NoteOnce(progress or Silent())
    asked = parse_methods(methods)
    ratios = list(dict.fromkeys(float(ratio) for ratio in ratios))
    _check(ratios, seeds, scenes, data, list_file)
    settings = _common(ratios[0], options)
    for ratio, method in itertools.product(ratios, asked):
        method.settings(replace(settings, ratio=ratio)).check()
    device_and_dtype(device, "float32")
    name = model if isinstance(model, str) else model.name
    place = Path(output) if output else Path("compare") / backbones.canonical(name)
    check_place(place)
    opened = _open(data, list_file, scenes)
    with thread_limit(threads):
        backbone = _load(model, pretrained, activation, device, progress)
        settings = settings.for_model(backbone)
        pictures = opened(max(backbone.preprocess.size))
        embeddings = class_embeddings(backbone, pictures.prompts, text_embeddings)
        scorer = Scorer(backbone, embeddings, pictures, settings.batch_size, progress, centred)
        runner = ComparisonRunner(backbone, settings, scorer, progress)
        runner.check(asked)
        identity = comparison_identity(
            backbone, settings, embeddings, data, list_file, pictures, device
        )
        identity |= changed_options(settings, centred)
        rows = Rows(place, identity, overwrite)
        record: dict[str, Any] = {
            "model": name,
            "pretrained": backbone.pretrained,
            "trained": backbone.trained,
            "data": str(data) if data is not None else "scenes",
            "centred": centred,
            "images": len(pictures),
            "calibration": settings.calibration,
            "samples": settings.pictures,
            "budget": settings.budget,
            "protect": list(settings.protect),
            "round_to": settings.round_to,
            "seeds": seeds,
            "ratios": ratios,
            "methods": [method.name for method in asked],
            "dense": _dense(backbone, scorer, rows),
        }
        take_over(earlier, record, rows)
        grid = list(itertools.product(range(seeds), ratios, asked))
        found = _fill(grid, rows, runner, record["dense"]["miou"], progress)
    order = itertools.product(ratios, asked, range(seeds))
    record["rows"] = [found[seed, ratio, method] for ratio, method, seed in order]
    record["summary"] = summary(record)
    record["differences"] = differences(record, _reference(record))
    return _write(record, place, start, progress)


def _check(
    ratios: Sequence[float],
    seeds: int,
    scenes: int | None,
    data: str | Path | None,
    list_file: str | Path | None,
) -> None:
    if not ratios:
        raise OptionError("--ratio is missing: give at least one, such as --ratio 0.5")
    if seeds < 1:
        raise OptionError(f"--seeds {seeds} is out of range; give 1 or more")
    if scenes is not None and scenes < 1:
        raise OptionError(f"--scenes {scenes} is out of range; give 1 or more")
    if list_file is not None and data is None:
        raise OptionError(f"--list {list_file} needs --data DIR; scenes have no files")


def _common(ratio: float, options: dict[str, Any]) -> PruneConfig:
    """Return the configuration that holds for all rows.

    Raises:
        OptionError: The budget is ``"latency"``.
        UnknownNameError: An option does not hold for all rows.
    """
    known = [o.name for o in options_of(PruneConfig) if o.compare == "all"]
    for name in options:
        if name not in known:
            raise UnknownNameError("option of compare", name, known)
    config = PruneConfig.from_options({"ratio": ratio, **options})
    if config.budget == "latency":
        raise OptionError(
            "--budget latency cannot be compared: Torch-Pruning has no table of layer times; use "
            "macs or params, and time the slim towers with 'ovsprune benchmark'"
        )
    config.check()
    return config


def _open(
    data: str | Path | None, list_file: str | Path | None, scenes: int | None
) -> Callable[[int], SegmentationData]:
    """Return a function of the tower's image size that opens the labelled images."""
    if data is None:
        return lambda size: ScenesData(scenes or 500, seed=SCENE_SEED, size=size)
    folder = FolderData(data, list_file, scenes)
    return lambda size: folder


def _load(
    model: str | Backbone,
    pretrained: str | None,
    activation: str | None,
    device: str,
    progress: Progress,
) -> Backbone:
    """Return the dense model in float32, loaded if it is a name.

    Raises:
        OptionError: The model is slim already.
    """
    if isinstance(model, str):
        with progress.stage(f"loading {model}", 1) as advance:
            model = backbones.load_backbone(
                model, pretrained=pretrained, activation=activation, device=device
            )
            advance(1)
    if model.slim is not None:
        raise OptionError(
            f"{model.slim.path} is slim already: compare on its dense model, {model.name}"
        )
    for note in model.notes:
        progress.note(note)
    if any(p.dtype != torch.float32 for p in model.tower.parameters()):
        # Half precision is for files only: moments and repairs need float32.
        model = replace(model, tower=deepcopy(model.tower).float())
    if not model.trained:
        progress.note(f"{model.name} has random weights: its mIoU and retention have no meaning")
    return model


def _dense(backbone: Backbone, scorer: Scorer, rows: Rows) -> dict[str, Any]:
    """Return costs and scores of the dense tower, from the stored rows if they are there."""
    stored = rows.find({"method": "dense"})
    if stored is None:
        costs = count_costs(backbone.tower, backbone.preprocess.size)
        stored = {"method": "dense", "macs": costs.macs, "params": costs.params, **scorer.dense()}
        rows.add(stored)
    return {name: stored[name] for name in ("macs", "params", "miou", "pixel_accuracy")}


def _fill(
    grid: Sequence[tuple[int, float, Method]],
    rows: Rows,
    runner: ComparisonRunner,
    dense: float,
    progress: Progress,
) -> dict[tuple[int, float, Method], dict[str, Any]]:
    """Return every row of the grid, stored or made now; each is on disk before the next begins."""
    found = {place: rows.find(row_key(*place)) for place in grid}
    missing = [place for place, row in found.items() if row is None]
    if missing and len(missing) < len(grid):
        progress.note(f"{len(grid) - len(missing)} of {len(grid)} rows are in {rows.place} already")
    others = makers(row for row in found.values() if row is not None)
    others.pop(made_by(), None)
    for name, count in others.items():
        progress.note(f"made by {name}: {count} of these rows; --overwrite makes all anew")
    with progress.stage("comparing", len(missing)) as advance:
        for seed, ratio, method in missing:
            row = runner.row(method, ratio, seed)
            kept = None if row["miou"] is None or not dense else row["miou"] / dense
            rows.add(
                {**row_key(seed, ratio, method), **row, "retention": kept, "made_by": made_by()}
            )
            found[seed, ratio, method] = rows.rows[-1]
            advance(1)
    return {place: row for place, row in found.items() if row is not None}


def _reference(record: dict[str, Any]) -> str:
    """Return the method that the others are compared with.

    It is the default, or the first method that reached a ratio.
    """
    reached = {row["method"] for row in record["rows"] if row["status"] == "done"}
    names = [name for name in record["methods"] if name in reached] or record["methods"]
    return DEFAULT if DEFAULT in names else str(names[0])


def _write(record: dict[str, Any], place: Path, start: float, progress: Progress) -> dict[str, Any]:
    """Write plot, page and record to the directory of the rows."""
    from ovsprune.report.curves import draw

    try:
        draw(record, place / "curves.png")
        record["plot"] = str(place / "curves.png")
    except MissingLibraryError as error:
        progress.note(f"no plot: {error}")
        record["plot"] = None
    record["output"] = str(place)
    record["seconds"] = time.perf_counter() - start
    write_text(place / "README.md", page(record))
    write_text(place / "compare.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    return record
