"""The bases of directions inside heads: what they diagonalise, and that none is better."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ovsprune.calibration.head_bases import RIDGE, balance, find_bases
from ovsprune.calibration.ridge import regularised
from ovsprune.core.progress import Silent
from ovsprune.graph.head_widths import turn, width_seeds
from ovsprune.slim.directions import dual
from tests.contracts.conftest import Case, open_clip_vit, prepared

D, E = 8, 20
TINY_RIDGE = 1e-9


def numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def head() -> tuple[Tensor, Tensor, Tensor]:
    """W_q, W_k [D, E] and the second moment [E, E] of what both read: far from white."""
    root = numbers(E, E, seed=0) * torch.logspace(0, -2, E, dtype=torch.float64)
    return numbers(D, E, seed=1), numbers(D, E, seed=2), root @ root.T


@pytest.mark.parametrize("seed", range(3))
def test_both_moments_become_the_same_falling_diagonal(seed: int) -> None:
    roots = numbers(2, D, D, seed=seed)
    first, second = roots[0] @ roots[0].T, roots[1] @ roots[1].T
    basis, values = balance(first, second)
    for by, moment in ((basis, first), (dual(basis), second)):
        found = by @ regularised(moment, RIDGE) @ by.T
        torch.testing.assert_close(found, values.diag(), atol=1e-9, rtol=1e-9)
    assert bool((values[1:] <= values[:-1]).all())


def test_truncation_is_the_best_of_its_rank(head: tuple[Tensor, Tensor, Tensor]) -> None:
    """Against Eckart and Young on the whole map of the logits, C^1/2 W_q^T W_k C^1/2."""
    w_q, w_k, moment = head
    basis, values = balance(w_q @ moment @ w_q.T, w_k @ moment @ w_k.T, TINY_RIDGE)
    q, k = basis @ w_q, dual(basis) @ w_k
    torch.testing.assert_close(q.T @ k, w_q.T @ w_k)
    eigenvalues, vectors = torch.linalg.eigh(moment)
    root = vectors * eigenvalues.clamp_min(0).sqrt() @ vectors.T
    whole = root @ w_q.T @ w_k @ root
    singular = torch.linalg.svdvals(whole)
    close = {"atol": 1e-4 * float(singular[0]), "rtol": 1e-3}
    torch.testing.assert_close(values, singular[:D], **close)
    for rank in range(1, D):
        left = whole - root @ q[:rank].T @ k[:rank] @ root
        torch.testing.assert_close(left.norm(), singular[rank:].norm(), **close)


def missing(w_q: Tensor, w_k: Tensor, moment: Tensor, basis: Tensor, rank: int) -> float:
    """Mean squared error of the logits over independent tokens, ``rank`` directions kept."""
    q, k = (basis @ w_q)[rank:], (dual(basis) @ w_k)[rank:]
    return float(((q @ moment @ q.T) * (k @ moment @ k.T)).sum())


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as it is": lambda first, second: torch.eye(D, dtype=torch.float64),
    "the queries alone": lambda first, second: torch.linalg.eigh(first)[1].T.flip(0),
    "the keys alone": lambda first, second: torch.linalg.eigh(second)[1].T.flip(0),
    **{
        f"random {i}": lambda first, second, i=i: numbers(D, D, seed=10 + i)  # type: ignore[misc]
        for i in range(20)
    },
}


@pytest.mark.parametrize("other", OTHERS)
def test_no_other_basis_loses_less(head: tuple[Tensor, Tensor, Tensor], other: str) -> None:
    w_q, w_k, moment = head
    first, second = w_q @ moment @ w_q.T, w_k @ moment @ w_k.T
    basis, values = balance(first, second, TINY_RIDGE)
    for rank in (2, 4, 6):
        ours = missing(w_q, w_k, moment, basis, rank)
        assert ours == pytest.approx(float(values[rank:].square().sum()), rel=1e-2)
        assert ours < 0.9 * missing(w_q, w_k, moment, OTHERS[other](first, second), rank)


def test_a_dead_head_has_a_basis(head: tuple[Tensor, Tensor, Tensor]) -> None:
    w_q, _, moment = head
    for first in (torch.zeros(D, D, dtype=torch.float64), w_q @ moment @ w_q.T):
        basis, values = balance(first, torch.zeros_like(first))
        assert basis.isfinite().all() and values.isfinite().all()
        assert torch.linalg.cond(basis) < 1e6


@pytest.fixture(scope="module")
def small() -> Case:
    return prepared(open_clip_vit())


def test_the_tower_in_its_bases_gives_the_same_and_is_in_order(small: Case) -> None:
    family_seeds = [s for s in _seeds(small) if not s.protected]
    found = find_bases(
        small.dense,
        small.backbone.stages(small.dense),
        family_seeds,
        small.pictures,
        batch_size=5,
        progress=Silent(),
    )
    assert set(found.bases) == {s.name for s in family_seeds} == set(found.energies)
    images = small.images()
    before = small.outputs(small.dense, images)
    weights = small.dense.state_dict()
    name = "transformer.resblocks.0.attn.q_proj.weight"
    old = weights[name].clone()
    turn(small.dense, found.bases)
    assert not torch.allclose(small.dense.state_dict()[name], old, atol=1e-2)
    after = small.outputs(small.dense, images)
    assert (after - before).abs().max() / before.std() < 1e-4
    for energies in found.energies.values():
        assert energies.shape == (16,)
        assert bool((energies[1:] <= energies[:-1]).all()) and float(energies[-1]) >= 0


def _seeds(case: Case) -> list:  # type: ignore[type-arg]
    from ovsprune.backbones import FAMILIES

    return width_seeds(FAMILIES.get(case.backbone.family).seeds(case.dense))
