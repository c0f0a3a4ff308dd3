"""Taylor and Fisher on hand-computed gradients, and their objectives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ovsprune.core.errors import OptionError
from ovsprune.importance import CRITERIA
from ovsprune.importance.fisher import Fisher
from ovsprune.importance.taylor import Taylor, consistency
from tests.importance.by_hand import context, normal

GRADIENTS = torch.tensor([[1.0, -2.0, 0.0], [-1.0, -1.0, 0.0]], dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_taylor_averages_absolute_values_over_images() -> None:
    ranking = CRITERIA.get("taylor").score(context(normal(3, 2), normal(2, 3), gradients=GRADIENTS))
    assert ranking.costs.tolist() == [1.0, 1.5, 0.0]
    assert ranking.order.tolist() == [2, 0, 1]


def test_fisher_averages_squares() -> None:
    ranking = CRITERIA.get("fisher").score(context(normal(3, 2), normal(2, 3), gradients=GRADIENTS))
    assert ranking.costs.tolist() == [1.0, 2.5, 0.0]
    assert ranking.order.tolist() == [2, 0, 1]


def tower(mask: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Build a tower of 3 input and 5 output channels, one token per pixel, masked on the input."""
    mix = normal(5, 3, seed=1)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        dense = torch.einsum("oc,bchw->bohw", mix, images * mask[:, :, None, None])
        return dense.mean((2, 3)), dense

    return forward


def test_fisher_estimates_the_squared_jacobian() -> None:
    images = normal(1, 3, 4, 4)
    mask = torch.ones(1, 3, requires_grad=True)
    values = Fisher(2000).objective(tower(mask), images, generator())
    assert values.shape == (1, 2000)
    (squares,) = torch.autograd.grad(values[0], mask, torch.eye(2000), is_grads_batched=True)
    squares = squares.square()
    jacobian = torch.autograd.functional.jacobian(
        lambda m: F.normalize(tower(m)(images)[1], dim=1).flatten(), mask
    )
    expected = jacobian.flatten(0, 1).square().sum(0) / 16
    torch.testing.assert_close(squares.mean((0, 1)), expected, rtol=0.1, atol=0)


def test_consistency_loss_has_a_nonzero_gradient_for_every_image() -> None:
    images = normal(6, 3, 4, 4)
    mask = torch.ones(6, 3, requires_grad=True)
    values = consistency(tower(mask), images, generator())
    assert values.shape == (6,)
    gradient = torch.autograd.grad(values.sum(), mask)[0]
    assert bool((gradient.abs().sum(1) > 1e-4).all())


def test_flip_is_undone_in_the_tokens() -> None:
    """Use a tower of 1x1 convolutions, which maps a flipped image to flipped tokens."""
    images = normal(64, 3, 4, 4)
    values = consistency(tower(torch.ones(64, 3)), images, generator())
    assert float(values.mean()) < 0.1
    unlike = F.normalize(tower(torch.ones(64, 3))(images)[1], dim=1)
    assert float((unlike - unlike.flip(-1)).square().sum(1).mean()) > 1.0


@pytest.mark.parametrize("objective", [consistency, Fisher().objective])
def test_random_draws_do_not_depend_on_the_batch_size(objective: Callable[..., Tensor]) -> None:
    images = normal(6, 3, 4, 4)
    whole = objective(tower(torch.ones(6, 3)), images, generator())
    draws = generator()
    parts = [objective(tower(torch.ones(len(p), 3)), p, draws) for p in images.split([1, 3, 2])]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_custom_loss_is_the_objective() -> None:
    def loss(forward: object, images: Tensor, generator: torch.Generator) -> Tensor:
        return images.sum((1, 2, 3))

    assert Taylor(loss).objective is loss
    assert Taylor().objective is consistency


def test_fisher_refuses_zero_projections() -> None:
    with pytest.raises(OptionError, match="projections is 0, expected at least 1"):
        Fisher(0)
