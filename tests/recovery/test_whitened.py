"""Whitened linear layers: the same weights, in coordinates that suit what they read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import Stream, run_stem
from ovsprune.calibration.moments import SecondMoments
from ovsprune.calibration.ridge import level
from ovsprune.recovery.whitened import Whitened, whiten
from tests.contracts.conftest import Case, open_clip_vit, prepared


def correlated(rows: int, spread: float, seed: int = 0) -> Tensor:
    """Rows [rows, 12] whose variances along some orthogonal directions go from 1 to ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    scales = torch.logspace(0, 0.5, 12, base=spread)
    return torch.randn(rows, 12, generator=generator) * scales @ turn.T + 3.0


def covariance_of(rows: Tensor) -> Tensor:
    moments = SecondMoments(rows.shape[1])
    moments.update(rows)
    return moments.result().covariance


def test_the_weight_stays_what_it_was() -> None:
    layer = nn.Linear(12, 7)
    before = layer.weight.detach().clone()
    white = Whitened(layer.weight, covariance_of(correlated(500, 100.0)))
    assert torch.equal(layer.weight, before)
    white.write()
    torch.testing.assert_close(layer.weight.detach(), before, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(white.free, before, atol=0.01)


def test_what_a_step_moves_varies_alike_in_every_direction() -> None:
    rows = correlated(4000, 50.0)
    covariance = covariance_of(rows)
    layer = nn.Linear(12, 12)
    white = Whitened(layer.weight, covariance)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        white.free += torch.eye(12)
    white.write()
    moved = (rows - rows.mean(0)) @ (layer.weight.detach() - before).T
    spread = torch.linalg.eigvalsh(covariance_of(moved)) / level(covariance)
    # 1 but for the ridge, which holds back the directions that hardly vary.
    assert spread.max() == pytest.approx(1.0, abs=0.02)
    assert spread.min() > 0.75
    plain = torch.linalg.eigvalsh(covariance) / level(covariance)
    assert plain.min() < 0.1 < 3.0 < plain.max()


def test_the_gradient_is_that_of_the_new_coordinates() -> None:
    rows = correlated(200, 30.0)
    layer = nn.Linear(12, 5, bias=False)
    white = Whitened(layer.weight, covariance_of(rows))
    layer(rows).square().mean().backward()
    white.read()
    free = white.free.detach().double().requires_grad_()
    (rows.double() @ (free @ white._factor.double()).T).square().mean().backward()
    torch.testing.assert_close(white.free.grad.double(), free.grad, rtol=1e-4, atol=1e-4)
    layer.weight.grad = None
    white.read()
    assert white.free.grad is None


@pytest.mark.parametrize("massive", [1.0, 1e4])
def test_descent_gets_further_whatever_the_scales(massive: float) -> None:
    """Steepest descent with its best step size, from the same weight, to the same goal."""
    rows = correlated(500, 30.0)
    rows = rows - rows.mean(0)
    rows[:, 0] *= massive
    goal = rows @ torch.randn(12, 4, generator=torch.Generator().manual_seed(1))

    def left(whitened: bool) -> float:
        found = []
        for lr in 10.0 ** torch.arange(-13, 1, 0.5):
            torch.manual_seed(0)
            layer = nn.Linear(12, 4, bias=False)
            white = Whitened(layer.weight, covariance_of(rows))
            optimizer = torch.optim.SGD([white.free if whitened else layer.weight], float(lr))
            for _ in range(30):
                layer.weight.grad = None
                (layer(rows) - goal).square().sum(1).mean().backward()
                white.read()
                optimizer.step()
                if whitened:
                    white.write()
            loss = (layer(rows) - goal).detach().square().mean(0)
            found.append(float((loss / goal.square().mean(0)).mean()))
        return min(x for x in found if x == x)

    assert left(True) < 0.1 * left(False)


def test_a_layer_whose_input_never_varies_is_left_as_it_is() -> None:
    layer = nn.Linear(12, 5)
    white = Whitened(layer.weight, torch.zeros(12, 12))
    torch.testing.assert_close(white.free.detach(), layer.weight.detach())


@pytest.fixture(scope="module")
def case() -> Case:
    return prepared(open_clip_vit())


def test_every_linear_layer_of_a_block_is_whitened_by_what_it_reads(case: Case) -> None:
    plan = case.random_plan(0)
    slim = case.cut(plan)
    item = case.context(slim, plan)
    stages = item.stages(slim)
    stream = run_stem(stages, item.pictures, item.batch_size)
    found = whiten(stages.blocks, stream, item.batch_size)
    inside = {
        layer.weight
        for block in stages.blocks.values()
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
    }
    assert {white.weight for white in found} == inside
    images = torch.cat(list(item.pictures.batches(item.batch_size)))
    with torch.no_grad():
        wanted = stages.outputs(images)
        for white in found:
            white.write()
        now = stages.outputs(images)
        behind = stages.head(stream[slice(0, len(images))])
    for name, a, b in zip(("pooled", "dense"), wanted, now, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(behind[1], wanted[1], rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_never_run_is_left_out() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, stream: Tensor) -> Tensor:
            return self.used(stream)

    block = Block()
    found = whiten({"only": block}, Stream(torch.randn(9, 4, 6)), 4)
    assert [white.weight for white in found] == [block.used.weight]
