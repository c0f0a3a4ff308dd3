"""``ovsprune export``."""

from __future__ import annotations

from typing import Any

import click

from ovsprune.cli.options import ACTIVATION, THREADS, batch_sizes, default_option, output
from ovsprune.cli.screen import Screen, output_options
from ovsprune.core.errors import OptionError


@click.command("export", short_help="Write a tower as a verified ONNX file.")
@click.argument("model", metavar="DIR")
@default_option("--format", default="onnx", help="onnx.")
@click.option(
    "--size", metavar="HxW", help="Height and width in pixels; by default the native ones."
)
@click.option("--dynamic", is_flag=True, help="Make height and width dynamic, too.")
@click.option("--opset", type=int, help="ONNX opset; by default the choice of torch's exporter.")
@batch_sizes((1, 2), "Batch size for the checks and the latency; may be repeated.")
@default_option(
    "--pairs", default=10, help="Alternating passes of torch and onnxruntime; 0 skips the latency."
)
@click.option("--pretrained", help="For a model name: a tag of open_clip, a file, or 'none'.")
@ACTIVATION
@THREADS
@output("File to write; by default export/MODEL.onnx.", "FILE")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@output_options
def command(screen: Screen, size: str | None, **options: Any) -> None:
    """Export the image tower of DIR, a slim directory or a model name, to ONNX.

    The graph maps `images` (preprocessed) to `pooled` and `dense`, for any batch size. Its outputs
    are compared with the tower's in onnxruntime before the file is written.
    """
    from ovsprune.jobs.export import export
    from ovsprune.report.tables import export_summary

    record = export(**options, size=_size(size), progress=screen.progress)
    screen.finish(record, *export_summary(record))


def _size(text: str | None) -> tuple[int, int] | None:
    """Parse ``"320x384"`` as height and width, ``"320"`` as a square."""
    if text is None:
        return None
    parts = text.lower().split("x")
    # isdecimal() refuses signs and empty parts, int() a size of 0.
    if not all(part.isdecimal() and int(part) for part in parts) or len(parts) > 2:
        raise OptionError(f"--size {text!r}: give height and width in pixels, as in 320x384")
    return int(parts[0]), int(parts[-1])
