"""A gated MLP as one function: values and derivatives against the line written out, and where it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import finetunes, llama
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import finetuna_func as ft
from finetuna_func import _blocks, _gated, kernels
from finetuna_func._gated import gated_mlp

RTOL = 1e-12
"""Sums of at most 300 numbers about as large as one, in float64, in another order."""


def stack_of_llamas(
    dtype: torch.dtype,
    n: int = 2,
    *,
    device: str = "cpu",
    rounded: bool = False,
    finetune: dict[str, Any] | None = None,
    **config: Any,
) -> tuple[ft.Base, ft.Finetuned, Tensor]:
    """A base, n finetunes of all layers of its MLPs, and ids; ``rounded`` weights are those of bfloat16."""
    model = llama(**config)
    model = model.to(device, torch.bfloat16 if rounded else dtype).to(dtype)
    base = ft.quantize_base_model(model)
    options = {"adapt_layers": {"q_proj", "gate_proj", "up_proj", "down_proj"}, "plain_layers": set()}
    stack = ft.stack(finetunes(base, n, **options | (finetune or {})))
    return base, stack, (torch.arange(12 * n).view(n, 2, 6) % 29).to(device)


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


MLP = [["h", "low_h"], ["y"], ["d_b", "d_low"], ["d_a", "d_bg", "d_bu", "d_g", "d_low", "d_u"], ["y"]]
"""What the kernels of a gated MLP write to, forward and backward."""


class Driver:
    """What Triton asks of a GPU to find out what a kernel writes to."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch):
    """Compiles without a GPU: the graphs' kernels by what they write to, operators in place, outputs that are zeros."""
    triton = pytest.importorskip("triton", reason="needs Triton, though no GPU")
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    written: list[list[str]] = []
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.extend(str(node.args[0]) for node in graph.graph.nodes if "auto_functionalized" in str(node.target))
        launched = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        written.extend(sorted(node.kwargs["tensors_to_clone"]) for node in launched)
        (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
        values = [None if node is None else node.meta["val"] for node in outputs]
        return lambda *args: [None if own is None else torch.zeros(own.shape, dtype=own.dtype) for own in values]

    torch.compiler.reset()
    yield aot_autograd(fw_compiler=backend), written, called
    torch.compiler.reset()


@pytest.mark.parametrize("lead", [(4, 2, 64), (2, 72)], ids=["rows and tokens", "rows"])
def test_the_compiler_sees_a_kernel_forward_and_one_backward(lead: tuple[int, ...], traced: Any):
    backend, written, called = traced
    leaves, weights = inputs(2, lead, (16, 40, 16), (4, 2, 3), 0)
    leaves, weights = [leaf.half().requires_grad_() for leaf in leaves], [weight.half() for weight in weights]

    def run(*leaves: Tensor) -> Tensor:
        return gated_mlp(*leaves, *weights, use_kernels=True)

    out = torch.compile(run, backend=backend, fullgraph=True, dynamic=False)(*leaves)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    assert written == MLP
    assert called == ["finetuna_func.add_product_.default"] * 2  # down, and of matrices, not codes, up in reverse


def test_one_graph_serves_all_lengths(traced: Any):
    """Both passes are traced, with a length that is a symbol, before the compiler is given the first."""
    leaves, weights = inputs(2, (2, 64), (16, 40, 16), (4, 2, 3), 0)
    leaves, weights = [leaf.half().requires_grad_() for leaf in leaves], [weight.half() for weight in weights]
    torch._dynamo.mark_dynamic(leaves[0], 1)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        lengths = [own.shape[1] for own in inputs if isinstance(own, Tensor) and own.ndim == 3 and own.shape[0] == 4]
        raise RuntimeError(f"{len(lengths)} of a length that is {type(lengths[0]).__name__}")

    def run(*leaves: Tensor) -> Tensor:
        return gated_mlp(*leaves, *weights, use_kernels=True)

    compiled = torch.compile(run, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="1 of a length that is SymInt"):
        compiled(*leaves)


def test_whole_blocks_are_traced_with_the_kernels(traced: Any, monkeypatch: pytest.MonkeyPatch):
    backend, written, called = traced
    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(kernels, "fits", lambda x, ranks: ranks in ((4,), (4, 4, 4)))
    monkeypatch.setattr(_blocks, "compile_block", lambda f, remat: torch.compile(f, backend=backend, fullgraph=True))
    base, stack, ids = stack_of_llamas(torch.float16)
    ft.stacked_value_and_grad(
        lambda t: ft.apply_stacked(base, t, ids, compile="blocks").logits.float().mean((1, 2, 3))
    )(stack)
    assert written == [["y"], *MLP, ["d_b", "d_low"], ["y"]]  # that of queries before and after
    in_place = [name.split(".")[1] for name in called]
    of_codes, others = "add_product_of_codes_", "add_product_"  # of gate and up in reverse, of all others
    assert in_place == [others, others, of_codes, of_codes, others]


def compiled_gradients(base: ft.Base, stack: ft.Finetuned, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    def loss(stack: ft.Finetuned) -> Tensor:
        return ft.apply_stacked(base, stack, ids, **options).logits.square().mean((1, 2, 3))

    return ft.stacked_value_and_grad(loss)(stack)[1]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch):
    """Compiles blocks with a backend that needs no compiler, and notes the MLPs that run as one function."""
    found: list[bool] = []
    original = _gated.gated_mlp

    def counted(*args: Any, **options: Any) -> Tensor:
        found.append(options["gelu"])
        return original(*args, **options)

    monkeypatch.setattr(_gated, "gated_mlp", counted)
    monkeypatch.setattr(
        _blocks, "compile_block", lambda f, remat: torch.compile(f, backend="aot_eager", fullgraph=True)
    )
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_a_compiled_model_has_the_gradients_of_an_eager_one(act: str, calls: list[bool]):
    base, stack, ids = stack_of_llamas(torch.float32, hidden_act=act)
    found = compiled_gradients(base, stack, ids, compile="blocks")
    assert set(calls) == {act != "silu"}
    calls.clear()
    expected = compiled_gradients(base, stack, ids)
    assert calls == []  # where nothing is compiled
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-4, atol=2e-6 * float(leaf.abs().max()), msg=name)
        assert leaf.abs().max() > 0, name


@pytest.mark.parametrize(
    ("config", "finetune"),
    [
        ({"mlp_bias": True}, {}),
        ({"hidden_act": "relu"}, {}),
        ({}, {"adapt_layers": {"gate_proj", "up_proj"}}),
        ({}, {"linear_config": ft.LinearAdapterConfig(r=4, bias=True)}),
        ({}, {"linear_config": ft.LinearAdapterConfig(r=4, dora=True)}),
    ],
    ids=["biases", "another activation", "down has no adapter", "adapters with biases", "DoRA"],
)
def test_what_is_not_one_function(config: dict[str, Any], finetune: dict[str, Any], calls: list[bool]):
    base, stack, ids = stack_of_llamas(torch.float32, finetune=finetune, **config)
    found, expected = compiled_gradients(base, stack, ids, compile="blocks"), compiled_gradients(base, stack, ids)
    assert calls == []
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-4, atol=2e-6 * float(leaf.abs().max()), msg=name)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.down_proj, self.act_fn = nn.Linear(6, 4, bias=False), nn.SiLU()


class Own(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Blocks(nn.Module):
    """Blocks of an MLP, in which long inputs come with another axis first."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Own()

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.mlp(x) if x.shape[1] < 7 else self.mlp(x.transpose(0, 1)).transpose(0, 1))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_rows_are_checked_as_by_the_layers(calls: list[bool]):
    base = ft.quantize_base_model(Blocks())
    stack = ft.stack(finetunes(base, 2, plain_layers=set()))
    ft.apply_stacked(base, stack, torch.ones(2, 2, 5, 4), compile="blocks")
    assert calls  # and the second call is of the same kind, which nobody watches any more
    for how in (None, "blocks"):
        with pytest.raises(Exception, match=r"whose leading axis is not the \d+ rows of the call"):
            ft.apply_stacked(base, stack, torch.ones(2, 2, 7, 4), compile=how)


@pytest.mark.parametrize("name", ["up_proj", "act_fn"])
def test_hooks_of_layers_run(name: str, calls: list[bool]):
    model, seen = Blocks(), set()
    for layer in model.layers:
        layer.mlp.get_submodule(name).register_forward_hook(lambda *_: seen.add(name))
    base = ft.quantize_base_model(model)
    ft.apply(base, finetunes(base, 1, plain_layers=set())[0], torch.ones(2, 5, 4), compile="blocks")
    assert calls == [] and seen


def test_by_code():
    """The line is known wherever it stands, and nothing else is taken for it."""

    class Turned(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    class Doubled(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2

    def gated(*blocks: nn.Module) -> list[bool]:
        base = ft.quantize_base_model(nn.Sequential(*blocks))
        with base.skeleton.calling() as (module, _):
            return [_gated.is_gated(block) or hasattr(block, "_ft_call") for block in module]

    assert gated(Own(), Turned(), Doubled()) == [True, False, False]


@pytest.mark.skipif(
    not torch.cuda.is_available() or not kernels.available(torch.device("cuda", 0)), reason="needs a GPU and Triton"
)
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_compiled_blocks_on_a_gpu(act: str):
    """Kernels in whole blocks of bfloat16 are as close to float32 as eager ones: products are rounded less often.

    Either is off by a few roundings of 2**-9 for each of two blocks, forward and backward: 2e-2 is ten of them.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 136, "hidden_act": act}
    base, stack, ids = stack_of_llamas(torch.bfloat16, device="cuda", **sizes)
    eager, compiled = (compiled_gradients(base, stack, ids, compile=how) for how in (None, "blocks"))
    wide, wide_stack, _ = stack_of_llamas(torch.float32, device="cuda", rounded=True, **sizes)
    exact = compiled_gradients(wide, wide_stack, ids)

    def error(grads: dict[str, Tensor], name: str) -> float:
        return float((grads[name] - exact[name]).norm() / exact[name].norm())

    for name in exact:
        assert error(compiled, name) < max(1.5 * error(eager, name), 2e-2), name
        assert error(compiled, name) > 0
