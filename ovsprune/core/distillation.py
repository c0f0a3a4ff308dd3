"""Options of a recovery that trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ovsprune.core.config import Config
from ovsprune.core.option_docs import documented
from ovsprune.core.options import deferred, option

__all__ = ["Distillation"]


def _default_optimizer() -> str:
    """Return Muon, or AdamW before torch 2.9."""
    import torch  # the declarations are read by the command line, which starts without torch

    return "Muon" if hasattr(torch.optim, "Muon") else "AdamW"


@documented
@dataclass(frozen=True)
class Distillation(Config):
    """Length and optimiser of the training in a recovery that takes gradient steps."""

    steps: int | None = option(
        None,
        minimum=1,
        default_text="1000, or no limit if a time limit is given",
        help="Gradient steps, over all rounds together.",
    )
    seconds: float | None = option(
        None,
        above=0,
        help="Wall-clock limit of the training, in seconds. A training that it stops cannot be "
        "repeated exactly.",
    )
    optimizer: str = option(
        factory=_default_optimizer,
        validate=deferred("ovsprune.core.optimizers", "optimizer_class"),
        metavar="NAME",
        default_text="Muon for matrices and AdamW for the rest, or AdamW alone before torch 2.9",
        help="Optimiser, a class of torch.optim.",
    )
    lr: float = option(
        1e-4,
        above=0,
        help="Peak learning rate; Muon uses ten times as much for matrices.",
    )

    @property
    def limit(self) -> int | None:
        """Steps after which training ends in any case; None if only time ends it."""
        return 1000 if self.steps is None and self.seconds is None else self.steps

    def shared(self, rounds: int) -> Distillation:
        """Return an equal part for each of ``rounds``, with the steps rounded up."""
        steps = None if self.limit is None else -(-self.limit // rounds)
        return replace(self, steps=steps, seconds=self.seconds and self.seconds / rounds)
