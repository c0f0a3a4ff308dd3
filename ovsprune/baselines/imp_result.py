"""Result of iterative magnitude pruning of single weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ovsprune.calibration.fidelity import Fidelity
from ovsprune.masks.spec import NOTE, MaskedSpec
from ovsprune.pruning.config import PruneConfig

__all__ = ["ImpResult", "Round"]


@dataclass(frozen=True)
class Round:
    """Record of one round.

    Attributes:
        kept: Number of weights that remain after the round.
        sparsity: Fraction of the ranked weights that is zero after the round, in [0, 1].
        loss: Feature loss before the first and before the last training step of the round; empty
            without training.
    """

    kept: int
    sparsity: float
    loss: tuple[float, ...]


@dataclass(eq=False)
class ImpResult:
    """Result of :func:`ovsprune.baselines.imp_weights.imp`.

    Attributes:
        spec: Contents of ``config.json``.
        tower: Masked tower, in the modules of the dense tower.
        masks: Name of a parameter to bool of its shape, True where the weight is kept.
        rounds: Record of every round.
        path: Directory of the result; None if nothing was written.
        settings: Configuration of the prune.
        fidelity: Agreement with the dense tower on held-out calibration images.
        seconds: Time per step.
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
        costs = asdict(spec.dense)
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
            "slim": costs,  # all shapes stay dense; see "nonzero"
            "nonzero": {**asdict(spec.nonzero), "flops": 2 * spec.nonzero.macs},
            "fidelity": asdict(self.fidelity),
            "seed": self.settings.seed,
            **self.settings.described(),
            "rounds": [{**asdict(r), "loss": list(r.loss)} for r in self.rounds],
            "weights": [
                {"name": w.name, "count": w.count, "zeros": w.zeros, "sparsity": w.sparsity}
                for w in spec.weights
            ],
            "excluded": list(spec.excluded),
            "seconds": round(sum(self.seconds.values()), 3),
            "timings": {step: round(value, 3) for step, value in self.seconds.items()},
            "output": None if self.path is None else str(self.path),
        }
