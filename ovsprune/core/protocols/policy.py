"""Finetuning policies: choose the layers that train at each step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["Layer", "Policy", "ScheduleContext"]


@dataclass(frozen=True)
class Layer:
    """One weight that a schedule trains or freezes, and what goes with it.

    Attributes:
        name: Dotted name of the parameter (``"visual.transformer.resblocks.3.mlp.c_fc.weight"``);
            fused queries, keys and values are one.
        numel: Its numbers.
        tower: Whether it is part of the image tower; False of a framework's own layers.
        followers: Names of the parameters that train and freeze with it: biases, norms, positions.
    """

    name: str
    numel: int
    tower: bool = True
    followers: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ScheduleContext:
    """What a policy sees when it is asked.

    Attributes:
        layers: The pool, in the order of the model; never empty.
        fraction: Share of the layers to train, in [0, 1].
        count: How many layers to train, where that was asked instead of a share.
        step: The optimiser step before which it is asked.
        total_steps: Optimiser steps of the whole training.
        generator: Seeded; the same at every question of a training.
        alphas: Name of a layer to the power-law exponent of its spectrum, > 1, infinite where it
            has none; None unless the policy says ``needs_spectra``.
    """

    layers: Sequence[Layer]
    fraction: float
    count: int | None
    step: int
    total_steps: int
    generator: torch.Generator
    alphas: Mapping[str, float] | None


class Policy(Protocol):
    """Decides which layers train when."""

    needs_spectra: bool
    """Whether it needs :attr:`ScheduleContext.alphas`."""
    current: bool
    """Whether they are of the weights as they are when it is asked, not as they were at first."""

    def moments(self, total_steps: int, every: int) -> Sequence[int]:
        """Steps before which it is asked: ascending, the first 0, all below ``total_steps``.

        Args:
            total_steps: Optimiser steps of the whole training, 1 or more.
            every: How often it may change its mind, in steps, 1 or more.
        """
        ...

    def choose(self, ctx: ScheduleContext) -> Collection[str]:
        """Names of the layers that train from ``item.step`` on."""
        ...
