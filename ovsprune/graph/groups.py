"""Channel groups from torch-pruning's dependency graph, made into units.

A family offers seeds (a layer whose outputs are units); the graph finds which slices of which
other layers must go along. The masked-equivalence test, not the graph, is the proof.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from ovsprune.core.protocols import PrunableLayer
from ovsprune.core.records import Costs, Group, Plan, Slice
from ovsprune.graph.costs import macs, on_meta
from ovsprune.graph.cut import cut
from ovsprune.graph.layers import is_channelwise, weight_of
from ovsprune.graph.norms import FoldedNorm
from ovsprune.graph.products import find_products
from ovsprune.graph.rows import reads_everything

__all__ = ["find_groups", "with_costs"]


def find_groups(
    tower: nn.Module, seeds: Sequence[PrunableLayer], size: tuple[int, int]
) -> list[Group]:
    """Groups that grow from ``seeds``, with the cost of one unit of each.

    Args:
        tower: The rewritten tower, attention in separate linear maps.
        seeds: Where the family offers to cut.
        size: Native height and width in pixels, for the costs.

    Raises:
        ValueError: A seed's group is read by no layer, by several of which the seed names none, or
            not by the one that it names; reaches the tower's output; or goes through a convolution
            of groups of several channels: the family offered something that cannot be cut alone.
    """
    # of a slim tower, a layer may have lost all its units before
    seeds = [seed for seed in seeds if len(weight_of(tower.get_submodule(seed.layer)))]
    if not seeds:
        return []
    example = torch.zeros(1, 3, *size)
    names = {module: name for name, module in tower.named_modules()}
    with torch.enable_grad(), _differentiable(tower):
        graph = torch_pruning.DependencyGraph().build_dependency(
            tower,
            example_inputs=example.to(next(tower.parameters())),
            # It keeps the norm's tensors, which go with the channels as the norm's would.
            customized_pruners={FoldedNorm: torch_pruning.pruner.function.BatchnormPruner()},
            verbose=False,
        )
    groups = [_grow(graph, tower.get_submodule(seed.layer), seed, names) for seed in seeds]
    return with_costs(tower, groups, size)


@contextmanager
def _differentiable(tower: nn.Module) -> Iterator[None]:
    """The graph is read off autograd's: for as long as it is built, every parameter takes part."""
    frozen = [p for p in tower.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _grow(graph: Any, layer: nn.Module, seed: PrunableLayer, names: dict[nn.Module, str]) -> Group:
    channels = weight_of(layer).shape[0]
    found = graph.get_pruning_group(
        layer, graph.get_pruner_of_module(layer).prune_out_channels, idxs=list(range(channels))
    )
    slices: dict[tuple[str, str], Slice] = {}
    norms, readers = [], []
    for dependency, indices in found:
        module = dependency.target.module
        if module not in names or not list(module.parameters(recurse=False)):
            continue
        name = names[module]
        is_input = graph.is_in_channel_pruning_fn(dependency.handler)
        passes = getattr(module, "weight", None) is not None and is_channelwise(module)
        if not (passes or reads_everything(module)):
            raise ValueError(
                f"{seed.layer}: its units go through {name}, whose groups are of several channels"
            )
        axis: Any = "in" if is_input and not passes else "out"
        rows = torch.as_tensor(list(map(int, indices)), dtype=torch.int64)
        slices[name, axis] = Slice(name, axis, _units(rows, seed))
        if passes and module.weight.ndim == 1:
            norms.append(name)
        elif axis == "in":
            readers.append(name)
    consumer = seed.consumer or "".join(readers[:1])
    if consumer not in readers or (seed.consumer is None and len(readers) > 1):
        raise ValueError(
            f"{seed.layer}: its units are read by {readers or 'nothing'}, not by "
            f"{seed.consumer or 'one layer'}"
        )
    return Group(
        name=seed.name,
        kind=seed.kind,
        units=channels // seed.unit_width,
        slices=(*slices.values(), *seed.along),
        consumer=consumer,
        block=seed.block,
        stream=seed.stream,
        norms=tuple(norms),
        gating_layers=_gating_layers(graph, slices.values(), consumer, names),
    )


def _gating_layers(
    graph: Any, slices: Iterable[Slice], consumer: str, names: dict[nn.Module, str]
) -> tuple[str, ...]:
    """Layers that make units and come behind a layer, other than the consumer, that reads them."""
    nodes = {names[module]: node for module, node in graph.module2node.items() if module in names}
    waiting = [nodes[s.module] for s in slices if s.axis == "in" and s.module != consumer]
    behind = set()
    while waiting:
        found = [n for n in waiting.pop().outputs if n not in behind and n is not nodes[consumer]]
        behind.update(found)
        waiting += found
    return tuple(s.module for s in slices if s.axis == "out" and nodes[s.module] in behind)


def _units(rows: Tensor, seed: PrunableLayer) -> Tensor:
    if rows.numel() % seed.unit_width:
        raise ValueError(
            f"{seed.layer}: {rows.numel()} channels are no multiple of {seed.unit_width}"
        )
    return rows.view(-1, seed.unit_width)


def with_costs(tower: nn.Module, groups: Sequence[Group], size: tuple[int, int]) -> list[Group]:
    """Cost of a unit as the difference that cutting one unit makes, on meta tensors.

    Where a layer reads one group's units and makes another's, the costs multiply: what a unit of
    each costs together is in the later group's ``shared``.
    """
    if not groups:
        return []
    count = _Count(tower, size)
    result: list[Group] = []
    for group in groups:
        alone = count.saved(group)
        shared = {
            other.name: count.together(other, group) for other in result if _meet(other, group)
        }
        result.append(
            replace(group, macs=float(alone.macs), params=float(alone.params), shared=shared)
        )
    return result


def _meet(one: Group, other: Group) -> bool:
    """Whether a layer reads the units of one and makes those of the other."""
    sides = [{(s.module, s.axis) for s in group.slices} for group in (one, other)]
    return any((module, "in" if axis == "out" else "out") in sides[1] for module, axis in sides[0])


class _Count:
    """Counts what cutting saves; groups of one shape at one resolution are counted once."""

    def __init__(self, tower: nn.Module, size: tuple[int, int]) -> None:
        self.tower = tower
        self.image = torch.empty(1, 3, *size, device="meta")
        self.macs = macs(on_meta(tower), self.image)
        self.params = sum(p.numel() for p in tower.parameters())
        self.spent = {product.name: product.macs for product in find_products(tower, size)}
        self.known: dict[Any, Costs] = {}

    def saved(self, *groups: Group) -> Costs:
        """What goes with one unit of each of ``groups``; nothing with one that is the last."""
        groups = tuple(g for g in groups if g.units > 1 or not self._convolves(g))
        key = tuple(map(self._shape, groups))
        if key not in self.known:
            shell = on_meta(self.tower)
            cut(shell, groups, Plan({g.name: torch.arange(1, g.units) for g in groups}))
            fewer = sum(p.numel() for p in shell.parameters())
            self.known[key] = Costs(self.macs - macs(shell, self.image), self.params - fewer)
        return self.known[key]

    def together(self, one: Group, other: Group) -> Costs:
        """What a unit of each costs together: either alone saves it, and both save it once."""
        first, second, both = self.saved(one), self.saved(other), self.saved(one, other)
        return Costs(
            first.macs + second.macs - both.macs, first.params + second.params - both.params
        )

    def _convolves(self, group: Group) -> bool:
        """Whether a convolution is among its layers, which torch does not have without channels."""
        return any(weight_of(self.tower.get_submodule(s.module)).ndim > 2 for s in group.slices)

    def _shape(self, group: Group) -> Any:
        layers = tuple(
            (
                tuple(weight_of(self.tower.get_submodule(s.module)).shape),
                self.spent.get(f"{s.module}.weight"),
            )
            for s in group.slices
        )
        return group.kind, group.units, layers, group.stream is not None
