"""Options of iterative magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass

from ovsprune.core.config import Config
from ovsprune.core.option_docs import documented
from ovsprune.core.options import option

__all__ = ["ImpConfig"]


@documented
@dataclass(frozen=True, kw_only=True)
class ImpConfig(Config):
    """Options of iterative magnitude pruning (IMP), see :mod:`ovsprune.baselines.imp_weights`.

    The other options of IMP (ratio, calibration images, seed, batch size, protected layers) are
    those of :class:`ovsprune.PruneConfig`, of which this is the section ``imp``.
    """

    structured: bool = option(
        False,
        provenance="changed",
        help="Remove whole units instead of single weights.",
    )
    steps: int = option(
        100, minimum=0, compare="method", help="Training steps per round; the paper uses 5000."
    )
    rewind: bool = option(
        False, compare="method", help="Start the training of every round from the dense weights."
    )
    lr: float = option(1e-4, above=0, compare="method", help="Learning rate of AdamW.")
    rounds: str | None = option(
        None,
        metavar="FILE",
        provenance="never",
        decides=False,
        help="File that keeps the last complete round. A later run continues from it; for single "
        "weights, also to a higher ratio.",
    )
