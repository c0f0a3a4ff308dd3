"""Feature distillation: train the slim tower towards the dense tower's features, without labels.

The slim tower is the student, the dense tower the teacher. Shapes: images [b, 3, H, W]; pooled
features [b, C]; dense features [b, C, h, w].
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import ActivationCache, collect_images, evenly_spaced
from ovsprune.calibration.feature_loss import OUTPUT_WEIGHTS, Features, feature_loss, total_variance
from ovsprune.calibration.refit import held_out_mask
from ovsprune.core.distillation import Distillation
from ovsprune.core.errors import OptionError
from ovsprune.core.optimizers import optimizer_class
from ovsprune.core.protocols import EndlessPictures, RecoveryContext
from ovsprune.graph.layers import requires_grad_as
from ovsprune.recovery import RECOVERIES
from ovsprune.recovery.whitened import Whitened, whiten

__all__ = ["Distill", "optimizer_class"]

_CHECKS = 20
"""Number of validations during a training."""
_WARM_UP = 0.05
"""Fraction of the training during which the learning rate rises."""
_MUON = 10.0
"""Learning rate of Muon, relative to that of AdamW. The former is the spectral norm of a step."""
_SAMPLED = 64
"""Maximum number of images for the loss scales and the input covariances."""


@RECOVERIES.register("distill")
class Distill:
    """Feature distillation from the dense tower, no labels; runs after gauss-newton."""

    trains = True
    after: str | None = "gauss-newton"

    def recover(self, ctx: RecoveryContext) -> None:
        """Train all weights of the slim tower in float32; keep those with the best validation loss.

        The loss is :func:`ovsprune.calibration.feature_loss.feature_loss`: the squared distance
        between the L2-normalised features of both towers (Romero et al., FitNets, 2015), relative
        to their total variance. The pooled output has a weight of one tenth. Both towers receive
        the same random crops and mirror images, new ones at every step (Beyer et al., CVPR 2022: a
        consistent and patient teacher). Rendered images are new at every step themselves.

        The validation images are not used by any other recovery. If a folder contains no further
        images, one eighth of the calibration images is held out instead. The weights from before
        the training are a candidate too, so the validation loss cannot increase.

        Linear layers of the blocks are trained in whitened coordinates
        (:class:`ovsprune.recovery.whitened.Whitened`), with any optimiser. Muon (Jordan et al.
        2024), the default from torch 2.9 on, takes steps of equal length in every direction of a
        matrix. In whitened coordinates, this length is measured by the layer's output.

        Raises:
            OptionError: The optimiser cannot train the tower.
        """
        student = Student(ctx)
        best = student.error()
        if best == 0.0:
            return  # Both towers are equal on the validation images: there is nothing to learn.
        state = _copy(ctx.slim)
        with requires_grad_as(ctx.slim, True):
            try:
                for _ in student.train():
                    error = student.error()
                    if error < best:
                        best, state = error, _copy(ctx.slim)
            finally:
                ctx.slim.load_state_dict(state)
                ctx.slim.zero_grad()  # sets gradients to None, which frees their memory


class Student:
    """Slim tower in training, with its teacher, training images and validation images.

    Args:
        ctx: Context of the recovery.

    Attributes:
        images: Calibration images, float32 [images, 3, H, W].
        train_indices: Indices in ``images`` of the training images, int64.
        validation: Validation images, float32 [V, 3, H, W].
    """

    def __init__(self, ctx: RecoveryContext) -> None:
        self.ctx, self.options = ctx, ctx.distill
        self.dense, self.slim = ctx.stages(ctx.dense), ctx.stages(ctx.slim)
        self.device = next(ctx.slim.parameters()).device
        self.generator = torch.Generator().manual_seed(ctx.seed)
        self.images = collect_images(ctx.pictures, ctx.batch_size)
        self.train_indices = torch.arange(len(self.images))
        if ctx.unseen is not None:
            self.validation = collect_images(ctx.unseen, ctx.batch_size)
        else:
            # The same images that the refits held out, so no recovery was fitted to them.
            held_out = held_out_mask(len(self.images))
            self.train_indices = (~held_out).nonzero().flatten()
            self.validation = self.images[held_out if held_out.any() else ~held_out]
        # The teacher does not change, so its features of the validation images are cached.
        self.validation_features = [self._teacher(part) for part in self._split(self.validation)]
        sampled = evenly_spaced(len(self.train_indices), _SAMPLED)
        self.sample = self.images[self.train_indices[sampled]]  # [at most 64, 3, H, W]
        self.whitened: list[Whitened] = []
        self.scales = self._loss_scales()

    @torch.no_grad()
    def error(self) -> float:
        """Return the loss on the validation images."""
        total = 0.0
        for images, teacher in zip(
            self._split(self.validation), self.validation_features, strict=True
        ):
            student = self.slim.outputs(images.to(self.device))
            # The loss is a mean over images; the last batch may be smaller.
            loss = feature_loss(student, teacher, self.scales, OUTPUT_WEIGHTS)
            total += len(images) * float(loss)
        return total / len(self.validation)

    def train(self) -> Iterator[None]:
        """Train; yield twenty times, the last time at the end, for a validation."""
        self.whitened = self._whiten()
        optimizers = self._optimizers()
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = [group["lr"] for group in groups]
        schedule = _Schedule(self.options)
        checks = 0
        with self.ctx.progress.stage("distillation", schedule.total) as advance:
            for images in self._batches():  # [b, 3, H, W]
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * schedule.rate_factor()
                if not self._step(optimizers, images):
                    self.ctx.progress.note(
                        f"distillation diverged at step {schedule.steps}; the best weights so far "
                        f"are kept. Try a lower --distill-lr than {self.options.lr:g}"
                    )
                    return
                fraction = schedule.count_step()
                advance(schedule.progress_since_last(fraction))
                # Slow steps may pass several checkpoints at once; they are validated once.
                if fraction * _CHECKS >= checks + 1:
                    checks = int(fraction * _CHECKS)
                    self._write_weights()
                    yield
                if fraction >= 1.0:
                    return

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the requested optimiser. Muon only accepts matrices, so AdamW trains the rest."""
        name, lr, slim = self.options.optimizer, self.options.lr, self.ctx.slim
        optimizer: Any = optimizer_class(name)
        try:
            # The optimiser gets V instead of W for whitened layers.
            free: dict[Tensor, Tensor] = {w.weight: w.free for w in self.whitened}
            # An attention or MLP that was removed entirely leaves matrices without entries.
            trained = [p for p in slim.parameters() if p.numel()]
            if name != "Muon":
                return [optimizer([free.get(p, p) for p in trained], lr=lr)]
            linear = {m.weight for m in slim.modules() if isinstance(m, nn.Linear)}
            matrices = [free.get(p, p) for p in trained if p in linear]
            others = [p for p in trained if p not in linear]
            optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=lr)]
            if matrices:
                optimizers.append(optimizer(matrices, lr=_MUON * lr, weight_decay=0.0))
            return optimizers
        except (ValueError, TypeError, RuntimeError) as error:
            raise _incompatible(name, error) from error

    def _step(self, optimizers: list[torch.optim.Optimizer], images: Tensor) -> bool:
        """Take one step on images [b, 3, H, W]; return False if a loss was not finite."""
        images = images.to(self.device)
        teacher = self._teacher(images)
        losses = []

        def closure() -> Tensor:
            # LBFGS calls this several times per step, so W must follow V each time.
            self._write_weights()
            self.ctx.slim.zero_grad()
            loss = feature_loss(self.slim.outputs(images), teacher, self.scales, OUTPUT_WEIGHTS)
            losses.append(float(loss.detach()))
            torch.autograd.backward(loss)  # gradients of W, then of V
            for layer in self.whitened:
                layer.read_gradient()
            return loss

        # The first optimiser evaluates the closure; the others use the same gradients.
        first, *others = optimizers
        try:
            first.step(closure)  # type: ignore[arg-type]
            for optimizer in others:
                optimizer.step()
        except RuntimeError as error:  # SparseAdam rejects dense gradients only here.
            raise _incompatible(self.options.optimizer, error) from error
        return all(map(math.isfinite, losses))

    def _whiten(self) -> list[Whitened]:
        with torch.no_grad():
            parts = [self.slim.stem(images.to(self.device)) for images in self._split(self.sample)]
        cache = ActivationCache(torch.cat(parts).float().cpu())  # [images, ...], before block 0
        return whiten(self.slim.blocks, cache, self.ctx.batch_size)

    def _write_weights(self) -> None:
        """Set the weights W of the whitened layers from the trained parameters V."""
        for layer in self.whitened:
            layer.write_weight()

    def _batches(self) -> Iterator[Tensor]:
        """Yield training batches [b, 3, H, W] without end.

        Rendered images are new in every batch. Others are shuffled in every epoch and augmented.
        """
        size = self.ctx.batch_size
        if isinstance(self.ctx.pictures, EndlessPictures):
            fresh = self.ctx.pictures.endless()
            while True:
                yield torch.stack([next(fresh) for _ in range(size)])
        while True:
            order = torch.randperm(len(self.train_indices), generator=self.generator)
            for start in range(0, len(order), size):
                chosen = self.train_indices[order[start : start + size]]
                yield torch.stack([self._augment(self.images[int(i)]) for i in chosen])

    def _split(self, images: Tensor) -> Iterator[Tensor]:
        """Yield images [n, 3, H, W] in batches, without augmentation."""
        size = self.ctx.batch_size
        yield from (images[start : start + size] for start in range(0, len(images), size))

    def _augment(self, image: Tensor) -> Tensor:
        """Return a random crop of at least half the area, resized to [3, H, W], maybe mirrored."""
        height, width = image.shape[1:]
        # One draw of four numbers per image: area, top, left, mirror.
        draw = torch.rand(4, generator=self.generator).tolist()
        # The area is uniform in [1/2, 1], so the side is the square root of that.
        side = math.sqrt(0.5 + 0.5 * draw[0])
        h, w = max(1, round(side * height)), max(1, round(side * width))
        top, left = round(draw[1] * (height - h)), round(draw[2] * (width - w))
        crop = image[None, :, top : top + h, left : left + w]  # [1, 3, h, w]
        crop = F.interpolate(crop, (height, width), mode="bilinear", antialias=True)[0]
        return crop.flip(2) if draw[3] < 0.5 else crop

    @torch.no_grad()
    def _teacher(self, images: Tensor) -> Features:
        return self.dense.outputs(images.to(self.device))

    def _loss_scales(self) -> list[float]:
        """Return the total variance of the dense tower's pooled and dense features."""
        sampled = [self._teacher(images) for images in self._split(self.sample)]
        kinds = zip(*sampled, *self.validation_features, strict=True)
        return [total_variance(F.normalize(torch.cat(kind), dim=1)) for kind in kinds]


class _Schedule:
    """Progress of a training, in steps or in time, and the learning rate schedule."""

    def __init__(self, options: Distillation) -> None:
        self.limit, self.seconds = options.limit, options.seconds
        self.steps = 0
        self.start = time.monotonic()
        # Length of the progress bar; a training limited by time has no known number of steps.
        self.total = self.limit if self.limit is not None else 1000
        self.shown = 0

    def fraction(self) -> float:
        """Return the completed fraction of the training, of steps or of time, the larger one."""
        steps = 0.0 if self.limit is None else self.steps / self.limit
        passed = time.monotonic() - self.start
        return max(steps, 0.0 if self.seconds is None else passed / self.seconds)

    def rate_factor(self) -> float:
        """Return the learning rate factor: linear warm-up, then cosine (Loshchilov and Hutter)."""
        fraction = min(self.fraction(), 1.0)
        # The first step has a positive rate even if no time has passed.
        if self.steps == 0 or fraction < _WARM_UP:
            return max(fraction, 1e-3) / _WARM_UP
        return 0.5 + 0.5 * math.cos(math.pi * (fraction - _WARM_UP) / (1 - _WARM_UP))

    def count_step(self) -> float:
        """Count a step; return the completed fraction."""
        self.steps += 1
        return self.fraction()

    def progress_since_last(self, fraction: float) -> int:
        """Return the advance of the progress bar since the last call, for a completed fraction."""
        current = min(self.total, round(fraction * self.total))
        advance, self.shown = current - self.shown, current
        return advance


def _copy(tower: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tower.state_dict().items()}


def _incompatible(name: str, error: Exception) -> OptionError:
    return OptionError(
        f"--distill-optimizer {name} cannot train this tower ({error}); use AdamW or another one"
    )
