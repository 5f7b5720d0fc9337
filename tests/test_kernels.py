"""Triton kernels against their definitions in plain torch: in the interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from finetuna_func import kernels
from finetuna_func._products import added, contracted
from finetuna_func._quant import Int8


def triton_version() -> tuple[int, ...]:
    try:
        return tuple(map(int, version("triton").split(".")[:2]))
    except PackageNotFoundError:
        return (0, 0)


@pytest.mark.skipif(triton_version() < (3, 9), reason="needs the interpreter of Triton 3.9, which takes numpy 2.4")
@pytest.mark.parametrize("name", ["interpreted_gated.py", "interpreted_low_rank.py", "interpreted_cross_entropy.py"])
def test_kernels_in_the_interpreter(name: str):
    """In a process of its own, since the interpreter is chosen when the kernels are imported."""
    interpreted = Path(__file__).with_name(name)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(interpreted)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "", "CUDA_VISIBLE_DEVICES": ""},
        cwd=interpreted.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-500:]


def test_importing_the_library_imports_no_kernel():
    """A machine without Triton, or without a GPU, never meets them."""
    code = "import sys, finetuna_func; sys.exit(any(own.startswith('finetuna_func.kernels.') for own in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_product_is_added_in_place():
    """As torch checks operators; and the compiler calls it as it is, on the place that it is given."""
    from finetuna_func.kernels.in_place import add_product_

    y, x, w = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 5), (3, 4), (4, 5)))
    torch.library.opcheck(torch.ops.finetuna_func.add_product_.default, (y.clone(), x, w))
    own = y.clone()
    add_product_(own, x, w)
    torch.testing.assert_close(own, y + x @ w, rtol=1e-12, atol=1e-12)
    with FakeTensorMode(), pytest.raises(RuntimeError):
        add_product_(torch.empty(3, 5), torch.empty(3, 4), torch.empty(5, 4))


def test_a_product_of_codes_is_added_in_place():
    from finetuna_func.kernels.in_place import add_product_of_codes_

    y, x = torch.randn(3, 5), torch.randn(3, 4)
    codes, scales = Int8().quantize(torch.randn(4, 5)).values()
    torch.library.opcheck(torch.ops.finetuna_func.add_product_of_codes_.default, (y.clone(), x, codes, scales))
    own = y.clone()
    add_product_of_codes_(own, x, codes, scales)
    exact = y.double() + x.double() @ (codes.double() * scales.double().unsqueeze(-1))
    torch.testing.assert_close(own.double(), exact, rtol=0, atol=1e-5)  # sums of a few numbers in float32
    assert (own - y).abs().max() > 0.1
    with FakeTensorMode(), pytest.raises(RuntimeError):
        add_product_of_codes_(torch.empty(3, 5), torch.empty(3, 4), torch.empty(5, 4), torch.empty(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_fits(dtype: torch.dtype):
    half = dtype in (torch.float16, torch.bfloat16)
    with FakeTensorMode():  # tensors without numbers that say they are on a GPU
        x = torch.empty(2, 3, dtype=dtype, device="cuda")
        assert kernels.fits(x, (4, 64, 1)) is half
        assert not kernels.fits(x, (4, 65, 1)) and not kernels.fits(x, (0, 4, 4))
        assert not kernels.fits(torch.empty(2, 3, dtype=dtype), (4, 4, 4))
        assert not kernels.fits(torch.empty(0, 3, dtype=dtype, device="cuda"), (4, 4, 4))
    assert not kernels.available(torch.device("cpu"))


@pytest.mark.skipif(
    not torch.cuda.is_available() or not kernels.available(torch.device("cuda", 0)), reason="needs a GPU and Triton"
)
@pytest.mark.parametrize(
    ("rows", "widths", "rank"),
    [(2048, [2048], 16), (37, [72], 5), (300, [3072], 64), (5, [40], 33), (500, [2048, 512, 512], 16)],
)
def test_products_of_adapters_on_a_gpu(rows: int, widths: list[int], rank: int):
    """In bfloat16: off by 2**-9 / sqrt(3) = 1.1e-3 by root mean square where numbers fill their binade, and up to twice
    that where they begin one; `added` is rounded twice, and once more of two products."""
    from finetuna_func.kernels.dequantize import dequantize

    n, width, generator = 3, sum(widths), torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    dy, low, bs = draw(n * rows, width), draw(n * rows, rank * len(widths)), [draw(n, own, rank) for own in widths]
    x, weight, a = draw(n * rows, 64), draw(64, width) / 8, draw(n, low.shape[1], width)
    codes = [tuple(Int8().quantize(weight.float()).values()) for _ in range(2)]
    d_low, d_bs = contracted(dy, low, bs, True)
    found = (
        d_low,
        *d_bs,
        added([x], [weight], low, bs, True),
        added([x], [weight], low, [a], True, upright=True),
        added([x, x], codes, low, [a], True, upright=True),
    )
    matrices = [Int8().dequantize(torch.bfloat16, *own) for own in codes]
    assert all(torch.equal(dequantize(*own, torch.bfloat16), w) for own, w in zip(codes, matrices, strict=True))
    weights = [own.double() for own in matrices]
    dy, low, x, weight, a = (leaf.double() for leaf in (dy, low, x, weight, a))
    bs = [b.double() for b in bs]
    d_low, d_bs = contracted(dy, low, bs, False)
    exact = (
        d_low,
        *d_bs,
        added([x], [weight], low, bs, False),
        added([x], [weight], low, [a], False, upright=True),
        added([x, x], weights, low, [a], False, upright=True),
    )
    bounds = (*([2e-3] * (1 + len(bs))), 3e-3, 3e-3, 4e-3)
    for own, other, bound in zip(found, exact, bounds, strict=True):
        assert own.shape == other.shape and own.dtype == torch.bfloat16
        error = float((own.double() - other).norm() / other.norm())
        assert 0 < error < bound


@pytest.mark.skipif(
    not torch.cuda.is_available() or not kernels.available(torch.device("cuda", 0)), reason="needs a GPU and Triton"
)
def test_losses_on_a_gpu():
    """Of bfloat16 logits: losses in float32, gradients rounded once."""
    from finetuna_func.kernels.cross_entropy import cross_entropy_

    generator = torch.Generator("cuda").manual_seed(0)
    logits = 3 * torch.randn(70, 32003, generator=generator, device="cuda").bfloat16()
    targets = torch.randint(32003, (70,), generator=generator, device="cuda")
    targets[::7] = -100
    leaf = logits.double().requires_grad_()
    exact = F.cross_entropy(leaf, targets, ignore_index=-100, reduction="none")
    (gradients,) = torch.autograd.grad(exact.sum(), leaf)
    losses = cross_entropy_(logits, targets, -100)
    torch.testing.assert_close(losses.double(), exact.detach(), rtol=1e-6, atol=1e-6)
    assert 0 < float((logits.double() - gradients).norm() / gradients.norm()) < 2e-3
    assert not losses[::7].any() and not logits[::7].any()


SHARED_BYTES = {80: 166912, 86: 101376, 90: 232448, 120: 101376}
"""What a block of threads may have of shared memory, by compute capability (CUDA C++ Programming Guide, 5.1)."""


def launches(monkeypatch: pytest.MonkeyPatch, rank: int) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The kernels, what they are given, and how they are launched, for products of a rank."""
    from finetuna_func.kernels import cross_entropy, dequantize, gated, low_rank

    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Noted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: found.append((self.kernel, args, options))

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    n, rows, width = 2, 256, 1024
    low, b, a = draw(n * rows, rank), draw(n, width, rank), draw(n, rank, width)
    of_both, wide = draw(n * rows, 2 * rank), draw(n * rows, width)
    gu = draw(n * rows, 2 * width)
    for module in (cross_entropy, gated, low_rank):
        monkeypatch.setattr(module, "wrap_triton", Noted)
    gated.gated._init_fn(gu, of_both, b, b, a, False)
    gated.gated_backward_._init_fn(gu, of_both, b, b, a, wide, low, False)
    low_rank.expand_._init_fn(wide, 0, low, 0, b, [width], False, False)
    low_rank.expand_._init_fn(wide, 0, draw(n * rows, 2 * rank), 0, b, [width // 2, width // 2], False, False)
    low_rank.expand_._init_fn(wide, 0, draw(n * rows, 3 * rank), 0, draw(n, 3 * rank, width), [width], True, True)
    low_rank.contract._init_fn(wide, low, b, [width], 0, 0)
    monkeypatch.setattr(dequantize, "_dequantize_kernel", Noted(dequantize._dequantize_kernel))
    dequantize.dequantize(wide.to(torch.int8), torch.empty(n * rows), torch.bfloat16)
    cross_entropy.cross_entropy_._init_fn(wide, torch.empty(n * rows, dtype=torch.int64), -100)
    return found


@pytest.mark.skipif(triton_version() < (3, 9), reason="needs Triton")
@pytest.mark.parametrize(("capability", "rank"), [(80, 64), (86, 16), (86, 64), (90, 16), (90, 64), (120, 64)])
def test_kernels_compile_for_a_kind_of_gpu(capability: int, rank: int, monkeypatch: pytest.MonkeyPatch):
    """Without one: Triton brings the assembler. Large tiles do not fit into the shared memory of smaller GPUs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int8: "*i8"}
    for kernel, args, options in launches(monkeypatch, rank):
        how = {name: value for name, value in options.items() if name.startswith("num_")}
        constants = {name: value for name, value in options.items() if name not in how}
        signature = {
            name: names[value.dtype] if isinstance(value, Tensor) else "i32"
            for name, value in zip(kernel.arg_names, args, strict=False)
        }
        divisible = [i for i, value in enumerate(args) if isinstance(value, Tensor) or (value % 16 == 0 and value > 0)]
        source = ASTSource(
            fn=kernel,
            signature={**signature, **dict.fromkeys(constants, "constexpr")},
            constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=how)
        assert 0 < compiled.metadata.shared <= SHARED_BYTES[capability], kernel
