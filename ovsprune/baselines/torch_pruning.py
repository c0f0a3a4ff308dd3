"""Stock baselines: Torch-Pruning through its own API, brought to the same measured cost.

A stock method is run in one of two forms. Alone, it prunes the tower as its library builds it, as a
user of Torch-Pruning would: of ``nn.MultiheadAttention`` it can then cut nothing, so that only MLPs
(or channels) go. Before a recovery of ours, it selects on the tower whose attention is rewritten to
separate linear maps, with whole heads offered to it (``num_heads``, ``prune_num_heads=True``,
``prune_head_dims=False``): the selection at its best. In both forms it may cut what our own default
may cut, and every other layer is in ``ignored_layers``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn

from ovsprune.core.errors import BudgetError
from ovsprune.core.protocols import Pictures, Stages
from ovsprune.core.records import Group, Plan
from ovsprune.graph.costs import count_costs
from ovsprune.pruning.config import TOLERANCE
from ovsprune.report.numbers import budget_name

__all__ = [
    "TORCH_PRUNING_METHODS",
    "TorchPruning",
    "TorchPruningMethod",
    "TorchPruningResult",
    "feature_gradients",
]


@dataclass(frozen=True)
class TorchPruningMethod:
    """Arguments of Torch-Pruning's ``BasePruner``.

    Attributes:
        summary: One line about it.
        taylor: ``GroupTaylorImportance`` instead of ``GroupMagnitudeImportance``.
        global_pruning: One ranking over all layers instead of one for each.
        isomorphic: One ranking for each set of equal structures (Fang et al., ECCV 2024).
    """

    summary: str
    taylor: bool = False
    global_pruning: bool = True
    isomorphic: bool = False

    @property
    def importance(self) -> Callable[..., Tensor]:
        """A fresh importance of the library's, with the library's own defaults."""
        name = "GroupTaylorImportance" if self.taylor else "GroupMagnitudeImportance"
        made: Callable[..., Tensor] = getattr(torch_pruning.importance, name)()
        return made


TORCH_PRUNING_METHODS: Mapping[str, TorchPruningMethod] = {
    "torch-pruning": TorchPruningMethod("Torch-Pruning: group magnitude, ranked globally"),
    "torch-pruning-uniform": TorchPruningMethod(
        "Torch-Pruning: group magnitude, the same share of every layer", global_pruning=False
    ),
    "torch-pruning-taylor": TorchPruningMethod(
        "Torch-Pruning: group Taylor with a label-free feature loss, ranked globally", taylor=True
    ),
    "torch-pruning-isomorphic": TorchPruningMethod(
        "Torch-Pruning: group magnitude, ranked within isomorphic groups", isomorphic=True
    ),
}
"""Stock methods by the name that ``--methods`` takes."""

_GRID = (*(0.05 * step for step in range(1, 20)), 0.98)
"""Ratios of the library's own that are tried before bisecting between two of them."""
_BISECTIONS = 12

Pair = tuple[float, float]
"""The library's own pruning ratios: of widths, and of heads."""


@dataclass(frozen=True, eq=False)
class TorchPruningResult:
    """What Torch-Pruning did at one ratio of its own.

    Attributes:
        tower: The tower that it cut, in place.
        plan: The units that it kept.
        achieved: Share of the measured cost (MACs or parameters) that went.
    """

    tower: nn.Module
    plan: Plan
    achieved: float


class TorchPruning:
    """One stock method on one tower, at any number of budgets.

    Args:
        name: Its name, for messages.
        method: How the library is called.
        tower: The tower, original or rewritten; it is not changed.
        groups: What may be cut, found on the rewritten tower.
        size: Native height and width in pixels.
        gradients: Name of a parameter to its gradient, where ``method.taylor`` needs them.
        budget: What a ratio counts: ``"macs"`` or ``"params"``.
        round_to: The library's own ``round_to``: channels stay in multiples of this.
    """

    def __init__(
        self,
        name: str,
        method: TorchPruningMethod,
        tower: nn.Module,
        groups: Sequence[Group],
        size: tuple[int, int],
        gradients: Mapping[str, Tensor] | None = None,
        budget: str = "macs",
        round_to: int = 1,
    ) -> None:
        self.name, self.method, self.tower, self.size = name, method, tower, size
        self.gradients = gradients or {}
        self.budget, self.round_to = budget, round_to
        present = {name for name, _ in tower.named_modules()}
        self.groups = [g for g in groups if all(s.module in present for s in g.slices)]
        self.left_alone = [g.name for g in groups if g not in self.groups]
        self._dense = self._cost(tower)
        self._tried: dict[Pair, float] = {}

    def reach(self, ratio: float) -> TorchPruningResult:
        """Bisect the library's own ratio until the measured cost is what was asked for.

        One ratio serves widths and heads at first, as in the library's examples. Heads are coarse,
        and a layer all of whose heads fall below the threshold is left whole by the library, so
        that the cost may jump over the goal or stay short of it: then the heads' ratio is held,
        below the jump or where the library goes furthest, and the widths' ratio is bisected alone.

        Args:
            ratio: Share of the cost that should go, in (0, 1).

        Raises:
            BudgetError: It cannot be reached within 0.01; the message says how far it came.
        """
        tried = self._bisect(ratio, lambda widths: (widths, widths))
        for heads in self._held(ratio) if self._off(tried, ratio) > TOLERANCE else ():
            tried += self._bisect(ratio, lambda widths, heads=heads: (widths, heads))  # type: ignore[misc]
        if self._off(tried, ratio) > TOLERANCE:
            raise BudgetError(self._too_far(tried, ratio))
        return self.prune(*min(tried, key=lambda pair: self._off([pair], ratio)))

    def prune(self, widths: float, heads: float) -> TorchPruningResult:
        """Run ``BasePruner`` once on a copy, with these pruning ratios of its own."""
        tower = deepcopy(self.tower).requires_grad_(True)
        for name, parameter in tower.named_parameters():
            if name in self.gradients:
                parameter.grad = self.gradients[name].clone()
        gone: dict[str, list[int]] = {}
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # Of its own guesses about unwrapped parameters.
            pruner = self._pruner(tower, widths, heads)
            names = {module: name for name, module in tower.named_modules()}
            for found in pruner.step(interactive=True):
                for dependency, indices in found:
                    reads = pruner.DG.is_in_channel_pruning_fn(dependency.handler)
                    if reads and dependency.target.module in names:
                        gone[names[dependency.target.module]] = [int(i) for i in indices]
                found.prune()
        tower.requires_grad_(False)
        for parameter in tower.parameters():
            parameter.grad = None
        achieved = 1 - self._cost(tower) / self._dense
        return TorchPruningResult(tower, self._plan(gone), achieved)

    def _cost(self, tower: nn.Module) -> int:
        return count_costs(tower, self.size).of(self.budget)

    def _pruner(self, tower: nn.Module, widths: float, heads: float) -> torch_pruning.BasePruner:
        free = {s.module for g in self.groups for s in g.slices if s.axis == "out"}
        roots = (nn.Linear, nn.modules.conv._ConvNd)
        return torch_pruning.BasePruner(
            tower,
            torch.zeros(1, 3, *self.size, device=next(tower.parameters()).device),
            importance=self.method.importance,
            global_pruning=self.method.global_pruning,
            isomorphic=self.method.isomorphic,
            pruning_ratio=widths,
            head_pruning_ratio=heads,
            ignored_layers=[
                layer
                for name, layer in tower.named_modules()
                if isinstance(layer, roots) and name not in free
            ],
            num_heads={
                tower.get_submodule(s.module): g.units
                for g in self.groups
                for s in g.slices
                if g.kind == "heads" and s.axis == "out"
            },
            prune_num_heads=True,
            prune_head_dims=False,
            round_to=self.round_to if self.round_to > 1 else None,
            # Its defaults are shared between pruners, and it writes into them.
            in_channel_groups={},
            out_channel_groups={},
        )

    def _plan(self, gone: Mapping[str, Sequence[int]]) -> Plan:
        """Units none of whose columns were taken from the consumer."""
        kept = {}
        for group in self.groups:
            lost = torch.isin(group.columns, torch.tensor(gone.get(group.consumer, ())).long())
            if bool((lost.any(1) != lost.all(1)).any()):
                raise AssertionError(f"{self.name} cut a unit of {group.name} in pieces")
            kept[group.name] = (~lost.any(1)).nonzero().flatten()
        return Plan(kept)

    def _held(self, ratio: float) -> Iterator[float]:
        """Ratios of the heads that are worth holding while the widths' ratio is bisected."""
        if not any(group.kind == "heads" for group in self.groups):
            return
        below = list(takewhile(lambda r: self._at((r, r)) < ratio, _GRID))
        if below:
            yield max(below, key=lambda r: self._at((r, r)))
        yield max(_GRID, key=lambda heads: self._at((_GRID[-2], heads)))

    def _bisect(self, ratio: float, pair: Callable[[float], Pair]) -> list[Pair]:
        """Own ratios that were tried: up the grid to the goal, then bisecting the last step."""
        low, high = 0.0, 0.0
        tried = []
        for high in _GRID:
            tried.append(pair(high))
            if self._at(tried[-1]) >= ratio:
                break
            low = high
        for _ in range(_BISECTIONS if low < high else 0):
            if self._off(tried, ratio) <= TOLERANCE / 10:
                break
            middle = (low + high) / 2
            tried.append(pair(middle))
            low, high = (middle, high) if self._at(tried[-1]) < ratio else (low, middle)
        return tried

    def _at(self, pair: Pair) -> float:
        if pair not in self._tried:
            self._tried[pair] = self.prune(*pair).achieved
        return self._tried[pair]

    def _off(self, pairs: Sequence[Pair], ratio: float) -> float:
        """How far the closest of these stays from the goal."""
        return min(abs(self._at(pair) - ratio) for pair in pairs)

    def _too_far(self, tried: Sequence[Pair], ratio: float) -> str:
        most = max(self._at(pair) for pair in tried)
        nearest = min((self._at(pair) for pair in tried), key=lambda value: abs(value - ratio))
        said = f"{self.name} took at most {most:.3f} of the {budget_name(self.budget)}; "
        said += f"{ratio:.3f} were asked for"
        if nearest != most:
            said += f", and the nearest is {nearest:.3f}"
        if self.left_alone:
            said += (
                f". It cannot cut {len(self.left_alone)} of the groups on this tower "
                f"({', '.join(self.left_alone[:2])}{', ...' if len(self.left_alone) > 2 else ''})"
            )
        return said


@torch.enable_grad()
def feature_gradients(
    tower: nn.Module,
    stages: Callable[[nn.Module], Stages],
    pictures: Pictures,
    batch_size: int,
    seed: int,
) -> dict[str, Tensor]:
    """Gradients of a label-free feature loss, for the stock Taylor importance.

    The distance of the dense tower to itself has no gradient, so the tower sees a picture with
    Gaussian noise of a tenth of the picture's own standard deviation, and should answer as it does
    to the clean one: mean squared distance of the L2-normalised dense tokens, summed over pictures.

    Returns:
        Name of a parameter to its gradient, of all parameters that have one.
    """
    tower = deepcopy(tower).eval().requires_grad_(True)
    parts = stages(tower)
    device = next(tower.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    for clean, noisy in _pairs(pictures, batch_size, generator):
        with torch.no_grad():
            wanted = _tokens(parts, clean.to(device))
        found = _tokens(parts, noisy.to(device))
        loss = (found - wanted).square().sum(1).mean((1, 2)).sum()
        torch.autograd.backward(loss)
    return {
        name: parameter.grad.detach()
        for name, parameter in tower.named_parameters()
        if parameter.grad is not None
    }


def _pairs(
    pictures: Pictures, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    for images in pictures.batches(batch_size):
        noise = torch.randn(images.shape, generator=generator)
        yield images, images + 0.1 * images.std((1, 2, 3), keepdim=True) * noise


def _tokens(stages: Stages, images: Tensor) -> Tensor:
    return F.normalize(stages.outputs(images)[1], dim=1)
