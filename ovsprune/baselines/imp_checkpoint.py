"""File with the last complete round of iterative magnitude pruning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ovsprune.calibration.result_file import ResultFile
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Backbone, Pictures
from ovsprune.masks.magnitude import RATE
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.provenance import origin_of

__all__ = ["RoundsFile"]

_WEIGHT, _MASK = "weight/", "mask/"  # a weight and its mask have the same name


class RoundsFile:
    """Weights and masks after a round; each round replaces the previous one.

    Every round starts with a new optimiser, so the next round depends only on these tensors and on
    the position in the order of the images, which follows from the number of rounds.

    Args:
        settings: Configuration; ``imp.rounds`` names the file, None keeps nothing.
        backbone: Model to prune.
        pictures: Calibration images.
        ranked: Further JSON values that determine a round.
        progress: Receives a note if a training is resumed.

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
        self._progress = progress
        self._file: ResultFile | None = None
        if settings.imp.rounds is None:
            return
        path = Path(settings.imp.rounds)
        self._file = ResultFile(path, "ovsprune.imp-rounds/1", "--imp-rounds", "trained")
        self._file.check_writable()  # before the training, not after a round
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
        """Load the last round into ``student``, and return what :meth:`save` received.

        Masks and records are empty if there is no file yet. ``check`` raises an error if the
        records cannot be continued; the student is then unchanged.

        Raises:
            DataError: The file is damaged, or belongs to another training.
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
        self._progress.note(f"{self._file.path}: training continues after round {len(rounds)}")
        return masks, rounds

    def save(self, student: nn.Module, masks: Mapping[str, Tensor], rounds: Sequence[Any]) -> None:
        """Replace the previous round by weights, bool masks by name, and one record per round.

        Raises:
            OutputError: The file cannot be written; the previous one remains.
        """
        if self._file is None:
            return
        tensors = {f"{_WEIGHT}{n}": t.detach().cpu() for n, t in student.state_dict().items()}
        tensors |= {f"{_MASK}{n}": mask.cpu() for n, mask in masks.items()}
        self._file.write(tensors, {**self._origin, "rounds": list(rounds)})
