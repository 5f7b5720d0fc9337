"""The Triton kernels: in Triton's interpreter, as traced by the compiler, on a GPU if there is one, and where they run.

The interpreter gets a process of its own, since it is chosen when the kernels are imported.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SmallLm, finetunes, llama
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import finetuna_func as ft
from finetuna_func import kernels
from finetuna_func._layers import _plus_by_rows

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available() or not kernels.available(), reason="needs a GPU and Triton")


def triton_version() -> tuple[int, ...]:
    try:
        return tuple(map(int, version("triton").split(".")[:2]))
    except PackageNotFoundError:
        return (0, 0)


@pytest.mark.skipif(triton_version() < (3, 7), reason="needs the interpreter of Triton 3.7, which takes numpy 2.4")
def test_kernels_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "", "CUDA_VISIBLE_DEVICES": ""},
        cwd=INTERPRETED.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 25 and "skipped" not in run.stdout, run.stdout[-500:]


def test_importing_the_library_imports_no_kernel():
    """A machine without Triton, or without a GPU, never meets them."""
    code = "import sys, finetuna_func; sys.exit('finetuna_func.kernels.lora' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Driver:
    """What Triton asks of a GPU to find out what a kernel writes to."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.mark.skipif(triton_version() == (0, 0), reason="needs Triton, though no GPU")
@pytest.mark.parametrize("lead", [(4, 2, 64), (2, 72)], ids=["rows and tokens", "rows"])
def test_traced(lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """The compiler sees one kernel forward and one backward, in one graph each, and that they write to their own."""
    import triton

    from finetuna_func.kernels import lora

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    written: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        launched = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        written.extend(sorted(node.kwargs["tensors_to_clone"]) for node in launched)
        (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
        values = [None if node is None else node.meta["val"] for node in outputs]
        return lambda *args: [None if own is None else torch.zeros(own.shape, dtype=own.dtype) for own in values]

    def expand(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
        return lora.expand(y, low.split([16, 16], -1)[1], b)

    torch.compiler.reset()
    shapes = [(*lead, 40), (*lead, 32), (2, 40, 16)]
    inputs = [torch.zeros(*shape, dtype=torch.float16, requires_grad=True) for shape in shapes]
    out = torch.compile(expand, backend=aot_autograd(fw_compiler=backend), fullgraph=True, dynamic=False)(*inputs)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [grad.shape for grad in grads] == [torch.Size(shape) for shape in shapes]
    assert written == [["out"], ["d_b", "d_low"]]
    torch.compiler.reset()


class Watched:
    """Stands for the kernels on a machine without them: the same numbers, and a count of the calls."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[int] = []
        patch.setattr(kernels, "available", lambda: True)
        patch.setattr(kernels, "fits", lambda y, low, b: True)
        patch.setattr(kernels, "expand", self.expand)

    def expand(self, y: Tensor, low: Tensor, b: Tensor) -> Tensor:
        self.calls.append(b.ndim)
        return _plus_by_rows(y, low, b)


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("remat", [None, "blocks"])
def test_where_the_kernels_run(stacked: bool, remat: Any, monkeypatch: pytest.MonkeyPatch, aot_eager: None):
    """In blocks that the library compiles, and nowhere else; where nobody differentiates through them, or once."""
    watched = Watched(monkeypatch)
    base = ft.quantize_base_model(SmallLm())
    tuned, ids = finetunes(base, 2), torch.arange(12).view(2, 1, 6)

    def one(params: Any, ids: Tensor, **options: Any) -> Tensor:
        return ft.apply(base, tuned[0].replace(params=params), ids, **options).square().mean()

    if stacked:
        stack = ft.stack(tuned)
        step = lambda **options: ft.stacked_value_and_grad(  # noqa: E731
            lambda t: ft.apply_stacked(base, t, ids, **options).square().mean((1, 2, 3))
        )(stack)
    else:
        step = lambda **options: ft.value_and_grad(  # noqa: E731
            lambda t: ft.apply(base, t, ids[0], **options).square().mean()
        )(tuned[0])
    step()
    step(remat=remat)
    params = dict(tuned[0].params)
    torch.func.grad(one)(params, ids[0], compile="blocks")
    torch.func.vmap(one, in_dims=(None, 0))(params, ids)
    torch.func.jvp(lambda p: one(p, ids[0], compile="blocks"), (params,), (params,))
    torch.compile(one)(params, ids[0])
    assert watched.calls == []
    step(compile="blocks", remat=remat)
    assert watched.calls and set(watched.calls) == {3 if stacked else 2}


def test_not_on_a_cpu(monkeypatch: pytest.MonkeyPatch, aot_eager: None):
    """Whatever is installed: the tensors decide."""
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(kernels, "expand", lambda *_: pytest.fail("a kernel on the CPU"))
    base = ft.quantize_base_model(SmallLm().bfloat16())
    tuned = finetunes(base, 1)[0]
    ft.value_and_grad(lambda t: ft.apply(base, t, torch.arange(20).view(1, 20), compile="blocks").mean())(tuned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_fits(dtype: torch.dtype):
    """Tensors without numbers that say they are on a GPU."""
    half = dtype in (torch.float16, torch.bfloat16)

    def fits(y: tuple[int, ...], low: tuple[int, ...], b: tuple[int, ...], *, b_dtype: torch.dtype = dtype) -> bool:
        made = [torch.empty(shape, dtype=own, device="cuda") for shape, own in ((y, dtype), (low, dtype), (b, b_dtype))]
        return kernels.fits(*made)

    with FakeTensorMode():
        assert fits((2, 32, 40), (2, 32, 4), (2, 40, 4)) is half
        assert fits((32, 40), (32, 128), (40, 128)) is half
        assert not fits((32, 40), (32, 129), (40, 129))
        assert not fits((32, 40), (32, 0), (40, 0))
        assert not fits((2, 15, 40), (2, 15, 4), (2, 40, 4))
        assert not fits((2, 32, 40), (2, 32, 4), (2, 40, 4), b_dtype=torch.float32 if half else torch.float16)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("rank", [4, 16, 17, 64, 128])
@pytest.mark.parametrize("width", [40, 576])
def test_on_a_gpu(dtype: torch.dtype, adapters: int, rank: int, width: int):
    """The bounds are those of `interpreted_kernels`: one rounding to half precision, and sums in float32."""
    from finetuna_func.kernels import lora

    generator = torch.Generator("cuda").manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype).requires_grad_()

    y, low, b = numbers(adapters, 333, width), numbers(adapters, 333, rank), numbers(adapters, width, rank)
    g = numbers(adapters, 333, width).detach()
    out = lora.expand(y, low, b)
    d_low, d_b = torch.autograd.grad(out, (low, b), g)
    y, low, b, g = (t.detach().double() for t in (y, low, b, g))
    references = [  # exact, the sum of magnitudes, terms, and the same without one term
        (out, y + low @ b.mT, y.abs() + low.abs() @ b.abs().mT, rank + 1, y + low[..., 1:] @ b[..., 1:].mT),
        (d_low, g @ b, g.abs() @ b.abs(), width, g[..., 1:] @ b[:, 1:]),
        (d_b, g.mT @ low, g.abs().mT @ low.abs(), 333, g[:, 1:].mT @ low[:, 1:]),
    ]
    for found, exact, magnitude, terms, wrong in references:
        bound = 1.01 * (torch.finfo(dtype).eps / 2 * exact.abs() + (terms + 2) * 2.0**-24 * magnitude) + 1e-7
        assert bool(((found.detach().double() - exact).abs() <= bound).all())
        assert not bool(((found.detach().double() - wrong).abs() <= bound).all())


@on_a_gpu
@pytest.mark.parametrize(("rank", "stacked"), [(4, False), (16, True), (17, True), (64, False)])
def test_compiled_blocks_on_a_gpu(rank: int, stacked: bool, monkeypatch: pytest.MonkeyPatch):
    """As exact as the eager composite: at most twice as far from the float32 gradients, and the route is taken.

    Widths 72, 576 and 64; 77 tokens, then 61, whose graph has symbols.
    """
    torch.compiler.reset()
    taken: list[int] = []
    expand = kernels.expand

    def watched(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
        taken.append(y.shape[-1])
        return expand(y, low, b)

    monkeypatch.setattr(kernels, "expand", watched)
    sizes: dict[str, Any] = dict(hidden_size=576, intermediate_size=72, num_attention_heads=9, num_key_value_heads=1)
    model = llama(**sizes, head_dim=64, max_position_embeddings=128, vocab_size=64).bfloat16().cuda()
    config = ft.LinearAdapterConfig(r=rank, alpha=rank)

    def step(dtype: torch.dtype, ids: Tensor, shift: int = 0, **options: Any) -> list[Tensor]:
        base = ft.quantize_base_model(model.to(dtype))
        tuned = finetunes(base, 2, scale=0.02, linear_config=config, plain_layers=())
        tuned = [t.replace(params={k: leaf.float().cuda() for k, leaf in t.params.items()}) for t in tuned]
        tuned = tuned[shift:] + tuned[:shift]
        if stacked:
            grads = ft.stacked_value_and_grad(lambda t: ft.causal_lm_loss(base, t, ids, **options))(ft.stack(tuned))[1]
        else:
            grads = ft.value_and_grad(lambda t: ft.causal_lm_loss(base, t, ids[0], **options))(tuned[0])[1]
        return [grads[name] for name in sorted(grads)]

    for tokens in (77, 61):
        ids = torch.randint(0, 64, (2, 2, tokens), generator=torch.Generator().manual_seed(tokens)).cuda()
        exact = step(torch.float32, ids)
        eager, other = step(torch.bfloat16, ids), step(torch.bfloat16, ids, shift=1)
        compiled = step(torch.bfloat16, ids, compile="blocks")
        assert {72, 576, 64} <= set(taken)

        def distance(found: list[Tensor], exact: list[Tensor] = exact) -> float:
            differences = [torch.linalg.vector_norm(p - q) for p, q in zip(found, exact, strict=True)]
            norms = [torch.linalg.vector_norm(q) for q in exact]
            return float(torch.stack(differences).norm() / torch.stack(norms).norm())

        assert distance(compiled) <= 2 * distance(eager) < 0.1 < distance(other)
    torch.compiler.reset()
