"""Triton kernels against their definitions in plain torch: in the interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from finetuna_func import kernels
from finetuna_func._products import contracted, expanded


def triton_version() -> tuple[int, ...]:
    try:
        return tuple(map(int, version("triton").split(".")[:2]))
    except PackageNotFoundError:
        return (0, 0)


@pytest.mark.skipif(triton_version() < (3, 9), reason="needs the interpreter of Triton 3.9, which takes numpy 2.4")
@pytest.mark.parametrize("name", ["interpreted_gated.py", "interpreted_low_rank.py"])
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
@pytest.mark.parametrize(("rows", "width", "rank"), [(2048, 2048, 16), (37, 72, 5), (300, 3072, 64), (5, 40, 33)])
def test_products_of_adapters_on_a_gpu(rows: int, width: int, rank: int):
    """In bfloat16, rounded once: off by 2**-9 / sqrt(3) = 1.2e-3 by root mean square."""
    n, generator = 3, torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    dy, low, b = draw(n * rows, width + 8), draw(n * rows, rank + 3), draw(n, width, rank)
    found = (
        *contracted(dy, 8, low, 3, b, True),
        expanded(low, 3, b, True),
        expanded(low, 3, b.mT, True, upright=True),
    )
    dy, low, b = dy.double(), low.double(), b.double()
    exact = (
        *contracted(dy, 8, low, 3, b, False),
        expanded(low, 3, b, False),
        expanded(low, 3, b.mT, False, upright=True),
    )
    for own, other in zip(found, exact, strict=True):
        assert own.shape == other.shape and own.dtype == torch.bfloat16
        error = float((own.double() - other).norm() / other.norm())
        assert 0 < error < 2e-3
