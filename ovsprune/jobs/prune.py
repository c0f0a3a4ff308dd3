"""Prune: load, group, rank, allocate, cut, recover, check, write."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ovsprune import backbones
from ovsprune.backbones.open_clip_source import OWN_WEIGHTS
from ovsprune.calibration.fidelity import Fidelity
from ovsprune.calibration.pictures import enough
from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import Plan
from ovsprune.importance import criterion_name
from ovsprune.jobs.again import check_again
from ovsprune.jobs.clock import Clock
from ovsprune.jobs.measure import thread_limit
from ovsprune.jobs.settings import DTYPES, Settings, settings_of
from ovsprune.jobs.steps import Job
from ovsprune.report.card import card
from ovsprune.slim import SlimCheckpoint, SlimSpec, write
from ovsprune.slim.write import check_output

__all__ = ["PruneResult", "Settings", "cast", "command_of", "open_dense", "prune"]


@dataclass(eq=False)
class PruneResult:
    """What a prune gave.

    Attributes:
        spec: The slim checkpoint's spec.
        tower: The slim tower, in the family's own modules.
        plan: Kept units of every group, in the coordinates of the base.
        path: Where it was written, or None.
        achieved: Ratio that was reached, of the budget's cost in the model that was given.
        fidelity: To the model that was given, on held-out calibration pictures.
        seconds: Time by step.
        latency: For a latency budget, ``dense_ms``, ``slim_ms`` and ``measured_ratio`` (the share
            of the time that is really gone, in one run), and ``predicted_ms``; None otherwise.
        given: The slim checkpoint that was pruned again; None where the model was dense.
    """

    spec: SlimSpec
    tower: nn.Module
    plan: Plan
    path: Path | None
    settings: Settings
    achieved: float
    fidelity: Fidelity
    seconds: dict[str, float]
    latency: dict[str, float] | None = None
    given: SlimCheckpoint | None = None

    def record(self) -> dict[str, Any]:
        """What ``ovsprune prune --json`` prints."""
        return {
            "model": self.spec.base.model,
            "pretrained": self.spec.base.pretrained,
            "trained": self.spec.base.trained,
            "ratio": self.settings.ratio,
            "budget": self.settings.budget,
            "dense": {"macs": self.spec.dense.macs, "params": self.spec.dense.params},
            "slim": {"macs": self.spec.slim.macs, "params": self.spec.slim.params},
            "given": None if self.given is None else _described(self.given),
            "achieved": self.achieved,
            "fidelity": {
                "cosine": self.fidelity.cosine,
                "relative_error": self.fidelity.relative_error,
            },
            "latency": self.latency,
            "criterion": criterion_name(self.settings.criterion),
            "allocation": self.settings.allocation,
            "recovery": self.settings.recovery,
            "rounds": self.settings.rounds,
            "seed": self.settings.seed,
            **self.settings.described(),
            "widths": {name: int(kept.numel()) for name, kept in self.plan.kept.items()},
            "seconds": round(sum(self.seconds.values()), 3),
            "timings": {step: round(value, 3) for step, value in self.seconds.items()},
            "output": None if self.path is None else str(self.path),
        }


def prune(
    model: str | Backbone,
    ratio: float,
    *,
    pretrained: str | None = None,
    activation: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    text: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a CLIP-like image tower once, without labels.

    No gradient step is taken but by the recovery ``distill`` and the method ``imp``.

    Args:
        model: A name (see :func:`ovsprune.backbones.load`), or a loaded backbone. A slim one is
            pruned again: it is what the ratio, the floors and the recovery go by, and its base what
            the result's mask, hashes and dense costs count from.
        ratio: Share of the cost of the given tower that goes, in (0, 1).
        pretrained: Tag, file, or ``"none"``.
        activation: For a bare file.
        device: Where the towers run.
        dtype: Of the saved tower: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        threads: CPU threads; None leaves torch's own choice.
        output: Directory to write, by default ``slim/<model>-r<ratio>``; ignored on a dry run.
        overwrite: Replace an existing output.
        dry_run: Plan and measure, write nothing.
        text: Save the untouched text tower too.
        progress: Is told how the work goes.
        options: Fields of :class:`Settings`: ``budget`` ("macs", "params", "latency"),
            ``calibration`` (a folder, "procedural", "leaves", "mixed", or "auto", which is
            "procedural" for ``tiny`` and "mixed" for other towers), ``samples`` (256; of "leaves"
            and "mixed" 1024), ``criterion`` (a name, or an object such as
            :class:`~ovsprune.importance.taylor.Taylor` with a loss of your own), ``allocation``,
            ``recovery``, ``protect`` (patterns of group names),
            ``round_to``, ``floor`` ("PATTERN=N", fewest units that stay), ``uniform_heads``,
            ``prune_depth`` (whole attentions and MLPs may go), ``latency_table`` (a file),
            ``seed``, ``batch_size``, ``ridge`` (relative to the mean variance), ``probe``
            (pictures for curves), ``rounds``, ``statistics`` (a file), ``distill`` (a
            :class:`~ovsprune.core.protocols.Distillation`), ``method`` ("default", or "imp" with
            ``imp_structured=True``; see :mod:`ovsprune.jobs.imp`), ``imp_steps``, ``imp_rewind``,
            ``imp_lr``, ``imp_rounds`` (a file).

    Raises:
        OptionError: A value is out of its range, or the model is an unstructured result, which
            cannot be pruned again.
        UnknownNameError: A name is unknown.
        BudgetError: The ratio is out of reach.
        WeightsError: The weights cannot be had.
        DataError: The calibration pictures, or the table of layer times, cannot be used.
        OutputError: The output exists, or cannot be written.
    """
    settings = settings_of(ratio, options)
    if settings.method == "imp" and not settings.imp_structured:
        raise OptionError(
            "method='imp' prunes single weights: call ovsprune.jobs.imp.imp, or give "
            "imp_structured=True for units"
        )
    if dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    progress = progress or Silent()
    target = _target(model, ratio, output, overwrite, dry_run)
    clock = Clock()
    with thread_limit(threads):
        model = _open(model, pretrained, activation, device, progress, clock)
        settings = settings.for_model(model)
        check_again(model, settings)
        if model.trained and settings.calibration == "mixed":
            most, count = enough("mixed"), settings.pictures
            more = f"{most} keep more (--samples {most}), and " if count < most else ""
            progress.note(
                f"calibrating on {count} made pictures: {more}photographs of your own keep most "
                "(--calibration DIR)"
            )
        done = Job(model, settings, progress, clock).run()
    result = PruneResult(
        done.spec,
        done.tower,
        done.plan,
        None,
        settings,
        done.achieved,
        done.fidelity,
        clock.seconds,
        done.latency,
        model.slim,
    )
    if target is not None:
        state = {f"visual.{k}": v for k, v in result.tower.state_dict().items()}
        tensors = cast({**state, **(model.text if text else {})}, dtype)
        command = command_of(model, settings, dtype, text)
        result.spec = replace(
            result.spec, provenance={**result.spec.provenance, "command": command}
        )
        result.path = write(
            target,
            result.spec,
            tensors,
            dict(result.plan.kept),
            card=card(result.spec, result.record()),
            overwrite=overwrite,
        )
        clock.lap("write")
    return result


def open_dense(
    model: str | Backbone,
    pretrained: str | None,
    activation: str | None,
    device: str,
    progress: Progress,
    clock: Clock,
) -> Backbone:
    """The dense model that is to be pruned, loaded if it is not.

    Raises:
        OptionError: It is pruned already.
        WeightsError: The weights cannot be had.
    """
    model = _open(model, pretrained, activation, device, progress, clock)
    if model.slim is not None:
        raise OptionError(
            f"{model.slim.path} is slim already: prune {model.name} again with a higher ratio"
        )
    return model


def _open(
    model: str | Backbone,
    pretrained: str | None,
    activation: str | None,
    device: str,
    progress: Progress,
    clock: Clock,
) -> Backbone:
    if isinstance(model, str):
        with progress.stage(f"loading {model}", 1) as advance:
            model = backbones.load(
                model, pretrained=pretrained, activation=activation, device=device
            )
            advance(1)
        clock.lap("load")
    for note in model.notes:
        progress.note(note)
    if not model.trained:
        progress.note(f"{model.name} has random weights: the result is marked as untrained")
    return model


def cast(state: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors as ``dtype``, apart from whole numbers (what a norm has counted).

    Raises:
        OptionError: A value is too large for it.
    """
    found = {
        name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    for name, tensor in found.items():
        if not tensor.isfinite().all() and state[name].isfinite().all():
            raise OptionError(
                f"--dtype {dtype} cannot hold {name}, whose largest value is "
                f"{float(state[name].abs().max()):.3g}; take bfloat16 or float32"
            )
    return found


_UNSAID = ("ratio", "ridge", "probe", "distill", "statistics", "imp_rounds")
"""Settings that are said otherwise, that no option is for, or that name files of this machine."""


def command_of(model: Backbone, settings: Settings, dtype: str, text: bool) -> str:
    """The command line that does the same, without the options that are the defaults."""
    name = model.name if model.slim is None else model.slim.path.resolve().name
    words = ["ovsprune", "prune", "--model", name, "--ratio", f"{settings.ratio:g}"]
    if model.slim is None and model.pretrained not in OWN_WEIGHTS:
        words += ["--pretrained", model.pretrained or "none"]
    defaults = Settings(ratio=settings.ratio).for_model(model)
    for name, value, default in [
        *_values("", settings, defaults),
        *_values("distill_", settings.distill, defaults.distill),
    ]:
        if name in _UNSAID or value == default:
            continue
        if name == "criterion" and not isinstance(value, str):
            continue  # No command line can give an object; the note below says so.
        option = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, tuple) else (value,):
            words += [option] if one is True else [option, str(one)]
    if dtype != "float32":
        words += ["--dtype", dtype]
    line = shlex.join([*words, *([] if text else ["--no-text"])])
    if not isinstance(settings.criterion, str):
        line += f"  # criterion: {criterion_name(settings.criterion)}, an object given from Python"
    return line


def _described(given: SlimCheckpoint) -> dict[str, Any]:
    """What a record says of the slim model that was pruned again."""
    slim = given.spec.slim
    return {"slim": str(given.path), "macs": slim.macs, "params": slim.params}


def _values(prefix: str, chosen: Any, defaults: Any) -> list[tuple[str, Any, Any]]:
    """Name, value and default of every field of a dataclass."""
    names = [field.name for field in fields(chosen)]
    return [(prefix + name, getattr(chosen, name), getattr(defaults, name)) for name in names]


def _target(
    model: str | Backbone,
    ratio: float,
    output: str | Path | None,
    overwrite: bool,
    dry_run: bool,
) -> Path | None:
    """Where to write, checked before the work begins."""
    if dry_run or (output is None and isinstance(model, Backbone)):
        return None
    name = model if isinstance(model, str) else model.name
    target = Path(output) if output else Path("slim") / f"{backbones.canonical(name)}-r{ratio:g}"
    check_output(target, overwrite=overwrite)
    return target
