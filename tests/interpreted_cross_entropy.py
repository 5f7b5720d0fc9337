"""The kernel of losses in Triton's interpreter, on the CPU.

`test_kernels` runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetuna_func.kernels import cross_entropy
from finetuna_func.kernels.cross_entropy import cross_entropy_


@pytest.fixture(autouse=True)
def interpreter():
    assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"


TOLERANCE = {torch.float16: 4e-4, torch.float32: 1e-6}
"""Of a norm: gradients rounded to float16 are off by 2**-11 / sqrt(3) = 2.8e-4 by root mean square, those below the
smallest normal number by more; sums are in float32, of numbers about as large."""


def draw(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * width)
    logits = 3 * torch.randn(rows, width, generator=generator)
    return logits.to(dtype), torch.randint(width, (rows,), generator=generator)


def exact(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf, targets, ignore_index=-100, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(5, 64), (3, 200), (2, 129), (1, 1), (4, 37)])
def test_losses_and_gradients(rows: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Of rows in one tile, in several, and in one that they do not fill; the second and the last do not count."""
    monkeypatch.setattr(cross_entropy, "LANES", 16)
    logits, targets = draw(rows, width, dtype)
    targets[1::3] = -100
    losses, gradients = exact(logits, targets)
    wrong = exact(logits, torch.where(targets < 0, targets, (targets + 1) % width))
    found = logits.clone()
    own = cross_entropy_(found, targets, -100)
    assert own.dtype == torch.float32 and found.dtype == dtype
    if width == 1:
        assert not own.any() and not found.any()
        return
    assert error(own, losses) < 1e-6 and error(found, gradients) < TOLERANCE[dtype]
    assert error(own, wrong[0]) > 0.1 and error(found, wrong[1]) > 0.1
    assert not found[1::3].any() and not own[1::3].any()


def test_what_is_infinite(monkeypatch: pytest.MonkeyPatch):
    """Words that a model rules out have no share, in whatever tile they are."""
    monkeypatch.setattr(cross_entropy, "LANES", 16)
    logits, targets = draw(3, 150, torch.float32)
    logits[0, :70], logits[1, 64:128], logits[2, 1:] = -torch.inf, -torch.inf, -torch.inf
    targets = torch.tensor([100, 3, 0])
    losses, gradients = exact(logits, targets)
    own = cross_entropy_(logits, targets, -100)
    torch.testing.assert_close(own.double(), losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradients, rtol=1e-6, atol=1e-6)


def test_a_label_that_is_none():
    """No number is right: NaN, and not that of some other place."""
    logits, _ = draw(4, 40, torch.float32)
    _, gradients = exact(logits, torch.tensor([3, 0, 0, 39]))
    own = cross_entropy_(logits, torch.tensor([3, 40, -1, 39]), -100)
    assert own.isnan().tolist() == [False, True, True, False]
    assert logits[1:3].isnan().all()
    torch.testing.assert_close(logits[[0, 3]].double(), gradients[[0, 3]], rtol=1e-6, atol=1e-6)
