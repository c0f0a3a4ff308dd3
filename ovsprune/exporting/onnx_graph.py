"""ONNX graph of a tower: export by torch, and inference in onnxruntime."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import ExportError, MissingLibraryError, OptionError
from ovsprune.slim.load import SlimTower

__all__ = [
    "INPUT",
    "OUTPUTS",
    "Run",
    "check_opset",
    "make_graph",
    "open_session",
    "require_libraries",
]

INPUT = "images"
OUTPUTS = ("pooled", "dense")

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")

ONE_FILE = 1536 * 2**20
"""Maximum bytes of weights for a single file; protocol buffers are limited to 2 GiB."""

_SMALLEST = 32
"""Minimum dynamic height and width: one patch of the coarsest CLIP ViT."""

Run = Callable[[Tensor], tuple[Tensor, Tensor]]


def require_libraries() -> None:
    """Check that the libraries for an export can be imported.

    Raises:
        MissingLibraryError: A library is not installed, or its import fails.
    """
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingLibraryError(
                f"an export to ONNX needs {', '.join(LIBRARIES)} ({name}: {error}); "
                "`pip install 'ovsprune[export]'`"
            ) from error


class _Outputs(nn.Module):
    """Module whose forward returns both outputs of a tower."""

    def __init__(self, tower: SlimTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.tower.outputs(images)


def make_graph(
    tower: SlimTower,
    size: tuple[int, int],
    file: Path,
    *,
    dynamic: bool,
    opset: int | None,
    metadata: Mapping[str, str],
) -> int:
    """Write ``tower`` as an ONNX graph from ``images`` to ``pooled`` and ``dense``.

    The batch dimension is dynamic. Weights of more than 1.5 GiB go into a second file with the
    suffix ``.data``.

    Args:
        tower: Tower in evaluation mode, float32, on the CPU.
        size: Height and width in pixels; for dynamic sizes, the example to trace with.
        file: File to write.
        dynamic: Make height and width dynamic.
        opset: ONNX opset; None for the exporter's default.
        metadata: Metadata of the file.

    Returns:
        Opset of the graph.

    Raises:
        ExportError: Torch cannot export the tower with these options.
    """
    dynamic_axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if dynamic:
        dynamic_axes[2] = torch.export.Dim("height", min=_SMALLEST)
        dynamic_axes[3] = torch.export.Dim("width", min=_SMALLEST)
    try:
        with _silence(), torch.no_grad():
            program: Any = torch.onnx.export(
                _Outputs(tower).eval(),
                # Two images: torch.export makes a dimension of size 1 in the example static.
                (torch.zeros(2, 3, *size),),
                dynamo=True,  # the TorchScript exporter has no `dynamic_shapes`
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes=(dynamic_axes,),
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # the exporter has many exception classes
        raise ExportError(_refusal(tower, size, dynamic, opset, error)) from error
    model = program.model
    written = int(model.opset_imports[""])
    # The exporter keeps its own opset, with a warning only, if the conversion fails.
    if opset not in (None, written):
        raise ExportError(f"--opset {opset}: the exporter wrote {written}; omit --opset")
    _strip(model)
    model.metadata_props.update(metadata)
    weights = sum(p.numel() * p.element_size() for p in tower.parameters())
    program.save(str(file), external_data=weights > ONE_FILE)
    return written


def _strip(model: Any) -> None:
    """Remove the exporter's notes on the source, which contain paths of this machine."""
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
        for value in (*graph.inputs, *graph.outputs):
            value.metadata_props.clear()


def _refusal(
    tower: SlimTower, size: tuple[int, int], dynamic: bool, opset: int | None, error: Exception
) -> str:
    """Return the message for a tower that torch cannot export."""
    # The exporter wraps the original error, whose first line is the most useful.
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    reason = lines[0][:300] if lines else type(error).__name__
    how = "with dynamic height and width" if dynamic else f"at {size[0]}x{size[1]}"
    ways = ["omit --dynamic and give a --size"] if dynamic else []
    ways += ["omit --opset"] if opset is not None else []
    return (
        f"torch {torch.__version__} cannot export this tower of {tower.spec.family} {how} "
        f"({reason}); {', or '.join([*ways, 'try another version of torch'])}"
    )


def open_session(file: Path, threads: int) -> Run:
    """Open the graph in ``file`` in onnxruntime on the CPU with ``threads`` threads.

    Raises:
        ExportError: onnxruntime cannot load the graph.
    """
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    try:
        session = runtime.InferenceSession(
            os.fspath(file), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's classes derive directly from Exception
        lines = str(error).splitlines() or [type(error).__name__]
        raise ExportError(
            f"onnxruntime {runtime.__version__} cannot load the graph ({lines[0][:300]}); try a "
            "newer version, or another --opset"
        ) from error

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        pooled, dense = session.run(list(OUTPUTS), {INPUT: images.numpy()})
        return torch.from_numpy(pooled), torch.from_numpy(dense)

    return run


def check_opset(opset: int | None) -> None:
    """Check that the opset is supported.

    Raises:
        OptionError: The opset is below 18 or unknown to the installed onnx.
    """
    if opset is None:
        return
    newest = int(importlib.import_module("onnx").defs.onnx_opset_version())
    # torch's exporter is written in the operators of opset 18.
    if not 18 <= opset <= newest:
        raise OptionError(f"--opset {opset}: give a value from 18 to {newest}")


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress warnings and log messages of the exporter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
