"""Rows divided among adapters, as tiles; and sums over tiles in a fixed order.

Rows of one adapter are next to one another. Either each of N adapters has as many (a stack), or ``ends``, int32
``(N,)`` on the device, says after which row each adapter's rows end, as ``offs`` of ``torch._grouped_mm``; a row
belongs to exactly one adapter, and the last one's reach to the end. That they do not decrease is not checked, since
it would wait for the device: wrong ends give wrong numbers, though never an access outside the tensors. A tile never
spans two adapters. With ``ends`` the number of tiles is not known on the host, so a few programs more than needed are
started.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def rows_of_adapters(ends, total, n, N_POW2: tl.constexpr):
    """Returns all adapters' numbers, first rows and the rows after their last; never rows that there are not."""
    adapter = tl.arange(0, N_POW2)
    end = tl.load(ends + adapter, mask=adapter < n - 1, other=total)
    start = tl.load(ends + adapter - 1, mask=(adapter > 0) & (adapter < n), other=0)
    start = tl.where(adapter < n, start, total)
    return adapter, tl.minimum(tl.maximum(start, 0), total), tl.minimum(tl.maximum(end, 0), total)


@triton.jit
def adapter_tile(
    tile, ends, total, rows, n, BLOCK: tl.constexpr, N_POW2: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """Returns a tile's adapter, its first row, and the row after the adapter's last; no rows if it is one too many."""
    if RAGGED:
        adapter, start, end = rows_of_adapters(ends, total, n, N_POW2)
        tiles = (tl.maximum(end - start, 0) + BLOCK - 1) // BLOCK
        before = tl.cumsum(tiles, 0) - tiles
        mine = (before <= tile) & (tile < before + tiles)
        own = tl.sum(tl.where(mine, adapter, 0), 0)
        first = tl.sum(tl.where(mine, start + (tile - before) * BLOCK, 0), 0)
        stop = tl.sum(tl.where(mine, end, 0), 0)
    else:
        per_adapter = tl.cdiv(rows, BLOCK)
        own = tile // per_adapter
        first = own * rows + (tile % per_adapter) * BLOCK
        stop = own * rows + rows
    return own, first, stop


@triton.jit
def tiles_of_adapter(
    own, ends, total, rows, n, BLOCK: tl.constexpr, N_POW2: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """Returns an adapter's first tile and how many it has."""
    if RAGGED:
        adapter, start, end = rows_of_adapters(ends, total, n, N_POW2)
        tiles = (tl.maximum(end - start, 0) + BLOCK - 1) // BLOCK
        first = tl.sum(tl.where(adapter < own, tiles, 0), 0)
        count = tl.sum(tl.where(adapter == own, tiles, 0), 0)
    else:
        count = tl.cdiv(rows, BLOCK)
        first = own * count
    return first, count


@triton.jit(do_not_specialize=["n"])
def _sum_tiles_kernel(
    partial, out, ends, total, rows, n, size,
    TILE: tl.constexpr, N_POW2: tl.constexpr, RAGGED: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    first, count = tiles_of_adapter(own, ends, total, rows, n, TILE, N_POW2, RAGGED)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    step = tl.arange(0, AT_ONCE)
    acc = tl.zeros([BLOCK], tl.float32)
    for done in range(0, count, AT_ONCE):
        tile = first + done + step
        where = partial + tile.to(tl.int64)[:, None] * size + at[None, :]
        inside = (done + step < count)[:, None] & (at < size)[None, :]
        acc += tl.sum(tl.load(where, mask=inside, other=0.0), 0)
    tl.store(out + own.to(tl.int64) * size + at, acc.to(out.dtype.element_ty), mask=at < size)


def sum_tiles(partial: Tensor, out: Tensor, ends: Tensor | None, total: int, rows: int, tile: int) -> Tensor:
    """Fills ``out (N, ...)`` with the sums of each adapter's own tiles ``partial (tiles, ...)``, float32."""
    n = out.shape[0]
    size = out[0].numel()
    block = min(1024, max(16, triton.next_power_of_2(triton.cdiv(size * n, 4 * processors(out.device)))))
    _sum_tiles_kernel[(n, triton.cdiv(size, block))](
        partial, out, ends, total, rows, n, size,
        TILE=tile, N_POW2=triton.next_power_of_2(n), RAGGED=ends is not None, AT_ONCE=8, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return out


def count_tiles(total: int, n: int, tile: int, ends: Tensor | None) -> int:
    """Returns how many tiles there are, at most."""
    return total // tile + n if ends is not None else n * triton.cdiv(total // n, tile)


def rank_block(rank: int) -> int:
    """Returns the width of a tile that holds a rank: tensor cores take 16 columns at least."""
    return max(16, triton.next_power_of_2(rank))


@functools.cache
def processors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
