"""Gradients of adapters formed of what a norm reads: the same numbers, and where that is done."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from finetuna_func._norms import form_before_norms

EPS = 1e-6
convert = torch.ops.prims.convert_element_type.default


def llama(x: Tensor, w: Tensor) -> Tensor:
    wide = convert(x, torch.float32)
    return w * convert(wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS), x.dtype)


def gemma(x: Tensor, w: Tensor) -> Tensor:
    wide = convert(x, torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return convert(wide * (1.0 + convert(w, torch.float32)), x.dtype)


def without_weight(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def with_a_mean(x: Tensor, w: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS) * w


def sums(norm: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``d_low.T @ norm(x)`` over the rows of each finetune, as a block's backward pass has it."""

    def run(x: Tensor, w: Tensor, d_low: Tensor) -> Tensor:
        n = d_low.shape[0]
        return torch.bmm(d_low.mT, norm(x, w).view(n, -1, x.shape[-1]))

    return run


def changed(run: Callable[..., Tensor], *given: Tensor) -> tuple[fx.GraphModule, bool]:
    """The graph after the pass, and whether it differs from the one before."""
    graph = make_fx(run, tracing_mode="fake")(*given)
    before = graph.code
    form_before_norms(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return graph, graph.code != before


def numbers(n: int, batch: int, tokens: int, width: int, rank: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n * batch, tokens, width, generator=generator)
    x[..., 0] *= 100  # as in real models
    return [
        x.to(dtype),
        torch.rand(width, generator=generator).to(dtype) + 0.5,
        torch.randn(n, batch * tokens, rank, generator=generator).to(dtype),
    ]


@settings(max_examples=30, deadline=None)
@given(
    norm=st.sampled_from([llama, gemma, without_weight, with_a_mean]),
    n=st.integers(1, 3),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 5),
    width=st.integers(4, 9),
    rank=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_the_same_numbers(
    norm: Callable[[Tensor, Tensor], Tensor], n: int, batch: int, tokens: int, width: int, rank: int, seed: int
):
    """In float32, as close as sums of at most ten numbers in another order: 1e-5 of the largest."""
    given = numbers(n, batch, tokens, width, rank, torch.float32, seed)
    graph, differs = changed(sums(norm), *given)
    assert differs
    found, expected = graph(*given), sums(norm)(*given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert not torch.equal(graph(given[0], given[1], given[2].roll(1, -2)), found) or batch * tokens == 1
    (product,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default)
    read = product.args[1].args[0]
    assert read.op == "placeholder" if norm is not with_a_mean else read.target is torch.ops.aten.sub.Tensor


@pytest.mark.parametrize("norm", [llama, gemma])
def test_in_bfloat16(norm: Callable[[Tensor, Tensor], Tensor]):
    """Three roundings of up to 2**-9, of numbers of either sign that are added up: 1e-2 of the norm is five of them."""
    given = numbers(2, 2, 64, 32, 4, torch.bfloat16, 0)
    graph, differs = changed(sums(norm), *given)
    exact = sums(norm)(*(leaf.float() for leaf in given))
    others = sums(norm)(given[0].float(), given[1].float() + 0.1, given[2].float())
    for found in (graph(*given), sums(norm)(*given)):
        assert (found.float() - exact).norm() < 1e-2 * exact.norm()
        assert (found.float() - others).norm() > 2e-2 * exact.norm()
    assert differs


def test_where_it_is_not_done():
    x, w, d_low = numbers(2, 2, 8, 6, 3, torch.float32, 0)

    def of_columns_alone(x: Tensor, w: Tensor, d_low: Tensor) -> Tensor:
        return torch.bmm(d_low.mT, (x * w).view(2, -1, 6))

    def turned(x: Tensor, w: Tensor, d_low: Tensor) -> Tensor:
        return torch.bmm(d_low.mT, without_weight(x, w).transpose(0, 1).reshape(2, -1, 6))

    def forward(x: Tensor, w: Tensor, a: Tensor) -> Tensor:
        return torch.bmm(llama(x, w).view(2, -1, 6), a.mT)

    assert changed(sums(llama), x, w, d_low)[1]
    for run in (of_columns_alone, turned):
        assert not changed(run, x, w, d_low)[1]
    assert not changed(forward, x, w, torch.randn(2, 3, 6))[1]
    assert not changed(sums(llama), x, w.expand(4, 1, 6), d_low)[1]  # a weight for each row
    assert not changed(sums(llama), x, w, torch.randn(2, 16, 6))[1]  # no fewer columns
    assert not changed(sums(llama), x.half(), w.half(), d_low.half())[1]
    assert not changed(sums(gemma), x.double(), w.double(), d_low.double())[1]  # which passes through float32
