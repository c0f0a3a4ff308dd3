"""Iterative magnitude pruning (IMP) of single weights, the method of OpenTrans (CVPR 2024).

Every round sets a tenth of the remaining weights to zero, those of smallest magnitude over all
layers (L1), and then trains the remaining weights to reproduce the dense tower's features. This
loss uses no class names, so the masks transfer to other tasks. The first layer is not ranked. The
result has zeros in tensors of the dense shapes: it needs less storage and the same time.
``imp_structured=True`` in :func:`ovsprune.prune` removes whole units in the same rounds.

Source: Xu et al., Transferable and Principled Efficiency for Open-Vocabulary Segmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune import backbones
from ovsprune.baselines.imp_checkpoint import RoundsFile
from ovsprune.baselines.imp_result import ImpResult, Round
from ovsprune.baselines.masked_training import MaskedTraining
from ovsprune.calibration.fidelity import fidelity
from ovsprune.calibration.pictures import calibration_hash, open_pictures
from ovsprune.core.clock import Clock
from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Backbone, Pictures
from ovsprune.core.records import Costs
from ovsprune.graph.costs import count_costs
from ovsprune.graph.products import Product, find_products
from ovsprune.masks.directory import check_place, write_unstructured
from ovsprune.masks.magnitude import RATE, keep_largest, kept_by_round
from ovsprune.masks.spec import MaskedSpec, WeightSpec
from ovsprune.profiling.timing import thread_limit
from ovsprune.pruning.config import PruneConfig, config_of
from ovsprune.pruning.loading import open_model
from ovsprune.pruning.pipeline import HELD_OUT
from ovsprune.pruning.reprune import check_reprune
from ovsprune.pruning.saving import Saving
from ovsprune.pruning.search_space import match_names
from ovsprune.report.unstructured import unstructured_card
from ovsprune.slim.hashing import base_spec

__all__ = ["imp"]


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

    ``ratio`` is the fraction of the ranked weights that is zero at the end, in (0, 1). The ranked
    weights are those that multiply activations (:func:`ovsprune.graph.products.find_products`),
    without the first layer and the weights that ``protect`` names. The method of ``config`` is
    taken to be ``"imp"``, and the options of :class:`~ovsprune.pruning.imp_config.ImpConfig` begin
    with ``imp_``. By default the output is ``unstructured/<model>-r<ratio>``. All other arguments
    are those of :func:`ovsprune.prune`.

    Raises:
        OptionError: A value is out of its range, or not for this method.
        WeightsError: The weights cannot be loaded.
        DataError: The calibration images cannot be used.
        OutputError: The output exists, or cannot be written.
    """
    settings = config_of(ratio, config, {**options, "method": "imp"})
    if settings.imp.structured:
        raise OptionError("imp_structured=True prunes units: call ovsprune.prune")
    progress = progress or Silent()
    saving = Saving.checked(
        model,
        f"unstructured/{{}}-r{settings.ratio:g}",
        output,
        partial(check_place, overwrite=overwrite),
        dtype=dtype,
        text=text,
        dry_run=dry_run,
    )
    clock = Clock()
    with thread_limit(threads):
        model = open_model(model, pretrained, activation, device, progress, clock)
        check_reprune(model, settings.method)
        settings = settings.for_model(model)
        result = _WeightPruning(model, settings, progress, clock).run()
    if saving.directory is not None:
        result.spec = saving.with_command(result.spec, model, settings)
        result.path = write_unstructured(
            saving.directory,
            result.spec,
            saving.tensors(model, result.tower),
            result.masks,
            card=unstructured_card(result.spec, result.record()),
            overwrite=overwrite,
        )
        clock.lap("write")
    return result


class _WeightPruning:
    """Rounds of pruning and training on one loaded backbone."""

    def __init__(
        self, backbone: Backbone, settings: PruneConfig, progress: Progress, clock: Clock
    ) -> None:
        self.backbone, self.settings = backbone, settings
        self.progress, self.clock = progress, clock
        # Training needs float32; half precision is for files only.
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
        agreement = fidelity(
            self._dense_features(self.dense),
            self._dense_features(self.student),
            held_out,
            settings.batch_size,
            next(self.dense.parameters()).device,
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
            fidelity=agreement,
            seconds=self.clock.seconds,
        )

    def _rounds(
        self, ranked: Sequence[Product], pictures: Pictures
    ) -> tuple[dict[str, Tensor], list[Round]]:
        settings = self.settings
        parameters = dict(self.student.named_parameters())
        # Parameters of the student: training changes them, and the next round ranks them.
        weights = {product.name: parameters[product.name] for product in ranked}
        total = sum(w.numel() for w in weights.values())
        plan = kept_by_round(total, settings.ratio)
        ranked_names = {"ranked": list(weights)}
        file = RoundsFile(settings, self.backbone, pictures, ranked_names, self.progress)
        masks, rounds = self._resumed(file, plan)
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
            masks = keep_largest(weights, masks, keep)  # by magnitude over all layers
            if settings.imp.rewind:
                training.rewind()
            title = f"round {number} of {len(plan)}"
            with self.progress.stage(title, settings.imp.steps) as advance:
                losses = training.run(masks, settings.imp.steps, advance)
            ends = (losses[0], losses[-1]) if losses else ()  # empty if --imp-steps is 0
            rounds.append(Round(keep, 1 - keep / total, ends))
            # The last round stops at this ratio, so a run to a higher ratio cannot continue it.
            if number < len(plan):
                file.save(self.student, masks, [asdict(r) for r in rounds])
        return {name: mask.cpu() for name, mask in masks.items()}, rounds

    def _resumed(
        self, file: RoundsFile, plan: Sequence[int]
    ) -> tuple[dict[str, Tensor], list[Round]]:
        """Return masks and rounds of the file, and load its weights into the student."""

        def check(records: list[dict[str, Any]]) -> None:
            if [r["kept"] for r in records] != list(plan[: len(records)]):
                raise OptionError(
                    f"--imp-rounds {self.settings.imp.rounds} has {len(records)} rounds, which "
                    f"removed {records[-1]['sparsity']:.3f} of the weights, more than --ratio "
                    f"{self.settings.ratio:g}: name another file"
                )

        masks, records = file.resume(self.student, check)
        rounds = [Round(r["kept"], r["sparsity"], tuple(r["loss"])) for r in records]
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
        # The paper's count: a zero weight costs no multiplication.
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
    """Return the ranked weights, and the names of the first layer's and the protected weights."""
    excluded = {products[0].name}  # the paper does not prune the first layer
    names = {p.name: (p.name,) for p in products}
    for pattern in patterns:
        excluded |= set(match_names(f"--protect {pattern!r}", pattern, names, "weight"))
    ranked = [p for p in products if p.name not in excluded]
    if not ranked:
        raise OptionError("everything is protected; there is nothing to prune")
    return ranked, [p.name for p in products if p.name in excluded]
