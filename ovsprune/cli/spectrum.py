"""``ovsprune spectrum``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ovsprune.cli.screen import Screen, output_options


@click.command("spectrum", short_help="How heavy the tails of the layers' spectra are.")
@click.option("--model", required=True, help="A model name or a slim directory.")
@click.option("--pretrained", help="Tag or file of the weights; 'none' for random ones.")
@click.option(
    "--fit",
    default="peak",
    show_default=True,
    help="Where the tail begins: peak (at the histogram's peak, OpenTrans), least-ks (Clauset et "
    "al.) or hill (at the middle).",
)
@click.option(
    "--convolution",
    default="slices",
    show_default=True,
    help="A convolution is one matrix a tap (slices), or one in all (unfolded).",
)
@click.option(
    "--layer",
    "layers",
    multiple=True,
    metavar="PATTERN",
    help="Only layers of such names (may be repeated).",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Draw the spectra with their tails, and alpha by depth and kind.",
)
@output_options
def command(screen: Screen, **options: Any) -> None:
    """Fit a power law to the spectrum of every layer of an image tower.

    A small alpha is a heavy tail, the mark of a layer that is trained well.
    """
    from ovsprune.jobs.spectrum import spectrum
    from ovsprune.report.spectra import spectrum_summary

    record = spectrum(**options, progress=screen.progress)
    screen.finish(record, *spectrum_summary(record))
