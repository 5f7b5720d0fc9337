"""Products of adapted layers as one function: values and derivatives against the sums written out, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetuna_func._products import _takes_up, adapted_products

RTOL = 1e-12
"""Sums of at most 150 numbers about as large as one, in float64, in another order."""


def plainly(x: Tensor, a: Tensor, weights: list[Tensor], bs: list[Tensor]) -> list[Tensor]:
    """The same, finetune by finetune and layer by layer."""
    if a.ndim == 2:
        a, bs = a[None], [b[None] for b in bs]
    of_each = x.reshape(len(a), -1, x.shape[-1])
    parts = a.split([b.shape[-1] for b in bs], dim=-2)
    ys = [
        torch.stack([x @ w.mT + x @ a.mT @ b.mT for x, a, b in zip(of_each, part, own, strict=True)])
        for w, part, own in zip(weights, parts, bs, strict=True)
    ]
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


def inputs(n: int | None, shape: tuple[int, ...], narrow: int, layers: list[tuple[int, int]], seed: int = 0):
    """x, a, weights and bs; ``layers`` are widths and ranks."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    many = () if n is None else (n,)
    x = draw((n or 1) * shape[0], *shape[1:], narrow)
    a = draw(*many, sum(rank for _, rank in layers), narrow)
    return x, a, [draw(width, narrow) for width, _ in layers], [draw(*many, width, rank) for width, rank in layers]


CASES = {
    "adds up": (3, (2, 4), 8, [(8, 2), (4, 3), (4, 2)]),
    "takes up": (2, (2, 8), 28, [(56, 2), (64, 2)]),
    "takes up backward": (2, (2, 16), 64, [(28, 2)]),
    "single": (None, (2, 16), 28, [(56, 4)]),
    "rows": (2, (16,), 28, [(56, 2)]),
    "one token": (2, (3, 1), 8, [(8, 2)]),
    "four axes": (2, (1, 2, 8), 28, [(56, 2)]),
}


def leaves(case: str) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    x, a, weights, bs = inputs(*CASES[case])
    return x.requires_grad_(), a.requires_grad_(), weights, [b.requires_grad_() for b in bs]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str):
    x, a, weights, bs = leaves(case)
    found, expected = adapted_products(x, a, weights, bs), plainly(x, a, weights, bs)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in expected]
    for y, e in zip(found, expected, strict=True):
        assert y.shape == e.shape
        torch.testing.assert_close(y, e, rtol=RTOL, atol=RTOL)
    grads, wanted = (torch.autograd.grad(ys, [x, a, *bs], cotangents) for ys in (found, expected))
    for own, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=RTOL, atol=100 * RTOL)
    without = plainly(x, a, weights, [torch.zeros_like(b) for b in bs])
    assert all((y - e).abs().max() > 1e-3 for y, e in zip(found, without, strict=True))
    with torch.no_grad():
        again = adapted_products(x, a, weights, bs)
    assert all(torch.equal(y, e) and not y.requires_grad for y, e in zip(again, found, strict=True))


@pytest.mark.parametrize("case", ["adds up", "takes up", "takes up backward"])
def test_gradcheck(case: str):
    x, a, weights, bs = leaves(case)
    assert torch.autograd.gradcheck(lambda x, a, *bs: adapted_products(x, a, weights, bs), (x, a, *bs), fast_mode=True)


def test_the_cases_go_both_ways():
    def forward(case: str) -> bool:
        (n, *_), (x, _, weights, bs) = CASES[case], leaves(case)
        return _takes_up(x.reshape(-1, x.shape[-1]), weights[0].shape[0], (n or 1) * bs[0].shape[-1])

    assert [case for case in CASES if forward(case)] == ["takes up", "single", "rows", "four axes"]
    x, a, weights, _ = leaves("takes up backward")
    assert _takes_up(torch.zeros(x.shape[0] * x.shape[1], len(weights[0])), x.shape[-1], a.shape[0] * a.shape[1])


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([None, 1, 2, 3]),
    batch=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 5, 23]),
    narrow=st.sampled_from([4, 8, 22]),
    layers=st.lists(st.tuples(st.sampled_from([4, 8, 44]), st.integers(1, 2)), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_any_shape(n: int | None, batch: int, tokens: int, narrow: int, layers: list[tuple[int, int]], seed: int):
    x, a, weights, bs = inputs(n, (batch, tokens), narrow, layers, seed)
    x.requires_grad_()
    found, expected = adapted_products(x, a, weights, bs), plainly(x, a, weights, bs)
    for y, e in zip(found, expected, strict=True):
        torch.testing.assert_close(y, e, rtol=RTOL, atol=RTOL)
    grads = [torch.autograd.grad(sum((y**2).sum() for y in ys), x)[0] for ys in (found, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=RTOL, atol=1e4 * RTOL)


@pytest.mark.parametrize("case", ["adds up", "takes up", "takes up backward"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["a", "b"])
def test_a_diverged_finetune_leaves_others_alone(case: str, value: float, where: str):
    x, a, weights, bs = leaves(case)
    with torch.no_grad():
        spoilt_a, spoilt_bs = a.clone(), [b.clone() for b in bs]
        (spoilt_a if where == "a" else spoilt_bs[0])[0, 0, 0] = value
    spoilt = spoilt_a.requires_grad_(), weights, [b.requires_grad_() for b in spoilt_bs]
    rows = x.shape[0] // len(a)
    results = []
    for own_a, _, own_bs in (spoilt, (a, weights, bs)):
        ys = adapted_products(x, own_a, weights, own_bs)
        results.append((ys, torch.autograd.grad(sum(y.sum() for y in ys), [x, own_a, *own_bs])))
    (ys, grads), (expected, wanted) = results
    for y, e in zip(ys, expected, strict=True):
        torch.testing.assert_close(y[rows:], e[rows:], rtol=RTOL, atol=RTOL)
    assert not torch.isfinite(ys[0][:rows]).all()
    for own, other in zip(grads, wanted, strict=True):
        kept = slice(rows, None) if own.shape == x.shape else slice(1, None)
        torch.testing.assert_close(own[kept], other[kept], rtol=RTOL, atol=100 * RTOL)
