"""Comparison of methods at several ratios and seeds, under one budget, on the same images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovsprune import backbones
from ovsprune.comparison.grid import Grid, dense_scores, fill, reference_method
from ovsprune.comparison.identity import comparison_identity
from ovsprune.comparison.results import Earlier, Rows, check_place, import_rows, write_record
from ovsprune.comparison.runner import ComparisonRunner
from ovsprune.comparison.scoring import Scorer
from ovsprune.comparison.setup import common_config, data_opener, open_backbone
from ovsprune.core.progress import NoteOnce, Progress, Silent
from ovsprune.core.protocols import Backbone
from ovsprune.evaluation.backbone_scores import class_embeddings
from ovsprune.profiling.timing import device_and_dtype, thread_limit
from ovsprune.pruning.config import PruneConfig
from ovsprune.report.comparison import differences, summary

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
    """Prune by every method at every ratio and seed, and score the slim towers.

    Each row is stored in ``output`` when it is finished. The same call resumes an interrupted
    comparison, and more methods, ratios or seeds only add rows.

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
        overwrite: Delete existing rows instead of resuming.
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
        DataError: The data set, the embeddings or the calibration images cannot be used.
        WeightsError: The model cannot be loaded, or there is neither a text tower nor a file of
            embeddings.
        OutputError: ``output`` holds something else, or rows of other settings.
    """
    start = time.perf_counter()
    # Every row runs the complete pipeline, which would repeat its notes.
    progress = NoteOnce(progress or Silent())
    grid = Grid.parse(ratios, methods, seeds)
    config = common_config(grid, options)
    open_data = data_opener(data, list_file, scenes)
    device_and_dtype(device, "float32")  # an unknown device is refused before weights are read
    name = model if isinstance(model, str) else model.name
    place = Path(output) if output else Path("compare") / backbones.canonical(name)
    # A wrong output directory is refused before the model is loaded.
    check_place(place)
    with thread_limit(threads):
        backbone = open_backbone(model, pretrained, activation, device, progress)
        config = config.for_model(backbone)
        # Scenes are square; a folder ignores the size.
        images = open_data(max(backbone.preprocess.size))
        embeddings = class_embeddings(backbone, images.prompts, text_embeddings)
        scorer = Scorer(backbone, embeddings, images, config.batch_size, progress, centred)
        runner = ComparisonRunner(backbone, config, scorer, progress)
        runner.check(grid.methods)
        identity = comparison_identity(
            backbone, config, embeddings, images,
            data=data, list_file=list_file, centred=centred, device=device,
        )  # fmt: skip
        rows = Rows(place, identity, overwrite)
        record = {
            "model": name,
            **_description(backbone, config, grid),
            "data": "scenes" if data is None else str(data),
            "centred": centred,
            "images": len(images),
            "dense": dense_scores(scorer, rows),
        }
        # After the dense scores: earlier rows must come from the same dense tower.
        import_rows(earlier, record, rows)
        record["rows"] = fill(grid, rows, runner, record["dense"]["miou"], progress)
    record["summary"] = summary(record)
    record["differences"] = differences(record, reference_method(record))
    return write_record(record, place, start, progress)


def _description(backbone: Backbone, config: PruneConfig, grid: Grid) -> dict[str, Any]:
    """Return model, options and grid for the record."""
    return {
        "pretrained": backbone.pretrained,
        "trained": backbone.trained,
        "calibration": config.calibration,
        "samples": config.pictures,
        "budget": config.budget,
        "protect": list(config.protect),
        "round_to": config.round_to,
        "seeds": grid.seeds,
        "ratios": list(grid.ratios),
        "methods": [method.name for method in grid.methods],
    }
