"""Every plug-in's shape on one page.

A plug-in is one class in one file of its room, with the room's decorator::

    @CRITERIA.register("mine")
    class Mine:
        needs = frozenset({"moments"})  # or "gradients", "norms", or nothing
        def score(self, item: GroupContext) -> Ranking: ...

Nothing is inherited; the contract tests run over every registered name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ovsprune.core.distillation import Distillation
from ovsprune.core.progress import Progress
from ovsprune.core.records import (
    Curves,
    DenseModel,
    Group,
    Plan,
    Preprocess,
    Scores,
    Slice,
    StreamPoint,
)

__all__ = [
    "NEEDS",
    "AllocationContext",
    "Allocator",
    "Backbone",
    "Budget",
    "Criterion",
    "Distillation",
    "Family",
    "Forward",
    "GradientCriterion",
    "GroupContext",
    "Layer",
    "Moments",
    "Objective",
    "Pictures",
    "Policy",
    "Ranking",
    "Recovery",
    "RecoveryContext",
    "ScheduleContext",
    "Seed",
    "Stages",
]


class Pictures(Protocol):
    """Calibration pictures: a fixed number of them, the same ones at every pass."""

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield float32 [b, 3, H, W], preprocessed, ``b <= size``, in a fixed order."""
        ...


@runtime_checkable
class EndlessPictures(Pictures, Protocol):
    """Calibration pictures that are made, so that there are always more of their kind."""

    def endless(self) -> Iterator[Tensor]:
        """Yield new pictures [3, H, W] without end, the same ones every time."""
        ...


@dataclass(frozen=True, eq=False)
class Stages:
    """A tower as a sequence of blocks over one residual stream.

    Attributes:
        stem: images [B, 3, H, W] -> stream [B, ...].
        blocks: Dotted name -> block, in order; each maps stream -> stream.
        head: stream -> (pooled [B, C], dense [B, C, h, w]).
    """

    stem: Callable[[Tensor], Tensor]
    blocks: Mapping[str, nn.Module]
    head: Callable[[Tensor], tuple[Tensor, Tensor]]

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled [B, C] and dense [B, C, h, w] outputs of images [B, 3, H, W]."""
        stream = self.stem(images)
        for block in self.blocks.values():
            stream = block(stream)
        return self.head(stream)


@dataclass(frozen=True)
class Seed:
    """Where a family offers to cut; the dependency graph finds what must go along.

    Attributes:
        name: Name of the group.
        kind: Unit kind.
        layer: Dotted name of a layer (of the rewritten tower) whose outputs are the units.
        unit_width: Consecutive outputs that make one unit.
        block: Dotted name of the block.
        stream: Where the residual stream is read after the consumer.
        protected: Why it is not offered by default, or None.
        consumer: Dotted name of the layer whose columns are ranked and refitted, where several
            layers read the units; None where one does.
        along: Slices that go along and that no graph sees: an index of the units, which is no part
            of what is computed.
    """

    name: str
    kind: str
    layer: str
    unit_width: int
    block: str
    stream: StreamPoint | None
    protected: str | None = None
    consumer: str | None = None
    along: tuple[Slice, ...] = ()


class Family(Protocol):
    """A backbone family: how its towers load, come apart, and go together again."""

    library: str
    """Distribution that builds the tower, for messages (``"open_clip_torch"``)."""

    def names(self) -> Sequence[str]:
        """Names that :meth:`load` takes."""
        ...

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Whether a model configuration of open_clip's describes a tower of this family."""
        ...

    def load(self, name: str, pretrained: str | None, activation: str | None) -> Backbone:
        """Build the model and load its weights; ``name`` may be a folder of open_clip's form.

        Raises:
            WeightsError: The weights cannot be had, or do not fit.
        """
        ...

    def build(self, dense: DenseModel) -> Backbone:
        """Build the dense backbone that a checkpoint was made from, its tower with random weights.

        Raises:
            WeightsError: ``dense.text`` does not fit.
        """
        ...

    def rewrite(self, tower: nn.Module) -> None:
        """Replace, in place, what cannot be cut or refitted as it is; the outputs stay.

        Fused attention becomes separate linear maps, and a norm behind a consumer is folded into
        it. The tower may have been finished as a slim one before: it can be pruned again.
        """
        ...

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Replace, in place, what :meth:`rewrite` put in by slim modules, or by what was there."""
        ...

    def seeds(self, tower: nn.Module) -> list[Seed]:
        """Where the rewritten tower can be cut, in order of the blocks."""
        ...

    def stages(self, tower: nn.Module) -> Stages:
        """The tower (rewritten or not) as a sequence of blocks."""
        ...


@dataclass(eq=False)
class Backbone:
    """A loaded model: the image tower that is pruned, and what stands around it.

    Attributes:
        name: Canonical name (``"ViT-B-16"``).
        pretrained: Tag, file name, or None for untrained weights.
        trained: False when the weights are random.
        family: Name in the registry of families.
        tower: The image tower.
        preprocess: How pictures become its input.
        activation: ``"gelu"``, ``"quick_gelu"``, ...
        architecture: JSON description from which the library builds the model.
        library_version: Version of the library that built it.
        text: State of everything but the tower, by canonical name; empty when there is none.
        encoder: texts -> [K, C] L2-normalised, or None without a text tower.
        slim: The slim checkpoint that this was read from, or None for a dense model.
        notes: What a user should know about how it was loaded, a line each.
    """

    name: str
    pretrained: str | None
    trained: bool
    family: str
    tower: nn.Module
    stages: Callable[[nn.Module], Stages]
    preprocess: Preprocess
    activation: str
    architecture: dict[str, Any]
    library_version: str
    text: Mapping[str, Tensor]
    encoder: Callable[[Sequence[str]], Tensor] | None = None
    slim: Any = None
    notes: Sequence[str] = ()

    @property
    def has_text(self) -> bool:
        """Whether :meth:`encode_text` works."""
        return self.encoder is not None

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled [B, C] and dense [B, C, h, w] outputs of images [B, 3, H, W]."""
        return self.stages(self.tower).outputs(images)

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """Pooled image embedding [B, C] of images [B, 3, H, W], not normalised."""
        return self.outputs(images)[0]

    @torch.no_grad()
    def dense(self, images: Tensor) -> Tensor:
        """Projected patch tokens [B, C, h, w] of images [B, 3, H, W], not normalised."""
        return self.outputs(images)[1]

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings [K, C], L2-normalised.

        Raises:
            WeightsError: The model has no text tower, or its tokenizer is not here.
        """
        from ovsprune.core.errors import WeightsError

        if self.encoder is None:
            raise WeightsError(
                f"{self.name} has no text tower here; give class embeddings instead "
                "(--text-embeddings FILE.npz)"
            )
        return self.encoder(texts)


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of what a consumer reads.

    Attributes:
        count: Number of rows (tokens or positions) seen.
        mean: float64 [n].
        covariance: float64 [n, n], centred.
    """

    count: int
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, eq=False)
class GroupContext:
    """What a criterion sees of one group.

    Attributes:
        group: The group.
        layers: Dotted name to layer, for every layer of the group's slices.
        moments: Moments of the consumer's input on calibration pictures; None unless the criterion
            needs ``"moments"``, or curves are measured.
        ridge: What is added to the covariance's diagonal, relative to its mean.
        generator: Seeded for this group.
        snapshots: Widths whose refitted weight an allocator will want; a criterion that has them at
            hand returns them, and spares a second elimination.
        gradients: float64 [samples, units]: derivative of the criterion's objective with respect to
            the unit's mask, a factor of 1 on the unit's columns of whatever reads it; a row
            for each picture, or for each of the objective's values of each picture. None unless the
            criterion needs ``"gradients"``.
    """

    group: Group
    layers: Mapping[str, nn.Module]
    moments: Moments | None
    ridge: float
    generator: torch.Generator
    snapshots: tuple[int, ...] = ()
    gradients: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Ranking:
    """One group's units, ranked.

    Attributes:
        costs: float64 [units], finite, 0 or more.
        order: int64 [units], first to be removed first.
        weights: Width -> float64 [m, n], the consumer's weight refitted for that width; may be
            empty.
    """

    costs: Tensor
    order: Tensor
    weights: Mapping[int, Tensor] = field(default_factory=dict)


NEEDS = frozenset({"moments", "gradients", "norms"})
"""What a criterion can ask for; see :class:`Criterion`."""


class Criterion(Protocol):
    """Ranks the units of a group.

    A criterion whose costs mean the same in every group (an estimated change of one loss) may say
    ``comparable = True``; see :class:`AllocationContext`.
    """

    needs: frozenset[str]
    """What must be there to rank a group: members of :data:`NEEDS`.

    ``"moments"``: :attr:`GroupContext.moments`. ``"gradients"``: :attr:`GroupContext.gradients`, of
    the criterion's own objective (:class:`GradientCriterion`). ``"norms"``: a norm between the
    units and their consumer; where a group has none the survey refuses, before any work is done.
    """

    def score(self, item: GroupContext) -> Ranking:
        """Rank ``item.group``'s units. No criterion asks what type a layer has."""
        ...


Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images [b, 3, H, W] -> (pooled [b, C], dense [b, C, h, w])."""


class Objective(Protocol):
    """What a tower's units are wanted for, as numbers that can be differentiated."""

    def __call__(self, forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
        """Value or values of each picture.

        Args:
            forward: The tower with a mask on each unit of each picture. It takes as many images as
                ``images`` has, and may be called several times, also without gradient.
            images: float32 [b, 3, H, W], preprocessed; every calibration picture comes once, in a
                fixed order.
            generator: On the CPU. What is drawn picture by picture does not depend on how many
                pictures come at a time.

        Returns:
            [b], or [b, r] for r values of each picture, of which each is differentiated. A
            picture's values depend on that picture alone.
        """
        ...


class GradientCriterion(Criterion, Protocol):
    """A criterion that needs ``"gradients"``."""

    objective: Objective


@dataclass(frozen=True)
class Budget:
    """What must remain.

    Attributes:
        kind: ``"macs"``, ``"params"`` or ``"latency"``.
        dense: Cost of the dense tower (MACs, parameters, or milliseconds).
        target: Cost that must remain.
        tables: Group name to the group's cost at every width 0 ... units, where the cost is no
            multiple of the units: a latency that was measured. Never falls with the width.
    """

    kind: str
    dense: float
    target: float
    tables: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def price(self, group: Group, width: int) -> float:
        """What keeping ``width`` units of ``group`` costs, in this budget's currency."""
        table = self.tables.get(group.name)
        if table is not None:
            return float(table[width])
        return width * (group.params if self.kind == "params" else group.macs)

    def together(self, group: Group, other: Group) -> float:
        """What one unit of each costs together, which :meth:`price` of either counts as its own.

        0 where ``group.shared`` does not name ``other``. Of a latency, which is measured of each
        group alone, it is the share of the MACs, in the mean time that a MAC of theirs takes.
        """
        shared = group.shared.get(other.name)
        if shared is None:
            return 0.0
        if self.kind != "latency":
            return float(shared.of(self.kind))
        times = [self.price(g, g.units) / (g.units * g.macs) for g in (group, other)]
        return shared.macs * sum(times) / 2


@dataclass(frozen=True, eq=False)
class AllocationContext:
    """What an allocator sees: groups that may be cut, their scores, the budget, measurements.

    Attributes:
        groups: Groups that may be cut.
        scores: Costs and orders of their units.
        budget: What must remain.
        curves: Error by width; None unless the allocator says ``needs_curves``.
        round_to: Units of one column stay in multiples of this.
        spectra: Group name to the power-law exponent alpha of its layers' spectra, > 1; None
            unless the allocator says ``needs_spectra``.
        comparable: The criterion's costs mean the same in every group (a change of one loss), so
            that a ranking over all groups takes them as they are.
    """

    groups: Sequence[Group]
    scores: Scores
    budget: Budget
    curves: Curves | None
    round_to: int = 1
    spectra: Mapping[str, float] | None = None
    comparable: bool = False


class Allocator(Protocol):
    """Turns scores or curves and a budget into widths."""

    needs_curves: bool
    needs_spectra: bool

    def widths(self, item: AllocationContext) -> dict[str, int]:
        """Units to keep in each group, at most the budget and within one unit of it.

        Raises:
            BudgetError: The floors cost more than the budget; names the nearest ratio.
        """
        ...


@dataclass(frozen=True, eq=False)
class RecoveryContext:
    """What a recovery sees: the dense tower, the cut one (to be changed in place), pictures.

    Attributes:
        dense: The dense tower, rewritten: what is to be come close to. Never changed.
        slim: The cut tower, in the same rewritten form (separate linear maps).
        stages: Either tower as a sequence of blocks.
        groups: In the dense tower's coordinates.
        plan: What ``slim`` keeps of them.
        pictures: Calibration pictures.
        batch_size: Pictures at a time.
        ridge: Relative to the mean variance of what a layer reads.
        seed: For recoveries that draw.
        progress: Shows the work.
        distill: For recoveries that train.
        unseen: Others of the same kind, which no recovery fits, to judge a training by; None where
            there are none.
    """

    dense: nn.Module
    slim: nn.Module
    stages: Callable[[nn.Module], Stages]
    groups: Sequence[Group]
    plan: Plan
    pictures: Pictures
    batch_size: int
    ridge: float
    seed: int
    progress: Progress
    distill: Distillation = field(default_factory=Distillation)
    unseen: Pictures | None = None


class Recovery(Protocol):
    """Repairs a cut tower in place."""

    trains: bool
    """Whether it takes gradient steps; the job then says so in the checkpoint."""
    after: str | None
    """Name of the recovery that runs before it, or None."""

    def recover(self, item: RecoveryContext) -> None:
        """Change ``item.slim`` in place; a plan that keeps everything must leave it as it is.

        The values of its parameters and buffers may change, never its shapes or its modules.
        """
        ...


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

    def choose(self, item: ScheduleContext) -> Collection[str]:
        """Names of the layers that train from ``item.step`` on."""
        ...
