"""Kernels of adapters' products in Triton's interpreter, on the CPU.

`test_kernels` runs this file with TRITON_INTERPRET=1. In float16, since the interpreter multiplies the bits of bfloat16
as integers; `test_kernels` checks bfloat16 on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from finetuna_func._products import adapted_products, added, contracted, expanded


@pytest.fixture(autouse=True)
def interpreter():
    assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"


RTOL = 4e-4
"""Of a norm: results rounded to float16 are off by 2**-11 / sqrt(3) = 2.8e-4 by root mean square; their sums are in
float32."""

SIZES = [  # adapters, rows of each, width, rank
    (2, 64, 128, 16),
    (3, 37, 72, 5),
    (1, 5, 40, 20),
    (2, 300, 700, 33),
    (2, 3, 24, 2),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize(("n", "rows", "width", "rank"), [*SIZES, (2, 40, 72, 80)])
def test_expand(n: int, rows: int, width: int, rank: int, upright: bool):
    """Of some columns of low into some of y, with NaN in the others of low; those of y stay as they are."""
    from finetuna_func.kernels.low_rank import expand_

    low, factors, y = draw(n * rows, rank + 7), draw(n, rank, width, seed=1), draw(n * rows, width + 9, seed=2)
    low[:, :3], low[:, 3 + rank :] = torch.nan, torch.nan
    before = y.clone()
    given = low, 3, factors if upright else factors.mT.contiguous(), [width], upright
    expand_(y, 5, *given, False)
    exact = expanded(low.double(), 3, factors.double(), upright=True)
    assert error(y[:, 5 : 5 + width], exact) < RTOL
    assert torch.equal(y[:, :5], before[:, :5]) and torch.equal(y[:, 5 + width :], before[:, 5 + width :])
    assert error(y[:, 5 : 5 + width], exact.roll(1, -1)) > 0.1
    if n > 1:
        assert error(y[:, 5 : 5 + width], expanded(low.double(), 3, factors.roll(1, 0).double(), upright=True)) > 0.1
    expand_(before, 5, *given, True)
    added_to = draw(n * rows, width + 9, seed=2).double()[:, 5 : 5 + width]
    assert error(before[:, 5 : 5 + width], added_to + exact) < RTOL


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize(("n", "rows", "width", "rank"), SIZES)
def test_added(n: int, rows: int, width: int, rank: int, upright: bool):
    """The adapters of two layers side by side."""
    x, weight = draw(n * rows, 24), draw(24, width + 8, seed=1) / 24**0.5
    low = draw(n * rows, rank + 3, seed=2)
    factors = [draw(n, rank, width, seed=3), draw(n, 3, 8, seed=4)]
    factors = factors if upright else [own.mT.contiguous() for own in factors]
    wide = [leaf.double() for leaf in (x, weight, low)]
    exact = added([wide[0]], [wide[1]], wide[2], [own.double() for own in factors], False, upright=upright)
    found = added([x], [weight], low, factors, True, upright=upright)
    assert error(found, exact) < 2 * RTOL  # rounded twice
    assert error(added([x], [weight], low, [2 * own for own in factors], True, upright=upright), exact) > 0.1
    of_rows = added([x.view(n, rows, -1)], [weight], low, factors, True, upright=upright)
    assert of_rows.shape == (n, rows, width + 8) and torch.equal(of_rows.flatten(0, 1), found)
    halves = added(x.chunk(2, -1), weight.chunk(2), low, factors, True, upright=upright)
    assert error(halves, exact) < 3 * RTOL  # rounded once more


LAYERS = {  # widths and ranks
    "one": [(128, 16)],
    "one, of an odd size": [(300, 5)],
    "side by side in one launch": [(512, 16), (256, 16), (256, 16)],
    "of five the first three, and the others": [(256, 3)] * 5,
    "of other ranks": [(256, 4), (256, 9)],
    "of widths that are no whole tiles": [(72, 4), (40, 4), (700, 33)],
}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("three_axes", [False, True])
def test_contracted(layers: list[tuple[int, int]], three_axes: bool):
    n, rows = 2, 37
    dy, low = draw(n * rows, sum(w for w, _ in layers)), draw(n * rows, sum(r for _, r in layers), seed=1)
    bs = [draw(n, *sizes, seed=2 + i) for i, sizes in enumerate(layers)]
    if three_axes:
        dy, low = dy.view(n, rows, -1), low.view(n, rows, -1)
    found, exact = (
        (d_low, *d_bs)
        for d_low, d_bs in (
            contracted(dy, low, bs, True),
            contracted(dy.double(), low.double(), [b.double() for b in bs], False),
        )
    )
    assert found[0].shape == low.shape
    for own, other in zip(found, exact, strict=True):
        assert error(own, other) < RTOL
        assert error(own, other.roll(1, -1)) > 0.1 and error(own, other.roll(1, 0)) > 0.1
    d_low, d_bs = contracted(dy, low, bs, True)
    assert all(torch.equal(own, other) for own, other in zip(found, (d_low, *d_bs), strict=True))
    # What is of one layer alone shows in no other's: neither its columns nor its factors.
    width, rank = layers[0]
    dy[..., :width], low[..., :rank] = torch.nan, torch.nan
    d_low, d_bs = contracted(dy, low, [torch.full_like(bs[0], torch.nan), *bs[1:]], True)
    assert torch.equal(d_low[..., rank:], found[0][..., rank:]) and d_low[..., :rank].isnan().all()
    assert all(torch.equal(own, other) for own, other in zip(d_bs[1:], found[2:], strict=True))


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_expanded_side_by_side(layers: list[tuple[int, int]]):
    n, rows = 2, 37
    x, weight = draw(n * rows, 24), draw(24, sum(w for w, _ in layers), seed=1) / 24**0.5
    low = draw(n * rows, sum(r for _, r in layers), seed=2)
    bs = [draw(n, *sizes, seed=3 + i) for i, sizes in enumerate(layers)]
    found = added([x], [weight], low, bs, True)
    exact = added([x.double()], [weight.double()], low.double(), [b.double() for b in bs], False)
    assert error(found, exact) < 2 * RTOL  # rounded twice
    for own in ([*bs[1:], bs[0].roll(1, 0)], [b.roll(1, 2) for b in bs]):
        if [b.shape for b in own] == [b.shape for b in bs]:
            assert error(added([x], [weight], low, own, True), exact) > 0.1


def test_products_of_codes():
    """Of gate and up in reverse: bitwise what the same matrices give, the codes being dequantized as elsewhere."""
    from finetuna_func._quant import Int8
    from finetuna_func.kernels.dequantize import dequantize

    for shape in ((37, 72), (5, 2048), (3, 2049)):
        leaves = tuple(Int8().quantize(draw(*shape).float()).values())
        for dtype in (torch.float16, torch.float32):  # the interpreter cuts off what bfloat16 has no bits for
            assert torch.equal(dequantize(*leaves, dtype), Int8().dequantize(dtype, *leaves))
    codes = [tuple(Int8().quantize(draw(40, 72, seed=i).float()).values()) for i in (1, 2)]
    weights = [Int8().dequantize(torch.float16, *own) for own in codes]
    xs, low, a = [draw(74, 40, seed=3), draw(74, 40, seed=4)], draw(74, 4, seed=5), draw(2, 4, 72, seed=6)
    found = added(xs, codes, low, [a], True, upright=True)
    exact = added(
        [x.double() for x in xs], [w.double() for w in weights], low.double(), [a.double()], False, upright=True
    )
    assert error(found, exact) < 3 * RTOL
    assert error(added(xs, codes[::-1], low, [a], True, upright=True), exact) > 0.1
    composites = [added(xs, own, low, [a], False, upright=True) for own in (codes, weights)]
    assert torch.equal(*composites) and error(composites[0], exact) < 3 * RTOL


@pytest.mark.parametrize("layers", [[(24, 4)], [(24, 4), (16, 2), (8, 5)]], ids=["one layer", "three layers"])
def test_as_one_function(layers: list[tuple[int, int]]):
    """Values and gradients of it all, in float16 through the kernels, against float64 through plain products."""
    n, width = 2, 40
    x, a = draw(2 * n, 9, width), draw(n, sum(rank for _, rank in layers), width, seed=1)
    weights = [draw(out, width, seed=2 + i) for i, (out, _) in enumerate(layers)]
    bs = [draw(n, out, rank, seed=5 + i) for i, (out, rank) in enumerate(layers)]
    results = []
    for wide in (False, True):
        given = [x, a, *bs] if not wide else [leaf.double() for leaf in (x, a, *bs)]
        leaves = [leaf.detach().requires_grad_() for leaf in given]
        own = [weight.to(leaves[0].dtype) for weight in weights]
        ys = adapted_products(leaves[0], leaves[1], own, leaves[2:], use_kernels=not wide)
        grads = torch.autograd.grad(sum(y.double().square().sum() for y in ys), leaves)
        results.append((*ys, *grads))
    for found, exact in zip(*results, strict=True):
        assert error(found, exact) < 4 * RTOL  # what is rounded goes into what is rounded


def test_a_diverged_adapter_leaves_others_alone():
    dy, low, b = draw(2 * 37, 72), draw(2 * 37, 5, seed=1), draw(2, 72, 5, seed=2)
    spoilt = b.clone()
    spoilt[0] = torch.nan
    x, weight = draw(2 * 37, 8, seed=3), draw(8, 72, seed=4)
    for one, other in (
        (added([x], [weight], low, [b], True), added([x], [weight], low, [spoilt], True)),
        (contracted(dy, low, [b], True)[0], contracted(dy, low, [spoilt], True)[0]),
    ):
        assert torch.equal(one[37:], other[37:]) and other[:37].isnan().any()
