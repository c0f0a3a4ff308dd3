"""What decides a prune: every option with its default and its check."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from ovsprune.allocation import ALLOCATIONS
from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Allocator, Criterion, Recovery
from ovsprune.importance import CRITERIA
from ovsprune.recovery import RECOVERIES

__all__ = ["BUDGETS", "DTYPES", "METHODS", "TOLERANCE", "Settings", "settings_of"]

METHODS = ("default", "imp")
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
    probe: int | None = None
    method: str = "default"
    imp_structured: bool = False
    imp_steps: int = 100
    imp_rewind: bool = False
    imp_lr: float = 1e-4

    @property
    def probe_pictures(self) -> int:
        """Pictures on which curves are measured: an eighth of the samples, 8 to 32."""
        return min(max(self.samples // 8, 8), 32) if self.probe is None else self.probe

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
        if self.probe is not None and self.probe < 1:
            raise OptionError(f"probe {self.probe}: give at least 1 picture")
        if not self.ridge > 0:
            raise OptionError(f"ridge {self.ridge:g}: give more than 0")
        self._check_method()
        return (
            CRITERIA.get(self.criterion),
            ALLOCATIONS.get(self.allocation),
            RECOVERIES.get("none" if self.method == "imp" else self.recovery),
        )

    def _check_method(self) -> None:
        """Refuse options of one method with another, instead of leaving them aside in silence."""
        if self.method not in METHODS:
            raise OptionError(f"--method {self.method!r} is unknown; known: {', '.join(METHODS)}")
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.method == "imp":
            if self.imp_steps < 0:
                raise OptionError(f"--imp-steps {self.imp_steps}: give 0 or more")
            if not self.imp_lr > 0:
                raise OptionError(f"--imp-lr {self.imp_lr:g}: give more than 0")
            refused = {"criterion", "allocation", "round_to"}
            refused |= set() if self.recovery == "none" else {"recovery"}
            refused |= set() if self.imp_structured else {"budget"}
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
