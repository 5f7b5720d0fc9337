"""Products of many adapters with rows that are divided among them, one kernel each.

For rows ``x (T, K)`` of N adapters, ``A (N, R, K)`` and ``B (N, O, R)``:

    low = x A^T                 `project`: one pass over x
    out = y + low B^T           `expand`: y read and out written once
    dlow, dB = g B, g^T low     `expand_adjoint`: both in one pass over g
    dA = dlow^T x               `outer`: one pass over x

Each is bound by the bytes of its large operand, of which it reads every element once. The rank is padded to a multiple
of what the tensor cores take, so stacks of different ranks are padded with zeros, as `finetuna_func.stack` does.
Scales stay outside: ``low`` is small. The grouped products are those of Punica (arXiv 2310.18547), S-LoRA (2311.03285)
and LoRAFusion (2510.00206); the kernels are our own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetuna_func.kernels._tiles import INTERPRETED, adapter_tile, count_tiles, processors, rank_block, sum_tiles


@triton.jit(do_not_specialize=["n"])
def _project_kernel(
    x, factor, out, ends, total, rows, n, width, x_row, f_adapter, f_col, f_rank,
    R: tl.constexpr, BLOCK_R: tl.constexpr, N_POW2: tl.constexpr, RAGGED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    own, first, stop = adapter_tile(tl.program_id(0), ends, total, rows, n, BLOCK_M, N_POW2, RAGGED)
    if first >= stop:
        return
    row = first + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_K)
    # Rows past the end read the last row again: no mask in the loop, and nothing of them is stored.
    x_at = x + tl.minimum(row, stop - 1).to(tl.int64)[:, None] * x_row + col[None, :]
    f_at = factor + own.to(tl.int64) * f_adapter + col[:, None] * f_col + rank[None, :] * f_rank
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, width, BLOCK_K):
        if EVEN:
            x_tile = tl.load(x_at)
            f_tile = tl.load(f_at, mask=rank[None, :] < R, other=0.0)
        else:
            x_tile = tl.load(x_at, mask=(k + col < width)[None, :], other=0.0)
            f_tile = tl.load(f_at, mask=(k + col < width)[:, None] & (rank[None, :] < R), other=0.0)
        acc = tl.dot(x_tile, f_tile, acc)
        x_at += BLOCK_K
        f_at += BLOCK_K * f_col
    out_at = out + row.to(tl.int64)[:, None] * R + rank[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=(row < stop)[:, None] & (rank < R)[None, :])


@triton.jit(do_not_specialize=["n"])
def _expand_kernel(
    y, low, factor, out, ends, total, rows, n, width, y_row, f_adapter, f_col, f_rank,
    R: tl.constexpr, BLOCK_R: tl.constexpr, N_POW2: tl.constexpr, RAGGED: tl.constexpr, EVEN: tl.constexpr,
    ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    own, first, stop = adapter_tile(tl.program_id(1), ends, total, rows, n, BLOCK_M, N_POW2, RAGGED)
    if first >= stop:
        return
    row = first + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, BLOCK_R)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < stop)[:, None]
    if not EVEN:
        inside = inside & (col < width)[None, :]
    far = row.to(tl.int64)[:, None]
    low_tile = tl.load(low + far * R + rank[None, :], mask=(row < stop)[:, None] & (rank < R)[None, :], other=0.0)
    f_at = factor + own.to(tl.int64) * f_adapter + rank[:, None] * f_rank + col[None, :] * f_col
    f_tile = tl.load(f_at, mask=(rank < R)[:, None] & (col < width)[None, :], other=0.0)
    acc = tl.dot(low_tile, f_tile)
    if ADD:
        acc += tl.load(y + far * y_row + col[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + far * width + col[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _adjoint_kernel(
    g, low, factor, d_low, d_factor, ends, total, rows, n, width, g_row, f_adapter, f_col, f_rank, cols,
    R: tl.constexpr, BLOCK_R: tl.constexpr, N_POW2: tl.constexpr, RAGGED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(1), tl.program_id(0)
    own, first, stop = adapter_tile(tile, ends, total, rows, n, BLOCK_M, N_POW2, RAGGED)
    if first >= stop:
        return
    row = first + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, BLOCK_R)
    far = row.to(tl.int64)[:, None]
    kept = (row < stop)[:, None] & (rank < R)[None, :]
    low_tile = tl.load(low + far * R + rank[None, :], mask=kept, other=0.0)  # zeros: rows past the end add nothing
    g_rows = g + tl.minimum(row, stop - 1).to(tl.int64)[:, None] * g_row
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(split * cols, tl.minimum(split * cols + cols, width), BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        f_at = factor + own.to(tl.int64) * f_adapter + col[:, None] * f_col + rank[None, :] * f_rank
        if EVEN:
            g_tile = tl.load(g_rows + col[None, :])
            f_tile = tl.load(f_at, mask=(rank < R)[None, :], other=0.0)
        else:
            g_tile = tl.load(g_rows + col[None, :], mask=(col < width)[None, :], other=0.0)
            f_tile = tl.load(f_at, mask=(col < width)[:, None] & (rank < R)[None, :], other=0.0)
        acc = tl.dot(g_tile, f_tile, acc)
        part = tl.dot(tl.trans(g_tile), low_tile)
        d_at = d_factor + tile.to(tl.int64) * width * R + col[:, None] * R + rank[None, :]
        tl.store(d_at, part.to(d_factor.dtype.element_ty), mask=(col < width)[:, None] & (rank < R)[None, :])
    low_at = d_low + split.to(tl.int64) * total * R + far * R + rank[None, :]
    tl.store(low_at, acc.to(d_low.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["n"])
def _outer_kernel(
    low, x, out, ends, total, rows, n, width, x_row, o_tile, o_col, o_rank,
    R: tl.constexpr, BLOCK_R: tl.constexpr, N_POW2: tl.constexpr, RAGGED: tl.constexpr, EVEN: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    _, first, stop = adapter_tile(tile, ends, total, rows, n, CHUNK, N_POW2, RAGGED)
    if first >= stop:
        return
    rank = tl.arange(0, BLOCK_R)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for start in range(first, tl.minimum(first + CHUNK, stop), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        kept = (row < stop)[:, None] & (rank < R)[None, :]
        low_tile = tl.load(low + row.to(tl.int64)[:, None] * R + rank[None, :], mask=kept, other=0.0)
        x_at = x + tl.minimum(row, stop - 1).to(tl.int64)[:, None] * x_row + col[None, :]
        x_tile = tl.load(x_at) if EVEN else tl.load(x_at, mask=(col < width)[None, :], other=0.0)
        acc = tl.dot(tl.trans(x_tile), low_tile, acc)
    out_at = out + tile.to(tl.int64) * o_tile + col[:, None] * o_col + rank[None, :] * o_rank
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=(col < width)[:, None] & (rank < R)[None, :])


def launch_project(
    x: Tensor, factor: Tensor, ends: Tensor | None, *, block_m: int = 64, block_k: int = 128, warps: int = 4,
    stages: int = 4,
) -> Tensor:  # fmt: skip
    """Returns ``x @ factor``, ``(T, R)`` in the dtype of ``x``; ``factor (N, width, R)``, of any strides."""
    total, width = x.shape
    n, _, rank = factor.shape
    out = x.new_empty(total, rank)
    if 0 in (total, rank):
        return out
    factor = factor.to(x.dtype)
    x = _rows_contiguous(x)
    _project_kernel[(count_tiles(total, n, block_m, ends),)](
        x, factor, out, ends, total, total // n, n, width, x.stride(0), *factor.stride(),
        R=rank, BLOCK_R=rank_block(rank), N_POW2=triton.next_power_of_2(n), RAGGED=ends is not None,
        EVEN=width % block_k == 0, BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def launch_expand(
    y: Tensor | None, low: Tensor, factor: Tensor, ends: Tensor | None, *, out: Tensor | None = None,
    block_m: int = 64, block_n: int = 128, warps: int = 4,
) -> Tensor:  # fmt: skip
    """Returns ``y + low @ factor.mT``, ``(T, width)``, or without ``y`` the product; ``out`` may be ``y`` itself."""
    total, rank = low.shape
    n, width, _ = factor.shape
    if out is None:
        out = low.new_empty(total, width)
    if 0 in (total, width):
        return out
    if rank == 0:
        return out.zero_() if y is None else out.copy_(y)
    factor, low = factor.to(low.dtype), low.contiguous()
    y = None if y is None else _rows_contiguous(y)
    _expand_kernel[(triton.cdiv(width, block_n), count_tiles(total, n, block_m, ends))](
        y, low, factor, out, ends, total, total // n, n, width, 0 if y is None else y.stride(0), *factor.stride(),
        R=rank, BLOCK_R=rank_block(rank), N_POW2=triton.next_power_of_2(n), RAGGED=ends is not None,
        EVEN=width % block_n == 0, ADD=y is not None, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out


def launch_adjoint(
    g: Tensor, low: Tensor, factor: Tensor, ends: Tensor | None, *, block_m: int = 128, block_n: int = 64,
    warps: int = 4, stages: int = 3, per_processor: int = 2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns ``g @ factor`` and ``g.mT @ low``, the latter per adapter in the dtype of ``factor``, in one pass."""
    total, width = g.shape
    n, _, rank = factor.shape
    d_low, d_factor = low.new_empty(total, rank), factor.new_empty(n, width, rank)
    if 0 in (total, width, rank):
        return d_low.zero_(), d_factor.zero_()
    if not INTERPRETED and total // n < block_m and ends is None:
        block_m = max(16, triton.next_power_of_2(total // n))
    tiles = count_tiles(total, n, block_m, ends)
    blocks = triton.cdiv(width, block_n)
    splits = min(blocks, max(1, round(per_processor * processors(g.device) / tiles)))
    cols = triton.cdiv(blocks, splits) * block_n
    splits = triton.cdiv(width, cols)
    one_tile = ends is None and tiles == n
    low_parts = d_low.unsqueeze(0) if splits == 1 else g.new_empty(splits, total, rank, dtype=torch.float32)
    parts = d_factor if one_tile else g.new_empty(tiles, width, rank, dtype=torch.float32)
    own, g, low = factor.to(g.dtype), _rows_contiguous(g), low.contiguous()
    _adjoint_kernel[(splits, tiles)](
        g, low, own, low_parts, parts, ends, total, total // n, n, width, g.stride(0), *own.stride(), cols,
        R=rank, BLOCK_R=rank_block(rank), N_POW2=triton.next_power_of_2(n), RAGGED=ends is not None,
        EVEN=width % block_n == 0, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        sum_tiles(low_parts, d_low.unsqueeze(0), None, splits, splits, 1)
    if not one_tile:
        sum_tiles(parts, d_factor, ends, total, total // n, block_m)
    return d_low, d_factor


def launch_outer(
    low: Tensor, x: Tensor, n: int, ends: Tensor | None, dtype: torch.dtype, *, chunk: int = 512, block_m: int = 64,
    block_n: int = 64, warps: int = 4, stages: int = 4,
) -> Tensor:  # fmt: skip
    """Returns ``low.mT @ x`` of each adapter's rows, ``(N, R, width)`` in ``dtype``."""
    total, width = x.shape
    rank = low.shape[1]
    out = x.new_empty(n, rank, width, dtype=dtype)
    if 0 in (total, width, rank):
        return out.zero_()
    tiles = count_tiles(total, n, chunk, ends)
    one_tile = ends is None and tiles == n
    parts = out if one_tile else x.new_empty(tiles, rank, width, dtype=torch.float32)
    low, x = low.contiguous(), _rows_contiguous(x)
    _outer_kernel[(triton.cdiv(width, block_n), tiles)](
        low, x, parts, ends, total, total // n, n, width, x.stride(0), rank * width, 1, width,
        R=rank, BLOCK_R=rank_block(rank), N_POW2=triton.next_power_of_2(n), RAGGED=ends is not None,
        EVEN=width % block_n == 0, CHUNK=chunk, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out if one_tile else sum_tiles(parts, out, ends, total, total // n, chunk)


@torch.library.custom_op("finetuna_func::project", mutates_args=())
def project(x: Tensor, a: Tensor, ends: Tensor | None = None) -> Tensor:
    """Returns ``x @ A.T`` of each row's own adapter, ``(T, R)`` in the dtype of ``x``; differentiable once.

    Args:
        x: ``(T, K)``, bfloat16 or float16, rows of one adapter next to one another.
        a: ``(N, R, K)``, floating point; its gradient is summed in float32 and has its dtype.
        ends: ``(N,)``, int32: after which row each adapter's rows end; ``None`` for ``T / N`` rows each.

    Raises:
        TypeError: A dtype that the tensor cores do not take, or ``ends`` of another than int32.
        ValueError: Shapes that do not belong together, or tensors that are not on one GPU.
    """
    _check("project", x, a, ends, "a", a.ndim == 3 and x.shape[-1] == a.shape[-1])
    return launch_project(x, a.mT, ends)


@torch.library.custom_op("finetuna_func::expand", mutates_args=())
def expand(y: Tensor, low: Tensor, b: Tensor, ends: Tensor | None = None) -> Tensor:
    """Returns ``y + low @ B.T`` of each row's own adapter, ``(T, O)``, a new tensor; differentiable once.

    Args:
        y: ``(T, O)``, bfloat16 or float16.
        low: ``(T, R)``, of the same dtype.
        b: ``(N, O, R)``, floating point; its gradient is summed in float32 and has its dtype.
        ends: As in `project`.

    Raises:
        TypeError: As in `project`, or ``y`` and ``low`` differ in dtype.
        ValueError: As in `project`.
    """
    fits = b.ndim == 3 and y.ndim == 2 and (y.shape[0], low.shape[-1], y.shape[1]) == (low.shape[0], *b.shape[:0:-1])
    _check("expand", low, b, ends, "b", fits, y)
    return launch_expand(y, low, b, ends)


@torch.library.custom_op("finetuna_func::expand_adjoint", mutates_args=())
def expand_adjoint(g: Tensor, low: Tensor, b: Tensor, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the gradients of `expand` for ``low`` and ``b``, from ``g (T, O)``."""
    return launch_adjoint(g, low, b, ends)


@torch.library.custom_op("finetuna_func::spread", mutates_args=())
def spread(low: Tensor, a: Tensor, ends: Tensor | None = None) -> Tensor:
    """Returns the gradient of `project` for ``x``: ``low @ A``, ``(T, K)``."""
    return launch_expand(None, low, a.mT, ends)


@torch.library.custom_op("finetuna_func::outer", mutates_args=())
def outer(low: Tensor, x: Tensor, a: Tensor, ends: Tensor | None = None) -> Tensor:
    """Returns the gradient of `project` for ``a``: ``low.T @ x`` of each adapter's rows, like ``a``."""
    return launch_outer(low, x, a.shape[0], ends, a.dtype)


@project.register_fake
def _(x: Tensor, a: Tensor, ends: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[1])


@expand.register_fake
def _(y: Tensor, low: Tensor, b: Tensor, ends: Tensor | None = None) -> Tensor:
    return y.new_empty(y.shape)


@expand_adjoint.register_fake
def _(g: Tensor, low: Tensor, b: Tensor, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return low.new_empty(low.shape), b.new_empty(b.shape)


@spread.register_fake
def _(low: Tensor, a: Tensor, ends: Tensor | None = None) -> Tensor:
    return low.new_empty(low.shape[0], a.shape[2])


@outer.register_fake
def _(low: Tensor, x: Tensor, a: Tensor, ends: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _save_expand(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])


def _project_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, a, ends = ctx.saved_tensors
    dx = spread(g, a, ends) if ctx.needs_input_grad[0] else None
    da = outer(g, x, a, ends) if ctx.needs_input_grad[1] else None
    return dx, da, None


def _expand_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    low, b, ends = ctx.saved_tensors
    d_low, db = expand_adjoint(g, low, b, ends) if any(ctx.needs_input_grad[1:3]) else (None, None)
    return g, d_low, db, None


project.register_autograd(_project_backward, setup_context=_save)
expand.register_autograd(_expand_backward, setup_context=_save_expand)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(
    op: str, rows: Tensor, factor: Tensor, ends: Tensor | None, name: str, fits: bool, y: Tensor | None = None
) -> None:
    if rows.dtype not in (torch.bfloat16, torch.float16) or (y is not None and y.dtype != rows.dtype):
        given = rows.dtype if y is None else f"{y.dtype} and {rows.dtype}"
        raise TypeError(f"{op}: expected rows in bfloat16 or float16, got {given}; the composite takes any dtype.")
    if not factor.is_floating_point() or (ends is not None and ends.dtype != torch.int32):
        raise TypeError(
            f"{op}: expected {name} in floating point and ends in int32, got {factor.dtype} and "
            f"{None if ends is None else ends.dtype}."
        )
    if rows.ndim != 2 or not fits:
        shapes = [tuple(t.shape) for t in (y, rows, factor) if t is not None]
        raise ValueError(f"{op}: rows and factors of shapes {shapes} do not belong together.")
    n = factor.shape[0]
    if n == 0 or (ends is None and rows.shape[0] % n) or (ends is not None and ends.shape != (n,)):
        raise ValueError(
            f"{op}: {rows.shape[0]} rows cannot be divided among {n} adapters; give ends, int32 of shape ({n},)."
        )
    devices = {t.device for t in (rows, factor, y, ends) if t is not None}
    if len(devices) > 1 or (rows.device.type != "cuda" and not INTERPRETED):
        raise ValueError(f"{op}: expected all tensors on one GPU, got {sorted(map(str, devices))}.")
