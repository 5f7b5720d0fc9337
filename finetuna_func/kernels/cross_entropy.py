"""The cross-entropy of each row of logits, which its gradient replaces.

    loss = log(sum(exp(x))) - x[target]          x  <-  softmax(x), less one at the target

Logits are the widest tensors of a language model. Here they are read twice, the second time while they are in the
cache, and the gradient is written where they were, so that it takes no memory of its own. (As in Liger Kernel, arXiv
2410.10989; the kernel is our own.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

LANES = 2048  # columns side by side, eight a thread
DEEP = 8  # times as many at a time: of them one is the largest, and one exponential corrects what was summed before
WARPS = 8


@triton.jit
def _kernel(logits, targets, losses, width, ignored, DEEP: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    own = logits + row * width
    most = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    tile = tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, width, DEEP * LANES):
        col = start + tile
        x = tl.load(own + col, mask=col < width, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        now = tl.maximum(most, tl.max(x, 0))
        known = tl.where(now == float("-inf"), 0.0, now)  # of nothing but -inf, whose exponentials are zero
        total = total * tl.exp(most - known) + tl.sum(tl.exp(x - known[None, :]), 0)
        most = now
    top = tl.max(most, 0)
    norm = tl.sum(total * tl.exp(most - top), 0)
    inside = (target >= 0) & (target < width)
    at = tl.load(own + tl.where(inside, target, 0)).to(tl.float32)
    loss = tl.where(inside, top - at + tl.log(norm), float("nan"))  # of a label that is none
    tl.store(losses + row, tl.where(target == ignored, 0.0, loss))
    tl.debug_barrier()  # all have read what is written now
    scale = tl.where(inside, tl.fdiv(1.0, norm), float("nan"))
    for start in range(0, width, DEEP * LANES):
        col = start + tile
        x = tl.load(own + col, mask=col < width, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
        p = tl.exp(x - top) * scale - tl.where((col == target) & (target != ignored), 1.0, 0.0)
        tl.store(own + col, tl.where(target == ignored, 0.0, p).to(logits.dtype.element_ty), mask=col < width)


@triton_op("finetuna_func::cross_entropy_", mutates_args={"logits"})
def cross_entropy_(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Returns the loss of each row, float32 ``(rows,)``, and leaves its gradient where the logits were.

    A row whose target is ``ignore_index`` has a loss and a gradient of zero; one whose target is no column, of NaN.

    Args:
        logits: ``(rows, width)``, contiguous.
        targets: ``(rows,)``, integers.
        ignore_index: The target of rows that do not count.
    """
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    wrap_triton(_kernel)[(logits.shape[0],)](
        logits, targets, losses, logits.shape[1], ignore_index, DEEP=DEEP, LANES=LANES, num_warps=WARPS
    )
    return losses
