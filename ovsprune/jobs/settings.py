"""What decides a prune: every option with its default and its check."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import Any

import torch

from ovsprune.allocation import ALLOCATIONS
from ovsprune.calibration.pictures import AUTO, enough, made_for
from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Allocator, Backbone, Criterion, Distillation, Recovery
from ovsprune.importance import find_criterion
from ovsprune.jobs.floors import parse_floor
from ovsprune.recovery import RECOVERIES
from ovsprune.recovery.distill import optimizer_class

__all__ = [
    "BUDGETS",
    "DTYPES",
    "METHODS",
    "TOLERANCE",
    "Settings",
    "recovery_chain",
    "settings_of",
]

METHODS = ("default", "imp")
BUDGETS = ("macs", "params", "latency")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = 0.01
"""Largest difference of the reached and the asked ratio."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a prune does; see :func:`prune`."""

    ratio: float
    budget: str = "macs"
    calibration: str = AUTO
    samples: int | None = None
    criterion: str | Criterion = "reconstruction"
    allocation: str = "sensitivity"
    recovery: str = "gauss-newton"
    protect: tuple[str, ...] = ()
    round_to: int = 1
    floor: tuple[str, ...] = ()
    uniform_heads: bool = False
    prune_depth: bool = False
    latency_table: str | None = None
    seed: int = 0
    batch_size: int = 16
    ridge: float = 1e-2
    probe: int | None = None
    rounds: int = 1
    statistics: str | None = None
    distill: Distillation = field(default_factory=Distillation)
    method: str = "default"
    imp_structured: bool = False
    imp_steps: int = 100
    imp_rewind: bool = False
    imp_lr: float = 1e-4
    imp_rounds: str | None = None

    @property
    def pictures(self) -> int:
        """Calibration pictures: as many as were named, or as are enough of their kind."""
        return enough(self.calibration) if self.samples is None else self.samples

    @property
    def probe_pictures(self) -> int:
        """Pictures on which curves are measured: an eighth of the others, 8 to 32."""
        return min(max(self.pictures // 8, 8), 32) if self.probe is None else self.probe

    def for_model(self, backbone: Backbone) -> Settings:
        """The same, with the kind of made pictures named where it was left to the model."""
        if self.calibration != AUTO:
            return self
        return replace(self, calibration=made_for(backbone.name))

    def check(self) -> tuple[Criterion, Allocator, Recovery]:
        """Look every name up and every range, before any work is done.

        Raises:
            OptionError: A value is out of its range, or not a criterion.
            UnknownNameError: A criterion, allocation or recovery is unknown.
        """
        if not 0.0 < self.ratio < 1.0:
            raise OptionError(
                f"--ratio {self.ratio:g} is outside (0, 1): it is the share of the cost that goes, "
                "0.5 for half"
            )
        if self.budget not in BUDGETS:
            raise OptionError(f"--budget {self.budget!r} is unknown; known: {', '.join(BUDGETS)}")
        if self.latency_table is not None and self.budget != "latency":
            raise OptionError(
                f"--latency-table is of use with --budget latency only, not {self.budget}"
            )
        if self.rounds > 1 and self.budget == "latency":
            raise OptionError(
                f"--rounds {self.rounds} goes with --budget macs or params: layer times are "
                "measured of the dense tower only"
            )
        given: dict[str, object] = {"--protect": self.protect, "--floor": self.floor}
        for option, patterns in given.items():
            if isinstance(patterns, str):
                raise OptionError(f"{option} {patterns!r}: give a list of patterns, not one string")
        for floor in self.floor:
            parse_floor(floor)
        for option, value in (
            ("--samples", self.pictures),
            ("--round-to", self.round_to),
            ("--batch-size", self.batch_size),
            ("--rounds", self.rounds),
        ):
            if not _is_whole(value):
                raise OptionError(f"{option} {value!r}: give a whole number")
            if value < 1:
                raise OptionError(f"{option} {value}: give at least 1")
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**63:
            raise OptionError(f"--seed {self.seed!r}: give a whole number from 0 to 2^63 - 1")
        if self.probe is not None and self.probe < 1:
            raise OptionError(f"probe {self.probe}: give at least 1 picture")
        if not 0 < self.ridge < math.inf:
            raise OptionError(f"ridge {self.ridge:g}: give a finite number above 0")
        if self.statistics is not None and not isinstance(self.criterion, str):
            raise OptionError(
                "--statistics keeps the rankings of a criterion that is known by its name: an "
                "object's own options could not be told apart; leave the file out"
            )
        _check_distillation(self.distill)
        self._check_method()
        if self.distill != Distillation() and not any(r.trains for r in self.recoveries):
            raise OptionError(
                f"--distill-... options go with --recovery distill, not {self.recovery}"
            )
        return (
            find_criterion(self.criterion),
            ALLOCATIONS.get(self.allocation),
            RECOVERIES.get(self.recovery),
        )

    @property
    def repairs(self) -> bool:
        """Whether what is left is changed at all."""
        return self.method == "imp" or self.recovery != "none"

    @property
    def recoveries(self) -> list[Recovery]:
        """What repairs the cut tower, in this order; nothing where the method trains it."""
        return [] if self.method == "imp" else recovery_chain(self.recovery)

    def _check_method(self) -> None:
        """Refuse options of one method with another, instead of leaving them aside in silence."""
        if self.method not in METHODS:
            raise OptionError(f"--method {self.method!r} is unknown; known: {', '.join(METHODS)}")
        plain = Settings(ratio=self.ratio)
        given = [f.name for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)]
        if self.method == "imp":
            if self.imp_steps < 0:
                raise OptionError(f"--imp-steps {self.imp_steps}: give 0 or more")
            if not 0 < self.imp_lr < math.inf:
                raise OptionError(f"--imp-lr {self.imp_lr:g}: give a finite number above 0")
            refused = {"criterion", "allocation", "round_to", "uniform_heads"}
            refused |= {"prune_depth", "rounds", "distill", "statistics"}
            refused |= set() if self.recovery == "none" else {"recovery"}
            refused |= set() if self.imp_structured else {"budget", "latency_table", "floor"}
            why = "iterative magnitude pruning ranks, counts and repairs in its own way"
        else:
            refused = {name for name in given if name.startswith("imp_")}
            why = "they belong to --method imp"
        wrong = [f"--{name.replace('_', '-')}" for name in given if name in refused]
        if wrong:
            raise OptionError(f"--method {self.method} does not take {', '.join(wrong)}: {why}")

    def described(self) -> dict[str, Any]:
        """What a record and a checkpoint's provenance say of the method; empty for the default."""
        if self.method == "default":
            return {}
        return {
            "method": self.method,
            "criterion": "l1",
            "allocation": "global",
            "recovery": "none",
            "imp_steps": self.imp_steps,
            "imp_rewind": self.imp_rewind,
            "imp_lr": self.imp_lr,
        }


def _is_whole(value: object) -> bool:
    """Whether it counts: an int, or numpy's."""
    return isinstance(value, Integral)


def _check_distillation(options: Distillation) -> None:
    if options.steps is not None and options.steps < 1:
        raise OptionError(f"--distill-steps {options.steps}: give at least 1")
    for option, value in (("seconds", options.seconds), ("lr", options.lr)):
        if value is not None and not 0 < value < math.inf:
            raise OptionError(f"--distill-{option} {value:g}: give a finite number above 0")
    optimizer_class(options.optimizer)


def recovery_chain(name: str) -> list[Recovery]:
    """The recovery called ``name``, and before it the ones that it says run before it.

    Raises:
        UnknownNameError: A name is unknown.
        ValueError: Recoveries wait for each other.
    """
    chain: list[Recovery] = []
    names: list[str] = []
    following: str | None = name
    while following is not None:
        if following in names:
            raise ValueError(f"recoveries wait for each other: {' after '.join(names)}")
        names.append(following)
        chain.insert(0, RECOVERIES.get(following))
        following = chain[0].after
    return chain


def settings_of(ratio: float, options: dict[str, Any]) -> Settings:
    """Settings from keyword arguments, checked.

    Raises:
        OptionError: A value is out of its range, or no field has that name.
        UnknownNameError: A name is unknown.
    """
    try:
        settings = Settings(ratio=ratio, **options)
    except TypeError as error:
        raise OptionError(str(error).replace("Settings.__init__()", "prune()")) from error
    settings.check()
    return settings
