"""``ovsprune evaluate``."""

from __future__ import annotations

from typing import Any

import click

from ovsprune.cli.options import ACTIVATION, MODEL, PRETRAINED, compute_options, scoring_options
from ovsprune.cli.screen import Screen, output_options


@click.command("evaluate", short_help="Measure zero-shot segmentation (mIoU).")
@MODEL
@click.option(
    "--data",
    metavar="DIR",
    help="Folder with images/, labels/ and classes.json, or 'scenes' (the default for tiny).",
)
@PRETRAINED
@ACTIVATION
@scoring_options
@click.option(
    "--last-block",
    metavar="NAME",
    help="Training-free attention in the last block of a ViT: maskclip, sclip, clearclip, qq, kk, "
    "vv or qk (as trained).",
)
@click.option("--limit", type=int, help="Use only the first N images.")
@compute_options(batch_size=True)
@output_options
def command(screen: Screen, **options: Any) -> None:
    """Measure zero-shot dense segmentation: mIoU on a folder of labelled images."""
    from ovsprune.jobs.evaluate import evaluate
    from ovsprune.report.tables import evaluate_summary

    record = evaluate(**options, progress=screen.progress)
    screen.finish(record, *evaluate_summary(record))
