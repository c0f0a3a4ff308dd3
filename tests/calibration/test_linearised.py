"""Products with the Jacobian of a block, preconditioner, and conjugate gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from ovsprune.calibration.linearised import (
    InputPreconditioner,
    Segment,
    Tensors,
    conjugate_gradients,
)
from ovsprune.graph.attention import SeparateAttention


class Block(nn.Module):
    """Attention and MLP with residuals, and a last layer that must not run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = SeparateAttention(nn.MultiheadAttention(8, 2, batch_first=True))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.act, self.last = nn.GELU(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)[0]
        return self.last(x + self.down(self.act(self.up(x))))


SEGMENTS = {
    "mlp": (["up"], "down"),
    "attention": (["attn.q_proj", "attn.k_proj", "attn.v_proj"], "attn.out_proj"),
}


@pytest.fixture(params=SEGMENTS)
def segment(request: pytest.FixtureRequest) -> Segment:
    return Segment(Block().requires_grad_(False), *SEGMENTS[request.param])


def jacobian(segment: Segment, x: Tensor) -> Tensor:
    """Return J, [outputs, parameters], computed by reverse-mode differentiation."""
    found: list[Tensor] = []
    layer = segment.block.get_submodule(segment.consumer)
    handle = layer.register_forward_hook(lambda *args: found.append(args[2]))

    def output(parameters: Tensors) -> Tensor:
        functional_call(segment.block, parameters, (x,))
        return found[-1]

    parts = jacrev(output)(segment.parameters)
    handle.remove()
    return torch.cat([p.flatten(0, 2).flatten(1) for p in parts.values()], 1).double()


def flat(values: Tensors) -> Tensor:
    return torch.cat([part.flatten() for part in values.values()])


def test_products_equal_those_with_the_explicit_jacobian(segment: Segment) -> None:
    x, weight = torch.randn(3, 5, 8), torch.rand(3, 5, 1).expand(3, 5, 8)
    change = {n: torch.randn(p.shape, dtype=torch.float64) for n, p in segment.parameters.items()}
    J = jacobian(segment, x)
    rows = torch.randn(3, 5, 8)
    torch.testing.assert_close(
        flat(segment.transposed_product(x, rows)),
        J.T @ rows.flatten().double(),
        atol=1e-4,
        rtol=1e-4,
    )
    wanted = J.T @ (weight.flatten() * (J @ flat(change)))
    torch.testing.assert_close(
        flat(segment.normal_product(x, weight, change)), wanted, atol=1e-3, rtol=1e-3
    )


def test_layers_after_the_consumer_do_not_run(segment: Segment) -> None:
    ran = []
    segment.block.get_submodule("last").register_forward_hook(lambda *_: ran.append(1))
    segment.transposed_product(torch.randn(1, 5, 8), torch.randn(1, 5, 8))
    assert not ran
    assert not segment.block.get_submodule(segment.consumer)._forward_hooks


def test_parameters_are_set_and_restored_bit_for_bit(segment: Segment) -> None:
    before = {n: p.clone() for n, p in segment.block.state_dict().items()}
    change = {n: torch.ones(p.shape, dtype=torch.float64) for n, p in segment.parameters.items()}
    segment.set_parameters(change, 0.5)
    after = segment.block.state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == set(segment.parameters)
    assert all(torch.allclose(after[n], before[n] + 0.5) for n in changed)
    segment.set_parameters(change, 0.0)
    assert all(torch.equal(p, before[n]) for n, p in segment.block.state_dict().items())


def test_conjugate_gradients_solve_and_stop_early() -> None:
    torch.manual_seed(0)
    half = torch.randn(20, 6, dtype=torch.float64)
    matrix = half.T @ half
    target = {"a": torch.randn(2, 2, dtype=torch.float64), "b": torch.randn(2, dtype=torch.float64)}
    calls = []

    def normal(values: Tensors) -> Tensors:
        calls.append(1)
        out = matrix @ flat(values)
        return {"a": out[:4].view(2, 2), "b": out[4:]}

    found = conjugate_gradients(normal, target, lambda v: dict(v), 6)
    torch.testing.assert_close(flat(found), torch.linalg.solve(matrix, flat(target)))
    assert len(calls) == 6
    calls.clear()
    nothing = conjugate_gradients(normal, {n: 0 * t for n, t in target.items()}, dict, 6)
    assert not flat(nothing).any()
    assert len(calls) <= 1


def test_the_preconditioner_solves_a_linear_layer_in_one_step() -> None:
    """Use J D = D x, for which the second moment of x is the normal matrix."""
    torch.manual_seed(0)
    x = torch.randn(400, 5) @ torch.randn(5, 5)
    wanted = torch.randn(3, 5, dtype=torch.float64)
    square = x.double().T @ x.double()
    preconditioner = InputPreconditioner(1e-9)
    for rows in x.split(100):
        preconditioner.update({"layer": rows[:, None]}, torch.ones(len(rows)))
    found = conjugate_gradients(
        lambda d: {"layer.weight": d["layer.weight"] @ square},
        {"layer.weight": wanted @ square},
        preconditioner.precondition,
        1,
    )
    torch.testing.assert_close(found["layer.weight"], wanted, atol=1e-3, rtol=1e-3)


def test_layers_with_the_same_input_share_the_second_moment() -> None:
    preconditioner, rows, other = InputPreconditioner(1e-2), torch.randn(10, 4), torch.randn(10, 4)
    preconditioner.update({"q": rows, "k": rows, "v": other}, torch.ones(10))
    values = {f"{n}.weight": torch.ones(2, 4, dtype=torch.float64) for n in "qkv"}
    found = preconditioner.precondition(values)
    assert torch.equal(found["q.weight"], found["k.weight"])
    assert not torch.equal(found["q.weight"], found["v.weight"])
