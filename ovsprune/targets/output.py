"""Output directory of ``ovsprune transfer``: writing it, and loading it into a new model.

It contains ``model.safetensors`` (tensors under the framework's names), ``transfer.json`` (slim
modules, and a report on every key) and ``lines.py`` (lines to add to the training script).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import CheckpointError, TargetError
from ovsprune.core.files import check_output, staged
from ovsprune.slim.attach import undo_on_error
from ovsprune.slim.read import file_digest, read_tensors
from ovsprune.slim.write import save_tensors
from ovsprune.targets.attached import add_guard, attach_cuts
from ovsprune.targets.convert import Converted
from ovsprune.targets.hooks import install
from ovsprune.targets.registry import TARGETS
from ovsprune.targets.surgery import Cut

__all__ = ["LINES", "RECORD", "STATE", "check_transfer_output", "load_into", "write_output"]

FORMAT = "ovsprune-transfer"
STATE, RECORD, LINES = "model.safetensors", "transfer.json", "lines.py"


def check_transfer_output(output: str | os.PathLike[str], overwrite: bool) -> Path:
    """Check that a transfer may be written to ``output``; return its full path.

    Raises:
        OutputError: The path exists and ``overwrite`` is false, or overwriting it would delete
            other files.
    """
    return check_output(
        output,
        overwrite=overwrite,
        kind="the output of `ovsprune transfer`",
        files=lambda path: {STATE, RECORD, LINES, *_listed(path)},
    )


def _listed(path: Path) -> set[str]:
    """Read the names of the additional files from the record in a directory."""
    try:
        document = json.loads((path / RECORD).read_text(encoding="utf-8"))
        return {str(name) for name in document["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def write_output(
    path: Path,
    converted: Converted,
    record: Mapping[str, Any],
    lines: str,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the output directory atomically.

    Args:
        path: Result of :func:`check_transfer_output`.
        converted: State and cuts.
        record: Report of the transfer, JSON data.
        lines: Lines to add to the training script.
        extra_files: Additional files, name to content.
    """
    with staged(path) as scratch:
        save_tensors(converted.state, scratch / STATE)
        document = {
            "format": FORMAT,
            "format_version": 1,
            **record,
            "complete": converted.complete,
            "depth": converted.depth,
            "cuts": [_cut_entry(cut) for cut in converted.cuts],
            "sha256": file_digest(scratch / STATE),
        }
        (scratch / RECORD).write_text(json.dumps(document, indent=1), encoding="utf-8")
        (scratch / LINES).write_text(lines, encoding="utf-8")
        for name, content in (extra_files or {}).items():
            (scratch / name).write_bytes(content)


def load_into(
    model: nn.Module, directory: str | os.PathLike[str], *, strict: bool = True
) -> list[str]:
    """Make a framework's freshly built, dense model slim and load a transferred checkpoint.

    Call this before the optimiser is created. All names and shapes are compared before a tensor is
    written; if something does not fit, the model is not changed.

    Args:
        model: The framework's model, built as its training script builds it.
        directory: Output directory of ``ovsprune transfer``.
        strict: Also refuse tensors outside the image tower that are missing or of another shape.

    Returns:
        Names of the tensors of ``model`` that the directory does not contain; they keep their
        values. Without a checkpoint of the framework, these are all tensors outside CLIP.

    Raises:
        CheckpointError: The directory is damaged, or is not an output of ``ovsprune transfer``.
        TargetError: ``model`` belongs to another framework than the directory, or is not dense.
    """
    path = Path(directory)
    document = _read_record(path)
    # complete: the transfer had a checkpoint of the framework, not CLIP alone
    state, complete = _read_state(path, document), bool(document["complete"])
    target = TARGETS.get(document["target"])
    target.towers(model)  # refuses another framework
    install(target.hooks)
    layout = target.layout(model.state_dict(), int(document["depth"]))
    cuts = tuple(_cut(entry, path / RECORD) for entry in document["cuts"])
    _check_dense(model, cuts)
    applied = attach_cuts(model, cuts)
    with undo_on_error(applied):
        current = model.state_dict()
        tower = {name for name in current if layout.canonical(name) is not None}
        # without the framework's checkpoint, its own positions are unknown and may differ
        free = {n for n in tower if not complete and layout.canonical(n) in layout.stays}
        required = set(current) if strict and complete else tower - free
        problems = _problems(current, state, required, tower, free, strict)
        if problems:
            raise TargetError(
                f"{path} does not fit this model: "
                f"{'; '.join(problems[:4])}{'; ...' if len(problems) > 4 else ''}. Build the "
                "framework with the configuration of the checkpoint that was transferred "
                "(strict=False lets parts outside the image tower differ)"
            )
    # without strict, tensors outside the tower may differ; they keep their values
    fits = {n for n in current.keys() & state.keys() if current[n].shape == state[n].shape}
    with torch.no_grad():
        for name in fits:
            # in place: tied parameters stay tied, and the device and dtype are the model's
            current[name].copy_(state[name])
    add_guard(model, document["target"], layout, cuts)  # refuses dense checkpoints from now on
    target.apply_compat(model)
    return sorted(current.keys() - fits)


def _check_dense(model: nn.Module, cuts: tuple[Cut, ...]) -> None:
    """Check that every module to cut exists and is dense."""
    for cut in cuts:
        try:
            module = model.get_submodule(cut.path)
        except AttributeError:
            raise TargetError(
                f"{type(model).__name__} has no {cut.path}; build the framework with the "
                "configuration of the checkpoint that was transferred"
            ) from None
        slim = hasattr(module, "kept_heads")  # an attribute of slim attentions alone
        if slim or (cut.heads is not None and getattr(module, "num_heads", 0) != cut.num_heads):
            state = "slim already" if slim else f"with {getattr(module, 'num_heads', 'no')} heads"
            raise TargetError(
                f"{cut.path} is {state}, expected a dense attention with {cut.num_heads} heads; "
                "load into a freshly built model"
            )


def _problems(
    current: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    required: set[str],
    tower: set[str],
    free: set[str],
    strict: bool,
) -> list[str]:
    """List names of ``required`` that ``state`` lacks, and shapes that differ from ``current``.

    Tensors in ``free`` may have any shape; without ``strict``, so may those outside ``tower``.
    """
    problems = [f"it lacks {name}" for name in sorted(required - set(state))]
    for name in sorted(state):
        if name not in current:
            problems += [f"the model has no {name}"] * strict
        elif name not in free and (strict or name in tower):
            shapes = tuple(state[name].shape), tuple(current[name].shape)
            if shapes[0] != shapes[1]:
                problems.append(f"{name} is {shapes[0]}, in the model {shapes[1]}")
    return problems


def _cut_entry(cut: Cut) -> dict[str, Any]:
    """Return the entry of a cut in the record; it has the widths but not the kept units."""
    if cut.heads is not None:
        return {"path": cut.path, "kept_heads": list(cut.heads), "num_heads": cut.num_heads}
    return {
        "path": cut.path,
        "outputs": None if cut.rows is None else len(cut.rows),
        "inputs": None if cut.columns is None else len(cut.columns),
    }


def _cut(entry: Any, file: Path) -> Cut:
    """Return a cut of the recorded widths. The choice of rows is irrelevant: values are loaded."""
    try:
        if "kept_heads" in entry:
            heads = tuple(int(head) for head in entry["kept_heads"])
            return Cut(path=str(entry["path"]), heads=heads, num_heads=int(entry["num_heads"]))
        widths = (entry["outputs"], entry["inputs"])
        rows, columns = (None if w is None else torch.arange(int(w)) for w in widths)
        return Cut(str(entry["path"]), rows=rows, columns=columns)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: an entry of cuts is not valid ({error})") from None


def _read_record(path: Path) -> dict[str, Any]:
    """Read and check ``transfer.json``."""
    file = path / RECORD
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); name a directory that `ovsprune transfer` "
            "wrote"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); transfer again") from None
    needed = ("format", "format_version", "target", "depth", "complete", "cuts", "sha256")
    missing = [key for key in needed if not isinstance(document, dict) or key not in document]
    if missing or document["format"] != FORMAT or document["format_version"] != 1:
        raise CheckpointError(
            f"{file} was not written by this version of `ovsprune transfer`"
            f"{' (it lacks ' + ', '.join(missing) + ')' if missing else ''}; transfer again"
        )
    return dict(document)


def _read_state(path: Path, document: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the tensors, after a comparison of the file with its recorded hash."""
    file = path / STATE
    if not file.is_file():
        raise CheckpointError(f"{path} has no {STATE}; copy the whole directory, or transfer again")
    if file_digest(file) != document["sha256"]:
        raise CheckpointError(f"{file} does not have the recorded SHA-256; copy it again")
    return read_tensors(file)
