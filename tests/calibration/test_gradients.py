"""Gradients of unit masks: finite differences, batch sizes, refused objectives."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ovsprune.calibration import gradients as module
from ovsprune.calibration.gradients import mask_gradients
from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Silent
from ovsprune.core.protocols import Forward, Objective, Stages
from ovsprune.core.records import Group, Slice
from ovsprune.graph.layers import weight_of


@dataclass(frozen=True)
class Noise:
    """Images of noise."""

    count: int
    dtype: torch.dtype = torch.float64

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[Tensor]:
        draws = torch.Generator().manual_seed(5)
        yield from torch.randn(self.count, 3, 6, 6, generator=draws).to(self.dtype).split(size)


class Tower(nn.Module):
    """Two convolutions with units between them, then an MLP on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, padding=1)
        self.first, self.second = nn.Linear(4, 10), nn.Linear(10, 5)

    def stages(self) -> Stages:
        def convolve(x: Tensor) -> Tensor:
            out: Tensor = self.read(self.make(x).tanh()).flatten(2).transpose(1, 2)
            return out

        def head(x: Tensor) -> tuple[Tensor, Tensor]:
            return x.mean(1), x.transpose(1, 2).unflatten(2, (4, 4))

        mlp = nn.Sequential(self.first, nn.GELU(), self.second)
        return Stages(convolve, {"mlp": mlp}, head)


def group(name: str, make: str, read: str, rows: Tensor) -> Group:
    slices = (Slice(make, "out", rows), Slice(read, "in", rows))
    return Group(name, "channels", len(rows), slices, read, "")


GROUPS = [
    group("kernels", "make", "read", torch.tensor([[0, 3], [1, 4], [2, 5]])),
    group("mlp", "first", "second", torch.arange(10).view(10, 1)),
]


@pytest.fixture
def tower() -> Tower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tower().eval().double()


def energy(forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
    pooled, dense = forward(images)
    return dense.square().mean((1, 2, 3)) + pooled.sin().sum(1)


def two_values(forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
    pooled, dense = forward(images)
    return torch.stack([energy(forward, images, generator), pooled[:, 0] * dense[:, 1, 0, 0]], 1)


def run(
    tower: Tower, objective: Objective = energy, batch_size: int = 16, count: int = 7
) -> dict[str, Tensor]:
    return mask_gradients(
        tower,
        tower.stages(),
        GROUPS,
        objective,
        Noise(count),
        batch_size=batch_size,
        seed=3,
        progress=Silent(),
    )


def values(tower: Tower, objective: Objective, count: int = 7) -> Tensor:
    stages = tower.stages()
    (images,) = Noise(count).batches(count)
    with torch.no_grad():
        return objective(
            lambda x: stages.head(stages.blocks["mlp"](stages.stem(x))), images, torch.Generator()
        )


@pytest.mark.parametrize("objective", [energy, two_values])
def test_gradients_equal_finite_differences(tower: Tower, objective: Objective) -> None:
    found = run(tower, objective)
    step = 1e-5
    for g in GROUPS:
        for unit in range(g.units):
            sides = []
            for factor in (1 + step, 1 - step):
                changed = deepcopy(tower)
                with torch.no_grad():
                    weight_of(changed.get_submodule(g.consumer))[:, g.columns[unit]] *= factor
                sides.append(values(changed, objective))
            expected = ((sides[0] - sides[1]) / (2 * step)).flatten().float()
            torch.testing.assert_close(found[g.name][:, unit], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 12, 100])
def test_the_batch_size_does_not_matter(tower: Tower, batch_size: int) -> None:
    expected, found = run(tower, two_values), run(tower, two_values, batch_size)
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "kernels": (14, 3),
        "mlp": (14, 10),
    }
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_a_unit_with_zero_columns_has_a_zero_gradient(tower: Tower) -> None:
    with torch.no_grad():
        tower.read.weight[:, [1, 4]] = 0
        tower.second.weight[:, 7] = 0
    found = run(tower)
    for name, unit in (("kernels", 1), ("mlp", 7)):
        dead = found[name].abs().sum(0) == 0
        assert dead.nonzero().flatten().tolist() == [unit]


def test_a_group_outside_of_the_objective_has_a_zero_gradient(tower: Tower) -> None:
    stages = tower.stages()

    def early(forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
        return stages.stem(images).square().sum((1, 2))

    found = run(tower, early)
    assert not found["mlp"].any() and bool(found["kernels"].any())


def test_columns_of_no_unit_are_not_masked(tower: Tower) -> None:
    """Test a group that covers only a part of the channels that its consumer reads."""
    part = group("part", "first", "second", torch.tensor([[8], [2]]))
    all_units = run(tower)["mlp"]
    found = mask_gradients(
        tower, tower.stages(), [part], energy, Noise(7), batch_size=8, seed=3, progress=Silent()
    )
    torch.testing.assert_close(found["part"], all_units[:, [8, 2]])


def test_the_tower_is_not_changed(tower: Tower) -> None:
    tower.first.requires_grad_(False)
    before = [p.requires_grad for p in tower.parameters()]
    run(tower)
    assert [p.requires_grad for p in tower.parameters()] == before
    assert not any(m._forward_pre_hooks for m in tower.modules())
    assert all(p.grad is None for p in tower.parameters())


def test_hooks_are_removed_after_an_error(tower: Tower) -> None:
    def broken(forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(tower, broken)
    assert not any(m._forward_pre_hooks for m in tower.modules())
    assert all(p.requires_grad for p in tower.parameters())


def test_large_results_may_be_stored_on_disk(tower: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def allocate(shape: tuple[int, ...]) -> Tensor:
        asked.append(shape)
        return torch.empty(shape)

    monkeypatch.setattr(module, "allocate", allocate)
    run(tower, two_values)
    assert asked == [(14, 13)]


def mean(forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
    return energy(forward, images, generator).mean()


def detached(forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
    return energy(forward, images, generator).detach()


def at_the_minimum(forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
    dense = forward(images)[1]
    return (dense - dense.detach()).square().sum((1, 2, 3))


def root_of_zero(forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
    return at_the_minimum(forward, images, generator).sqrt()


def both_views_at_once(forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
    return forward(torch.cat([images, images.flip(-1)]))[0].sum(1)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (mean, r"objective mean returned \(\) for 4 images, expected a tensor \[4\] or \[4, r\]"),
        (detached, "detached returned values without a gradient"),
        (at_the_minimum, "at_the_minimum is zero for every unit.*dense tower's own output"),
        (root_of_zero, "root_of_zero has gradients that are not finite"),
        (both_views_at_once, "received 4 images and called forward with 8.*once per view"),
    ],
)
def test_unusable_objectives_are_refused(tower: Tower, objective: Objective, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run(tower, objective)
