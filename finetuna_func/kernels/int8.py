"""The frozen int8 base: codes to numbers in one pass, and a product that reads the codes themselves (W8A16).

With few rows a product is bound by the bytes of its weight. Dequantizing first moves five bytes for each code (one
read, two written, two read again); `matmul` moves one. Integers up to 127 are exact in bfloat16, the sums are in
float32 and the scale comes after them, so that the result alone is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetuna_func.kernels._tiles import INTERPRETED, processors, rank_block, rows_of_adapters, sum_tiles
from finetuna_func.kernels.lora import expand_adjoint


@triton.jit
def _dequantize_kernel(
    codes, scale, out, height, width, EVEN: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    col = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < height)[:, None]
    if not EVEN:
        inside = inside & (col < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    numbers = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
    numbers *= tl.load(scale + row, mask=row < height, other=0.0)[:, None]
    tl.store(out + at, numbers.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _matmul_kernel(
    x, codes, scale, low, b, ends, out, rows, height, width, per_adapter, n, x_row, depth,
    R: tl.constexpr, BLOCK_R: tl.constexpr, N_POW2: tl.constexpr, LORA: tl.constexpr, RAGGED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Tiles in groups of rows of tiles, so that those running at a time share their operands in the cache.
    tiles_m, tiles_o = tl.cdiv(rows, BLOCK_M), tl.cdiv(height, BLOCK_O)
    tile = tl.program_id(0)
    group = tile // (GROUP * tiles_o)
    in_group = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (tile % (GROUP * tiles_o)) % in_group
    tile_o = (tile % (GROUP * tiles_o)) // in_group
    split = tl.program_id(1)

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    start = split * depth
    # The transpose of the result: the tensor cores take their first operand from registers, where codes are widened.
    w_at = codes + tl.minimum(o, height - 1).to(tl.int64)[:, None] * width + (start + k)[None, :]
    x_at = x + tl.minimum(m, rows - 1).to(tl.int64)[None, :] * x_row + (start + k)[:, None]
    acc = tl.zeros([BLOCK_O, BLOCK_M], tl.float32)
    for at in range(start, tl.minimum(start + depth, width), BLOCK_K):
        if EVEN:
            w_tile = tl.load(w_at)
            x_tile = tl.load(x_at)
        else:
            w_tile = tl.load(w_at, mask=(at + k < width)[None, :], other=0)
            x_tile = tl.load(x_at, mask=(at + k < width)[:, None], other=0.0)
        acc = tl.dot(w_tile.to(x_tile.dtype), x_tile, acc)
        w_at += BLOCK_K
        x_at += BLOCK_K
    acc *= tl.load(scale + o, mask=o < height, other=0.0)[:, None]
    if LORA and split == 0:
        rank = tl.arange(0, BLOCK_R)
        if RAGGED:
            adapter, begin, end = rows_of_adapters(ends, rows, n, N_POW2)
            first = tl.sum(((adapter < n - 1) & (end <= tile_m * BLOCK_M)).to(tl.int32), 0)
            last = tl.sum(((adapter < n - 1) & (end < tl.minimum(tile_m * BLOCK_M + BLOCK_M, rows))).to(tl.int32), 0)
        else:
            first = tile_m * BLOCK_M // per_adapter
            last = tl.minimum(tile_m * BLOCK_M + BLOCK_M, rows) - 1
            last = last // per_adapter
        for i in range(0, last - first + 1):  # mostly one; a tile of few rows may have several adapters
            own = first + i
            if RAGGED:
                low_first = tl.sum(tl.where(adapter == own, begin, 0), 0)
                low_stop = tl.sum(tl.where(adapter == own, end, 0), 0)
            else:
                low_first = own * per_adapter
                low_stop = low_first + per_adapter
            mine = (m >= low_first) & (m < low_stop)
            low_at = low + m.to(tl.int64)[None, :] * R + rank[:, None]
            low_tile = tl.load(low_at, mask=mine[None, :] & (rank < R)[:, None], other=0.0)
            b_at = b + (own.to(tl.int64) * height + o[:, None]) * R + rank[None, :]
            b_tile = tl.load(b_at, mask=(o < height)[:, None] & (rank < R)[None, :], other=0.0)
            acc = tl.dot(b_tile, low_tile, acc)
    out_at = out + split.to(tl.int64) * rows * height + m.to(tl.int64)[:, None] * height + o[None, :]
    result = tl.trans(acc).to(out.dtype.element_ty)
    tl.store(out_at, result, mask=(m < rows)[:, None] & (o < height)[None, :])


def launch_dequantize(
    codes: Tensor, scale: Tensor, dtype: torch.dtype, *, block_o: int = 4, block_k: int = 1024, warps: int = 4
) -> Tensor:
    """Returns ``codes * scale`` in ``dtype``, rounded once."""
    height, width = codes.shape
    out = codes.new_empty(height, width, dtype=dtype)
    if out.numel():
        grid = (triton.cdiv(width, block_k), triton.cdiv(height, block_o))
        _dequantize_kernel[grid](
            codes.contiguous(), scale.contiguous(), out, height, width,
            EVEN=width % block_k == 0, BLOCK_O=block_o, BLOCK_K=block_k, num_warps=warps,
        )  # fmt: skip
    return out


def launch_matmul(
    x: Tensor, codes: Tensor, scale: Tensor, low: Tensor | None = None, b: Tensor | None = None,
    ends: Tensor | None = None, *, block_m: int = 64, block_o: int = 64, block_k: int = 128, warps: int = 4,
    stages: int = 4, split: int | None = None,
) -> Tensor:  # fmt: skip
    """Returns ``x @ (codes * scale).T + low @ b.mT``, ``(T, O)``."""
    (rows, width), height = x.shape, codes.shape[0]
    out = x.new_empty(rows, height)
    if out.numel() == 0:
        return out
    x = x if x.stride(-1) == 1 else x.contiguous()
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(height, block_o)
    if split is None:  # few tiles leave multiprocessors idle; each split reads its own part of the weight
        split = max(1, min(triton.cdiv(width, 4 * block_k), 2 * processors(x.device) // tiles))
    depth = triton.cdiv(triton.cdiv(width, block_k), split) * block_k
    split = max(1, triton.cdiv(width, depth)) if depth else 1
    parts = out if split == 1 else x.new_empty(split, rows, height, dtype=torch.float32)
    rank, n = (0, 1) if b is None else (b.shape[2], b.shape[0])
    lora = rank > 0
    _matmul_kernel[(tiles, split)](
        x, codes.contiguous(), scale.contiguous(), low.contiguous() if lora else None,
        b.to(x.dtype).contiguous() if lora else None, ends, parts, rows, height, width, max(1, rows // n), n,
        x.stride(0), depth,
        R=rank, BLOCK_R=rank_block(rank), N_POW2=triton.next_power_of_2(n), LORA=lora, RAGGED=ends is not None,
        EVEN=width % block_k == 0, BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_K=block_k, GROUP=8, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out if split == 1 else sum_tiles(parts, out.unsqueeze(0), None, split, split, 1)[0]


@torch.library.custom_op("finetuna_func::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``codes * scale`` of an int8 matrix ``(O, K)`` and float32 scales ``(O,)``, rounded once to ``dtype``."""
    _check("dequantize", codes, scale)
    return launch_dequantize(codes, scale, dtype)


@torch.library.custom_op("finetuna_func::int8_matmul", mutates_args=())
def matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    low: Tensor | None = None,
    b: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """Returns ``x @ (codes * scale).T + low @ B.T``, ``(T, O)`` in the dtype of ``x``; differentiable once.

    Args:
        x: ``(T, K)``, bfloat16 or float16.
        codes: ``(O, K)``, int8.
        scale: ``(O,)``, float32.
        low: ``(T, R)`` like ``x``, or ``None`` for no adapters.
        b: ``(N, O, R)``, floating point.
        ends: ``(N,)``, int32: after which row each adapter's rows end; ``None`` for ``T / N`` rows each.

    Raises:
        TypeError: Dtypes other than these.
        ValueError: Shapes that do not belong together, or tensors that are not on a GPU.
    """
    _check("matmul", codes, scale)
    if x.dtype not in (torch.bfloat16, torch.float16) or (low is not None and low.dtype != x.dtype):
        raise TypeError(f"matmul: expected x (and low) in bfloat16 or float16, got {x.dtype}.")
    if (low is None) != (b is None) or x.ndim != 2 or x.shape[1] != codes.shape[1]:
        raise ValueError(f"matmul: x {tuple(x.shape)}, codes {tuple(codes.shape)}, low and b do not belong together.")
    if low is not None and b is not None:
        expected = (x.shape[0], codes.shape[0], low.shape[-1])
        if (low.shape[0], *b.shape[1:]) != expected or (ends is None and x.shape[0] % b.shape[0]):
            raise ValueError(f"matmul: low {tuple(low.shape)} and b {tuple(b.shape)} do not belong to {expected}.")
        if ends is not None and (ends.dtype != torch.int32 or ends.shape != b.shape[:1]):
            raise ValueError(f"matmul: expected ends int32 of shape {tuple(b.shape[:1])}, got {ends}.")
    return launch_matmul(x, codes, scale, low, b, ends)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@matmul.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    low: Tensor | None = None,
    b: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, low, b, ends = ctx.saved_tensors
    dx = torch.matmul(g, dequantize(codes, scale, g.dtype)) if ctx.needs_input_grad[0] else None
    d_low, db = expand_adjoint(g, low, b, ends) if any(ctx.needs_input_grad[3:5]) else (None, None)
    return dx, None, None, d_low, db, None


matmul.register_autograd(_backward, setup_context=_save)


def _check(op: str, codes: Tensor, scale: Tensor) -> None:
    if codes.dtype != torch.int8 or scale.dtype != torch.float32:
        raise TypeError(f"{op}: expected int8 codes and float32 scales, got {codes.dtype} and {scale.dtype}.")
    if codes.ndim != 2 or scale.shape != codes.shape[:1]:
        raise ValueError(f"{op}: expected codes (O, K) and scale (O,), got {tuple(codes.shape)}, {tuple(scale.shape)}.")
    if codes.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"{op}: expected tensors on a GPU, got {codes.device}; the composite runs anywhere.")
