"""Gradients that are formed with a sum, against the same sum recomputed and against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetuna_func import _sums

N, TOKENS, WIDTH, WORDS = 3, 10, 4, 7
EXACT = 1e-12


def inputs(n: int | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lead = () if n is None else (n,)
    leaves = {
        "weight": torch.randn(*lead, WORDS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_(),
        "bias": torch.randn(*lead, WORDS, generator=generator, dtype=torch.float64).requires_grad_(),
        "frozen": torch.randn(WORDS, generator=generator, dtype=torch.float64),
        "unread": torch.zeros(*lead, 2, dtype=torch.float64).requires_grad_(),
    }
    hidden = torch.randn(*lead, TOKENS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    return leaves, hidden, torch.randint(0, WORDS, (*lead, TOKENS), generator=generator)


class Piece:
    """Cross-entropies of tokens, and how many were asked for."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, leaves: dict[str, Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
        self.calls.append(targets.shape[-1])
        logits = hidden @ leaves["weight"].mT + leaves["bias"].unsqueeze(-2) + leaves["frozen"]
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").reshape(targets.shape)


def derivatives(total: Tensor, leaves: dict[str, Tensor], hidden: Tensor, **options: Any) -> list[Tensor]:
    weights = torch.arange(1.0, 1.0 + total.numel(), dtype=torch.float64).reshape(total.shape)
    wanted = [hidden, *(leaf for leaf in leaves.values() if leaf.requires_grad)]
    return list(
        torch.autograd.grad((weights * total).sum(), wanted, allow_unused=True, materialize_grads=True, **options)
    )


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    scale = max(float(leaf.abs().max()) for leaf in expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and float((one - other).abs().max()) <= EXACT * scale


@pytest.mark.parametrize("size", [1, 3, 5, 10, 99])
@pytest.mark.parametrize("n", [None, 1, N])
def test_gradients_are_those_of_plain_autograd(n: int | None, size: int):
    """Each finetune's by its own cotangent, every piece computed once, and as often as one likes."""
    leaves, hidden, targets = inputs(n)
    piece = Piece()
    total = _sums.sum_of_pieces(piece, leaves, hidden, targets, size, n)
    whole = Piece()(leaves, hidden, targets).sum(-1)
    assert total.shape == whole.shape == (() if n is None else (n,))
    assert float((total - whole).detach().abs().max()) <= EXACT * float(whole.detach().abs().max())
    expected = derivatives(whole, leaves, hidden, retain_graph=True)
    for _ in range(2):
        assert_same(derivatives(total, leaves, hidden, retain_graph=True), expected)
    assert sum(piece.calls) == TOKENS and max(piece.calls) == min(size, TOKENS)
    other = derivatives(whole.flip(0) if whole.ndim else 2 * whole, leaves, hidden)
    if n != 1:
        assert float((other[0] - expected[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("n", [None, N])
def test_second_derivatives(n: int | None):
    """By plain autograd too, where the gradient is asked for with a graph."""
    leaves, hidden, targets = inputs(n)

    def second(total: Tensor) -> list[Tensor]:
        first = derivatives(total, leaves, hidden, create_graph=True)
        return derivatives(sum((leaf.square().sum() for leaf in first), torch.zeros(())), leaves, hidden)

    found = second(_sums.sum_of_pieces(Piece(), leaves, hidden, targets, 3, n))
    expected = second(Piece()(leaves, hidden, targets).sum(-1))
    assert_same(found, expected)
    assert float(expected[0].abs().max()) > 1e-3


def test_what_is_not_needed_is_not_formed():
    leaves, hidden, targets = inputs(N)
    frozen = {name: leaf.detach() for name, leaf in leaves.items()}
    total = _sums.sum_of_pieces(Piece(), frozen, hidden, targets, 3, N)
    (found,) = torch.autograd.grad(total.sum(), hidden)
    (expected,) = torch.autograd.grad(Piece()(frozen, hidden, targets).sum(), hidden)
    assert_same([found], [expected])
    with torch.no_grad():
        assert not _sums.sum_of_pieces(Piece(), leaves, hidden, targets, 3, N).requires_grad
    assert not _sums.sum_of_pieces(Piece(), frozen, hidden.detach(), targets, 3, N).requires_grad


def test_a_leaf_that_finetunes_share_is_recomputed():
    """Its gradient would need a cotangent for each; so that every piece is computed a second time."""
    leaves, hidden, targets = inputs(N)
    leaves["frozen"] = leaves["frozen"].requires_grad_()
    piece = Piece()
    total = _sums.sum_of_pieces(piece, leaves, hidden, targets, 3, N)
    found = derivatives(total, leaves, hidden)
    assert_same(found, derivatives(Piece()(leaves, hidden, targets).sum(-1), leaves, hidden))
    assert sum(piece.calls) == 2 * TOKENS
