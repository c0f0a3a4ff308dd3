"""Transfer: put a slim tower into a framework's live model, or into its checkpoint on disk."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.unpickle.folder import read_folder, sibling_files
from ovsprune.core.unpickle.foreign import Foreign, read_foreign
from ovsprune.slim import SlimCheckpoint, SlimTower, read
from ovsprune.slim.attach import undo_on_error
from ovsprune.slim.read import newest_slim
from ovsprune.targets import TARGETS, Attached
from ovsprune.targets.convert import Converted
from ovsprune.targets.key_map import depth_of
from ovsprune.targets.output import check_transfer_output, write_output
from ovsprune.targets.recognise import recognise

if TYPE_CHECKING:
    from ovsprune.pruning.repair_target import TowerRepair

__all__ = ["read_slim", "transfer"]

_PathLike = str | os.PathLike[str]
_Slim = SlimCheckpoint | SlimTower | _PathLike | None


@overload
def transfer(
    model: nn.Module,
    slim: _Slim = ...,
    target: str = ...,
    *,
    weights: str = ...,
    force: bool = ...,
    example: Any = ...,
    calibration: _PathLike | None = ...,
    samples: int | None = ...,
    recovery: str = ...,
    progress: Progress | None = ...,
) -> Attached: ...


@overload
def transfer(
    model: None = ...,
    slim: _Slim = ...,
    target: str = ...,
    *,
    weights: str = ...,
    checkpoint: _PathLike | None = ...,
    output: _PathLike | None = ...,
    overwrite: bool = ...,
    force: bool = ...,
    dry_run: bool = ...,
    calibration: _PathLike | None = ...,
    samples: int | None = ...,
    recovery: str = ...,
    policy: str | None = ...,
    fraction: float = ...,
    progress: Progress | None = ...,
) -> dict[str, Any]: ...


def transfer(
    model: nn.Module | None = None,
    slim: _Slim = None,
    target: str = "auto",
    *,
    weights: str = "auto",
    checkpoint: _PathLike | None = None,
    output: _PathLike | None = None,
    overwrite: bool = False,
    force: bool = False,
    dry_run: bool = False,
    example: Any = None,
    calibration: _PathLike | None = None,
    samples: int | None = None,
    recovery: str = "closed-form",
    policy: str | None = None,
    fraction: float = 0.5,
    progress: Progress | None = None,
) -> Attached | dict[str, Any]:
    """Put a slim tower into a framework's live model, or into its checkpoint on disk.

    The tower of a live ``model`` is replaced in place; create the optimiser afterwards. Without a
    model, a directory is written: the framework's checkpoint, the lines to add to its training
    script, and a report of every key.

    Args:
        model: The framework's live model, dense, or None to work on disk.
        slim: The slim checkpoint (from :func:`ovsprune.read`), the slim tower (from
            :func:`ovsprune.load`), or a directory; by default the newest under ``slim/``.
        target: Name of a target; ``"auto"`` recognises a live model.
        weights: ``"slim"`` (the framework uses the frozen base CLIP), ``"target"`` (it finetuned
            CLIP: cut its own weights by the mask), or ``"auto"`` (by the base model's hashes).
        checkpoint: On disk: the framework's dense checkpoint (.pth, .safetensors, or a folder that
            ``save_pretrained`` wrote); without one, CLIP alone is written.
        output: On disk: directory to write, ``transfer/<target>-<slim>`` by default.
        overwrite: Replace an output that exists.
        force: Take a slim checkpoint whose base had random weights.
        dry_run: On disk: check and report, but write nothing.
        example: Live: input of the model's forward pass (an argument, a tuple of them, or a
            mapping by name), on which MACs are counted; by default the target's example input.
        calibration: If the framework's own weights are cut by the mask (``weights="target"``),
            unlabelled images to repair its tower on: a folder, ``"procedural"``,
            ``"leaves"`` or ``"mixed"``. Needs the dependencies of ``pip install ovsprune``.
        samples: Number of calibration images; by default 256, of ``"leaves"`` and ``"mixed"`` 1024.
        recovery: Method of the repair, as in :func:`ovsprune.prune`.
        policy: On disk: a policy of :func:`ovsprune.schedule`; the lines to add then make its
            plan. With a live model, call :func:`ovsprune.schedule` on it.
        fraction: Fraction of the tower's layers that it trains, in [0, 1].
        progress: Progress reporter.

    Returns:
        With a model, the report: replaced modules, protected parts, and the MACs and parameters
        of the full model before and after. ``print`` shows it, and its ``detach()`` restores the
        original, bit for bit. On disk, a record with
        ``target, slim, weights, reason, replaced, kept, dropped, output, schedule{policy,
        fraction}, lines, notes``.

    Raises:
        UnknownNameError: There is no such target or policy.
        TargetError: The framework cannot take the slim tower; nothing was changed.
        CheckpointError: A checkpoint is missing or damaged.
        OutputError: The output exists or cannot be written.
        OptionError: ``weights`` is unknown, an argument belongs to the other mode, the model cannot
            be run on ``example``, or calibration images are given although the slim weights are
            used, which the pruning already repaired; nothing was changed.
        DataError: The calibration images cannot be used.
    """
    progress = progress or Silent()
    if target != "auto":
        TARGETS.get(target)  # an unknown name is reported before a file is read
    repair = None if calibration is None else _repair_of(str(calibration), samples, recovery)
    plan = None if policy is None else _scheduled(policy, fraction)
    if model is not None:
        disk = {"checkpoint": checkpoint, "output": output, "policy": policy}
        unusable = [name for name, value in disk.items() if value is not None]
        unusable += ["dry_run"] * dry_run  # nothing if it is False
        if unusable:
            names = ", ".join(unusable)
            raise OptionError(f"{names} cannot be used with a live model; leave it out")
        name = target if target != "auto" else recognise(model)
        if name is None:
            raise TargetError(
                f"{type(model).__name__} belongs to none of the known frameworks "
                f"({', '.join(TARGETS)}); if the model is wrapped, pass model.module, or name the "
                "target"
            )
        return _live(
            model, read_slim(slim, progress), name, weights, force, example, repair, progress
        )
    if example is not None:
        raise OptionError("example is only used with a live model; leave it out on disk")
    if target == "auto":
        raise OptionError(
            f"target 'auto' needs a live model; on disk name one of {', '.join(TARGETS)}"
        )
    return _on_disk(
        read_slim(slim, progress),
        target,
        weights,
        checkpoint,
        output=output,
        overwrite=overwrite,
        force=force,
        dry_run=dry_run,
        repair=repair,
        plan=plan,
        progress=progress,
    )


def _repair_of(calibration: str, samples: int | None, recovery: str) -> TowerRepair:
    """Build the repair; it needs libraries that an environment of a framework may lack."""
    try:
        from ovsprune.pruning.repair_target import TowerRepair
    except ImportError as error:
        raise OptionError(
            f"a repair needs the full installation, pip install ovsprune ({error}); leave out "
            "calibration, or run the transfer in an environment that has it"
        ) from None
    return TowerRepair(calibration, samples, recovery)


def _live(
    model: nn.Module,
    slim: SlimCheckpoint,
    name: str,
    weights: str,
    force: bool,
    example: Any,
    repair: TowerRepair | None,
    progress: Progress,
) -> Attached:
    """Attach the slim tower, and count the costs of the full model before and after."""
    target = TARGETS.get(name)
    choice = target.check(model, slim, weights=weights, force=force)  # refuse before the slow steps
    if repair is not None:
        # the repaired weights take the place of the slim ones
        names = model.state_dict()
        state = target.layout(names, depth_of(slim)).tower_state(names)
        slim, reason = repair(slim, choice, state, progress)
        weights, choice = "slim", ("target", reason)
    # MACs are counted on the input of the caller, else on the target's
    data = target.example(model) if example is None else example
    before, counted_on = None, "nothing, since the target has no input for it; pass example=..."
    with progress.stage(f"transfer to {name}", 3) as advance:
        if data is not None:
            from ovsprune.profiling.model_macs import describe, whole_macs

            try:
                before = whole_macs(model, data, target.prepare)
                counted_on = describe(data)
            except OptionError as error:
                if example is not None:  # the caller asked for this input
                    raise
                counted_on = f"nothing: {error}"
        advance(1)
        attached = target.attach(model, slim, weights=weights, force=force)
        attached.weights, attached.reason = choice
        attached.counted_on = counted_on
        advance(1)
        if before is not None:
            with undo_on_error(attached):
                attached.macs_after = whole_macs(model, data, target.prepare)
                attached.macs_before = before
        advance(1)
    return attached


def _on_disk(
    slim: SlimCheckpoint,
    name: str,
    weights: str,
    checkpoint: _PathLike | None,
    *,
    output: _PathLike | None,
    overwrite: bool,
    force: bool,
    dry_run: bool,
    repair: TowerRepair | None,
    plan: dict[str, Any] | None,
    progress: Progress,
) -> dict[str, Any]:
    """Convert the framework's checkpoint and write the output directory."""
    target = TARGETS.get(name)
    # A dry run writes nothing, so the output may exist.
    directory = check_transfer_output(
        output or Path("transfer") / f"{name}-{slim.path.resolve().name}", overwrite or dry_run
    )
    with progress.stage(f"transfer to {name}", 3) as advance:
        foreign = None
        if checkpoint is not None:
            path = Path(checkpoint)
            foreign = read_folder(path) if path.is_dir() else read_foreign(path)
        advance(1)
        state = None if foreign is None else foreign.tensors
        # This conversion decides whose weights are used, which a repair must know.
        converted = target.convert(state, slim, weights=weights, force=force)
        if repair is not None:
            tower = target.layout(state, depth_of(slim)).tower_state(state or {})
            choice = converted.weights, converted.reason
            slim, reason = repair(slim, choice, tower, progress)
            # `slim` now holds the framework's own repaired weights, which the record says.
            converted = target.convert(state, slim, weights="slim", force=force)
            converted = replace(converted, weights="target", reason=reason)
        advance(1)
        extra = {} if checkpoint is None else sibling_files(Path(checkpoint), target.files)
        lines = target.lines(str(directory)) + ("" if plan is None else _PLAN.format(**plan))
        record = {
            "target": name,
            "slim": str(slim.path),
            "weights": converted.weights,
            "reason": converted.reason,
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "replaced": dict(converted.replaced),
            "kept": dict(converted.kept),
            **_unused(converted, foreign),
            "output": None if dry_run else str(directory),
            "schedule": plan,
            "lines": lines,
            "files": sorted(extra),
        }
        if not dry_run:
            write_output(directory, converted, record, lines, extra)
        advance(1)
    return record


_PLAN = """
# Schedule: which layers of the tower train at each step. Add this after the weights were loaded and
# before the optimiser is created. `model` is the framework's model, `total_steps` the number of
# optimiser steps. ovsprune.schedules.loops has hooks for the training loops of five libraries.

import ovsprune

plan = ovsprune.schedule(
    model, policy={policy!r}, fraction={fraction!r}, total_steps=total_steps
)
# optimizer = ...; plan.bind(optimizer); call plan.step(i) before step i
"""


def _scheduled(policy: str, fraction: float) -> dict[str, Any]:
    """Check a schedule; return its entry in the record."""
    from ovsprune.jobs.schedule import checked
    from ovsprune.schedules import POLICIES

    POLICIES.get(policy)
    # Only the training script knows the number of steps; 1 passes the check.
    checked(1, fraction, None, None, "follow")
    return {"policy": policy, "fraction": fraction}


def _unused(converted: Converted, foreign: Foreign | None) -> dict[str, Any]:
    """Return the entries ``dropped`` and ``notes``, with those of the framework's checkpoint."""
    dropped, notes = dict(converted.dropped), list(converted.notes)
    if foreign is not None:
        reason = "not a tensor of the model (an optimiser's state has dense shapes)"
        dropped |= dict.fromkeys(foreign.other, reason)
        if foreign.inert:
            notes.append(f"not read in the checkpoint: {', '.join(foreign.inert)}")
    return {"dropped": dropped, "notes": notes}


def read_slim(slim: _Slim, progress: Progress) -> SlimCheckpoint:
    """Return the slim checkpoint; by default read the newest one."""
    if isinstance(slim, SlimCheckpoint):
        return slim
    if isinstance(slim, SlimTower):
        return slim.checkpoint()
    if slim is None:
        slim = newest_slim()
        progress.note(f"no slim checkpoint was named; using the newest, {slim}")
    return read(slim)
