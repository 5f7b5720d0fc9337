"""A gated MLP as one function: values and derivatives against the line written out, and where it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import finetunes, llama
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import finetuna_func as ft
from finetuna_func import _blocks, _kept, kernels
from finetuna_func._gated import gated_mlp

RTOL = 1e-12
"""Sums of at most 300 numbers about as large as one, in float64, in another order."""


def stack_of_llamas(dtype: torch.dtype, n: int = 2) -> tuple[ft.Base, ft.Finetuned, Tensor]:
    base = ft.quantize_base_model(llama().to(dtype))
    layers = {"q_proj", "gate_proj", "up_proj", "down_proj"}
    stack = ft.stack(finetunes(base, n, adapt_layers=layers, plain_layers=set()))
    return base, stack, torch.arange(12 * n).view(n, 2, 6) % 29


def plainly(
    x: Tensor, a: Tensor, bg: Tensor, bu: Tensor, ad: Tensor, bd: Tensor, w: Tensor, down: Tensor, gelu: bool
) -> Tensor:
    """The same, finetune by finetune."""
    if a.ndim == 2:
        a, bg, bu, ad, bd = (leaf[None] for leaf in (a, bg, bu, ad, bd))
    ys = []
    for i, own in enumerate(x.reshape(len(a), -1, x.shape[-1])):
        a_gate, a_up = a[i].split([bg.shape[-1], bu.shape[-1]])
        w_gate, w_up = w.chunk(2)
        gate = own @ w_gate.mT + own @ a_gate.mT @ bg[i].mT
        up = own @ w_up.mT + own @ a_up.mT @ bu[i].mT
        h = (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
        ys.append(h @ down.mT + h @ ad[i].mT @ bd[i].mT)
    return torch.stack(ys).reshape(*x.shape[:-1], -1)


def inputs(n: int | None, shape: tuple[int, ...], sizes: tuple[int, int, int], ranks: tuple[int, int, int], seed: int):
    """Those of `gated_mlp`: x, the factors, the weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64) / sizes[-1] ** 0.5

    (narrow, wide, out), (rg, ru, rd) = sizes, ranks
    many = () if n is None else (n,)
    x = draw((n or 1) * shape[0], *shape[1:], narrow) * narrow**0.5
    factors = [draw(*many, rg + ru, narrow), draw(*many, wide, rg), draw(*many, wide, ru)]
    factors += [draw(*many, rd, wide), draw(*many, out, rd)]
    return [x, *factors], [draw(2 * wide, narrow), draw(out, wide)]


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([None, 1, 2, 3]),
    shape=st.sampled_from([(2, 5), (1, 1), (3,), (2, 1), (1, 2, 3)]),
    ranks=st.tuples(*[st.integers(1, 3)] * 3),
    gelu=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients(
    n: int | None, shape: tuple[int, ...], ranks: tuple[int, int, int], gelu: bool, seed: int
):
    leaves, weights = inputs(n, shape, (6, 10, 7), ranks, seed)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    found, expected = gated_mlp(*leaves, *weights, gelu=gelu), plainly(*leaves, *weights, gelu)
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=RTOL)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    grads, wanted = (torch.autograd.grad(y, leaves, cotangent) for y in (found, expected))
    for own, other in zip(grads, wanted, strict=True):
        assert own.shape == other.shape
        torch.testing.assert_close(own, other, rtol=RTOL, atol=100 * RTOL)
    for i in range(1, len(leaves)):  # every factor counts
        without = [torch.zeros_like(leaf) if i == j else leaf for j, leaf in enumerate(leaves)]
        assert (gated_mlp(*without, *weights, gelu=gelu) - found).abs().max() > 1e-6
    assert (gated_mlp(*leaves, *weights, gelu=not gelu) - found).abs().max() > 1e-6


@pytest.mark.parametrize("gelu", [False, True])
def test_gradcheck(gelu: bool):
    leaves, weights = inputs(2, (2, 3), (4, 6, 5), (2, 1, 2), 0)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *own: gated_mlp(*own, *weights, gelu=gelu), leaves)


@pytest.mark.parametrize("where", range(5))
def test_a_diverged_finetune_leaves_others_alone(where: int):
    leaves, weights = inputs(2, (2, 3), (4, 6, 5), (2, 1, 2), 0)
    spoilt = [leaf.clone() for leaf in leaves]
    spoilt[1 + where][0] = torch.nan
    results = []
    for own in (leaves, spoilt):
        own = [leaf.requires_grad_() for leaf in own]
        y = gated_mlp(*own, *weights)
        results.append((y, torch.autograd.grad(y.sum(), own)))
    (y, grads), (other, others) = results
    assert torch.equal(y[2:], other[2:]) and other[:2].isnan().any()
    for own, theirs in zip(grads, others, strict=True):
        half = slice(len(own) // 2, None)
        assert torch.equal(own[half], theirs[half])


class Driver:
    """What Triton asks of a GPU to find out what a kernel writes to."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch):
    """Compiles without a GPU: the graphs' kernels by what they write to, and outputs that are zeros."""
    triton = pytest.importorskip("triton", reason="needs Triton, though no GPU")
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    written: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        launched = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        written.extend(sorted(node.kwargs["tensors_to_clone"]) for node in launched)
        (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
        values = [None if node is None else node.meta["val"] for node in outputs]
        return lambda *args: [None if own is None else torch.zeros(own.shape, dtype=own.dtype) for own in values]

    torch.compiler.reset()
    yield aot_autograd(fw_compiler=backend), written
    torch.compiler.reset()


@pytest.mark.parametrize("lead", [(4, 2, 64), (2, 72)], ids=["rows and tokens", "rows"])
def test_the_compiler_sees_a_kernel_forward_and_one_backward(lead: tuple[int, ...], traced: Any):
    backend, written = traced
    leaves, weights = inputs(2, lead, (16, 40, 16), (4, 2, 3), 0)
    leaves, weights = [leaf.half().requires_grad_() for leaf in leaves], [weight.half() for weight in weights]

    def run(*leaves: Tensor) -> Tensor:
        return gated_mlp(*leaves, *weights, use_kernels=True)

    out = torch.compile(run, backend=backend, fullgraph=True, dynamic=False)(*leaves)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    assert written == [["h", "low_h"], ["d_a", "d_bg", "d_bu", "d_gu", "d_low"]]


def test_whole_blocks_are_traced_with_the_kernels(traced: Any, monkeypatch: pytest.MonkeyPatch):
    backend, written = traced
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(kernels, "fits", lambda x, ranks: ranks == (4, 4, 4))
    monkeypatch.setattr(_kept, "compile_block", lambda f, remat: torch.compile(f, backend=backend, fullgraph=True))
    monkeypatch.setattr(_blocks, "compile_block", _kept.compile_block)
    base, stack, ids = stack_of_llamas(torch.float16)
    ft.stacked_value_and_grad(
        lambda t: ft.apply_stacked(base, t, ids, compile="blocks").logits.float().mean((1, 2, 3))
    )(stack)
    assert written == [["h", "low_h"], ["d_a", "d_bg", "d_bu", "d_gu", "d_low"]]
