"""The Triton kernels in Triton's interpreter, on the CPU: `test_kernels` runs this file with ``TRITON_INTERPRET=1``.

References are float64 products of the same numbers, adapter by adapter. A sum of K products of half-precision numbers,
accumulated in float32 and rounded once, is off by at most eps/2 of the result and K * 2^-24 of the sum of magnitudes.

In float16: the interpreter multiplies the bits of bfloat16 as integers. ``benchmarks/kernels.py`` checks bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetuna_func._quant import Int8
from finetuna_func.kernels import _tiles, int8, lora

assert _tiles.INTERPRETED, "run with TRITON_INTERPRET=1"

EVEN = (3, (40, 40, 40))  # adapters, rows of each
RAGGED = (5, (33, 0, 1, 70, 16))
SIZES = [(16, 64), (5, 130), (33, 24)]  # rank, width: whole tiles and parts of tiles


def close(out: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """Asserts the bound of the docstring; and that the bound would notice a term left out."""
    eps = torch.finfo(out.dtype).eps
    bound = eps / 2 * exact.abs() + (terms + 2) * 2.0**-24 * magnitude + 1e-7
    worst = ((out.detach().double() - exact).abs() / (bound * 1.01)).max()
    assert worst <= 1, f"{float(worst):.2f} times the bound"


def ends_of(lengths: tuple[int, ...]) -> Tensor | None:
    return None if len(set(lengths)) == 1 else torch.tensor(lengths).cumsum(0).int()


def by_adapter(lengths: tuple[int, ...]) -> list[slice]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[EVEN, RAGGED], ids=["even", "ragged"])
def rows(request: pytest.FixtureRequest) -> tuple[int, tuple[int, ...]]:
    return request.param


@pytest.mark.parametrize(("rank", "width"), SIZES)
def test_project_and_its_gradients(rows: tuple[int, tuple[int, ...]], rank: int, width: int):
    n, lengths = rows
    dtype = torch.float16
    total, ends = sum(lengths), ends_of(lengths)
    x = numbers(total, width, dtype=dtype).requires_grad_()
    a = numbers(n, rank, width, dtype=dtype, seed=1).requires_grad_()
    g = numbers(total, rank, dtype=dtype, seed=2)
    out = lora.project(x, a, ends)
    dx, da = torch.autograd.grad(out, (x, a), g)
    assert (out.dtype, dx.dtype, da.dtype) == (dtype,) * 3
    for i, own in enumerate(by_adapter(lengths)):
        xi, ai, gi = x[own].double().detach(), a[i].double().detach(), g[own].double()
        close(out[own], xi @ ai.T, xi.abs() @ ai.abs().T, width) if len(xi) else None
        close(dx[own], gi @ ai, gi.abs() @ ai.abs(), rank) if len(xi) else None
        close(da[i], gi.T @ xi, gi.abs().T @ xi.abs(), len(xi))
    with pytest.raises(AssertionError, match="times the bound"):  # a factor of the wrong adapter is noticed
        own = by_adapter(lengths)[0]
        xi, ai = x[own].double().detach(), a[1].double().detach()
        close(out[own], xi @ ai.T, xi.abs() @ ai.abs().T, width)


@pytest.mark.parametrize(("rank", "width"), SIZES)
def test_expand_and_its_gradients(rows: tuple[int, tuple[int, ...]], rank: int, width: int):
    n, lengths = rows
    dtype = torch.float16
    total, ends = sum(lengths), ends_of(lengths)
    y = numbers(total, width, dtype=dtype).requires_grad_()
    low = numbers(total, rank, dtype=dtype, seed=1).requires_grad_()
    b = numbers(n, width, rank, dtype=dtype, seed=2).requires_grad_()
    g = numbers(total, width, dtype=dtype, seed=3)
    before = y.detach().clone()
    out = lora.expand(y, low, b, ends)
    dy, dlow, db = torch.autograd.grad(out, (y, low, b), g)
    assert torch.equal(y, before) and torch.equal(dy, g)
    for i, own in enumerate(by_adapter(lengths)):
        yi, li, bi, gi = (t.double().detach() for t in (y[own], low[own], b[i], g[own]))
        close(db[i], gi.T @ li, gi.abs().T @ li.abs(), len(li))
        if len(yi):
            close(out[own], yi + li @ bi.T, yi.abs() + li.abs() @ bi.abs().T, rank + 1)
            close(dlow[own], gi @ bi, gi.abs() @ bi.abs(), width)
    with pytest.raises(AssertionError, match="times the bound"):  # the last row left out of a sum is noticed
        own = by_adapter(lengths)[0]
        gi, li = g[own].double()[:-1], low[own].double().detach()[:-1]
        close(db[0], gi.T @ li, gi.abs().T @ li.abs(), len(li))


@pytest.mark.parametrize("per_processor", [0.1, 1, 8])
def test_adjoint_by_splits(per_processor: float):
    """However the work is cut, the sums are those of float64."""
    g, low = numbers(96, 200, dtype=torch.float16), numbers(96, 16, dtype=torch.float16, seed=1)
    b = numbers(2, 200, 16, dtype=torch.float32, seed=2).half().float()
    d_low, db = lora.launch_adjoint(g, low, b, None, block_m=16, block_n=16, per_processor=per_processor)
    assert db.dtype == torch.float32
    for i, own in enumerate(by_adapter((48, 48))):
        gi, li, bi = g[own].double(), low[own].double(), b[i].double()
        close(d_low[own], gi @ bi, gi.abs() @ bi.abs(), 200)
        close(db[i], gi.T @ li, gi.abs().T @ li.abs(), 48)
    again = lora.launch_adjoint(g, low, b, None, block_m=16, block_n=16, per_processor=per_processor)
    assert all(torch.equal(p, q) for p, q in zip((d_low, db), again, strict=True))


def test_strides_and_in_place():
    """Rows further apart than they are wide, transposed factors, and a sum into its own operand."""
    x = numbers(40, 3, 64, dtype=torch.float16)[:, 1]
    a = numbers(2, 64, 16, dtype=torch.float16, seed=1).mT
    assert torch.equal(lora.project(x, a), lora.project(x.contiguous(), a.contiguous()))
    low, b = numbers(40, 16, dtype=torch.float16), numbers(2, 64, 16, dtype=torch.float16)
    expected = lora.expand(x, low, b)
    own = x.clone()
    assert lora.launch_expand(own, low, b, None, out=own) is own
    assert torch.equal(own, expected) and not torch.equal(own, x)


@pytest.mark.parametrize("shape", [(8, 1024), (5, 33), (1, 1)])
def test_dequantize(shape: tuple[int, int]):
    dtype = torch.float16
    leaves = Int8().quantize(numbers(*shape, dtype=torch.float32))
    out = int8.dequantize(*leaves.values(), dtype)
    assert torch.equal(out, Int8().dequantize(dtype, *leaves.values()))
    assert not torch.equal(out, leaves[""].to(dtype))


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("lengths", [None, (30, 30, 30), (7,) * 9, (33, 0, 1, 70, 16)], ids=str)
def test_int8_matmul(lengths: tuple[int, ...] | None, split: int):
    dtype = torch.float16
    total = 45 if lengths is None else sum(lengths)
    codes, scale = Int8().quantize(numbers(70, 100, dtype=torch.float32)).values()
    x = numbers(total, 100, dtype=dtype, seed=1)
    exact = x.double() @ (codes.double() * scale.double()[:, None]).T
    magnitude = x.double().abs() @ (codes.double() * scale.double()[:, None]).abs().T
    low = b = ends = None
    if lengths is not None:
        low, b = numbers(total, 6, dtype=dtype, seed=2), numbers(len(lengths), 70, 6, dtype=dtype, seed=3)
        ends = ends_of(lengths)
        for i, own in enumerate(by_adapter(lengths)):
            exact[own] += low[own].double() @ b[i].double().T
            magnitude[own] += low[own].double().abs() @ b[i].double().abs().T
    out = int8.launch_matmul(x, codes, scale, low, b, ends, block_m=16, block_o=32, block_k=16, split=split)
    close(out, exact, magnitude, 100 + 6)
    with pytest.raises(AssertionError, match="times the bound"):
        close(out, exact + 0.02 * magnitude, magnitude, 100 + 6)


def test_int8_matmul_gradients():
    codes, scale = Int8().quantize(numbers(24, 32, dtype=torch.float32)).values()
    x, low = numbers(20, 32, dtype=torch.float16), numbers(20, 4, dtype=torch.float16, seed=1)
    b, g = numbers(2, 24, 4, dtype=torch.float16, seed=2), numbers(20, 24, dtype=torch.float16, seed=3)
    inputs = [t.requires_grad_() for t in (x, low, b)]
    dx, dlow, db = torch.autograd.grad(int8.matmul(x, codes, scale, low, b), inputs, g)
    assert torch.equal(dx, g @ Int8().dequantize(torch.float16, codes, scale))
    parts = torch.autograd.grad(lora.expand(numbers(20, 24, dtype=torch.float16), low, b), (low, b), g)
    assert torch.equal(dlow, parts[0]) and torch.equal(db, parts[1])
    assert not torch.equal(dlow, torch.zeros_like(dlow))


def test_nothing_to_do():
    """No rows, no rank, no columns: sums of nothing are zero."""
    empty = torch.zeros(0, 16, dtype=torch.float16).requires_grad_()
    a = numbers(2, 4, 16, dtype=torch.float16).requires_grad_()
    out = lora.project(empty, a)
    dx, da = torch.autograd.grad(out.sum(), (empty, a))
    assert out.shape == (0, 4) and dx.shape == (0, 16) and torch.equal(da, torch.zeros_like(a))
    y = numbers(4, 16, dtype=torch.float16)
    assert torch.equal(lora.expand(y, y[:, :0], torch.zeros(2, 16, 0, dtype=torch.float16)), y)


def test_numbers_that_are_not_finite_stay_in_their_rows():
    x = numbers(40, 64, dtype=torch.float16)
    x[19], x[39] = float("nan"), float("inf")
    a = numbers(2, 16, 64, dtype=torch.float16, seed=1)
    bad = ~lora.project(x, a).isfinite().all(-1)
    assert bad.nonzero().flatten().tolist() == [19, 39]
    low = numbers(40, 16, dtype=torch.float16)
    ends = torch.tensor([19, 20, 40]).int()  # adapters 1 and 2 own such a row, adapter 0 does not
    db = lora.launch_outer(low, x, 3, ends, torch.float32)
    assert [bool(part.isfinite().all()) for part in db] == [True, False, False]


@pytest.mark.parametrize("wrong", [[100, 40, 40], [30, 10, 40], [-5, 2**30, 40], [0, 0, 0]], ids=str)
def test_ends_that_are_wrong_reach_no_other_memory(wrong: list[int]):
    """The rows are a part of a longer tensor, in which all other rows stay as they are."""
    whole = numbers(200, 32, dtype=torch.float16)
    before, own = whole.clone(), whole[80:120]
    ends, b = torch.tensor(wrong).int(), numbers(3, 32, 4, dtype=torch.float16)
    low = numbers(40, 4, dtype=torch.float16)
    lora.launch_expand(own, low, b, ends, out=own)
    assert torch.equal(whole[:80], before[:80]) and torch.equal(whole[120:], before[120:])
    assert not torch.equal(own, before[80:120])
    assert lora.launch_outer(low, own, 3, ends, torch.float32).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=torch.zeros(4, 8)), TypeError, "bfloat16 or float16"),
        (dict(a=torch.zeros(2, 4, 8, dtype=torch.int8)), TypeError, "floating point"),
        (dict(ends=torch.tensor([2, 4])), TypeError, "int32"),
        (dict(ends=torch.tensor([4]).int()), ValueError, "divided among 2"),
        (dict(x=torch.zeros(3, 8).half()), ValueError, "3 rows"),
        (dict(x=torch.zeros(4, 7).half()), ValueError, "do not belong"),
    ],
    ids=["dtype", "codes", "int64", "too few ends", "rows", "width"],
)
def test_errors(arguments: dict[str, Tensor], error: type[Exception], message: str):
    good = dict(x=torch.zeros(4, 8).half(), a=torch.zeros(2, 4, 8), ends=None)
    assert lora.project(**good).shape == (4, 4)
    with pytest.raises(error, match=message):
        lora.project(**{**good, **arguments})


def test_one_graph_when_compiled():
    """The operators trace with their shapes and derivatives: one graph, the same numbers."""
    x, a = numbers(40, 64, dtype=torch.float16), numbers(2, 16, 64, dtype=torch.float16, seed=1)
    b, y = numbers(2, 32, 16, dtype=torch.float16, seed=2), numbers(40, 32, dtype=torch.float16, seed=3)
    inputs = [t.requires_grad_() for t in (x, a, b, y)]

    def layer(x: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return lora.expand(y, 0.5 * lora.project(x, a), b).float().square().sum()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    eager = torch.autograd.grad(layer(*inputs), inputs)
    traced = torch.autograd.grad(compiled(*inputs), inputs)
    assert all(torch.equal(p, q) for p, q in zip(eager, traced, strict=True))
    assert all(bool(p.any()) for p in eager)


def test_operators_are_sound():
    """torch's own check of schemas, shapes in tracing and registration of the derivative."""
    x, a = numbers(8, 16, dtype=torch.float16).requires_grad_(), numbers(2, 4, 16, dtype=torch.float16)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(lora.project, (x, a.requires_grad_()), test_utils=tests)
    y, low, b = (numbers(*shape, dtype=torch.float16).requires_grad_() for shape in [(8, 16), (8, 4), (2, 16, 4)])
    torch.library.opcheck(lora.expand, (y, low, b), test_utils=tests)
    codes, scale = Int8().quantize(numbers(16, 16, dtype=torch.float32)).values()
    torch.library.opcheck(int8.dequantize, (codes, scale, torch.float16), test_utils=tests)
    torch.library.opcheck(int8.matmul, (x, codes, scale, low, b), test_utils=tests)
