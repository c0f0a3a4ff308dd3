"""``ovsprune spectrum``."""

from __future__ import annotations

from typing import Any

import click

from ovsprune.cli.options import MODEL, PATH, default_option
from ovsprune.cli.screen import Screen, output_options


@click.command("spectrum", short_help="Fit power laws to the spectra of layers.")
@MODEL
@click.option("--pretrained", help="Tag or file of the weights; 'none' for random ones.")
@default_option(
    "--fit",
    default="peak",
    help="Start of the tail: peak (peak of the histogram, OpenTrans), least-ks (Clauset et al.) or "
    "hill (median).",
)
@default_option(
    "--convolution",
    default="slices",
    help="Convolutions: one matrix per kernel position (slices), or a single one (unfolded).",
)
@click.option(
    "--layer",
    "layers",
    multiple=True,
    metavar="PATTERN",
    help="Only layers with matching names (may be repeated).",
)
@click.option(
    "--plot",
    type=PATH,
    metavar="FILE.png",
    help="Plot the spectra with their tails, and alpha by depth and kind.",
)
@output_options
def command(screen: Screen, **options: Any) -> None:
    """Fit a power law to the spectrum of every layer of an image tower.

    A small alpha means a heavy tail, which indicates a well trained layer.
    """
    from ovsprune.jobs.spectrum import spectrum
    from ovsprune.report.spectra import spectrum_summary

    record = spectrum(**options, progress=screen.progress)
    screen.finish(record, *spectrum_summary(record))
