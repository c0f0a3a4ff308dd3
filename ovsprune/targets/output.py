"""What ``ovsprune transfer`` writes, and putting it into a framework's fresh model.

A directory with ``model.safetensors`` (the framework's names), ``transfer.json`` (which modules are
slim, and the account of every key) and ``lines.py`` (what to add to the training script).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ovsprune.core.errors import CheckpointError, TargetError
from ovsprune.core.files import check_output, staged
from ovsprune.slim.attach import undo_on_error
from ovsprune.slim.read import file_digest
from ovsprune.slim.write import save_tensors
from ovsprune.targets.attached import add_guard, attach_cuts
from ovsprune.targets.convert import Converted
from ovsprune.targets.hooks import install
from ovsprune.targets.layout import Layout
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
        kind="what `ovsprune transfer` wrote",
        files=lambda path: {STATE, RECORD, LINES, *_listed(path)},
    )


def _listed(path: Path) -> set[str]:
    """Files that the record in a directory says were written beside the weights."""
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
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write the directory, so that afterwards there is all of it or nothing new.

    Args:
        path: From :func:`check_transfer_output`.
        converted: State and cuts.
        record: The account of the transfer, plain JSON.
        lines: What to add to the training script.
        beside: More files, plain name to content.

    Raises:
        OutputError: It cannot be written (a full disk, ...); nothing was changed.
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
        for name, content in (beside or {}).items():
            (scratch / name).write_bytes(content)


def load_into(
    model: nn.Module, directory: str | os.PathLike[str], *, strict: bool = True
) -> list[str]:
    """Make a framework's freshly built, dense model slim and load a transferred checkpoint.

    Call it before the optimiser is made. Everything is compared before a tensor is written; if
    something does not fit, the model is as it was.

    Args:
        model: The framework's model, built as its own script builds it.
        directory: What ``ovsprune transfer`` wrote.
        strict: Refuse if anything outside the image tower is missing or of another shape, too.

    Returns:
        Tensors of ``model`` that the directory does not hold, which keep their values; without a
        framework's checkpoint, that is all but CLIP.

    Raises:
        CheckpointError: The directory is damaged, or no output of ``ovsprune transfer``.
        TargetError: ``model`` is not the framework that it was written for, or not dense.
    """
    from ovsprune.targets import TARGETS

    path = Path(directory)
    document = _read_record(path)
    state = _read_state(path, document)
    target = TARGETS.get(document["target"])
    target.towers(model)
    install(target.hooks)
    layout = target.layout(model.state_dict(), int(document["depth"]))
    cuts = tuple(_cut(entry, path / RECORD) for entry in document["cuts"])
    _check_dense(model, cuts)
    applied = attach_cuts(model, cuts)
    with undo_on_error(applied):
        own = model.state_dict()
        tower = {name for name in own if layout.canonical(name) is not None}
        # CLIP alone knows nothing of what the framework makes of its positions
        free = set() if document["complete"] else {n for n in tower if _stays(layout, n)}
        _compare(own, state, tower - free, free, path, strict, bool(document["complete"]))
    with torch.no_grad():
        for name in own.keys() & state.keys():
            if own[name].shape == state[name].shape:
                own[name].copy_(state[name])
    add_guard(model, document["target"], layout, cuts)
    target.apply_compat(model)
    return sorted(n for n in own if n not in state or own[n].shape != state[n].shape)


def _stays(layout: Layout, name: str) -> bool:
    return layout.canonical(name) in layout.stays


def _check_dense(model: nn.Module, cuts: tuple[Cut, ...]) -> None:
    for cut in cuts:
        try:
            module = model.get_submodule(cut.path)
        except AttributeError:
            raise TargetError(
                f"{type(model).__name__} has no {cut.path}; build the framework as it was built "
                "for the checkpoint that was transferred"
            ) from None
        slim = hasattr(module, "kept_heads")
        if slim or (cut.heads is not None and getattr(module, "num_heads", 0) != cut.num_heads):
            state = "slim already" if slim else f"with {getattr(module, 'num_heads', 'no')} heads"
            raise TargetError(
                f"{cut.path} is {state}, expected a dense attention with {cut.num_heads} heads; "
                "load into a freshly built model"
            )


def _compare(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    tower: set[str],
    free: set[str],
    path: Path,
    strict: bool,
    complete: bool,
) -> None:
    """Compare names and shapes.

    Raises:
        TargetError: Something does not fit.
    """
    wanted = set(own) if strict and complete else tower
    problems = [f"it lacks {name}" for name in sorted(wanted - set(state))]
    for name in sorted(state):
        if name not in own:
            if strict:
                problems.append(f"the model has no {name}")
        elif name in free:
            continue
        elif own[name].shape != state[name].shape and (strict or name in tower):
            shapes = tuple(state[name].shape), tuple(own[name].shape)
            problems.append(f"{name} is {shapes[0]}, in the model {shapes[1]}")
    if problems:
        raise TargetError(
            f"{path} does not fit this model: "
            f"{'; '.join(problems[:4])}{'; ...' if len(problems) > 4 else ''}. Build the framework "
            "with the configuration of the checkpoint that was transferred (strict=False lets "
            "parts outside the image tower differ)"
        )


def _cut_entry(cut: Cut) -> dict[str, Any]:
    if cut.heads is not None:
        return {"path": cut.path, "kept_heads": list(cut.heads), "num_heads": cut.num_heads}
    return {
        "path": cut.path,
        "outputs": None if cut.rows is None else len(cut.rows),
        "inputs": None if cut.columns is None else len(cut.columns),
    }


def _cut(entry: Any, file: Path) -> Cut:
    """A cut whose widths are right; which rows stay does not matter, since they are loaded."""
    try:
        if "kept_heads" in entry:
            heads = tuple(int(head) for head in entry["kept_heads"])
            return Cut(str(entry["path"]), heads, int(entry["num_heads"]))
        widths = (entry["outputs"], entry["inputs"])
        rows, columns = (None if w is None else torch.arange(int(w)) for w in widths)
        return Cut(str(entry["path"]), rows=rows, columns=columns)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: an entry of cuts is not valid ({error})") from None


def _read_record(path: Path) -> dict[str, Any]:
    file = path / RECORD
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); name a directory that `ovsprune transfer` "
            "wrote"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}); transfer again") from None
    needed = ("format", "format_version", "target", "depth", "complete", "cuts", "sha256")
    missing = [key for key in needed if not isinstance(document, dict) or key not in document]
    if missing or document["format"] != FORMAT or document["format_version"] != 1:
        raise CheckpointError(
            f"{file} is not what this ovsprune's transfer writes"
            f"{' (it lacks ' + ', '.join(missing) + ')' if missing else ''}; transfer again"
        )
    return dict(document)


def _read_state(path: Path, document: Mapping[str, Any]) -> dict[str, Tensor]:
    file = path / STATE
    if not file.is_file():
        raise CheckpointError(f"{path} has no {STATE}; copy the whole directory, or transfer again")
    if file_digest(file) != document["sha256"]:
        raise CheckpointError(f"{file} is not the file that was written; copy it again")
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is no safetensors file: {error}") from None
