"""The Triton kernels in Triton's interpreter, on the CPU: `test_kernels` runs this file with ``TRITON_INTERPRET=1``.

References are float64 products of the same numbers, adapter by adapter. A sum of K products of half-precision numbers,
accumulated in float32 and rounded once, is off by at most eps/2 of the result and K * 2^-24 of the sum of magnitudes.

In float16: the interpreter multiplies the bits of bfloat16 as integers. `test_kernels` checks bfloat16 on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from finetuna_func.kernels import lora

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"

HALF = torch.float16
SIZES = [(4, 64), (16, 128), (17, 40), (64, 130), (128, 40)]  # rank, width: whole tiles and parts of tiles
ROWS = [(1, 40), (3, 33), (2, 300)]  # adapters, rows of each


def close(out: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """Asserts the bound of the docstring."""
    bound = torch.finfo(out.dtype).eps / 2 * exact.abs() + (terms + 2) * 2.0**-24 * magnitude + 1e-7
    worst = ((out.detach().double() - exact).abs() / (bound * 1.01)).max()
    assert worst <= 1, f"{float(worst):.2f} times the bound"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(HALF)


@pytest.mark.parametrize(("adapters", "rows"), ROWS)
@pytest.mark.parametrize(("rank", "width"), SIZES)
def test_expand_and_its_gradients(adapters: int, rows: int, rank: int, width: int):
    y, low = numbers(adapters, rows, width), numbers(adapters, rows, rank, seed=1)
    b, g = numbers(adapters, width, rank, seed=2), numbers(adapters, rows, width, seed=3)
    inputs = [t.requires_grad_() for t in (y, low, b)]
    before = y.detach().clone()
    out = lora.expand(y, low, b)
    dy, d_low, d_b = torch.autograd.grad(out, inputs, g)
    assert torch.equal(y, before) and torch.equal(dy, g)
    y, low, b, g = (t.detach().double() for t in (y, low, b, g))
    close(out, y + low @ b.mT, y.abs() + low.abs() @ b.abs().mT, rank + 1)
    close(d_low, g @ b, g.abs() @ b.abs(), width)
    close(d_b, g.mT @ low, g.abs().mT @ low.abs(), rows)
    with pytest.raises(AssertionError, match="times the bound"):  # a row left out of a sum is noticed
        close(d_b, g[:, 1:].mT @ low[:, 1:], g.abs().mT @ low.abs(), rows)
    if adapters > 1:
        with pytest.raises(AssertionError, match="times the bound"):  # and so is a factor of the wrong adapter
            close(out, y + low @ b.roll(1, 0).mT, y.abs() + low.abs() @ b.abs().mT, rank + 1)


@pytest.mark.parametrize("processors", [1, 8, 64])
def test_adjoint_by_splits(processors: int, monkeypatch: pytest.MonkeyPatch):
    """However the columns are divided, the sums are those of float64, and the same bits again."""
    monkeypatch.setattr(lora, "_processors", lambda device: processors)
    g, low, b = numbers(2, 48, 700), numbers(2, 48, 16, seed=1), numbers(2, 700, 16, seed=2)
    d_low, d_b = lora.expand_adjoint(g, low, b)
    again = lora.expand_adjoint(g, low, b)
    assert torch.equal(d_low, again[0]) and torch.equal(d_b, again[1])
    g, low, b = (t.double() for t in (g, low, b))
    close(d_low, g @ b, g.abs() @ b.abs(), 700)
    close(d_b, g.mT @ low, g.abs().mT @ low.abs(), 48)
    with pytest.raises(AssertionError, match="times the bound"):  # a split left out is noticed
        close(d_low, g[..., 64:] @ b[:, 64:], g.abs() @ b.abs(), 700)


def test_one_adapter_and_parts_of_a_shared_product():
    """``B (O, R)`` on any leading axes; ``low`` whose rows are further apart than they are long."""
    y, low, b = numbers(2, 20, 40), numbers(2, 20, 48, seed=1), numbers(1, 40, 16, seed=2)
    part = low[..., 16:32]
    out = lora.expand(y, part, b[0])
    assert torch.equal(out, lora.expand(y.view(1, 40, 40), part.contiguous().view(1, 40, 16), b).view_as(y))
    assert not torch.equal(out, lora.expand(y, low[..., :16], b[0]))
    spread = numbers(2, 40, 40, seed=4)[:, ::2]
    assert torch.equal(lora.expand(spread, part, b[0]), lora.expand(spread.contiguous(), part, b[0]))
    of_spread = lora.expand_adjoint(spread, part, b.mT.contiguous().mT[0])
    of_rows = lora.expand_adjoint(spread.contiguous(), part.contiguous(), b[0])
    assert all(torch.equal(p, q) for p, q in zip(of_spread, of_rows, strict=True))


def test_nothing_to_do():
    """No rows, no rank: sums of nothing are zero."""
    y, b = numbers(2, 4, 16), torch.zeros(2, 16, 0, dtype=HALF)
    assert torch.equal(lora.expand(y, y[..., :0], b), y)
    empty, b = y[:, :0], numbers(2, 16, 4)
    d_low, d_b = lora.expand_adjoint(empty, empty[..., :4], b)
    assert d_low.shape == (2, 0, 4) and torch.equal(d_b, torch.zeros_like(b))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # numpy, in the interpreter
def test_numbers_that_are_not_finite_stay_in_their_rows():
    """Nor do they reach another adapter through the padding of a tile."""
    g, low, b = numbers(3, 19, 40), numbers(3, 19, 4, seed=1), numbers(3, 40, 4, seed=2)
    g[1, 18], low[1, 0] = float("nan"), float("inf")
    bad = ~lora.expand(numbers(3, 19, 40), low, b).isfinite().all(-1)
    assert bad.nonzero().tolist() == [[1, 0]]
    d_low, d_b = lora.expand_adjoint(g, low, b)
    assert (~d_low.isfinite().all(-1)).nonzero().tolist() == [[1, 18]]
    assert [bool(part.isfinite().all()) for part in d_b] == [True, False, True]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(y=torch.zeros(4, 8)), TypeError, "one dtype"),
        (dict(b=torch.zeros(2, 8, 4)), TypeError, "one dtype"),
        (dict(low=torch.zeros(3, 4).half()), ValueError, "do not belong"),
        (dict(b=torch.zeros(3, 8, 4).half()), ValueError, "do not belong"),
        (dict(b=torch.zeros(2, 7, 4).half()), ValueError, "do not belong"),
    ],
    ids=["float32", "dtypes", "rows", "adapters", "width"],
)
def test_errors(wrong: dict[str, Tensor], error: type[Exception], message: str):
    good = dict(y=torch.zeros(4, 8).half(), low=torch.zeros(4, 4).half(), b=torch.zeros(2, 8, 4).half())
    assert lora.expand(**good).shape == (4, 8)
    with pytest.raises(error, match=message):
        lora.expand(**good | wrong)
    with pytest.raises(error, match=message):
        lora.expand_adjoint(*(good | wrong).values())


def test_operators_are_sound():
    """torch's own check of schemas and of the registration of the derivative; `test_kernels` traces them."""
    y, low, b = (numbers(*shape).requires_grad_() for shape in [(2, 8, 16), (2, 8, 4), (2, 16, 4)])
    tests = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(lora.expand, (y, low, b), test_utils=tests)
    torch.library.opcheck(lora.expand_adjoint, (y.detach(), low.detach(), b.detach()), test_utils=tests[:1])
