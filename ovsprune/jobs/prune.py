"""Prune: load, group, rank, allocate, cut, recover, check, write."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune import backbones
from ovsprune.allocation import ALLOCATIONS
from ovsprune.backbones import FAMILIES
from ovsprune.calibration.fidelity import Fidelity, fidelity
from ovsprune.calibration.pictures import calibration_hash, open_pictures
from ovsprune.calibration.survey import Survey
from ovsprune.core.errors import BudgetError, OptionError
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import (
    AllocationContext,
    Allocator,
    Backbone,
    Budget,
    Criterion,
    Family,
    Pictures,
    Recovery,
    RecoveryContext,
    Seed,
)
from ovsprune.core.records import Costs, Group, Plan
from ovsprune.graph.costs import measure
from ovsprune.graph.cut import cut
from ovsprune.graph.groups import find_groups
from ovsprune.importance import CRITERIA
from ovsprune.recovery import RECOVERIES
from ovsprune.report.card import card
from ovsprune.slim import SlimSpec, write
from ovsprune.slim.hashing import base_spec
from ovsprune.slim.spec import LayerSpec, SliceSpec
from ovsprune.slim.write import check_output

__all__ = ["PruneResult", "Settings", "prune"]

BUDGETS = ("macs", "params")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = 0.01
"""Largest difference of the reached and the asked ratio."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a prune does; see :func:`prune`."""

    ratio: float
    budget: str = "macs"
    calibration: str = "procedural"
    samples: int = 256
    criterion: str = "reconstruction"
    allocation: str = "sensitivity"
    recovery: str = "closed-form"
    protect: tuple[str, ...] = ()
    round_to: int = 1
    seed: int = 0
    batch_size: int = 16
    ridge: float = 1e-2
    probe: int = 32

    def check(self) -> tuple[Criterion, Allocator, Recovery]:
        """Look every name up and every range, before any work is done.

        Raises:
            OptionError: A value is out of its range.
            UnknownNameError: A criterion, allocation or recovery is unknown.
        """
        if not 0.0 < self.ratio < 1.0:
            raise OptionError(
                f"--ratio {self.ratio:g} is outside (0, 1): it is the share of the cost that goes, "
                "0.5 for half"
            )
        if self.budget not in BUDGETS:
            raise OptionError(f"--budget {self.budget!r} is unknown; known: {', '.join(BUDGETS)}")
        for option, value in (("--round-to", self.round_to), ("--batch-size", self.batch_size)):
            if value < 1:
                raise OptionError(f"{option} {value}: give at least 1")
        if self.seed < 0:
            raise OptionError(f"--seed {self.seed}: give 0 or more")
        if not self.ridge > 0:
            raise OptionError(f"ridge {self.ridge:g}: give more than 0")
        return (
            CRITERIA.get(self.criterion),
            ALLOCATIONS.get(self.allocation),
            RECOVERIES.get(self.recovery),
        )


@dataclass(eq=False)
class PruneResult:
    """What a prune gave.

    Attributes:
        spec: The slim checkpoint's spec.
        tower: The slim tower, in the family's own modules.
        plan: Kept units of every group.
        path: Where it was written, or None.
        achieved: Ratio that was reached, of the budget's cost.
        fidelity: On held-out calibration pictures.
        seconds: Time by step.
    """

    spec: SlimSpec
    tower: nn.Module
    plan: Plan
    path: Path | None
    settings: Settings
    achieved: float
    fidelity: Fidelity
    seconds: dict[str, float]

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
            "achieved": self.achieved,
            "fidelity": {
                "cosine": self.fidelity.cosine,
                "relative_error": self.fidelity.relative_error,
            },
            "criterion": self.settings.criterion,
            "allocation": self.settings.allocation,
            "recovery": self.settings.recovery,
            "seed": self.settings.seed,
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
    """Prune a CLIP-like image tower once, without labels and without a gradient step.

    Args:
        model: A name (see :func:`ovsprune.backbones.load`), or a loaded backbone.
        ratio: Share of the tower's cost that goes, in (0, 1).
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
        options: Fields of :class:`Settings`: ``budget`` ("macs", "params"), ``calibration``
            (a folder or "procedural"), ``samples``, ``criterion``, ``allocation``, ``recovery``,
            ``protect`` (patterns of group names), ``round_to``, ``seed``, ``batch_size``,
            ``ridge`` (relative to the mean variance), ``probe`` (pictures for curves).

    Raises:
        OptionError: A value is out of its range.
        UnknownNameError: A name is unknown.
        BudgetError: The ratio is out of reach.
        WeightsError: The weights cannot be had.
        DataError: The calibration pictures cannot be used.
        OutputError: The output exists, or cannot be written.
    """
    try:
        settings = Settings(ratio=ratio, **options)
    except TypeError as error:
        raise OptionError(str(error).replace("Settings.__init__()", "prune()")) from error
    settings.check()
    if dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    progress = progress or Silent()
    target = _target(model, ratio, output, overwrite, dry_run)
    if threads is not None:
        if threads < 1:
            raise OptionError(f"--threads {threads}: give at least 1")
        torch.set_num_threads(threads)
    clock = Clock()
    if isinstance(model, str):
        with progress.stage(f"loading {model}", 1) as advance:
            model = backbones.load(
                model, pretrained=pretrained, activation=activation, device=device
            )
            advance(1)
        clock.lap("load")
    if model.slim is not None:
        raise OptionError(
            f"{model.slim.path} is slim already: prune {model.name} again with a higher ratio"
        )
    if not model.trained:
        progress.note(f"{model.name} has random weights: the result is marked as untrained")
    result = Job(model, settings, progress, clock, DTYPES[dtype]).run()
    if target is not None:
        state = {f"visual.{k}": v.to(DTYPES[dtype]) for k, v in result.tower.state_dict().items()}
        kept_text = {k: v.to(DTYPES[dtype]) for k, v in model.text.items()} if text else {}
        command = shlex.join(["ovsprune", "prune", "--model", model.name, "--ratio", f"{ratio:g}"])
        result.spec = replace(
            result.spec, provenance={**result.spec.provenance, "command": command}
        )
        result.path = write(
            target,
            result.spec,
            {**state, **kept_text},
            dict(result.plan.kept),
            card=card(result.spec, result.record()),
            overwrite=overwrite,
        )
        clock.lap("write")
    return result


class Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._last
        self._last = now


class Job:
    """One prune of one loaded backbone."""

    def __init__(
        self,
        backbone: Backbone,
        settings: Settings,
        progress: Progress,
        clock: Clock,
        dtype: torch.dtype,
    ) -> None:
        self.backbone, self.settings, self.progress = backbone, settings, progress
        self.clock, self.dtype = clock, dtype
        self.family: Family = FAMILIES.get(backbone.family)
        self.criterion, self.allocator, self.recovery = settings.check()
        self.device = next(backbone.tower.parameters()).device

    def run(self) -> PruneResult:
        size = self.backbone.preprocess.size
        dense = deepcopy(self.backbone.tower).eval().requires_grad_(False)
        base = measure(dense, size)
        self.family.rewrite(dense)
        seeds = self.family.seeds(dense)
        free, protected = _split(seeds, self.settings.protect)
        groups = find_groups(dense, free, size)
        self.clock.lap("graph")
        budget = self._budget(base)
        pictures, held_out = open_pictures(
            self.settings.calibration,
            self.backbone.preprocess,
            self.settings.samples,
            32,
            self.settings.seed,
            self.progress,
        )
        plan = self._plan(dense, groups, budget, pictures)
        slim = deepcopy(dense)
        cut(slim, groups, plan)
        if self.recovery.needs_pictures:
            self._recover(dense, slim, groups, plan, pictures)
        self.clock.lap("recover")
        self.family.finish(slim, groups, plan)
        costs = measure(slim, size)
        achieved = self._achieved(base, costs)
        closeness = fidelity(
            self._features(dense),
            self._features(slim),
            held_out,
            self.settings.batch_size,
            self.device,
        )
        self.clock.lap("check")
        spec = self._spec(groups, seeds, protected, plan, base, costs, pictures)
        return PruneResult(
            spec, slim, plan, None, self.settings, achieved, closeness, self.clock.seconds
        )

    def _features(self, tower: nn.Module) -> Any:
        stages = self.family.stages(tower)

        def dense(images: Tensor) -> Tensor:
            stream = stages.stem(images)
            for block in stages.blocks.values():
                stream = block(stream)
            return stages.head(stream)[1]

        return dense

    def _budget(self, base: Costs) -> Budget:
        whole = float(base.macs if self.settings.budget == "macs" else base.params)
        return Budget(self.settings.budget, whole, whole * (1 - self.settings.ratio))

    def _plan(
        self, dense: nn.Module, groups: list[Group], budget: Budget, pictures: Pictures
    ) -> Plan:
        scores, curves = Survey(
            dense,
            self.family.stages(dense),
            groups,
            self.criterion,
            pictures,
            batch_size=self.settings.batch_size,
            ridge=self.settings.ridge,
            seed=self.settings.seed,
            probe=self.settings.probe if self.allocator.needs_curves else 0,
            progress=self.progress,
        ).run()
        self.clock.lap("survey")
        item = AllocationContext(groups, scores, budget, curves, self.settings.round_to)
        widths = self.allocator.widths(item)
        kept = {
            g.name: scores.orders[g.name][g.units - widths[g.name] :].sort().values for g in groups
        }
        self.clock.lap("allocate")
        return Plan(kept)

    def _recover(
        self,
        dense: nn.Module,
        slim: nn.Module,
        groups: list[Group],
        plan: Plan,
        pictures: Pictures,
    ) -> None:
        self.recovery.recover(
            RecoveryContext(
                dense,
                slim,
                self.family.stages,
                groups,
                plan,
                pictures,
                self.settings.batch_size,
                self.settings.ridge,
                self.settings.seed,
                self.progress,
            )
        )

    def _achieved(self, base: Costs, slim: Costs) -> float:
        pair = (
            (base.macs, slim.macs) if self.settings.budget == "macs" else (base.params, slim.params)
        )
        achieved = 1 - pair[1] / pair[0]
        if abs(achieved - self.settings.ratio) > TOLERANCE:
            raise BudgetError(
                f"a ratio of {self.settings.ratio:.3f} of the {self.settings.budget} cannot be met "
                f"within {TOLERANCE}: the nearest is {achieved:.3f} with --round-to "
                f"{self.settings.round_to}"
            )
        return achieved

    def _spec(
        self,
        groups: list[Group],
        seeds: list[Seed],
        protected: dict[str, str],
        plan: Plan,
        base: Costs,
        slim: Costs,
        pictures: Pictures,
    ) -> SlimSpec:
        backbone, settings = self.backbone, self.settings
        return SlimSpec(
            base=base_spec(
                backbone.name, backbone.pretrained, backbone.trained, backbone.tower.state_dict()
            ),
            family=backbone.family,
            library=self.family.library,
            library_version=backbone.library_version,
            architecture=backbone.architecture,
            activation=backbone.activation,
            preprocess=backbone.preprocess,
            layers=tuple(_layer(g, plan) for g in groups),
            protected=tuple(protected),
            dense=base,
            slim=slim,
            provenance={
                "criterion": settings.criterion,
                "allocation": settings.allocation,
                "recovery": settings.recovery,
                "budget": settings.budget,
                "ratio": settings.ratio,
                "calibration": settings.calibration
                if settings.calibration == "procedural"
                else "folder",
                "calibration_hash": calibration_hash(pictures),
                "samples": len(pictures),
                "round_to": settings.round_to,
                "ridge": settings.ridge,
                "seed": settings.seed,
                "torch": torch.__version__,
            },
        )


def _layer(group: Group, plan: Plan) -> LayerSpec:
    slices: tuple[SliceSpec, ...] = ()
    if group.kind != "heads":
        for part in group.slices:
            offset = int(part.rows[0, 0])
            if not torch.equal(part.rows.flatten(), torch.arange(part.rows.numel()) + offset):
                raise AssertionError(f"{part.module}: the format has no units that are scattered")
            slices += (SliceSpec(part.module, part.axis, offset),)
    return LayerSpec(
        name=group.name,
        kind=group.kind,
        block=group.block,
        units=group.units,
        kept=plan.width(group.name),
        unit_width=int(group.columns.shape[1]),
        slices=slices,
    )


def _split(seeds: Sequence[Seed], patterns: Sequence[str]) -> tuple[list[Seed], dict[str, str]]:
    """Seeds that may be cut, and the names of the others with the reason.

    Raises:
        OptionError: A pattern matches nothing, or everything is protected.
    """
    protected = {s.name: s.protected for s in seeds if s.protected}
    for pattern in patterns:
        hits = [s.name for s in seeds if _matches(s, pattern)]
        if not hits:
            raise OptionError(
                f"--protect {pattern!r} matches no group; groups are named like "
                f"{', '.join(s.name for s in seeds[:2])}, and * stands for anything"
            )
        protected |= dict.fromkeys(hits, f"--protect {pattern}")
    free = [s for s in seeds if s.name not in protected]
    if not free:
        raise OptionError("everything is protected; there is nothing to cut")
    return free, protected


def _matches(seed: Seed, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (seed.name, seed.block, seed.layer))


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
