"""The second product of an adapter, and its adjoint: one pass each over the large operand.

    out = y + low B^T           `expand`: y read and out written once
    dlow, dB = g B, g^T low     `expand_adjoint`: both in one pass over g

Rows of one adapter are next to one another, and each of N adapters has as many. Both are bound by bytes. The rank is
padded to what the tensor cores take; sums are in float32 and in a fixed order, without atomics: the same inputs give
the same bits. Scales stay outside. The grouped products are those of Punica (arXiv 2310.18547), S-LoRA (2311.03285)
and LoRAFusion (2510.00206); the kernels are our own.

They are ``triton_op``: the compiler sees through them and launches the kernels like its own. Sums over tiles are left
to it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton.jit
def _expand_kernel(
    y, low, b, out, rows, width, low_row,
    R: tl.constexpr, BLOCK_R: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks, per_adapter = tl.cdiv(width, BLOCK_N), tl.cdiv(rows, BLOCK_M)
    tile = tl.program_id(0) // blocks
    own = tile // per_adapter  # a tile never spans two adapters
    first, stop = own * rows + (tile % per_adapter) * BLOCK_M, own * rows + rows
    row = first + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, BLOCK_R)
    col = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < stop)[:, None]
    if not EVEN:
        inside = inside & (col < width)[None, :]
    far = row.to(tl.int64)[:, None]
    kept = (row < stop)[:, None] & (rank < R)[None, :]
    low_tile = tl.load(low + far * low_row + rank[None, :], mask=kept, other=0.0)
    b_at = b + own.to(tl.int64) * width * R + col[None, :] * R + rank[:, None]
    b_tile = tl.load(b_at, mask=(rank < R)[:, None] & (col < width)[None, :], other=0.0)
    acc = tl.dot(low_tile, b_tile)
    acc += tl.load(y + far * width + col[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + far * width + col[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _adjoint_kernel(
    g, low, b, d_low, d_b, total, rows, width, low_row, cols, SPLITS: tl.constexpr,
    R: tl.constexpr, BLOCK_R: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    per_adapter = tl.cdiv(rows, BLOCK_M)
    own = tile // per_adapter
    first, stop = own * rows + (tile % per_adapter) * BLOCK_M, own * rows + rows
    row = first + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, BLOCK_R)
    far = row.to(tl.int64)[:, None]
    kept = (row < stop)[:, None] & (rank < R)[None, :]
    low_tile = tl.load(low + far * low_row + rank[None, :], mask=kept, other=0.0)
    # Rows past the end read the last row again, without a mask in the loop: times zeros in dB, and not stored in dlow.
    g_rows = g + tl.minimum(row, stop - 1).to(tl.int64)[:, None] * width
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(split * cols, tl.minimum(split * cols + cols, width), BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        b_at = b + own.to(tl.int64) * width * R + col[:, None] * R + rank[None, :]
        if EVEN:
            g_tile = tl.load(g_rows + col[None, :])
            b_tile = tl.load(b_at, mask=(rank < R)[None, :], other=0.0)
        else:
            g_tile = tl.load(g_rows + col[None, :], mask=(col < width)[None, :], other=0.0)
            b_tile = tl.load(b_at, mask=(col < width)[:, None] & (rank < R)[None, :], other=0.0)
        acc = tl.dot(g_tile, b_tile, acc)
        part = tl.dot(tl.trans(g_tile), low_tile)
        d_at = d_b + tile.to(tl.int64) * width * R + col[:, None] * R + rank[None, :]
        tl.store(d_at, part.to(d_b.dtype.element_ty), mask=(col < width)[:, None] & (rank < R)[None, :])
    low_at = d_low + split.to(tl.int64) * total * R + far * R + rank[None, :]
    tl.store(low_at, acc.to(d_low.dtype.element_ty), mask=kept)


@triton_op("finetuna_func::expand", mutates_args={})
def expand(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """Returns ``y + low @ B.T`` of each row's own adapter, like ``y``; differentiable once.

    Args:
        y: ``(..., O)``, bfloat16 or float16.
        low: ``(..., R)`` of the same dtype, as many rows.
        b: ``(N, O, R)`` of the same dtype, or ``(O, R)`` for a single adapter.

    Raises:
        TypeError: Dtypes that are not one, or not of half precision.
        ValueError: Shapes that do not belong together.
    """
    adapters, rows = _check("expand", y, low, b)
    width, rank = b.shape[-2:]
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    if rows == 0 or width == 0 or rank == 0:
        return out.copy_(y)
    y, low, b = y.contiguous(), _by_rows(low), b.contiguous()
    block_m, block_n = 64, 128
    programs = adapters * _ceil(rows, block_m) * _ceil(width, block_n)
    wrap_triton(_expand_kernel)[(programs,)](
        y, low, b, out, rows, width, low.stride(0),
        R=rank, BLOCK_R=_rank_block(rank), EVEN=width % block_n == 0, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


@triton_op("finetuna_func::expand_adjoint", mutates_args={})
def expand_adjoint(g: Tensor, low: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of `expand` for ``low`` and ``b``, from the cotangent ``g (..., O)``."""
    adapters, rows = _check("expand_adjoint", g, low, b)
    width, rank = b.shape[-2:]
    if rows == 0 or width == 0 or rank == 0:
        return torch.zeros_like(low), torch.zeros_like(b)
    total, block_n = adapters * rows, 64
    # As rows by its strides: an operand of as_strided gets one buffer, for all who read it. A kernel's operand that is
    # still to be computed gets one of its own, and the frozen product, which reads g as well, another.
    g, flat, b = g.contiguous().as_strided((total, width), (width, 1)), _by_rows(low), b.contiguous()
    # 256 rows at a time and 3 stages were the fastest on an H100; at higher ranks they take too much shared memory.
    block_m = 256 if rank <= 64 else 128
    while block_m > 16 and block_m // 2 >= rows:
        block_m //= 2
    tiles, blocks = adapters * _ceil(rows, block_m), _ceil(width, block_n)
    splits = 1  # of the columns: few tiles leave multiprocessors idle
    while 2 * splits <= blocks and 2 * splits * tiles <= _processors(g.device):
        splits *= 2
    cols = _ceil(blocks, splits) * block_n
    d_low = g.new_empty(splits, total, rank, dtype=torch.float32)
    d_b = g.new_empty(tiles, width, rank, dtype=torch.float32)
    wrap_triton(_adjoint_kernel)[(tiles * splits,)](
        g, flat, b, d_low, d_b, total, rows, width, flat.stride(0), cols, SPLITS=splits,
        R=rank, BLOCK_R=_rank_block(rank), EVEN=width % block_n == 0, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=8 if block_m >= 128 else 4, num_stages=3,
    )  # fmt: skip
    d_b = d_b.view(adapters, -1, width, rank).sum(1)
    return d_low.sum(0).to(low.dtype).view(low.shape), d_b.to(b.dtype).view(b.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    low, b = ctx.saved_tensors
    d_low, d_b = expand_adjoint(g, low, b) if any(ctx.needs_input_grad[1:]) else (None, None)
    return g, d_low, d_b


expand.register_autograd(_backward, setup_context=_save)


def _check(op: str, y: Tensor, low: Tensor, b: Tensor) -> tuple[int, int]:
    """Returns the number of adapters and how many rows each has."""
    if y.dtype not in (torch.bfloat16, torch.float16) or not y.dtype == low.dtype == b.dtype:
        raise TypeError(f"{op}: expected one dtype, bfloat16 or float16, got {y.dtype}, {low.dtype} and {b.dtype}.")
    adapters = b.shape[0] if b.ndim == 3 else 1
    rows = math.prod(y.shape[:-1])
    fits = b.ndim in (2, 3) and (y.shape[-1], low.shape[-1]) == tuple(b.shape[-2:]) and adapters > 0
    if not fits or math.prod(low.shape[:-1]) != rows or rows % adapters:
        shapes = ", ".join(str(tuple(t.shape)) for t in (y, low, b))
        raise ValueError(f"{op}: shapes {shapes} do not belong together: (..., O), (..., R) and (N, O, R).")
    return adapters, rows // adapters


def _by_rows(low: Tensor) -> Tensor:
    """``(rows, R)`` whose rows may be further apart than they are long, as parts of a product that layers share."""
    flat = low.reshape(-1, low.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _rank_block(rank: int) -> int:
    """The width of a tile that holds a rank: tensor cores take 16 columns at least."""
    return max(16, triton.next_power_of_2(rank))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
