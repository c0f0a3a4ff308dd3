"""Iterative magnitude pruning, the method of OpenTrans (Xu et al., CVPR 2024), of single weights.

A round removes a tenth of the weights that remain, the smallest of all layers together (L1), and
then trains what is left to have the dense tower's features: a loss that sees no class, so that the
masks serve any task. The first layer is left out of the ranking. The result has zeros and no fewer
numbers: it saves storage and not time; ``imp_structured=True`` in :func:`ovsprune.prune` removes
whole units in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune import backbones
from ovsprune.baselines.imp_checkpoint import RoundsFile
from ovsprune.baselines.masked_training import MaskedTraining
from ovsprune.calibration.fidelity import Fidelity, fidelity
from ovsprune.calibration.pictures import calibration_hash, open_pictures
from ovsprune.core.clock import Clock
from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Backbone, Pictures
from ovsprune.core.records import Costs
from ovsprune.graph.costs import count_costs
from ovsprune.graph.products import Product, find_products
from ovsprune.jobs.prune import DTYPES, cast, open_dense
from ovsprune.masks.directory import check_place, write_unstructured
from ovsprune.masks.magnitude import RATE, keep_largest, kept_by_round
from ovsprune.masks.spec import NOTE, MaskedSpec, WeightSpec
from ovsprune.profiling.timing import thread_limit
from ovsprune.pruning.command_line import command_of
from ovsprune.pruning.config import PruneConfig, config_of
from ovsprune.pruning.pipeline import HELD_OUT
from ovsprune.report.unstructured import unstructured_card
from ovsprune.slim.hashing import base_spec

__all__ = ["ImpResult", "Round", "imp"]


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        kept: Weights that are left after it.
        sparsity: Share of the ranked weights that is zero after it.
        loss: Feature loss before its first training step, and before its last; empty without
            training.
    """

    kept: int
    sparsity: float
    loss: tuple[float, ...]


@dataclass(eq=False)
class ImpResult:
    """Result of :func:`imp`.

    Attributes:
        spec: What ``config.json`` says.
        tower: The masked tower, in the dense tower's own modules.
        masks: Parameter's name to bool of its shape, True where the weight stays.
        rounds: What every round did.
        path: Where it was written, or None.
        fidelity: On held-out calibration pictures.
        seconds: Time by step.
    """

    spec: MaskedSpec
    tower: nn.Module
    masks: dict[str, Tensor]
    rounds: list[Round]
    path: Path | None
    settings: PruneConfig
    fidelity: Fidelity
    seconds: dict[str, float]

    def record(self) -> dict[str, Any]:
        """Return the record that ``ovsprune prune --method imp --json`` prints."""
        spec = self.spec
        costs = {"macs": spec.dense.macs, "params": spec.dense.params}
        nonzero = {"macs": spec.nonzero.macs, "params": spec.nonzero.params}
        return {
            "model": spec.base.model,
            "pretrained": spec.base.pretrained,
            "trained": spec.base.trained,
            "kind": "unstructured",
            "note": NOTE,
            "ratio": self.settings.ratio,
            "budget": "weights",
            "achieved": spec.sparsity,
            "dense": costs,
            "slim": costs,
            "nonzero": {**nonzero, "flops": 2 * spec.nonzero.macs},
            "fidelity": {
                "cosine": self.fidelity.cosine,
                "relative_error": self.fidelity.relative_error,
            },
            "seed": self.settings.seed,
            **self.settings.described(),
            "rounds": [
                {"kept": r.kept, "sparsity": r.sparsity, "loss": list(r.loss)} for r in self.rounds
            ],
            "weights": [
                {"name": w.name, "count": w.count, "zeros": w.zeros, "sparsity": w.sparsity}
                for w in spec.weights
            ],
            "excluded": list(spec.excluded),
            "seconds": round(sum(self.seconds.values()), 3),
            "timings": {step: round(value, 3) for step, value in self.seconds.items()},
            "output": None if self.path is None else str(self.path),
        }


def imp(
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
) -> ImpResult:
    """Prune single weights of an image tower by magnitude, in rounds, without labels.

    Args:
        model: Name (see :func:`ovsprune.backbones.load_backbone`) or loaded backbone.
        ratio: Fraction of the ranked weights that is zero at the end, in (0, 1). The ranked weights
            are those that multiply activations (:func:`ovsprune.graph.products.find_products`),
            without the first layer and the weights that ``protect`` names.
        config: Configuration; its ``method`` is taken to be ``"imp"``.
        pretrained: Tag, file, or ``"none"``.
        activation: ``"gelu"`` or ``"quick_gelu"``, for a weights file that does not say which.
        device: Device of the towers.
        dtype: Type of the saved tower: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        threads: CPU threads; None leaves the choice to PyTorch.
        output: Directory to write, by default ``unstructured/<model>-r<ratio>``.
        overwrite: Replace an existing output.
        dry_run: Prune and measure, but write nothing.
        text: Save the unmodified text tower too.
        progress: Progress reporter.
        options: Options of :class:`ovsprune.PruneConfig`, which win over those of ``config``; those
            of :class:`~ovsprune.baselines.imp_config.ImpConfig` begin with ``imp_``.

    Raises:
        OptionError: A value is out of its range, or not for this method.
        WeightsError: The weights cannot be loaded.
        DataError: The calibration images cannot be used.
        OutputError: The output exists, or cannot be written.
    """
    settings = config_of(ratio, config, {**options, "method": "imp"})
    if settings.imp.structured:
        raise OptionError("imp_structured=True prunes units: call ovsprune.prune")
    if dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    progress = progress or Silent()
    target = _target(model, settings.ratio, output, overwrite, dry_run)
    clock = Clock()
    with thread_limit(threads):
        model = open_dense(model, pretrained, activation, device, progress, clock)
        settings = settings.for_model(model)
        result = _Job(model, settings, progress, clock).run()
    if target is not None:
        command = command_of(model, settings, dtype, text)
        made = {**result.spec.provenance, "command": command}
        result.spec = replace(result.spec, provenance=made)
        state = {f"visual.{k}": v for k, v in result.tower.state_dict().items()}
        result.path = write_unstructured(
            target,
            result.spec,
            cast({**state, **(model.text if text else {})}, dtype),
            result.masks,
            card=unstructured_card(result.spec, result.record()),
            overwrite=overwrite,
        )
        clock.lap("write")
    return result


class _Job:
    """The rounds on one loaded backbone."""

    def __init__(
        self, backbone: Backbone, settings: PruneConfig, progress: Progress, clock: Clock
    ) -> None:
        self.backbone, self.settings = backbone, settings
        self.progress, self.clock = progress, clock
        # Half precision is for files: training needs float32.
        self.dense = deepcopy(backbone.tower).float().eval().requires_grad_(False)
        self.student = deepcopy(self.dense)

    def run(self) -> ImpResult:
        backbone, settings = self.backbone, self.settings
        base = count_costs(self.dense, backbone.preprocess.size)
        products = find_products(self.dense, backbone.preprocess.size)
        ranked, excluded = _split(products, settings.protect)
        self.clock.lap("graph")
        pictures, held_out = open_pictures(
            settings.calibration,
            backbone.preprocess,
            settings.pictures,
            HELD_OUT,
            settings.seed,
            self.progress,
        )
        masks, rounds = self._rounds(ranked, pictures)
        self.clock.lap("imp")
        self.student.requires_grad_(False)
        device = next(self.dense.parameters()).device
        closeness = fidelity(
            self._dense_features(self.dense),
            self._dense_features(self.student),
            held_out,
            settings.batch_size,
            device,
        )
        self.clock.lap("check")
        spec = self._spec(ranked, excluded, masks, base, pictures)
        return ImpResult(
            spec=spec,
            tower=self.student,
            masks=masks,
            rounds=rounds,
            path=None,
            settings=settings,
            fidelity=closeness,
            seconds=self.clock.seconds,
        )

    def _rounds(
        self, ranked: Sequence[Product], pictures: Pictures
    ) -> tuple[dict[str, Tensor], list[Round]]:
        settings = self.settings
        parameters = dict(self.student.named_parameters())
        weights = {product.name: parameters[product.name] for product in ranked}
        total = sum(w.numel() for w in weights.values())
        plan = kept_by_round(total, settings.ratio)
        kept = RoundsFile(
            settings, self.backbone, pictures, {"ranked": list(weights)}, self.progress
        )
        masks, rounds = self._resumed(kept, plan)
        masks = masks or {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
        training = MaskedTraining(
            self.student,
            self.dense,
            self.backbone.stages,
            pictures,
            batch_size=settings.batch_size,
            rate=settings.imp.lr,
            seed=settings.seed,
            done=len(rounds) * settings.imp.steps,
        )
        for number, keep in enumerate(plan[len(rounds) :], start=len(rounds) + 1):
            masks = keep_largest(weights, masks, keep)
            if settings.imp.rewind:
                training.rewind()
            title = f"round {number} of {len(plan)}"
            with self.progress.stage(title, settings.imp.steps) as advance:
                losses = training.run(masks, settings.imp.steps, advance)
            ends = (losses[0], losses[-1]) if losses else ()
            rounds.append(Round(keep, 1 - keep / total, ends))
            if number < len(plan):  # the last one goes as far as this ratio, and serves no other
                kept.save(self.student, masks, [asdict(r) for r in rounds])
        return {name: mask.cpu() for name, mask in masks.items()}, rounds

    def _resumed(
        self, kept: RoundsFile, plan: Sequence[int]
    ) -> tuple[dict[str, Tensor], list[Round]]:
        """Masks and rounds of the file, whose weights the student gets."""

        def check(told: list[dict[str, Any]]) -> None:
            if [r["kept"] for r in told] != list(plan[: len(told)]):
                raise OptionError(
                    f"--imp-rounds {self.settings.imp.rounds} has {len(told)} rounds, which "
                    f"removed {told[-1]['sparsity']:.3f} of the weights, more than --ratio "
                    f"{self.settings.ratio:g}: name another file"
                )

        masks, told = kept.resume(self.student, check)
        rounds = [Round(r["kept"], r["sparsity"], tuple(r["loss"])) for r in told]
        device = next(self.student.parameters()).device
        return {name: mask.to(device) for name, mask in masks.items()}, rounds

    def _dense_features(self, tower: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda images: replace(self.backbone, tower=tower).outputs(images)[1]

    def _spec(
        self,
        ranked: Sequence[Product],
        excluded: Sequence[str],
        masks: dict[str, Tensor],
        base: Costs,
        pictures: Pictures,
    ) -> MaskedSpec:
        backbone, settings = self.backbone, self.settings
        zeros = {name: mask.numel() - int(mask.sum()) for name, mask in masks.items()}
        # as the paper counts: a zero weight costs nothing, wherever it multiplies
        unused = sum(p.macs * zeros[p.name] // masks[p.name].numel() for p in ranked)
        return MaskedSpec(
            base=base_spec(
                backbone.name, backbone.pretrained, backbone.trained, backbone.tower.state_dict()
            ),
            family=backbone.family,
            library=backbones.FAMILIES.get(backbone.family).library,
            library_version=backbone.library_version,
            architecture=backbone.architecture,
            activation=backbone.activation,
            preprocess=backbone.preprocess,
            weights=tuple(WeightSpec(p.name, p.shape, zeros[p.name]) for p in ranked),
            excluded=tuple(excluded),
            dense=base,
            nonzero=Costs(base.macs - unused, base.params - sum(zeros.values())),
            provenance={
                **settings.recorded(),
                "imp_rate": RATE,
                "calibration_hash": calibration_hash(pictures),
                "samples": len(pictures),
                "batch_size": settings.batch_size,
                "torch": torch.__version__,
            },
        )


def _split(products: Sequence[Product], patterns: Sequence[str]) -> tuple[list[Product], list[str]]:
    """Weights that are ranked, and the names of the others: the first layer's, and protected ones.

    Raises:
        OptionError: A pattern matches nothing, or nothing is left.
    """
    excluded = {products[0].name}
    for pattern in patterns:
        hits = {p.name for p in products if fnmatchcase(p.name, pattern)}
        if not hits:
            raise OptionError(
                f"--protect {pattern!r} matches no weight; weights are named like "
                f"{', '.join(p.name for p in products[:2])}, and * stands for anything"
            )
        excluded |= hits
    ranked = [p for p in products if p.name not in excluded]
    if not ranked:
        raise OptionError("everything is protected; there is nothing to prune")
    return ranked, [p.name for p in products if p.name in excluded]


def _target(
    model: str | Backbone, ratio: float, output: str | Path | None, overwrite: bool, dry_run: bool
) -> Path | None:
    """Where to write, checked before the work begins; not ``slim/``, where transfers look."""
    if dry_run or (output is None and isinstance(model, Backbone)):
        return None
    name = model if isinstance(model, str) else model.name
    place = Path("unstructured") / f"{backbones.canonical(name)}-r{ratio:g}"
    return check_place(output or place, overwrite=overwrite)
