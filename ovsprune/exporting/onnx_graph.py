"""A tower as an ONNX graph: made by torch's exporter, written, and run in onnxruntime.

What the libraries are asked for stands here alone; :mod:`ovsprune.jobs.export` is the job.
"""

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
"""Bytes of weights up to which the graph is one file: a protocol buffer has at most 2 GiB."""

_SMALLEST = 32
"""Least height and width that the exporter may count on: a patch of the coarsest CLIP ViT."""

Run = Callable[[Tensor], tuple[Tensor, Tensor]]


def require_libraries() -> None:
    """Import what an export needs.

    Raises:
        MissingLibraryError: Something is not installed, or its version does not import.
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
    """Both outputs of a tower, as a forward."""

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

    The batch is free. Weights of more than 1.5 GiB go into a second file, ``file`` with ``.data``
    behind its name.

    Args:
        tower: In evaluation mode, float32, on the CPU.
        size: Height and width in pixels; where they are free, the ones to trace with.
        file: Where to.
        dynamic: Whether height and width are free.
        opset: Of ONNX; None for the exporter's own choice.
        metadata: What the file says of itself, plain strings.

    Returns:
        The opset.

    Raises:
        ExportError: Torch cannot export the tower, or not with free sizes, or not to that opset.
    """
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if dynamic:
        free[2] = torch.export.Dim("height", min=_SMALLEST)
        free[3] = torch.export.Dim("width", min=_SMALLEST)
    try:
        with _silence(), torch.no_grad():
            program: Any = torch.onnx.export(
                _Outputs(tower).eval(),
                (torch.zeros(2, 3, *size),),
                dynamo=True,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes=(free,),
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # the exporter's own, torch.export's, and whatever a tower raises
        raise ExportError(_refusal(tower, size, dynamic, opset, error)) from error
    model = program.model
    found = int(model.opset_imports[""])
    if opset not in (None, found):
        raise ExportError(f"--opset {opset}: the exporter gave {found}; leave --opset out")
    _strip(model)
    model.metadata_props.update(metadata)
    weights = sum(p.numel() * p.element_size() for p in tower.parameters())
    program.save(str(file), external_data=weights > ONE_FILE)
    return found


def _strip(model: Any) -> None:
    """Take out what the exporter notes of the source: modules, and files of this machine."""
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
    # the exporter's message ends with a summary of what was raised inside
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    reason = lines[0][:300] if lines else type(error).__name__
    how = "with free height and width" if dynamic else f"at {size[0]}x{size[1]}"
    ways = ["leave --dynamic out and name a --size"] if dynamic else []
    ways += ["leave --opset out"] if opset is not None else []
    return (
        f"torch {torch.__version__} cannot export this tower of {tower.spec.family} {how} "
        f"({reason}); {', or '.join([*ways, 'try another version of torch'])}"
    )


def open_session(file: Path, threads: int) -> Run:
    """The graph in ``file``, run by onnxruntime on the CPU with ``threads`` threads.

    Raises:
        ExportError: onnxruntime does not take it.
    """
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(
            os.fspath(file), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its classes are of its own, below Exception
        lines = str(error).splitlines() or [type(error).__name__]
        raise ExportError(
            f"onnxruntime {runtime.__version__} does not take the graph ({lines[0][:300]}); try a "
            "newer one, or another --opset"
        ) from error

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        pooled, dense = session.run(list(OUTPUTS), {INPUT: images.numpy()})
        return torch.from_numpy(pooled), torch.from_numpy(dense)

    return run


def check_opset(opset: int | None) -> None:
    """Refuse an opset without what the graphs use.

    Raises:
        OptionError: It is below 18, or the installed onnx does not know it.
    """
    if opset is None:
        return
    newest = int(importlib.import_module("onnx").defs.onnx_opset_version())
    if not 18 <= opset <= newest:
        raise OptionError(f"--opset {opset}: give 18 to {newest}, what torch and onnx here can do")


@contextmanager
def _silence() -> Iterator[None]:
    """The exporter's remarks are for those who write exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
