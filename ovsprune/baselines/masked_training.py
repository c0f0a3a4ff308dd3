"""Feature distillation in which masked weights stay zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import collect_images
from ovsprune.calibration.feature_loss import feature_loss
from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Pictures, Stages
from ovsprune.masks.apply import zero

__all__ = ["MaskedTraining"]


class MaskedTraining:
    """Training of a tower to reproduce the features of the dense tower.

    Both towers stay in evaluation mode, so batch norms keep the dense statistics and dropout is
    off. All parameters train, including the first layer and the norms.

    Args:
        student: Tower that is trained; ``requires_grad`` of its parameters is set.
        teacher: Dense tower.
        stages: Returns a tower as a sequence of blocks.
        pictures: Calibration images; kept in memory, or on disk above 1 GiB.
        batch_size: Number of images per step.
        rate: Learning rate of AdamW. Its weight decay is 0, because decay would move all weights
            towards zero and affect the ranking.
        seed: Seed of the order of the images.
        done: Steps that an interrupted run has taken; their images are skipped.
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
        self._images = collect_images(pictures, batch_size)
        # [batch_size] indices per step; an interrupted run has used the first `done` of them.
        self._batches = islice(_endless(len(self._images), batch_size, seed), done, None)

    @torch.no_grad()
    def rewind(self, where: Mapping[str, Tensor] | None = None) -> None:
        """Reset the student's parameters to those of the teacher (Frankle and Carbin 2019).

        Args:
            where: Name of a parameter to bool of its shape: entries to reset; None resets all.
        """
        # Buffers need no reset: they do not change in evaluation mode.
        dense = dict(self.teacher.named_parameters())
        for name, parameter in self.student.named_parameters():
            if where is None:
                parameter.copy_(dense[name])
            elif name in where:
                mask = where[name].to(parameter.device)
                parameter.copy_(torch.where(mask, dense[name], parameter))

    @torch.enable_grad()
    def run(
        self, masks: Mapping[str, Tensor], steps: int, advance: Callable[[int], None]
    ) -> list[float]:
        """Take ``steps`` training steps.

        Args:
            masks: Name of a parameter to bool of its shape; entries with False are zero before,
                between and after the steps.
            steps: Number of steps; with 0, only the zeros are set.
            advance: Called with 1 after every step.

        Returns:
            Loss before every step.

        Raises:
            OptionError: The training diverged.
        """
        parameters = dict(self.student.named_parameters())
        masks = {name: mask.to(self._device) for name, mask in masks.items()}
        zero(parameters, masks)
        # A new optimiser per round, so that a resumed training is exact.
        optimizer = torch.optim.AdamW(parameters.values(), lr=self.rate, weight_decay=0.0)
        losses = []
        for _ in range(steps):
            images = self._images[next(self._batches)].to(self._device)
            with torch.no_grad():
                target = self._teacher.outputs(images)
            loss = feature_loss(self._student.outputs(images), target)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            zero(parameters, masks)  # the optimiser moves masked weights, too
            losses.append(loss.item())
            self._check(len(losses), loss.isfinite())
            advance(1)
        # The last step may have produced parameters that no loss has seen.
        self._check(steps, torch.stack([p.isfinite().all() for p in parameters.values()]).all())
        optimizer.zero_grad()  # frees the gradients
        return losses

    def _check(self, step: int, finite: Tensor) -> None:
        if not finite:
            raise OptionError(
                f"the training between rounds diverged at step {step}: take a lower --imp-lr than "
                f"{self.rate:g}"
            )


def _endless(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield indices of batches in a new order per pass; an incomplete batch joins the next pass."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, count)
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:size]
        queue = queue[size:]
