"""Prune a tower: load, group, rank, allocate, cut, recover, check, write."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ovsprune.baselines.imp_units import imp_selector
from ovsprune.calibration.fidelity import Fidelity
from ovsprune.calibration.pictures import enough
from ovsprune.core.clock import Clock
from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import Plan
from ovsprune.importance import criterion_name
from ovsprune.profiling.timing import thread_limit
from ovsprune.pruning.config import PruneConfig, config_of
from ovsprune.pruning.loading import open_model
from ovsprune.pruning.pipeline import Pipeline
from ovsprune.pruning.reprune import check_reprune
from ovsprune.pruning.saving import Saving
from ovsprune.report.card import card
from ovsprune.slim import SlimCheckpoint, SlimSpec, write
from ovsprune.slim.write import check_output

__all__ = ["PruneResult", "prune"]


@dataclass(eq=False)
class PruneResult:
    """Result of :func:`prune`.

    Attributes:
        spec: Contents of the checkpoint's ``config.json``.
        tower: Slim tower, in the modules of its own library.
        plan: Kept units of every group, in the coordinates of the base model.
        path: Directory of the checkpoint; None if nothing was written.
        settings: Configuration of the prune.
        achieved: Ratio that was reached, as a fraction of the budget's cost in the given model.
        fidelity: Agreement with the given model on held-out calibration images.
        seconds: Time per step.
        latency: With a latency budget ``dense_ms``, ``slim_ms``, ``measured_ratio`` (fraction of
            the time that was removed, measured in one run) and ``predicted_ms``; otherwise None.
        given: Slim checkpoint that was pruned again; None if the given model was dense.
    """

    spec: SlimSpec
    tower: nn.Module
    plan: Plan
    path: Path | None
    settings: PruneConfig
    achieved: float
    fidelity: Fidelity
    seconds: dict[str, float]
    latency: dict[str, float] | None = None
    given: SlimCheckpoint | None = None

    def record(self) -> dict[str, Any]:
        """Return the record that ``ovsprune prune --json`` prints."""
        given = None
        if self.given is not None:
            given = {"slim": str(self.given.path), **asdict(self.given.spec.slim)}
        return {
            "model": self.spec.base.model,
            "pretrained": self.spec.base.pretrained,
            "trained": self.spec.base.trained,
            "ratio": self.settings.ratio,
            "budget": self.settings.budget,
            "dense": asdict(self.spec.dense),
            "slim": asdict(self.spec.slim),
            "given": given,
            "achieved": self.achieved,
            "fidelity": asdict(self.fidelity),
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
    ratio: float | None = None,
    *,
    config: PruneConfig | None = None,
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
    """Prune the image tower of a CLIP-like model, without labels.

    Only the recovery ``distill`` and the method ``imp`` take gradient steps.

    Args:
        model: Name (see :func:`ovsprune.backbones.load_backbone`) or loaded backbone. A slim model
            is pruned again: ratio, floors and recovery then refer to the slim model; mask, hashes
            and dense costs of the result refer to its dense base model.
        ratio: Fraction of the tower's cost to remove, in (0, 1); by default that of ``config``.
        config: Configuration; by default ``PruneConfig(ratio=ratio)``.
        pretrained: Tag, file, or ``"none"``.
        activation: ``"gelu"`` or ``"quick_gelu"``, for a weights file that does not say which.
        device: Device of the towers.
        dtype: Type of the saved tower: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        threads: CPU threads; None leaves the choice to PyTorch.
        output: Directory to write, by default ``slim/<model>-r<ratio>``; ignored on a dry run.
        overwrite: Replace an existing output.
        dry_run: Plan and measure, but write nothing.
        text: Save the unmodified text tower too.
        progress: Progress reporter.
        options: Options of :class:`ovsprune.PruneConfig`, which win over those of ``config``:
            ``samples=64``, ``recovery="distill"``, ``distill_steps=200``.

    Raises:
        OptionError: A value is out of its range, or the model is an unstructured result, which
            cannot be pruned again.
        UnknownNameError: A name is unknown.
        BudgetError: The ratio cannot be reached.
        WeightsError: The weights cannot be loaded.
        DataError: The calibration images, or the table of layer times, cannot be used.
        OutputError: The output exists, or cannot be written.
    """
    settings = _config(ratio, config, options)
    progress = progress or Silent()
    saving = Saving.checked(
        model,
        f"slim/{{}}-r{settings.ratio:g}",  # {} is filled with the canonical name of the model
        output,
        partial(check_output, overwrite=overwrite),
        dtype=dtype,
        text=text,
        dry_run=dry_run,
    )
    clock = Clock()
    with thread_limit(threads):
        model = open_model(model, pretrained, activation, device, progress, clock)
        settings = settings.for_model(model)
        check_reprune(model, settings.method)
        _recommend_photographs(model, settings, progress)
        # None for every other method: the pipeline then ranks by criterion and allocation.
        selector = imp_selector(model, settings, progress, clock)
        done = Pipeline(model, settings, progress, clock, selector).run()
    result = PruneResult(
        spec=done.spec,
        tower=done.tower,
        plan=done.plan,
        # Written below, because the model card needs the record of this result.
        path=None,
        settings=settings,
        achieved=done.achieved,
        fidelity=done.fidelity,
        seconds=clock.seconds,  # the same dict, so it includes the write below
        latency=done.latency,
        given=model.slim,
    )
    if saving.directory is not None:
        result.spec = saving.with_command(result.spec, model, settings)
        result.path = write(
            saving.directory,
            result.spec,
            saving.tensors(model, result.tower),
            result.plan.kept,
            card=card(result.spec, result.record()),
            overwrite=overwrite,
        )
        clock.lap("write")
    return result


def _config(
    ratio: float | None, config: PruneConfig | None, options: dict[str, Any]
) -> PruneConfig:
    settings = config_of(ratio, config, options)
    if settings.method == "imp" and not settings.imp.structured:
        raise OptionError(
            "method='imp' prunes single weights: call ovsprune.baselines.imp_weights.imp, or give "
            "imp_structured=True to remove units"
        )
    return settings


def _recommend_photographs(model: Backbone, settings: PruneConfig, progress: Progress) -> None:
    """Note that photographs preserve more accuracy than the default calibration images."""
    # Random weights have no accuracy to preserve, and `tiny` is calibrated on scenes.
    if not model.trained or settings.calibration != "mixed":
        return
    most, count = enough("mixed"), settings.pictures
    more = f"{most} preserve more (--samples {most}), and " if count < most else ""
    progress.note(
        f"calibrating on {count} synthetic images: {more}photographs of your own preserve "
        "the most accuracy (--calibration DIR)"
    )
