"""The last round of iterative magnitude pruning, in a file, from which the next one goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ovsprune.calibration.kept import KeptFile
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Backbone, Pictures
from ovsprune.masks.magnitude import RATE
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.provenance import origin_of

__all__ = ["RoundsFile"]

_WEIGHT, _MASK = "weight/", "mask/"


class RoundsFile:
    """Weights and masks after a round, written over those of the round before.

    An optimiser begins anew in every round, so they are all that the next one depends on, with the
    place in the order of the pictures, which follows from how many rounds there were.

    Args:
        settings: ``imp.rounds`` names the file; None keeps nothing.
        backbone: What is pruned.
        pictures: What it trains on.
        ranked: What else decides a round, as JSON values.
        progress: Is told where it goes on.

    Raises:
        OutputError: The file cannot be written.
    """

    def __init__(
        self,
        settings: PruneConfig,
        backbone: Backbone,
        pictures: Pictures,
        ranked: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        self._progress, self._origin = progress, {}
        self._file: KeptFile | None = None
        if settings.imp.rounds is None:
            return
        path = Path(settings.imp.rounds)
        self._file = KeptFile(path, "ovsprune.imp-rounds/1", "--imp-rounds", "trained")
        self._file.check_place()
        self._origin = {
            **origin_of(backbone, pictures),
            **ranked,
            "rate": RATE,
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "imp_steps": settings.imp.steps,
            "imp_rewind": settings.imp.rewind,
            "imp_lr": settings.imp.lr,
        }

    def resume(
        self, student: nn.Module, check: Callable[[list[Any]], None] | None = None
    ) -> tuple[dict[str, Tensor], list[Any]]:
        """Put the weights of the last round into ``student``.

        Args:
            student: The tower; left as it is if this raises.
            check: Looks at what every round did, and raises if this training cannot go on there.

        Returns:
            What :meth:`save` was given: masks, and what every round did; both empty where there is
            no file yet.

        Raises:
            DataError: The file is damaged, or of another training.
        """
        if self._file is None or not self._file.path.exists():
            return {}, []
        tensors, stored = self._file.read(self._origin)
        rounds = list(stored["rounds"])
        if check is not None:
            check(rounds)
        weights = {n.removeprefix(_WEIGHT): t for n, t in tensors.items() if n.startswith(_WEIGHT)}
        student.load_state_dict(weights)
        masks = {n.removeprefix(_MASK): t for n, t in tensors.items() if n.startswith(_MASK)}
        self._progress.note(f"{self._file.path}: going on after round {len(rounds)}")
        return masks, rounds

    def save(self, student: nn.Module, masks: Mapping[str, Tensor], rounds: Sequence[Any]) -> None:
        """Keep this round, in place of the one before.

        Args:
            student: The tower.
            masks: Name to bool tensor.
            rounds: What every round did, as JSON values.

        Raises:
            OutputError: The file cannot be written; the one before is left.
        """
        if self._file is None:
            return
        tensors = {f"{_WEIGHT}{n}": t.detach().cpu() for n, t in student.state_dict().items()}
        tensors |= {f"{_MASK}{n}": mask.cpu() for n, mask in masks.items()}
        self._file.write(tensors, {**self._origin, "rounds": list(rounds)})
