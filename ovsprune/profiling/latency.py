"""Latency budgets: measured layer times by width, and verification of the result.

The time of a tower is modelled as the sum of the times of stem, blocks and head. The time saved by
narrowing a group is measured by narrowing this group alone in its block; the savings of several
groups of a block are added.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ovsprune.core.errors import DataError, OutputError
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Budget, Family
from ovsprune.core.records import Group, Plan
from ovsprune.graph.cut import cut
from ovsprune.profiling.latency_table import LatencyTable, cache_path, digest, this_machine
from ovsprune.profiling.timing import Pass, alternate, random_images

__all__ = ["LatencyModel", "compare_latency", "latency_budget"]

BATCH = 1
"""Batch size: latency is the time for one image."""
POINTS = 6
"""Timed widths per group, besides the narrowest and the dense one."""
ROUNDS = 20
"""Alternating rounds; the median counts."""

FULL = 1
"""Width key of pieces without a width (dense blocks, stem and head)."""


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Timed pieces of one tower.

    Attributes:
        rest: Name of the piece of stem and head.
        blocks: Block name to the name of its dense piece.
        groups: Group name to the name of its piece, and the widths to time.
        passes: (piece, width) to a function that builds the pass to time.
    """

    rest: str
    blocks: Mapping[str, str]
    groups: Mapping[str, tuple[str, tuple[int, ...]]]
    passes: Mapping[tuple[str, int], Callable[[], Pass]]

    @classmethod
    @torch.inference_mode()
    def of(
        cls, tower: nn.Module, groups: Sequence[Group], family: Family, images: Tensor
    ) -> LatencyModel:
        """Collect the pieces of a rewritten tower, for ``images`` [B, 3, H, W]."""
        stages = family.stages(tower)
        x = stages.stem(images)  # input of the next block
        passes: dict[tuple[str, int], Callable[[], Pass]] = {}
        blocks: dict[str, str] = {}
        pieces: dict[str, tuple[str, tuple[int, ...]]] = {}

        def narrowed(name: str, x: Tensor, widths: Mapping[str, int]) -> Callable[[], Pass]:
            # Built on demand, because most pieces may be in the table already.
            def build() -> Pass:
                block = _narrowed(tower, groups, family, widths).get_submodule(name)
                return lambda: block(x)

            return build

        for name, block in stages.blocks.items():
            shape = digest(f"{_described(block)} on {tuple(x.shape)}")
            # Equal blocks share a piece, which is timed once.
            blocks[name] = f"block {shape}"
            passes.setdefault((blocks[name], FULL), narrowed(name, x, {}))
            for group in (g for g in groups if g.block == name):
                # Without the name of the block, so that equal blocks share the piece.
                consumer = group.consumer.removeprefix(f"{name}.")
                width = group.columns.shape[1]
                piece = f"{group.kind} {group.units}x{width} before {consumer} in {shape}"
                pieces[group.name] = piece, _grid(group)
                for units in _grid(group):
                    passes.setdefault((piece, units), narrowed(name, x, {group.name: units}))
            x = block(x)
        rest = f"rest {digest(f'{_described(tower)} on {tuple(images.shape)}')}"
        last = x
        # The outer lambda builds the pass, as for the blocks.
        passes[rest, FULL] = lambda: lambda: (stages.stem(images), stages.head(last))
        return cls(rest=rest, blocks=blocks, groups=pieces, passes=passes)

    def budget(self, table: LatencyTable, groups: Sequence[Group], ratio: float) -> Budget:
        """Return a budget in milliseconds with prices interpolated from ``table``."""
        times = table.times
        dense = times[self.rest][FULL] + sum(times[b][FULL] for b in self.blocks.values())
        tables = {}
        for group in groups:
            piece, widths = self.groups[group.name]
            known = {w: times[piece][w] for w in widths}
            # The dense width was timed as the complete block.
            known[group.units] = times[self.blocks[group.block]][FULL]
            values = np.interp(np.arange(group.units + 1), list(known), list(known.values()))
            # A narrower block that measures slower saves nothing: take the running minimum from the
            # dense width down, which keeps the dense time.
            values = np.minimum.accumulate(values[::-1])[::-1]
            tables[group.name] = tuple(float(v) for v in values - values[0])
        return Budget("latency", dense, dense * (1 - ratio), tables)


def latency_budget(
    tower: nn.Module,
    groups: Sequence[Group],
    family: Family,
    size: tuple[int, int],
    ratio: float,
    file: str | Path | None,
    progress: Progress,
) -> Budget:
    """Return the budget for a ratio of the predicted time; measure missing layer times.

    Args:
        tower: Rewritten dense tower.
        groups: Prunable groups.
        family: Family of the tower.
        size: Input height and width in pixels.
        ratio: Fraction of the time to remove.
        file: Table of layer times; None for this machine's table in the user's cache directory. A
            table of another machine is read, but never extended.
        progress: Progress reporter.

    Raises:
        DataError: ``file`` is no table, or is from another machine and lacks a piece.
        OutputError: ``file`` cannot be written.
    """
    weight = next(tower.parameters())
    images = random_images(BATCH, size).to(weight)
    machine = this_machine(weight.device, weight.dtype, BATCH, size)
    model = LatencyModel.of(tower, groups, family, images)
    path = cache_path(machine) if file is None else Path(file)
    table = _read(path, machine, named=file is not None, progress=progress)
    missing = [key for key in model.passes if key[1] not in table.times.get(key[0], {})]
    if missing:
        if table.machine != machine:
            piece, width = missing[0]
            raise DataError(
                f"{path} has no time for {piece!r} at width {width} and was measured on another "
                f"machine ({_differences(table.machine, machine)}). Run the same command there to "
                "add it, or name another file"
            )
        measured = _measured({k: model.passes[k] for k in missing}, weight.device, progress)
        table = table.extended(measured)
        try:
            table.write(path)
        except OutputError as error:
            # A cache that cannot be written only costs another measurement next time.
            if file is not None:
                raise
            progress.note(str(error))
    return model.budget(table, groups, ratio)


def compare_latency(
    dense: nn.Module, slim: nn.Module, size: tuple[int, int], progress: Progress
) -> dict[str, float]:
    """Measure the latency of one image, dense and slim in alternation.

    Returns:
        ``dense_ms``, ``slim_ms`` (medians), and ``measured_ratio``: 1 minus the median of slim /
        dense over the rounds.
    """
    weight = next(slim.parameters())
    images = random_images(BATCH, size).to(weight)
    times = alternate(
        {"dense": lambda: dense(images), "slim": lambda: slim(images)},
        rounds=ROUNDS,
        device=weight.device,
        progress=progress,
        label="latency, dense and slim",
    )
    pairs = zip(times["slim"], times["dense"], strict=True)
    return {
        "dense_ms": 1e3 * statistics.median(times["dense"]),
        "slim_ms": 1e3 * statistics.median(times["slim"]),
        "measured_ratio": 1 - statistics.median(a / b for a, b in pairs),
    }


def _grid(group: Group) -> tuple[int, ...]:
    """Return the widths to time: 1, 0 if allowed, and up to :data:`POINTS` evenly spaced."""
    widths = {1, *(round(group.units * k / POINTS) for k in range(POINTS))}
    return tuple(sorted(w for w in widths if min(1, group.min_units) <= w < group.units))


def _described(module: nn.Module) -> str:
    """Describe what determines the time of a module: its repr and its numbers of heads."""
    attributes = [
        (name, key, value)
        for name, part in module.named_modules()
        for key, value in sorted(vars(part).items())
        if isinstance(value, int | tuple) and ("head" in key or "dim" in key)
    ]
    return f"{module!r} {attributes}"


def _narrowed(
    tower: nn.Module, groups: Sequence[Group], family: Family, widths: Mapping[str, int]
) -> nn.Module:
    """Return the finished tower with some groups narrowed; unchanged weights are shared."""
    # The memo makes deepcopy reuse the tensors; `cut` replaces weights and never modifies them.
    memo: dict[int, Any] = {id(t): t for t in (*tower.parameters(), *tower.buffers())}
    shell = deepcopy(tower, memo)
    plan = Plan({g.name: torch.arange(widths.get(g.name, g.units)) for g in groups})
    cut(shell, groups, plan)
    family.finish(shell, groups, plan)
    return shell.eval()


def _measured(
    passes: Mapping[tuple[str, int], Callable[[], Pass]], device: torch.device, progress: Progress
) -> dict[tuple[str, int], float]:
    """Measure the median milliseconds of every piece at every width, in alternation."""
    names = {f"{piece} at {width}": (piece, width) for piece, width in passes}
    times = alternate(
        {name: passes[key]() for name, key in names.items()},
        rounds=ROUNDS,
        device=device,
        progress=progress,
        label="layer times",
    )
    return {names[name]: round(1e3 * statistics.median(s), 6) for name, s in times.items()}


def _read(
    path: Path, machine: Mapping[str, Any], *, named: bool, progress: Progress
) -> LatencyTable:
    """Read the table, or return an empty one; a damaged cached table is measured again."""
    if not path.exists():
        return LatencyTable(machine)
    try:
        table = LatencyTable.read(path)
    except DataError as error:
        if named:
            raise
        progress.note(f"measured again: {error}")
        return LatencyTable(machine)
    if table.machine != machine:
        progress.note(
            f"{path} was measured on another machine: {_differences(table.machine, machine)}"
        )
    return table


def _differences(other: Mapping[str, Any], this: Mapping[str, Any]) -> str:
    """List the properties in which two machines differ."""
    keys = [key for key in sorted({*other, *this}) if other.get(key) != this.get(key)]
    return ", ".join(f"{key} {other.get(key)!r}, here {this.get(key)!r}" for key in keys)
