"""Configuration of a prune: every option, declared once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ovsprune.core.config import Config
from ovsprune.core.distillation import Distillation
from ovsprune.core.errors import OptionError
from ovsprune.core.option_docs import documented
from ovsprune.core.options import Requirement, deferred, option, section
from ovsprune.pruning.floors import parse_floor
from ovsprune.pruning.imp_config import ImpConfig

if TYPE_CHECKING:
    from ovsprune.core.protocols import Backbone, Criterion, Recovery
else:
    # The command line reads this class before torch is imported. `options_of` evaluates the
    # annotations, and needs a name that stands for objects given from Python.
    Criterion = Any

__all__ = ["FOLDER", "TOLERANCE", "PruneConfig", "config_of"]

TOLERANCE = 0.01
"""Largest difference between the requested ratio and the ratio that is reached."""

FOLDER = "folder"
"""Calibration in a recipe whose images came from a folder; the user must name the folder again."""

_DEFAULT = "--method default"
_IMP_WEIGHTS = "--method imp"
_IMP_UNITS = "--method imp --imp-structured"


@documented
@dataclass(frozen=True, kw_only=True)
class PruneConfig(Config):
    """Options of :func:`ovsprune.prune`.

    Each field declares one option: type, default, meaning, allowed values, and the methods that it
    belongs to. The command line, ``compare``, the provenance of a checkpoint and recipe files use
    the same names; ``distill.lr`` is ``distill_lr`` there, and ``--distill-lr`` on the command
    line.

    Example:
        >>> from ovsprune import PruneConfig
        >>> PruneConfig.from_options({"ratio": 0.5, "distill_steps": 200}).distill.steps
        200
    """

    # measured=False: rankings and error curves do not depend on the option, so prunes that differ
    # only in such options share them.
    ratio: float = option(
        above=0,
        below=1,
        measured=False,
        help="Fraction of the cost to remove; 0.5 removes half.",
    )
    budget: str = option(
        "macs",
        choices=("macs", "params", "latency"),
        methods=(_DEFAULT, _IMP_UNITS),
        measured=False,
        compare="all",
        help="Cost that the ratio refers to; latency is that of one image on this machine.",
    )
    calibration: str = option(
        "auto",
        compare="all",
        help="Calibration images: a folder of images without labels, or generated images: "
        "'procedural' (scenes as tiny was trained on), 'leaves', 'mixed', or 'auto' (procedural "
        "for tiny, mixed for other models).",
    )
    samples: int | None = option(
        None,
        minimum=1,
        default_text="256; 1024 for leaves and mixed",
        compare="all",
        help="Number of calibration images.",
    )
    criterion: str | Criterion = option(
        "reconstruction",
        choices=deferred("ovsprune.importance", "CRITERIA.names"),
        validate=deferred("ovsprune.importance", "find_criterion"),
        methods=(_DEFAULT,),
        help="Importance score that ranks the units of a layer (`ovsprune criteria` lists them). "
        "From Python also an object, such as ovsprune.importance.taylor.Taylor.",
    )
    allocation: str = option(
        "sensitivity",
        choices=deferred("ovsprune.allocation", "ALLOCATIONS.names"),
        methods=(_DEFAULT,),
        measured=False,
        help="Distribution of the budget over the layers (`ovsprune criteria` lists them).",
    )
    recovery: str = option(
        "gauss-newton",
        choices=deferred("ovsprune.recovery", "RECOVERIES.names"),
        methods=(_DEFAULT,),
        off="none",
        measured=False,
        help="Repair of the remaining weights after the cut (`ovsprune criteria` lists them).",
    )
    protect: tuple[str, ...] = option(
        (),
        metavar="PATTERN",
        provenance="changed",
        compare="all",
        help="Leave layers whose name matches the pattern ('*.11.*') uncut. Repeatable.",
    )
    round_to: int = option(
        1,
        minimum=1,
        methods=(_DEFAULT,),
        measured=False,
        compare="all",
        help="Keep MLP widths at multiples of this number.",
    )
    floor: tuple[str, ...] = option(
        (),
        metavar="PATTERN=N",
        validate=parse_floor,
        methods=(_DEFAULT, _IMP_UNITS),
        compare="method",
        help="Minimum number of units (or fraction of them, below 1) to keep in matching layers. "
        "Repeatable.",
    )
    uniform_heads: bool = option(
        False,
        methods=(_DEFAULT,),
        compare="method",
        help="Keep the same number of heads in every layer, the last block included.",
    )
    prune_depth: bool = option(
        False,
        methods=(_DEFAULT,),
        provenance="changed",
        compare="method",
        help="Allow whole attentions and MLPs to be removed; every block keeps its place and name.",
    )
    latency_table: str | None = option(
        None,
        metavar="FILE",
        methods=(_DEFAULT, _IMP_UNITS),
        requires=Requirement("--budget latency", lambda config: config.budget == "latency"),
        measured=False,
        provenance="never",
        help="File of layer times; by default this machine's, in your cache directory.",
    )
    seed: int = option(0, minimum=0, maximum=2**63 - 1, help="Seed of all random choices.")
    batch_size: int = option(
        16, minimum=1, provenance="changed", compare="all", help="Number of images per batch."
    )
    ridge: float = option(
        1e-2,
        above=0,
        methods=(_DEFAULT,),
        command=False,
        help="Ridge penalty of the least-squares fits, relative to the mean variance of the "
        "inputs.",
    )
    probe: int | None = option(
        None,
        minimum=1,
        methods=(_DEFAULT,),
        provenance="changed",
        command=False,
        default_text="an eighth of the calibration images, 8 to 32",
        help="Number of images on which error curves are measured.",
    )
    rounds: int = option(
        1,
        minimum=1,
        methods=(_DEFAULT,),
        measured=False,
        compare="method",
        help="Number of rounds of pruning, with recovery after each.",
    )
    statistics: str | None = option(
        None,
        metavar="FILE",
        methods=(_DEFAULT,),
        measured=False,
        provenance="never",
        decides=False,
        help="File that keeps the statistics measured on the calibration images. Another ratio "
        "then measures nothing.",
    )
    distill: Distillation = section(
        Distillation,
        methods=(_DEFAULT,),
        requires=Requirement("--recovery distill", lambda config: config.trains),
        measured=False,
        compare="method",
    )
    method: str = option(
        "default",
        choices=("default", "imp"),
        measured=False,
        provenance="changed",
        help="Pruning method: 'default' (importance scores, allocation and recovery) or 'imp' "
        "(iterative magnitude pruning with feature distillation, as OpenTrans).",
    )
    imp: ImpConfig = section(ImpConfig, methods=(_IMP_WEIGHTS, _IMP_UNITS), measured=False)

    @property
    def variant(self) -> str:
        """Words of the command line that select the method."""
        if self.method == "imp":
            return _IMP_UNITS if self.imp.structured else _IMP_WEIGHTS
        return _DEFAULT

    @property
    def pictures(self) -> int:
        """Number of calibration images: ``samples``, or enough for their kind."""
        from ovsprune.calibration.pictures import enough

        return enough(self.calibration) if self.samples is None else self.samples

    @property
    def probe_pictures(self) -> int:
        """Number of images on which error curves are measured: by default an eighth, 8 to 32."""
        return min(max(self.pictures // 8, 8), 32) if self.probe is None else self.probe

    @property
    def recoveries(self) -> list[Recovery]:
        """Recoveries to run on the cut tower, in this order; none if the method trains it."""
        from ovsprune.recovery import recovery_chain

        return [] if self.method == "imp" else recovery_chain(self.recovery)

    @property
    def repairs(self) -> bool:
        """True if the remaining weights are modified after the cut."""
        return self.method == "imp" or self.recovery != "none"

    @property
    def trains(self) -> bool:
        """True if a recovery takes gradient steps."""
        return any(recovery.trains for recovery in self.recoveries)

    def for_model(self, backbone: Backbone) -> PruneConfig:
        """Return the configuration with ``calibration="auto"`` resolved for a model."""
        from ovsprune.calibration.pictures import made_for

        if self.calibration != "auto":
            return self
        return replace(self, calibration=made_for(backbone.name))

    def check(self) -> None:
        """Check all names, ranges and combinations, before any work is done.

        Raises:
            OptionError: A value is out of range, or does not go with another one.
            UnknownNameError: A criterion, allocation, recovery or optimiser is unknown.
        """
        self.check_options()
        if self.rounds > 1 and self.budget == "latency":
            raise OptionError(
                f"--rounds {self.rounds} goes with --budget macs or params: layer times are "
                "measured on the dense tower only"
            )
        if self.statistics is not None and not isinstance(self.criterion, str):
            raise OptionError(
                "--statistics keeps the rankings of a criterion that is known by its name: the "
                "options of an object cannot be compared; leave the file out"
            )

    def recorded(self) -> dict[str, Any]:
        """Return the options that belong in the provenance, with JSON values.

        Paths are not recorded: a folder of calibration images becomes ``"folder"``.
        """
        from ovsprune.calibration.pictures import RENDERED
        from ovsprune.importance import criterion_name

        recorded = super().recorded()
        if "criterion" in recorded:
            recorded["criterion"] = criterion_name(self.criterion)
        if self.calibration not in RENDERED:
            recorded["calibration"] = FOLDER
        return recorded | self.described()

    def described(self) -> dict[str, Any]:
        """Return the description of a method other than the default, for records."""
        if self.method == "default":
            return {}
        options = {k: v for k, v in super().recorded().items() if k.startswith("imp_")}
        # The same method in the words of the default method: magnitude, ranked over all layers.
        fixed = {"criterion": "l1", "allocation": "global", "recovery": "none"}
        return {"method": self.method, **fixed, **options}

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Any], **options: Any) -> PruneConfig:
        """Return the configuration that made a checkpoint.

        Args:
            provenance: ``spec.provenance`` of a checkpoint.
            options: Options that win over the recorded ones.

        Raises:
            OptionError: The calibration images came from a folder or the criterion was an object,
                and ``options`` does not give them.
        """
        return cls.from_recorded({**cls.recorded_options(provenance), **options})

    @classmethod
    def recorded_options(cls, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options in a provenance by name, without those that the method ignores."""
        values = dict(provenance)
        if values.get("method") == "imp":
            # A budget is recorded for units only: single weights are counted themselves.
            values.setdefault("imp_structured", "budget" in values)
        return super().recorded_options(values)

    @classmethod
    def unrecorded(cls, name: str, values: Mapping[str, Any]) -> str | None:
        """Return why the recorded value of an option must be given again; None if it is usable."""
        from ovsprune.importance import CRITERIA

        value = values.get(name)
        if name == "calibration" and value == FOLDER:
            return "the images came from a folder, which is not recorded; name it again"
        if name == "criterion" and isinstance(value, str) and value not in CRITERIA.names():
            return f"{value!r} is no registered name; give the name or the object again"
        return None


def config_of(ratio: float | None, config: PruneConfig | None, options: Any) -> PruneConfig:
    """Return a configuration with a ratio and options that win over it, checked.

    Raises:
        OptionError: A value is out of its range, or there is no ratio.
        UnknownNameError: A name is unknown.
    """
    values = dict(options) if ratio is None else {"ratio": ratio, **options}
    result = PruneConfig.from_options(values) if config is None else config.with_options(values)
    result.check()
    return result
