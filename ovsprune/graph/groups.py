"""Groups of coupled channels, found with torch-pruning's dependency graph and split into units.

A family names prunable layers, whose outputs are the units. The graph finds the slices of other
layers that must be cut with them. The tests verify each group independently of the graph: a cut
tower must equal the masked dense tower.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from ovsprune.core.protocols import PrunableLayer
from ovsprune.core.records import Costs, Group, Plan, Slice
from ovsprune.graph.costs import countable, macs
from ovsprune.graph.cut import cut
from ovsprune.graph.layers import is_channelwise, requires_grad_as, weight_of
from ovsprune.graph.norms import FoldedNorm
from ovsprune.graph.products import find_products
from ovsprune.graph.rows import reads_all_channels

__all__ = ["find_groups", "with_costs"]


def find_groups(
    tower: nn.Module, prunable: Sequence[PrunableLayer], size: tuple[int, int]
) -> list[Group]:
    """Return the group of each prunable layer, with the cost of one unit.

    Args:
        tower: The rewritten tower, with attention in separate linear layers.
        prunable: Layers that the family allows to prune.
        size: Native height and width in pixels, for the costs.

    Raises:
        ValueError: The units of a layer cannot be cut separately. No layer reads them; or several
            layers do and no consumer is named; or the named consumer does not read them; or they
            pass through a convolution whose groups have several channels.
    """
    # A layer of a slim tower may have lost all of its units in an earlier prune.
    prunable = [entry for entry in prunable if len(weight_of(tower.get_submodule(entry.layer)))]
    if not prunable:
        return []
    example = torch.zeros(1, 3, *size)
    names = {module: name for name, module in tower.named_modules()}
    # torch-pruning reads its graph from autograd's, so all parameters must require gradients.
    with torch.enable_grad(), requires_grad_as(tower, True):
        graph = torch_pruning.DependencyGraph().build_dependency(
            tower,
            example_inputs=example.to(next(tower.parameters())),
            # A folded norm holds tensors of one entry per channel, which are cut like a norm's.
            customized_pruners={FoldedNorm: torch_pruning.pruner.function.BatchnormPruner()},
            verbose=False,
        )
    groups = [
        _group_of(graph, tower.get_submodule(entry.layer), entry, names) for entry in prunable
    ]
    return with_costs(tower, groups, size)


def _group_of(
    graph: Any, layer: nn.Module, prunable: PrunableLayer, names: dict[nn.Module, str]
) -> Group:
    """Return the group of one prunable layer, without costs."""
    channels = weight_of(layer).shape[0]
    dependencies = graph.get_pruning_group(
        layer, graph.get_pruner_of_module(layer).prune_out_channels, idxs=list(range(channels))
    )
    slices: dict[tuple[str, str], Slice] = {}
    norms, readers = [], []
    for dependency, indices in dependencies:
        module = dependency.target.module
        # Operations without parameters (reshapes, sums) are nodes of the graph, too.
        if module not in names or not list(module.parameters(recurse=False)):
            continue
        name = names[module]
        is_input = graph.is_in_channel_pruning_fn(dependency.handler)
        channelwise = getattr(module, "weight", None) is not None and is_channelwise(module)
        if not (channelwise or reads_all_channels(module)):
            raise ValueError(
                f"the units of {prunable.layer} pass through {name}, a convolution whose groups "
                "have several channels; they cannot be pruned: leave this layer out of "
                "prunable_layers()"
            )
        # A norm or depthwise convolution has one row per channel and no columns to cut.
        axis: Any = "in" if is_input and not channelwise else "out"
        rows = torch.as_tensor(list(map(int, indices)), dtype=torch.int64)
        slices[name, axis] = Slice(name, axis, _units(rows, prunable))
        if channelwise and module.weight.ndim == 1:
            norms.append(name)
        elif axis == "in":
            readers.append(name)
    consumer = prunable.consumer or "".join(readers[:1])
    if consumer not in readers or (prunable.consumer is None and len(readers) > 1):
        raise ValueError(
            f"the units of {prunable.layer} are read by {readers or 'no layer'}, expected "
            f"{prunable.consumer or 'exactly one layer'}; set PrunableLayer.consumer to one of "
            "the layers that read them"
        )
    return Group(
        name=prunable.name,
        kind=prunable.kind,
        units=channels // prunable.unit_width,
        slices=(*slices.values(), *prunable.extra_slices),
        consumer=consumer,
        block=prunable.block,
        stream=prunable.stream,
        norms=tuple(norms),
        gating_layers=_gating_layers(graph, slices.values(), consumer, names),
    )


def _gating_layers(
    graph: Any, slices: Iterable[Slice], consumer: str, names: dict[nn.Module, str]
) -> tuple[str, ...]:
    """Return the layers that produce units and depend on a reader other than the consumer."""
    nodes = {names[module]: node for module, node in graph.module2node.items() if module in names}
    queue = [nodes[s.module] for s in slices if s.axis == "in" and s.module != consumer]
    downstream = set()
    while queue:
        # Do not walk past the consumer: its output is the residual stream.
        new = [n for n in queue.pop().outputs if n not in downstream and n is not nodes[consumer]]
        downstream.update(new)
        queue += new
    return tuple(s.module for s in slices if s.axis == "out" and nodes[s.module] in downstream)


def _units(rows: Tensor, prunable: PrunableLayer) -> Tensor:
    """Return indices [channels] as [units, unit_width]."""
    if rows.numel() % prunable.unit_width:
        raise ValueError(
            f"{prunable.layer} has {rows.numel()} channels, expected a multiple of unit_width = "
            f"{prunable.unit_width}; correct the PrunableLayer"
        )
    return rows.view(-1, prunable.unit_width)


def with_costs(tower: nn.Module, groups: Sequence[Group], size: tuple[int, int]) -> list[Group]:
    """Return the groups with the cost of one unit of each.

    The cost is the difference that cutting one unit makes, counted on meta tensors. If a layer
    reads the units of one group and produces those of another, its cost is a product of both
    widths. The cost that one unit of each group shares is then in the later group's ``shared``.
    """
    if not groups:
        return []
    counter = _CostCounter(tower, size)
    result: list[Group] = []
    for group in groups:
        saved = counter.saved(group)
        shared = {
            other.name: counter.shared_cost(other, group)
            for other in result
            if _share_layer(other, group)
        }
        result.append(
            replace(group, macs=float(saved.macs), params=float(saved.params), shared=shared)
        )
    return result


def _share_layer(first: Group, second: Group) -> bool:
    """Return True if a layer reads the units of one group and produces those of the other."""
    sides = [{(s.module, s.axis) for s in group.slices} for group in (first, second)]
    return any((module, "in" if axis == "out" else "out") in sides[1] for module, axis in sides[0])


class _CostCounter:
    """Counts the costs that cutting a unit saves; equal groups are counted once."""

    def __init__(self, tower: nn.Module, size: tuple[int, int]) -> None:
        self.tower = tower
        self.size = size
        self.macs = macs(*countable(tower, size))
        self.params = sum(p.numel() for p in tower.parameters())
        self.layer_macs = {product.name: product.macs for product in find_products(tower, size)}
        self.cache: dict[Any, Costs] = {}

    def saved(self, *groups: Group) -> Costs:
        """Return the costs that cutting one unit of each group saves."""
        # The last channel of a convolution cannot be cut: torch has none without channels.
        groups = tuple(g for g in groups if g.units > 1 or not self._has_convolution(g))
        key = tuple(map(self._signature, groups))
        if key not in self.cache:
            smaller, image = countable(self.tower, self.size)
            cut(smaller, groups, Plan({g.name: torch.arange(1, g.units) for g in groups}))
            params = sum(p.numel() for p in smaller.parameters())
            self.cache[key] = Costs(self.macs - macs(smaller, image), self.params - params)
        return self.cache[key]

    def shared_cost(self, first: Group, second: Group) -> Costs:
        """Return the costs that a unit of each group shares, by inclusion and exclusion."""
        one, other, both = self.saved(first), self.saved(second), self.saved(first, second)
        return Costs(one.macs + other.macs - both.macs, one.params + other.params - both.params)

    def _has_convolution(self, group: Group) -> bool:
        """Return True if a layer of the group is a convolution."""
        return any(weight_of(self.tower.get_submodule(s.module)).ndim > 2 for s in group.slices)

    def _signature(self, group: Group) -> Any:
        """Return a key that is equal for groups of equal costs."""
        # MACs are included because equal shapes cost more at a higher resolution.
        layers = tuple(
            (
                tuple(weight_of(self.tower.get_submodule(s.module)).shape),
                self.layer_macs.get(f"{s.module}.weight"),
            )
            for s in group.slices
        )
        return group.kind, group.units, layers, group.stream is not None
