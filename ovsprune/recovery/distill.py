"""Distillation: gradient steps towards the dense tower's own features, without labels."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import Stream, spread_over, stored
from ovsprune.calibration.feature_loss import SHARES, Features, feature_loss, spread
from ovsprune.calibration.refit import held_out
from ovsprune.core.distillation import Distillation
from ovsprune.core.errors import OptionError
from ovsprune.core.optimizers import optimizer_class
from ovsprune.core.protocols import EndlessPictures, RecoveryContext
from ovsprune.recovery import RECOVERIES
from ovsprune.recovery.whitened import Whitened, whiten

__all__ = ["Distill", "optimizer_class"]

_CHECKS = 20
"""How often, over a training, the error on unseen pictures is measured."""
_WARM_UP = 0.05
"""Share of a training in which the learning rate rises."""
_MUON = 10.0
"""Muon's learning rate, a spectral norm for each matrix, in those of AdamW for the rest."""
_SAMPLED = 64
"""Pictures that spreads, and covariances of what layers read, are taken from."""


@RECOVERIES.register("distill")
class Distill:
    """Feature distillation from the dense tower, no labels; runs after gauss-newton."""

    trains = True
    after: str | None = "gauss-newton"

    def recover(self, ctx: RecoveryContext) -> None:
        """Train all weights of the slim tower in float32, and keep the best by unseen pictures.

        The loss is :func:`ovsprune.calibration.feature_loss.feature_loss`: the squared distance of
        the L2-normalised dense tokens and pooled outputs from the dense tower's (Romero et al.,
        FitNets, 2015), over their spread, the pooled output counting a tenth. Both towers see the
        same crops and mirror images, new ones at every step, so that few pictures go a long way
        (Beyer et al., CVPR 2022: a consistent and patient teacher); made pictures, of which there
        is no end, are new ones themselves at every step. The weights with the least error on
        pictures that no repair has seen stay, the ones from before the training included. A folder
        may have none left beside calibration's: then an eighth of those is not trained on. The
        refits before have fitted it, so that it speaks for what they left.

        Linear layers of the blocks are trained in whitened coordinates, see
        :class:`ovsprune.recovery.whitened.Whitened`, whatever the optimiser. Muon (Jordan et al.
        2024), the default from torch 2.9 on, has steps of one length in every direction of a
        matrix; in these coordinates it is one by what the layer gives.

        Raises:
            OptionError: The optimiser cannot train such a tower.
        """
        pupil = Student(ctx)
        best = pupil.error()
        if best == 0.0:
            return  # Nothing was cut, or nothing was lost: there is nothing to learn.
        state = _copy(ctx.slim)
        before = {p: p.requires_grad for p in ctx.slim.parameters()}
        ctx.slim.requires_grad_(True)
        try:
            for _ in pupil.train():
                error = pupil.error()
                if error < best:
                    best, state = error, _copy(ctx.slim)
        finally:
            ctx.slim.load_state_dict(state)
            for parameter, flag in before.items():
                parameter.requires_grad_(flag).grad = None


class Student:
    """The slim tower, the dense one that it learns from, and the pictures."""

    def __init__(self, ctx: RecoveryContext) -> None:
        self.item, self.options = ctx, ctx.distill
        self.dense, self.slim = ctx.stages(ctx.dense), ctx.stages(ctx.slim)
        self.device = next(ctx.slim.parameters()).device
        self.generator = torch.Generator().manual_seed(ctx.seed)
        self.pictures = stored(ctx.pictures, ctx.batch_size)
        self.lessons = torch.arange(len(self.pictures))
        if ctx.unseen is not None:
            self.exam = stored(ctx.unseen, ctx.batch_size)
        else:
            held = held_out(len(self.pictures))
            self.lessons = (~held).nonzero().flatten()
            self.exam = self.pictures[held if held.any() else ~held]
        self.answers = [self._teacher(images) for images in self._plain(self.exam)]
        self.sample = self.pictures[self.lessons[spread_over(len(self.lessons), _SAMPLED)]]
        self.whitened: list[Whitened] = []
        self.spreads = self._spreads()

    @torch.no_grad()
    def error(self) -> float:
        """The loss on the pictures that it is judged by."""
        total = 0.0
        for images, wanted in zip(self._plain(self.exam), self.answers, strict=True):
            found = self.slim.outputs(images.to(self.device))
            total += len(images) * float(feature_loss(found, wanted, self.spreads, SHARES))
        return total / len(self.exam)

    def train(self) -> Iterator[None]:
        """Train, stopping twenty times on the way, at the end too, to be examined."""
        self.whitened = self._whiten()
        optimizers = self._optimizers()
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = [group["lr"] for group in groups]
        clock = _Schedule(self.options)
        checks = 0
        with self.item.progress.stage("distillation", clock.total) as advance:
            for images in self._batches():
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * clock.rate()
                if not self._step(optimizers, images):
                    self.item.progress.note(
                        f"distillation diverged at step {clock.steps}; the best weights from "
                        f"before are kept. Try a lower --distill-lr than {self.options.lr:g}"
                    )
                    return
                share = clock.tick()
                advance(clock.moved(share))
                if share * _CHECKS >= checks + 1:
                    checks = int(share * _CHECKS)
                    self._write()
                    yield
                if share >= 1.0:
                    return

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """The one that was asked for; Muon, which takes matrices alone, and AdamW for the rest."""
        name, lr, slim = self.options.optimizer, self.options.lr, self.item.slim
        kind: Any = optimizer_class(name)
        try:
            free: dict[Tensor, Tensor] = {w.weight: w.free for w in self.whitened}
            # Of an attention or MLP that is gone, matrices without entries are left.
            trained = [p for p in slim.parameters() if p.numel()]
            if name != "Muon":
                return [kind([free.get(p, p) for p in trained], lr=lr)]
            linear = {m.weight for m in slim.modules() if isinstance(m, nn.Linear)}
            matrices = [free.get(p, p) for p in trained if p in linear]
            others = [p for p in trained if p not in linear]
            found: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=lr)]
            if matrices:
                found.append(kind(matrices, lr=_MUON * lr, weight_decay=0.0))
            return found
        except (ValueError, TypeError, RuntimeError) as error:
            raise _cannot(name, error) from error

    def _step(self, optimizers: list[torch.optim.Optimizer], images: Tensor) -> bool:
        """One step; False if the loss was not finite, and nothing was done."""
        images = images.to(self.device)
        wanted = self._teacher(images)
        losses = []

        def closure() -> Tensor:
            self._write()
            self.item.slim.zero_grad()
            loss = feature_loss(self.slim.outputs(images), wanted, self.spreads, SHARES)
            losses.append(float(loss.detach()))
            torch.autograd.backward(loss)
            for layer in self.whitened:
                layer.read()
            return loss

        first, *others = optimizers
        try:
            first.step(closure)  # type: ignore[arg-type]
            for optimizer in others:
                optimizer.step()
        except RuntimeError as error:  # SparseAdam finds out here that gradients are dense.
            raise _cannot(self.options.optimizer, error) from error
        return all(map(math.isfinite, losses))

    def _whiten(self) -> list[Whitened]:
        with torch.no_grad():
            parts = [self.slim.stem(images.to(self.device)) for images in self._plain(self.sample)]
        stream = Stream(torch.cat(parts).float().cpu())
        return whiten(self.slim.blocks, stream, self.item.batch_size)

    def _write(self) -> None:
        for layer in self.whitened:
            layer.write()

    def _batches(self) -> Iterator[Tensor]:
        """Batches [b, 3, H, W]: new pictures, or changed ones, shuffled whenever all were seen."""
        size = self.item.batch_size
        if isinstance(self.item.pictures, EndlessPictures):
            more = self.item.pictures.endless()
            while True:
                yield torch.stack([next(more) for _ in range(size)])
        while True:
            order = torch.randperm(len(self.lessons), generator=self.generator)
            for start in range(0, len(order), size):
                chosen = self.lessons[order[start : start + size]]
                yield torch.stack([self._changed(self.pictures[int(i)]) for i in chosen])

    def _plain(self, pictures: Tensor) -> Iterator[Tensor]:
        """Batches of pictures as they are."""
        size = self.item.batch_size
        yield from (pictures[start : start + size] for start in range(0, len(pictures), size))

    def _changed(self, image: Tensor) -> Tensor:
        """A random crop of half the area or more, at the full size again, mirrored or not."""
        height, width = image.shape[1:]
        draw = torch.rand(4, generator=self.generator).tolist()
        side = math.sqrt(0.5 + 0.5 * draw[0])
        h, w = max(1, round(side * height)), max(1, round(side * width))
        top, left = round(draw[1] * (height - h)), round(draw[2] * (width - w))
        crop = image[None, :, top : top + h, left : left + w]
        crop = F.interpolate(crop, (height, width), mode="bilinear", antialias=True)[0]
        return crop.flip(2) if draw[3] < 0.5 else crop

    @torch.no_grad()
    def _teacher(self, images: Tensor) -> Features:
        return self.dense.outputs(images.to(self.device))

    def _spreads(self) -> list[float]:
        """Spreads of the dense tower's features, on lessons as they are and the exam."""
        known = [self._teacher(images) for images in self._plain(self.sample)]
        kinds = zip(*known, *self.answers, strict=True)
        return [spread(F.normalize(torch.cat(kind), dim=1)) for kind in kinds]


class _Schedule:
    """How far a training is, in steps or in time, and the learning rate that goes with it."""

    def __init__(self, options: Distillation) -> None:
        self.limit, self.seconds = options.limit, options.seconds
        self.steps = 0
        self.start = time.monotonic()
        self.total = self.limit if self.limit is not None else 1000
        self.shown = 0

    def share(self) -> float:
        """Share of the training that is done, of steps or of time, whichever is more."""
        steps = 0.0 if self.limit is None else self.steps / self.limit
        passed = time.monotonic() - self.start
        return max(steps, 0.0 if self.seconds is None else passed / self.seconds)

    def rate(self) -> float:
        """A linear rise, then half a cosine down to nothing (Loshchilov and Hutter 2017)."""
        share = min(self.share(), 1.0)
        if self.steps == 0 or share < _WARM_UP:
            return max(share, 1e-3) / _WARM_UP
        return 0.5 + 0.5 * math.cos(math.pi * (share - _WARM_UP) / (1 - _WARM_UP))

    def tick(self) -> float:
        """Count a step; the share that is done by now."""
        self.steps += 1
        return self.share()

    def moved(self, share: float) -> int:
        """By how much the bar moves, where ``share`` is done."""
        now = min(self.total, round(share * self.total))
        moved, self.shown = now - self.shown, now
        return moved


def _copy(tower: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tower.state_dict().items()}


def _cannot(name: str, error: Exception) -> OptionError:
    return OptionError(
        f"--distill-optimizer {name} cannot train this tower ({error}); take AdamW or another one"
    )
