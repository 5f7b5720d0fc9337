"""The kernels of gated MLPs in Triton's interpreter, on the CPU: `test_kernels` runs this file with TRITON_INTERPRET=1.

In float16: the interpreter multiplies the bits of bfloat16 as integers. `test_gated` checks bfloat16 on a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from finetuna_func._gated import _between, _between_backward


@pytest.fixture(autouse=True)
def interpreter():
    assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"


RTOL = 4e-4
"""Of a norm. Results in float16, and products of what is rounded to it: 2**-11 / sqrt(3) = 2.8e-4 by root mean square,
and sqrt(2) times that where parts are rounded and then their sum."""

SIZES = [  # adapters, rows of each, width, ranks
    (2, 64, 128, (16, 16, 16)),
    (3, 37, 72, (4, 8, 2)),
    (1, 5, 40, (20, 3, 16)),
    (2, 70, 300, (16, 16, 33)),
    (1, 1100, 40, (2, 2, 2)),
]


def numbers(n: int, rows: int, width: int, ranks: tuple[int, int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).half()

    rg, ru, rh = ranks
    gu, low = draw(n * rows, 2 * width), draw(n * rows, rg + ru)
    factors = [draw(n, width, rg, scale=0.3), draw(n, width, ru, scale=0.3), draw(n, rh, width, scale=0.1)]
    return [gu, low, *factors, draw(n * rows, width), draw(n * rows, rh)]


def compare(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    for own, other in zip(found, exact, strict=True):
        assert own.shape == other.shape
        error = float((own.double() - other).norm() / other.norm())
        assert error < RTOL


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("n", "rows", "width", "ranks"), SIZES)
def test_kernels_and_their_definition(n: int, rows: int, width: int, ranks: tuple[int, int, int], gelu: bool):
    *leaves, d_h, d_low_h = numbers(n, rows, width, ranks)
    before = [leaf.clone() for leaf in (*leaves, d_low_h)]
    wide = [leaf.double() for leaf in leaves]
    found, exact = _between(*leaves, gelu, True), _between(*wide, gelu, False)
    compare(found, exact)
    grads = _between_backward(*leaves, d_h.clone(), d_low_h, gelu, True)
    wanted = _between_backward(*wide, d_h.double(), d_low_h.double(), gelu, False)
    compare(grads, wanted)
    assert all(torch.equal(own, other) for own, other in zip((*leaves, d_low_h), before, strict=True))
    again = _between_backward(*leaves, d_h.clone(), d_low_h, gelu, True)
    assert all(torch.equal(own, other) for own, other in zip(grads, again, strict=True))
    with pytest.raises(AssertionError):  # the other activation is noticed
        compare(found, _between(*wide, not gelu, False))
    if n > 1:
        with pytest.raises(AssertionError):  # and so are factors of the wrong adapter
            compare(found, _between(*wide[:2], *(factor.roll(1, 0) for factor in wide[2:]), gelu, False))


@pytest.mark.parametrize("n", [2, 3])
def test_half_of_the_finetunes_at_a_time(n: int, monkeypatch: pytest.MonkeyPatch):
    """Where that leaves enough programs for a launch; bitwise what one launch computes."""
    from finetuna_func.kernels import gated

    *leaves, d_h, d_low_h = numbers(n, 70, 136, (4, 8, 2))
    launches: list[int] = []

    def noted(kernel: Any) -> Any:
        launches.append(1)
        return kernel

    monkeypatch.setattr(gated, "wrap_triton", noted)
    whole = _between_backward(*leaves, d_h.clone(), d_low_h, False, True)
    monkeypatch.setattr(gated, "ENOUGH", n // 2 * 3)
    halves = _between_backward(*leaves, d_h.clone(), d_low_h, False, True)
    assert len(launches) == 1 + 2
    assert all(torch.equal(own, other) for own, other in zip(whole, halves, strict=True))
    monkeypatch.setattr(gated, "ENOUGH", n // 2 * 3 + 1)
    _between_backward(*leaves, d_h.clone(), d_low_h, False, True)
    assert len(launches) == 4


def test_a_diverged_adapter_leaves_others_alone():
    *leaves, d_h, d_low_h = numbers(2, 37, 72, (4, 8, 2))
    spoilt = [leaf.clone() for leaf in leaves]
    spoilt[2][0] = torch.nan
    for function, rest in ((_between, ()), (_between_backward, (d_h, d_low_h))):
        one, other = (function(*own, *(leaf.clone() for leaf in rest), False, True) for own in (leaves, spoilt))
        for a, b in zip(one, other, strict=True):
            half = slice(len(a) // 2, None)
            assert torch.equal(a[half], b[half])
            assert b[: len(a) // 2].isnan().any()
