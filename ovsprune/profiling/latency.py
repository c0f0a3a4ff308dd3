"""Latency as a budget: layer times by width, the prices made of them, and what it really takes.

The time of a tower is taken as the sum of its parts: the stem and the head, and every block. What
a group saves at a width is what its own block saves when that group alone is narrowed to it; what
several groups of one block save is taken as the sum.
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
from ovsprune.profiling.timing import Pass, alternate

__all__ = ["LatencyModel", "compare_latency", "latency_budget"]

BATCH = 1
"""Pictures at a time: latency is what one picture waits."""
POINTS = 6
"""Widths of a group at which its block is timed, beside the narrowest and the dense one."""
ROUNDS = 20
"""Alternating rounds of which the median is taken."""

WHOLE = 1
"""The width under which a piece without a width (the dense block, the rest) is listed."""


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """The pieces of one tower, and how each is run.

    Attributes:
        rest: Piece of the stem and the head.
        blocks: Block to its dense piece.
        groups: Group to its piece, and the widths at which it is timed.
        passes: (piece, width) to what builds the thing that is timed.
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
        """The pieces of a rewritten tower, for ``images`` [B, 3, H, W]."""
        stages = family.stages(tower)
        stream = stages.stem(images)
        passes: dict[tuple[str, int], Callable[[], Pass]] = {}
        blocks: dict[str, str] = {}
        found: dict[str, tuple[str, tuple[int, ...]]] = {}

        def narrowed(name: str, read: Tensor, widths: Mapping[str, int]) -> Callable[[], Pass]:
            def build() -> Pass:
                block = _narrowed(tower, groups, family, widths).get_submodule(name)
                return lambda: block(read)

            return build

        for name, block in stages.blocks.items():
            shape = digest(f"{_described(block)} on {tuple(stream.shape)}")
            blocks[name] = f"block {shape}"
            passes.setdefault((blocks[name], WHOLE), narrowed(name, stream, {}))
            for group in (g for g in groups if g.block == name):
                consumer = group.consumer.removeprefix(f"{name}.")
                width = group.columns.shape[1]
                piece = f"{group.kind} {group.units}x{width} before {consumer} in {shape}"
                found[group.name] = piece, _grid(group)
                for at in _grid(group):
                    passes.setdefault((piece, at), narrowed(name, stream, {group.name: at}))
            stream = block(stream)
        rest = f"rest {digest(f'{_described(tower)} on {tuple(images.shape)}')}"
        last = stream
        passes[rest, WHOLE] = lambda: lambda: (stages.stem(images), stages.head(last))
        return cls(rest, blocks, found, passes)

    def budget(self, table: LatencyTable, groups: Sequence[Group], ratio: float) -> Budget:
        """A budget in milliseconds whose prices are interpolated from ``table``."""
        times = table.times
        dense = times[self.rest][WHOLE] + sum(times[b][WHOLE] for b in self.blocks.values())
        tables = {}
        for group in groups:
            piece, widths = self.groups[group.name]
            known = {w: times[piece][w] for w in widths}
            known[group.units] = times[self.blocks[group.block]][WHOLE]
            values = np.interp(np.arange(group.units + 1), list(known), list(known.values()))
            # A narrower block that is slower saves nothing. The dense time is left as it is.
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
    """The budget for a share of the predicted time, measuring what no table has yet.

    Args:
        tower: The rewritten dense tower.
        groups: What may be cut.
        family: Its family.
        size: Input height and width in pixels.
        ratio: Share of the time that goes.
        file: The table; None for this machine's in the user's cache directory. A file that was
            measured on another machine is read and never added to.
        progress: Is told of the measuring.

    Raises:
        DataError: ``file`` is no table, or is another machine's and lacks a piece of this tower.
        OutputError: ``file`` cannot be written.
    """
    weight = next(tower.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, *size, generator=generator).to(weight)
    here = this_machine(weight.device, weight.dtype, BATCH, size)
    model = LatencyModel.of(tower, groups, family, images)
    path = cache_path(here) if file is None else Path(file)
    table = _read(path, here, named=file is not None, progress=progress)
    missing = [key for key in model.passes if key[1] not in table.times.get(key[0], {})]
    if missing:
        if table.machine != here:
            raise DataError(
                f"{path} has no time for {missing[0][0]!r} at width {missing[0][1]} and was "
                f"measured elsewhere ({_unlike(table.machine, here)}): add it there, by the same "
                "command, or name another file"
            )
        measured = _measured({k: model.passes[k] for k in missing}, weight.device, progress)
        table = LatencyTable(here, _merged(table.times, measured))
        try:
            table.write(path)
        except OutputError as error:
            if file is not None:
                raise
            progress.note(str(error))
    return model.budget(table, groups, ratio)


def compare_latency(
    dense: nn.Module, slim: nn.Module, size: tuple[int, int], progress: Progress
) -> dict[str, float]:
    """Milliseconds that one picture takes, dense and slim in alternation, and the share saved.

    Returns:
        ``dense_ms``, ``slim_ms`` (medians), and ``measured_ratio``: 1 less the median of slim /
        dense over the rounds.
    """
    weight = next(slim.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, *size, generator=generator).to(weight)
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
    """1, 0 if all may go, and :data:`POINTS` widths at most, evenly spaced and ascending."""
    widths = {1, *(round(group.units * k / POINTS) for k in range(POINTS))}
    return tuple(sorted(w for w in widths if min(1, group.min_units) <= w < group.units))


def _described(module: nn.Module) -> str:
    """What decides how long a module takes; its representation does not say how many heads."""
    found = [
        (name, key, value)
        for name, part in module.named_modules()
        for key, value in sorted(vars(part).items())
        if isinstance(value, int | tuple) and ("head" in key or "dim" in key)
    ]
    return f"{module!r} {found}"


def _narrowed(
    tower: nn.Module, groups: Sequence[Group], family: Family, widths: Mapping[str, int]
) -> nn.Module:
    """The tower in its final form with some groups narrowed; weights are shared where they can."""
    # Weights are never changed in place by a cut: the copy has the structure only.
    memo: dict[int, Any] = {id(t): t for t in (*tower.parameters(), *tower.buffers())}
    shell = deepcopy(tower, memo)
    plan = Plan({g.name: torch.arange(widths.get(g.name, g.units)) for g in groups})
    cut(shell, groups, plan)
    family.finish(shell, groups, plan)
    return shell.eval()


def _measured(
    passes: Mapping[tuple[str, int], Callable[[], Pass]], device: torch.device, progress: Progress
) -> dict[tuple[str, int], float]:
    """Median milliseconds of every piece at every width, all of them in alternation."""
    names = {f"{piece} at {width}": (piece, width) for piece, width in passes}
    times = alternate(
        {name: passes[key]() for name, key in names.items()},
        rounds=ROUNDS,
        device=device,
        progress=progress,
        label="layer times",
    )
    return {names[name]: round(1e3 * statistics.median(found), 6) for name, found in times.items()}


def _merged(
    times: Mapping[str, Mapping[int, float]], more: Mapping[tuple[str, int], float]
) -> dict[str, Mapping[int, float]]:
    merged = {piece: dict(found) for piece, found in times.items()}
    for (piece, width), value in more.items():
        merged.setdefault(piece, {})[width] = value
    return {piece: dict(sorted(found.items())) for piece, found in merged.items()}


def _read(path: Path, here: Mapping[str, Any], *, named: bool, progress: Progress) -> LatencyTable:
    """The table in ``path``, or an empty one; a cached one that is damaged is measured again."""
    if not path.exists():
        return LatencyTable(here)
    try:
        table = LatencyTable.read(path)
    except DataError as error:
        if named:
            raise
        progress.note(f"measured again: {error}")
        return LatencyTable(here)
    if table.machine != here:
        progress.note(f"{path} was measured elsewhere: {_unlike(table.machine, here)}")
    return table


def _unlike(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    keys = [k for k in sorted({*there, *here}) if there.get(k) != here.get(k)]
    return ", ".join(f"{k} {there.get(k)!r}, here {here.get(k)!r}" for k in keys)
