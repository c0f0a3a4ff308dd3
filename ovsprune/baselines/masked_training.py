"""A few steps of feature distillation in which masked weights stay zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import stored
from ovsprune.calibration.feature_loss import feature_loss
from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Pictures, Stages
from ovsprune.masks.apply import zero

__all__ = ["MaskedTraining"]


class MaskedTraining:
    """Trains one tower to have another's features.

    Both stay in evaluation mode: the statistics of norms are the dense tower's, and nothing is
    dropped. Every parameter trains, those of the first layer and the norms too.

    Args:
        student: The tower that is trained; its parameters are made to need gradients.
        teacher: The dense tower.
        stages: A tower's blocks and head.
        pictures: Without labels; held in memory, or on disk above 1 GiB.
        batch_size: Pictures a step.
        rate: Learning rate of AdamW, which has no weight decay here: it would pull all weights to
            zero and so take part in the ranking.
        seed: Of the order of the pictures.
        done: Steps that were taken before, by an interrupted run; the order goes on after them.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        stages: Callable[[nn.Module], Stages],
        pictures: Pictures,
        *,
        batch_size: int,
        rate: float,
        seed: int,
        done: int = 0,
    ) -> None:
        self.student, self.rate = student.eval().requires_grad_(True), rate
        self.teacher = teacher
        self._student, self._teacher = stages(student), stages(teacher)
        self._device = next(student.parameters()).device
        self._images = stored(pictures, batch_size)
        self._batches = islice(_endless(len(self._images), batch_size, seed), done, None)

    @torch.no_grad()
    def rewind(self, where: Mapping[str, Tensor] | None = None) -> None:
        """Give the student the teacher's parameters again (Frankle and Carbin 2019).

        Args:
            where: Parameter's name to bool of its shape, the entries that are meant; by default
                every entry of every parameter.
        """
        first = dict(self.teacher.named_parameters())
        for name, parameter in self.student.named_parameters():
            if where is None:
                parameter.copy_(first[name])
            elif name in where:
                parameter.copy_(
                    torch.where(where[name].to(parameter.device), first[name], parameter)
                )

    @torch.enable_grad()
    def run(
        self, masks: Mapping[str, Tensor], steps: int, advance: Callable[[int], None]
    ) -> list[float]:
        """Take ``steps`` steps.

        Args:
            masks: Parameter's name to bool of its shape; where it is False, the parameter is zero
                before, between and after the steps.
            steps: 0 sets the zeros, and no more.
            advance: Is told of every step.

        Returns:
            The loss before every step.

        Raises:
            OptionError: The training diverged.
        """
        parameters = dict(self.student.named_parameters())
        masks = {name: mask.to(self._device) for name, mask in masks.items()}
        zero(parameters, masks)
        optimizer = torch.optim.AdamW(parameters.values(), lr=self.rate, weight_decay=0.0)
        losses = []
        for _ in range(steps):
            images = self._images[next(self._batches)].to(self._device)
            with torch.no_grad():
                wanted = self._teacher.outputs(images)
            loss = feature_loss(self._student.outputs(images), wanted)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            zero(parameters, masks)
            losses.append(loss.item())
            self._check(len(losses), loss.isfinite())
            advance(1)
        self._check(steps, torch.stack([p.isfinite().all() for p in parameters.values()]).all())
        optimizer.zero_grad()
        return losses

    def _check(self, step: int, finite: Tensor) -> None:
        if not finite:
            raise OptionError(
                f"the training between rounds diverged at step {step}: take a lower --imp-lr than "
                f"{self.rate:g}"
            )


def _endless(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches, in a new order at every pass; a pass's rest waits for the next."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < min(size, count):
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[: min(size, count)]
        waiting = waiting[min(size, count) :]
