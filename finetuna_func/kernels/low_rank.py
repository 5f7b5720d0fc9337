"""An adapter's products with what is as wide as its layer's output, each at the rate of reading or writing it.

    expand:    low @ B^T                       contract:  dy @ B  and  dy^T low,  from one reading of dy

Between a few columns and many, such products are memory traffic: a library of matrix products reads dy once for each
of the last two, and for the first has its workspace cleared before. Layers side by side (queries, keys and values) are
one launch. Rows of one adapter are next to one another, and each of N adapters has as many; a tile never spans two, nor
two layers. Sums are in float32 and in a fixed order, without atomics; those over tiles are left to the compiler. (The
expand and shrink of Punica, arXiv 2310.18547; the kernels are our own.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from finetuna_func.kernels import padded

BLOCK_R = 64  # columns of low at a time
EXPAND_M, EXPAND_N, EXPAND_WARPS = 64, 128, 4
CONTRACT_M, CONTRACT_N, CONTRACT_WARPS, CONTRACT_STAGES = 256, 64, 8, 1
SPLITS = 8  # of the columns, where rows alone would leave multiprocessors idle
SIDE_BY_SIDE = 3  # layers of one launch
SHARED = 256  # which their widths are multiples of, so that tiles of each are whole


def runs(widths: Sequence[int], ranks: Sequence[int]) -> list[slice]:
    """Returns which layers side by side are one launch: up to three of one rank, if their widths are whole tiles.

    Args:
        widths: Of what each of the layers puts out.
        ranks: Of their adapters.

    Example:
        >>> runs([2048, 512, 512], [16, 16, 16])
        [slice(0, 3, None)]
        >>> runs([2048, 500, 512], [16, 16, 8])
        [slice(0, 1, None), slice(1, 2, None), slice(2, 3, None)]
    """
    found: list[slice] = []
    for i, width in enumerate(widths):
        start = found[-1].start if found else 0
        fits = all(own % SHARED == 0 for own in (widths[start], width)) and ranks[start] == ranks[i]
        if found and fits and i - start < SIDE_BY_SIDE:
            found[-1] = slice(start, i + 1)
        else:
            found.append(slice(i, i + 1))
    return found


@triton.jit
def _layer(col, end, next_end):
    """Which of up to three layers side by side a column is of."""
    return (col >= end).to(tl.int32) + (col >= next_end).to(tl.int32)


@triton.jit
def _expand_kernel(
    low, factors, y, columns, first, y_columns, y_first, rows, width, end, next_end,
    R: tl.constexpr, UPRIGHT: tl.constexpr, ADD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks, tiles = tl.cdiv(width, BLOCK_N), tl.cdiv(rows, BLOCK_M)
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    own = (tile // tiles).to(tl.int64)
    row, col = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, kept = (row < rows)[:, None], (col < width)[None, :]
    far = (own * rows + row)[:, None]
    first += _layer(block * BLOCK_N, end, next_end) * R
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, R, BLOCK_R):
        of = start + tl.arange(0, BLOCK_R)
        left = tl.load(low + far * columns + first + of[None, :], mask=inside & (of < R)[None, :], other=0.0)
        at = of[:, None] * width + col[None, :] if UPRIGHT else col[None, :] * R + of[:, None]
        right = tl.load(factors + own * R * width + at, mask=kept & (of < R)[:, None], other=0.0)
        acc = tl.dot(left, right, acc)
    place = y + far * y_columns + y_first + col[None, :]
    if ADD:
        acc += tl.load(place, mask=inside & kept, other=0.0).to(tl.float32)
    tl.store(place, acc.to(y.dtype.element_ty), mask=inside & kept)


@triton.jit
def _contract_kernel(
    dy, low, b, d_low, d_b, dy_columns, dy_first, columns, first, total, rows, width, cols, end, next_end,
    R: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    tiles = tl.cdiv(rows, BLOCK_M)
    own = tile // tiles
    row, of = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    inside, held = (row < rows)[:, None], (of < R)[None, :]
    far = (own * rows + row)[:, None]
    first += _layer(part * cols, end, next_end) * R
    own_low = tl.load(low + far * columns + first + of[None, :], mask=inside & held, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(part * cols, tl.minimum(part * cols + cols, width), BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        kept = (col < width)[:, None]
        g = tl.load(dy + far * dy_columns + dy_first + col[None, :], mask=inside & (col < width)[None, :], other=0.0)
        b_tile = tl.load(b + (own * width + col[:, None]) * R + of[None, :], mask=kept & held, other=0.0)
        acc = tl.dot(g, b_tile, acc)
        tl.store(d_b + (tile * width + col[:, None]) * R + of[None, :], tl.dot(tl.trans(g), own_low), mask=kept & held)
    tl.store(d_low + (part * total + far) * R + of[None, :], acc, mask=inside & held)


@triton_op("finetuna_func::expand_", mutates_args={"y"})
def expand_(
    y: Tensor, at: int, low: Tensor, first: int, factors: Tensor, widths: Sequence[int], upright: bool, add: bool
) -> None:
    """Sets some columns of y to the products of some columns of low with the factors of each adapter, or adds these.

    Args:
        y: ``(N * rows, all columns)``, bfloat16 or float16, contiguous like all others.
        at: The first of the ``width`` columns of y that are set.
        low: ``(N * rows, all columns)``.
        first: The first of the columns of low that are multiplied, r for each layer.
        factors: ``(N, width, r)``; upright ``(N, r, width)``.
        widths: Those of the layers side by side, one of `runs`, whose sum ``width`` is.
        upright: Whether the factors are so.
        add: Whether they are added to what y holds.
    """
    n, width, rank = (factors if not upright else factors.mT).shape
    rows = y.shape[0] // n
    wrap_triton(_expand_kernel)[(n * -(-rows // EXPAND_M) * -(-width // EXPAND_N),)](
        low, factors, y, low.shape[1], first, y.shape[1], at, rows, width, *_ends(widths),
        R=rank, UPRIGHT=upright, ADD=add, BLOCK_R=min(BLOCK_R, padded(rank)), BLOCK_M=EXPAND_M, BLOCK_N=EXPAND_N,
        num_warps=EXPAND_WARPS,
    )  # fmt: skip


@triton_op("finetuna_func::contract", mutates_args={})
def contract(
    dy: Tensor, low: Tensor, b: Tensor, widths: Sequence[int], dy_first: int, first: int
) -> tuple[Tensor, Tensor]:
    """Returns ``dy @ B`` and ``dy.T @ low`` of some columns of dy and low, in parts, in float32.

    The sum over the second axis is to be taken of the latter, ``(N, parts, width, r)``; and of the former, ``(parts,
    N * rows, r)``, over as many of the first as each layer has of `parts_of`.

    Args:
        dy: ``(N * rows, all columns)``, bfloat16 or float16, contiguous like all others.
        low: ``(N * rows, all columns)``.
        b: ``(N, width, r)``.
        widths: Those of the layers side by side, one of `runs`, whose sum ``width`` is.
        dy_first: The first of the ``width`` columns of dy that are multiplied.
        first: The first of the columns of low, r for each layer.
    """
    n, width, rank = b.shape
    total, rows = dy.shape[0], dy.shape[0] // n
    tiles, parts, cols = -(-rows // CONTRACT_M), sum(parts_of(widths)), _columns(widths)
    d_low = dy.new_empty(parts, total, rank, dtype=torch.float32)
    d_b = dy.new_empty(n, tiles, width, rank, dtype=torch.float32)
    wrap_triton(_contract_kernel)[(n * tiles * parts,)](
        dy, low, b, d_low, d_b, dy.shape[1], dy_first, low.shape[1], first, total, rows, width, cols, *_ends(widths),
        R=rank, BLOCK_R=padded(rank), PARTS=parts, BLOCK_M=CONTRACT_M, BLOCK_N=CONTRACT_N,
        num_warps=CONTRACT_WARPS, num_stages=CONTRACT_STAGES,
    )  # fmt: skip
    return d_low, d_b


def parts_of(widths: Sequence[int]) -> list[int]:
    """Returns how many parts of the columns of each layer `contract` sums over apart.

    Example:
        >>> parts_of([2048, 512, 512]), parts_of([2048])
        ([8, 2, 2], [8])
    """
    return [-(-width // _columns(widths)) for width in widths]


def _columns(widths: Sequence[int]) -> int:
    """Of a part: whole blocks, so many that there are `SPLITS` parts, and of several layers a divisor of each."""
    blocks = [-(-width // CONTRACT_N) for width in widths]
    each = -(-sum(blocks) // SPLITS)
    if len(blocks) > 1:
        shared = math.gcd(*blocks)
        each = max(own for own in range(1, each + 1) if shared % own == 0)
    return each * CONTRACT_N


def _ends(widths: Sequence[int]) -> tuple[int, int]:
    """The columns at which the second and the third layer begin; where there is none, the end of all."""
    total = sum(widths)
    return (widths[0] if len(widths) > 1 else total), (widths[0] + widths[1] if len(widths) > 2 else total)
