"""Triton kernels, for blocks that the library compiles for a GPU.

| module | concept |
|---|---|
| `gated` | what lies between the frozen products of a gated MLP: the gate, and the adapters' products |
| `low_rank` | adapters' products elsewhere: from few columns to many, and both cotangents from one reading |
| `in_place` | products added to what is there already |
| `dequantize` | a matrix from its codes, where it is there for one product alone |
| `cross_entropy` | losses of logits, which their gradient replaces |

Nothing of Triton is imported before a kernel is used. A composite of plain torch is the definition of what a kernel
computes, and runs on a CPU, in other dtypes, and where a tensor does not fit.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

MAX_RANK = 64  # sums of that many columns stay in registers


@functools.cache
def available(device: torch.device) -> bool:
    """Returns whether there is Triton for a device: a GPU whose tensor cores take bfloat16 (sm_80 and later)."""
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def fits(x: Tensor, ranks: tuple[int, ...]) -> bool:
    """Returns whether the kernels, where they are available, take products like x, of adapters of these ranks."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.device.type == "cuda" and half and x.numel() > 0 and all(0 < rank <= MAX_RANK for rank in ranks)


def takes_logits(logits: Tensor) -> bool:
    """Returns whether the kernel of losses, where it is available, takes logits like these."""
    return logits.is_cuda and logits.dtype in (torch.bfloat16, torch.float16, torch.float32) and logits.numel() > 0


def padded(rank: int) -> int:
    """Returns the width of a tile that holds a rank, a power of two: tensor cores take 16 columns at least."""
    return max(16, 1 << (rank - 1).bit_length())
