"""An adapter's first product beside its input: values, and derivatives to the second order, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from finetuna_func._low_rank import with_low_rank

RTOL = 1e-12
"""Sums of at most 50 numbers about as large as one, in float64, in another order."""

SHAPES = {"single": ((6, 5), (2, 5)), "stack": ((3, 6, 5), (3, 2, 5)), "no rows": ((0, 5), (2, 5))}


def plainly(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    return x, x @ a.mT


def inputs(case: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, A, and two matrices for further products."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, a = SHAPES[case]
    return draw(*x).requires_grad_(), draw(*a).requires_grad_(), draw(5, 4), draw(2, 4)


def layer(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, a: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """As a layer uses it, two products of x among what follows, and x itself read elsewhere as well."""
    rows, low = function(x.tanh(), a)
    return (rows @ w + (rows @ w.sin()).tanh() + low @ b).square() + x.sum(-1, keepdim=True)


@pytest.mark.parametrize("case", SHAPES)
def test_values_and_gradients(case: str):
    x, a, w, b = inputs(case)
    found, expected = layer(with_low_rank, x, a, w, b), layer(plainly, x, a, w, b)
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=RTOL)
    given = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    grads, wanted = (torch.autograd.grad(y, [x, a], given) for y in (found, expected))
    for own, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=RTOL, atol=100 * RTOL)
        assert case == "no rows" or (own - other.roll(1, -1)).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(layer(with_low_rank, x, a, w, b), found)


@pytest.mark.parametrize("case", ["single", "stack"])
@pytest.mark.parametrize("reads", ["x", "low", "neither needs x", "neither needs a"])
def test_only_one_is_read_or_needed(case: str, reads: str):
    x, a, w, b = inputs(case)
    x, a = (own.detach() if reads == f"neither needs {name}" else own for name, own in (("x", x), ("a", a)))

    def result(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor | None]:
        rows, low = function(x, a)
        y = rows @ w if reads == "x" else low @ b if reads == "low" else rows @ w + low @ b
        leaves = [leaf for leaf in (x, a) if leaf.requires_grad]
        return list(torch.autograd.grad(y.square().sum(), leaves, allow_unused=True))

    for own, other in zip(result(with_low_rank), result(plainly), strict=True):
        if other is None:
            assert own is None
        else:
            assert own is not None
            torch.testing.assert_close(own, other, rtol=RTOL, atol=100 * RTOL)


@pytest.mark.parametrize("case", ["single", "stack"])
def test_gradcheck(case: str):
    x, a, w, b = inputs(case)

    def function(x: Tensor, a: Tensor) -> Tensor:
        return layer(with_low_rank, x, a, w, b)

    # Batched cotangents, and second derivatives, must not be added in place: others read them.
    assert torch.autograd.gradcheck(function, (x, a), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (x, a), check_batched_grad=True)


def test_the_cotangent_is_added_into_what_the_product_gave():
    """One tensor as wide as x in all of the backward pass, where a sum would have made two more."""
    x, a, w, b = inputs("single")
    made: list[int] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape == x.shape:
                made.append(out.untyped_storage().data_ptr())
            return out

    rows, low = with_low_rank(x, a)
    y = (rows @ w + low @ b).sum()
    with Counting():
        torch.autograd.grad(y, [x, a])
    assert len(set(made)) == 1 and len(made) >= 2
