"""Triton kernels for blocks that the library compiles for a GPU: adapters' products in one pass over the large operand.

| module | concept |
|---|---|
| `lora` | ``y + low @ B.T`` for the rows of many adapters, and both gradients that it needs |

Nothing of Triton is imported before a kernel is used. The composite of plain torch is the definition: it is what runs
eagerly, under torch.func, on a CPU, in other dtypes, and where a user compiles. The kernels have a first derivative
alone, which is all that a compiled block has.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

MAX_RANK = 128
MIN_ROWS = 16  # of an adapter: with fewer, tiles of 16 rows are mostly padding


@functools.cache
def available() -> bool:
    """Returns whether this process has Triton, and GPUs whose tensor cores take bfloat16 (sm_80 and later)."""
    if importlib.util.find_spec("triton") is None or torch.version.cuda is None:
        return False
    devices = range(torch.cuda.device_count())
    return len(devices) > 0 and all(torch.cuda.get_device_capability(i) >= (8, 0) for i in devices)


def fits(y: Tensor, low: Tensor, b: Tensor) -> bool:
    """Returns whether `expand` takes these tensors and is worth it; asks for nothing that waits for the device."""
    half = y.dtype in (torch.bfloat16, torch.float16) and y.dtype == low.dtype == b.dtype
    if is_traceable_wrapper_subclass(y) or y.device.type != "cuda" or not half or not 0 < b.shape[-1] <= MAX_RANK:
        return False
    adapters = b.shape[0] if b.ndim == 3 else 1
    return y.shape[-1] > 0 and y.numel() // y.shape[-1] >= adapters * MIN_ROWS


def expand(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """Returns ``y + low @ B.T``: see `lora.expand`."""
    from finetuna_func.kernels import lora

    return lora.expand(y, low, b)
