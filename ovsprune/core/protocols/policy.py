"""Finetuning policies: choose the layers that train at each step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["Layer", "Policy", "ScheduleContext"]


@dataclass(frozen=True)
class Layer:
    """Weight that a schedule trains or freezes, with the parameters that follow it.

    Attributes:
        name: Dotted name of the parameter (``"visual.transformer.resblocks.3.mlp.c_fc.weight"``).
            A fused query-key-value weight counts as one.
        numel: Number of its entries.
        tower: True for a weight of the image tower, False for a layer of the framework.
        followers: Names of the parameters that are trained and frozen together with it: biases,
            norms, positional embeddings.
    """

    name: str
    numel: int
    tower: bool = True
    followers: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ScheduleContext:
    """Inputs of a policy at one decision.

    Attributes:
        layers: Layers to choose from, in the order of the model; never empty.
        fraction: Fraction of the layers to train, in [0, 1].
        count: Number of layers to train; None if ``fraction`` applies.
        step: Optimiser step before which the decision is made.
        total_steps: Number of optimiser steps of the training.
        generator: Seeded random generator, the same at every decision of a training.
        alphas: Name of a layer to the power-law exponent of its spectrum, > 1, or infinity if no
            power law fits; None unless the policy sets ``needs_spectra``.
    """

    layers: Sequence[Layer]
    fraction: float
    count: int | None
    step: int
    total_steps: int
    generator: torch.Generator
    alphas: Mapping[str, float] | None


class Policy(Protocol):
    """Choice of the layers that train, made once or at several steps of a training."""

    needs_spectra: bool
    """True if the policy reads :attr:`ScheduleContext.alphas`."""
    needs_current_spectra: bool
    """True if ``alphas`` are measured on the current weights, False for the initial weights."""

    def decision_steps(self, total_steps: int, every: int) -> Sequence[int]:
        """Return the steps before which :meth:`choose` is called.

        Args:
            total_steps: Number of optimiser steps of the training, 1 or more.
            every: Smallest number of steps between two decisions, 1 or more.

        Returns:
            Ascending steps below ``total_steps``; the first is 0.
        """
        ...

    def choose(self, ctx: ScheduleContext) -> Collection[str]:
        """Return the names of the layers to train from ``ctx.step`` on."""
        ...
