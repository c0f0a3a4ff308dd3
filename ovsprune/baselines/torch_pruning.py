"""Torch-Pruning baselines, run through the library's own API to a given measured cost.

A method is run in one of two forms. Alone, it prunes the original tower, as a user of Torch-Pruning
would. The library cannot cut ``nn.MultiheadAttention``, so only MLPs or channels are pruned. Before
one of our recoveries, it selects units on the rewritten tower, whose attention consists of separate
linear layers, and may remove whole heads (``num_heads``, ``prune_num_heads=True``,
``prune_head_dims=False``). In both forms it may cut the layers that our default method may cut; all
others are in ``ignored_layers``.
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
        summary: Description in one line.
        taylor: True for ``GroupTaylorImportance``, False for ``GroupMagnitudeImportance``.
        global_pruning: True for one ranking over all layers, False for one per layer.
        isomorphic: True for one ranking per set of equal structures (Fang et al., ECCV 2024).
    """

    summary: str
    taylor: bool = False
    global_pruning: bool = True
    isomorphic: bool = False

    @property
    def importance(self) -> Callable[..., Tensor]:
        """New importance object of the library, with the library's defaults."""
        name = "GroupTaylorImportance" if self.taylor else "GroupMagnitudeImportance"
        importance: Callable[..., Tensor] = getattr(torch_pruning.importance, name)()
        return importance


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
"""Methods by their name in ``--methods``."""

_GRID = (*(0.05 * step for step in range(1, 20)), 0.98)
"""Pruning ratios of the library that are tried before bisection between two of them."""
_BISECTIONS = 12  # of a grid step of 0.05

Pair = tuple[float, float]
"""Pruning ratios of the library: of widths, and of heads."""


@dataclass(frozen=True, eq=False)
class TorchPruningResult:
    """Result of one run of Torch-Pruning.

    Attributes:
        tower: Pruned copy of the tower.
        plan: Kept units.
        achieved: Removed fraction of the measured cost (MACs or parameters).
    """

    tower: nn.Module
    plan: Plan
    achieved: float


class TorchPruning:
    """Torch-Pruning on one tower, for any number of ratios.

    Args:
        name: Name of the method, for messages.
        method: Arguments of the library.
        tower: Original or rewritten tower; it is not changed.
        groups: Groups that may be cut, found on the rewritten tower.
        size: Height and width of the images in pixels.
        gradients: Gradient by name of a parameter; required by ``method.taylor``.
        budget: Cost that a ratio refers to: ``"macs"`` or ``"params"``.
        round_to: ``round_to`` of the library: widths are multiples of this.

    Attributes:
        not_cut: Names of groups whose layers this form of the tower does not have.
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
        self.not_cut = [g.name for g in groups if g not in self.groups]
        self._dense = self._cost(tower)
        self._tried: dict[Pair, float] = {}  # a prune takes seconds, so its result is kept

    def reach(self, ratio: float) -> TorchPruningResult:
        """Bisect the library's pruning ratio until the measured cost fits.

        The search begins with one ratio for widths and heads, as in the library's examples. Heads
        are coarse, and the library skips a layer all of whose heads are below the threshold, so the
        cost may jump over the target or stay short of it. The ratio of the heads is then fixed,
        below the jump or where the library removes most, and that of the widths is bisected alone.

        Args:
            ratio: Fraction of the cost to remove, in (0, 1).

        Raises:
            BudgetError: The ratio cannot be reached within 0.01; the message names the largest.
        """
        tried = self._bisect(ratio, lambda widths: (widths, widths))
        for heads in self._head_ratios(ratio) if self._error(tried, ratio) > TOLERANCE else ():
            tried += self._bisect(ratio, lambda widths, heads=heads: (widths, heads))  # type: ignore[misc]
        if self._error(tried, ratio) > TOLERANCE:
            raise BudgetError(self._failure(tried, ratio))
        return self.prune(*min(tried, key=lambda pair: self._error([pair], ratio)))

    def prune(self, widths: float, heads: float) -> TorchPruningResult:
        """Run ``BasePruner`` once on a copy, with its pruning ratios of widths and heads."""
        tower = deepcopy(self.tower).requires_grad_(True)
        for name, parameter in tower.named_parameters():
            if name in self.gradients:
                parameter.grad = self.gradients[name].clone()
        removed: dict[str, list[int]] = {}  # consumer to the input columns that it lost
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # The library warns of unwrapped parameters.
            pruner = self._pruner(tower, widths, heads)
            names = {module: name for name, module in tower.named_modules()}
            for coupled in pruner.step(interactive=True):
                for dependency, indices in coupled:
                    reads = pruner.DG.is_in_channel_pruning_fn(dependency.handler)
                    if reads and dependency.target.module in names:
                        removed[names[dependency.target.module]] = [int(i) for i in indices]
                coupled.prune()
        tower.requires_grad_(False)
        for parameter in tower.parameters():
            parameter.grad = None
        achieved = 1 - self._cost(tower) / self._dense
        return TorchPruningResult(tower, self._plan(removed), achieved)

    def _cost(self, tower: nn.Module) -> int:
        return count_costs(tower, self.size).of(self.budget)

    def _pruner(self, tower: nn.Module, widths: float, heads: float) -> torch_pruning.BasePruner:
        # Everything that our default does not cut is ignored by the library.
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
            prune_num_heads=True,  # whole heads; head dimensions stay
            prune_head_dims=False,
            round_to=self.round_to if self.round_to > 1 else None,
            # The library changes its default dicts in place, which all pruners would share.
            in_channel_groups={},
            out_channel_groups={},
        )

    def _plan(self, removed: Mapping[str, Sequence[int]]) -> Plan:
        """Return the units whose columns the consumer still has."""
        kept = {}
        for group in self.groups:
            columns = torch.tensor(removed.get(group.consumer, ())).long()
            lost = torch.isin(group.columns, columns)  # [units, width]
            if bool((lost.any(1) != lost.all(1)).any()):
                raise AssertionError(f"{self.name} removed a part of a unit of {group.name}")
            kept[group.name] = (~lost.any(1)).nonzero().flatten()
        return Plan(kept)

    def _head_ratios(self, ratio: float) -> Iterator[float]:
        """Yield ratios of the heads to fix while the ratio of the widths is bisected."""
        if not any(group.kind == "heads" for group in self.groups):
            return
        # Below the jump: the last common ratio that stays short of the target.
        below = list(takewhile(lambda r: self._at((r, r)) < ratio, _GRID))
        if below:
            yield max(below, key=lambda r: self._at((r, r)))
        # Where the library removes most at nearly full removal of widths.
        yield max(_GRID, key=lambda heads: self._at((_GRID[-2], heads)))

    def _bisect(self, ratio: float, pair: Callable[[float], Pair]) -> list[Pair]:
        """Return the pairs that were tried: up the grid to the target, then in its last step."""
        low, high = 0.0, 0.0
        tried = []
        for high in _GRID:
            tried.append(pair(high))
            if self._at(tried[-1]) >= ratio:
                break
            low = high
        for _ in range(_BISECTIONS if low < high else 0):
            if self._error(tried, ratio) <= TOLERANCE / 10:
                break
            middle = (low + high) / 2
            tried.append(pair(middle))
            low, high = (middle, high) if self._at(tried[-1]) < ratio else (low, middle)
        return tried

    def _at(self, pair: Pair) -> float:
        if pair not in self._tried:
            self._tried[pair] = self.prune(*pair).achieved
        return self._tried[pair]

    def _error(self, pairs: Sequence[Pair], ratio: float) -> float:
        """Return the smallest distance of these pairs from the target."""
        return min(abs(self._at(pair) - ratio) for pair in pairs)

    def _failure(self, tried: Sequence[Pair], ratio: float) -> str:
        """Return the message for a ratio that cannot be reached."""
        most = max(self._at(pair) for pair in tried)
        nearest = min((self._at(pair) for pair in tried), key=lambda value: abs(value - ratio))
        message = f"{self.name} removed at most {most:.3f} of the {budget_name(self.budget)}, not "
        message += f"the requested {ratio:.3f}"
        if nearest != most:
            message += f"; the nearest is {nearest:.3f}"
        if self.not_cut:
            message += (
                f". It cannot cut {len(self.not_cut)} of the groups on this tower "
                f"({', '.join(self.not_cut[:2])}{', ...' if len(self.not_cut) > 2 else ''})"
            )
        return message


@torch.enable_grad()
def feature_gradients(
    tower: nn.Module,
    stages: Callable[[nn.Module], Stages],
    pictures: Pictures,
    batch_size: int,
    seed: int,
) -> dict[str, Tensor]:
    """Return the gradients of a label-free feature loss by parameter, for Taylor importance.

    The distance between equal features has no gradient, so Gaussian noise is added to each image,
    with a tenth of the standard deviation of the image. The loss is the mean squared distance
    between the L2-normalised dense tokens of the noisy and the clean image, summed over images.
    """
    tower = deepcopy(tower).eval().requires_grad_(True)
    parts = stages(tower)
    device = next(tower.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    for clean in pictures.batches(batch_size):  # [b, 3, H, W]
        noise = torch.randn(clean.shape, generator=generator)  # on the CPU, as its generator
        noisy = clean + 0.1 * clean.std((1, 2, 3), keepdim=True) * noise
        with torch.no_grad():
            target = _tokens(parts, clean.to(device))  # [b, C, h, w]
        tokens = _tokens(parts, noisy.to(device))
        loss = (tokens - target).square().sum(1).mean((1, 2)).sum()
        torch.autograd.backward(loss)  # adds to the gradients of earlier batches
    return {
        name: parameter.grad.detach()
        for name, parameter in tower.named_parameters()
        if parameter.grad is not None
    }


def _tokens(stages: Stages, images: Tensor) -> Tensor:
    return F.normalize(stages.outputs(images)[1], dim=1)
