"""What lies between the frozen products of a gated MLP with adapters, one pass over the wide tensors each way.

    g = gu[:, :F] + low_g Bg^T      u = gu[:, F:] + low_u Bu^T      h = act(g) * u      low_h = h A^T

``gu`` is the frozen product of gate and up, F wide each; an adapter's products are a few operations per number of it,
which tensor cores do while the next numbers arrive. Apart from a kernel like this, each of them is a pass of its own
over what is F wide: three forward and six backward, beside that of the activation. Backward, h is computed again in the
pass that needs it, so that nobody keeps it.

Rows of one adapter are next to one another, and each of N adapters has as many; a tile never spans two. Sums are in
float32 and in a fixed order, without atomics: the same inputs give the same bits. Sums over tiles are left to the
compiler, which sees through a ``triton_op``; the parts of one, the cotangents of ``low``, are many, and rounded to 16
bits. The grouped products are those of Punica (arXiv 2310.18547) and LoRAFusion (2510.00206); the kernels are our own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import triton_op, wrap_triton

from finetuna_func.kernels import padded

# Tiles of two warps, for which Triton takes the older instructions of tensor cores. These multiply registers; those of
# four warps read shared memory, and wait for one another before and after each of eight small products.
BLOCK_M = 32
BLOCK_N = 64  # forward, twice as many for small ranks
SMALL = 32  # ranks whose sums leave registers to two warps
SPLITS = 4  # of the columns, forward: with fewer programs, multiprocessors would idle
CHUNK = 1024  # rows whose sums one program forms, backward
ENOUGH = 512  # programs of a launch, backward


@triton.jit
def _slope(g, GELU: tl.constexpr):
    """What the sigmoid in an activation ``g * sigmoid(z(g))`` is of, and its derivative."""
    if GELU:  # the tanh form, since (1 + tanh z) / 2 = sigmoid(2 z)
        z = 1.5957691216057308 * g * (1.0 + 0.044715 * g * g)
        dz = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    else:
        z = g
        dz = tl.full(g.shape, 1.0, tl.float32)
    return z, dz


@triton.jit
def _forward_kernel(
    gu, low, b_g, b_u, a, h, low_h, total, rows, width, cols,
    RG: tl.constexpr, RU: tl.constexpr, RH: tl.constexpr, BG: tl.constexpr, BU: tl.constexpr, BH: tl.constexpr,
    GELU: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    per_adapter = tl.cdiv(rows, BLOCK_M)
    own = (tile // per_adapter).to(tl.int64)
    row = (tile % per_adapter) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < rows)[:, None]
    far = (own * rows + row)[:, None]
    of_g, of_u, of_h = tl.arange(0, BG), tl.arange(0, BU), tl.arange(0, BH)
    low_g = tl.load(low + far * (RG + RU) + of_g[None, :], mask=inside & (of_g < RG)[None, :], other=0.0)
    low_u = tl.load(low + far * (RG + RU) + RG + of_u[None, :], mask=inside & (of_u < RU)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BH], tl.float32)
    for start in range(part * cols, tl.minimum(part * cols + cols, width), BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        kept = (col < width)[None, :]
        g_at = gu + far * (2 * width) + col[None, :]
        g = tl.load(g_at, mask=inside & kept, other=0.0)
        u = tl.load(g_at + width, mask=inside & kept, other=0.0)
        bg_at = b_g + own * width * RG + col[None, :] * RG + of_g[:, None]
        bu_at = b_u + own * width * RU + col[None, :] * RU + of_u[:, None]
        bg = tl.load(bg_at, mask=kept & (of_g < RG)[:, None], other=0.0)
        bu = tl.load(bu_at, mask=kept & (of_u < RU)[:, None], other=0.0)
        g = tl.dot(low_g, bg, g.to(tl.float32))
        u = tl.dot(low_u, bu, u.to(tl.float32))
        z, _ = _slope(g, GELU)
        y = (g * tl.sigmoid(z) * u).to(h.dtype.element_ty)
        tl.store(h + far * width + col[None, :], y, mask=inside & kept)
        a_at = a + own * RH * width + of_h[None, :] * width + col[:, None]
        a_tile = tl.load(a_at, mask=(col < width)[:, None] & (of_h < RH)[None, :], other=0.0)
        acc = tl.dot(y, a_tile, acc)
    at = low_h + (part.to(tl.int64) * total + far) * RH + of_h[None, :]
    tl.store(at, acc, mask=inside & (of_h < RH)[None, :])


@triton.jit
def _backward_kernel(
    gu, low, b_g, b_u, a, d_h, d_low_h, d_g, d_u, d_low, d_bg, d_bu, d_a, first_own, total, rows, width, chunk,
    RG: tl.constexpr, RU: tl.constexpr, RH: tl.constexpr, BG: tl.constexpr, BU: tl.constexpr, BH: tl.constexpr,
    GELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks, chunks = tl.cdiv(width, BLOCK_N), tl.cdiv(rows, chunk)
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    tile += first_own * chunks
    own, first = (tile // chunks).to(tl.int64), (tile % chunks) * chunk
    col = block * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = (col < width)[None, :]
    of_g, of_u, of_h = tl.arange(0, BG), tl.arange(0, BU), tl.arange(0, BH)
    in_g, in_u, in_h = (of_g < RG)[None, :], (of_u < RU)[None, :], (of_h < RH)[None, :]
    bg_at, bu_at = own * width * RG + col[:, None] * RG, own * width * RU + col[:, None] * RU
    bg = tl.load(b_g + bg_at + of_g[None, :], mask=(col < width)[:, None] & in_g, other=0.0)
    bu = tl.load(b_u + bu_at + of_u[None, :], mask=(col < width)[:, None] & in_u, other=0.0)
    a_at = own * RH * width + of_h[:, None] * width + col[None, :]
    a_tile = tl.load(a + a_at, mask=kept & (of_h < RH)[:, None], other=0.0)
    acc_g = tl.zeros([BLOCK_N, BG], tl.float32)
    acc_u = tl.zeros([BLOCK_N, BU], tl.float32)
    acc_h = tl.zeros([BLOCK_N, BH], tl.float32)
    for start in range(first, tl.minimum(first + chunk, rows), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None]
        far = (own * rows + row)[:, None]
        g_at, h_at = far * (2 * width) + col[None, :], far * width + col[None, :]
        g = tl.load(gu + g_at, mask=inside & kept, other=0.0)
        u = tl.load(gu + g_at + width, mask=inside & kept, other=0.0)
        dh = tl.load(d_h + h_at, mask=inside & kept, other=0.0)
        low_g = tl.load(low + far * (RG + RU) + of_g[None, :], mask=inside & in_g, other=0.0)
        low_u = tl.load(low + far * (RG + RU) + RG + of_u[None, :], mask=inside & in_u, other=0.0)
        dl = tl.load(d_low_h + far * RH + of_h[None, :], mask=inside & in_h, other=0.0)
        g = tl.dot(low_g, tl.trans(bg), g.to(tl.float32))
        u = tl.dot(low_u, tl.trans(bu), u.to(tl.float32))
        dh = tl.dot(dl, a_tile, dh.to(tl.float32))
        z, dz = _slope(g, GELU)
        s = tl.sigmoid(z)
        act = g * s
        h = (act * u).to(d_g.dtype.element_ty)
        dg = (dh * u * (s + act * (1.0 - s) * dz)).to(d_g.dtype.element_ty)
        du = (dh * act).to(d_g.dtype.element_ty)
        tl.store(d_g + h_at, dg, mask=inside & kept)
        tl.debug_barrier()  # all warps have read what d_u may replace
        tl.store(d_u + h_at, du, mask=inside & kept)
        at = d_low + (block.to(tl.int64) * total + far - first_own * rows) * (RG + RU)
        tl.store(at + of_g[None, :], tl.dot(dg, bg).to(d_low.dtype.element_ty), mask=inside & in_g)
        tl.store(at + RG + of_u[None, :], tl.dot(du, bu).to(d_low.dtype.element_ty), mask=inside & in_u)
        acc_g = tl.dot(tl.trans(dg), low_g, acc_g)
        acc_u = tl.dot(tl.trans(du), low_u, acc_u)
        acc_h = tl.dot(tl.trans(h), dl, acc_h)
    tile = tile.to(tl.int64)
    far_col, kept_col = col[:, None], (col < width)[:, None]
    tl.store(d_bg + (tile * width + far_col) * RG + of_g[None, :], acc_g, mask=kept_col & in_g)
    tl.store(d_bu + (tile * width + far_col) * RU + of_u[None, :], acc_u, mask=kept_col & in_u)
    tl.store(d_a + tile * RH * width + of_h[None, :] * width + far_col, acc_h, mask=kept_col & in_h)


@triton_op("finetuna_func::gated", mutates_args={})
def gated(gu: Tensor, low: Tensor, b_g: Tensor, b_u: Tensor, a: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Returns h ``(N * rows, F)`` and the parts, float32 ``(parts, N * rows, r)``, whose sum is ``h @ A.T``.

    Args:
        gu: ``(N * rows, 2 F)``, bfloat16 or float16, contiguous like all others.
        low: ``(N * rows, r of the gate + r of up)``.
        b_g: ``(N, F, r)`` of the gate.
        b_u: ``(N, F, r)`` of up.
        a: ``(N, r, F)`` of down.
        gelu: Whether the activation is GELU in its tanh form, and not SiLU.
    """
    (n, width, rank_g), rank_u, rank_h = b_g.shape, b_u.shape[-1], a.shape[-2]
    total = gu.shape[0]
    small = max(rank_g, rank_u, rank_h) <= SMALL
    block_n = 2 * BLOCK_N if small else BLOCK_N
    rows, blocks = total // n, -(-width // block_n)
    parts = min(SPLITS, blocks)
    cols = -(-blocks // parts) * block_n
    h = gu.new_empty(total, width)
    low_h = gu.new_empty(parts, total, rank_h, dtype=torch.float32)
    wrap_triton(_forward_kernel)[(n * -(-rows // BLOCK_M) * parts,)](
        gu, low, b_g, b_u, a, h, low_h, total, rows, width, cols,
        RG=rank_g, RU=rank_u, RH=rank_h, BG=padded(rank_g), BU=padded(rank_u), BH=padded(rank_h),
        GELU=gelu, PARTS=parts, BLOCK_M=BLOCK_M, BLOCK_N=block_n, num_warps=2, num_stages=3 if small else 2,
    )  # fmt: skip
    return h, low_h


@triton_op("finetuna_func::gated_backward_", mutates_args={"d_h"})
def gated_backward_(
    gu: Tensor, low: Tensor, b_g: Tensor, b_u: Tensor, a: Tensor, d_h: Tensor, d_low_h: Tensor, gelu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the cotangents of the gate, of ``low``, ``b_g``, ``b_u`` and ``a``, the last three in parts.

    That of up takes the place of ``d_h``. The sum over the second axis, of parts, is to be taken of the last three, in
    float32. That of ``low`` is a sum over all columns, with a part for each tile of these: many, of which those of half
    the finetunes at a time are there.

    Args:
        gu: As for `gated`.
        low: Likewise.
        b_g: Likewise.
        b_u: Likewise.
        a: Likewise.
        d_h: ``(N * rows, F)``, the cotangent of h without what comes from ``h @ A.T``.
        d_low_h: ``(N * rows, r)``, the cotangent of ``h @ A.T``.
        gelu: Likewise.
    """
    (n, width, rank_g), rank_u, rank_h = b_g.shape, b_u.shape[-1], a.shape[-2]
    total = gu.shape[0]
    small = max(rank_g, rank_u, rank_h) <= SMALL
    rows, blocks = total // n, -(-width // BLOCK_N)
    chunks = -(-rows // CHUNK)
    d_g = torch.empty_like(d_h)
    d_bg, d_bu, d_a = (
        gu.new_empty(n, chunks, *shape, dtype=torch.float32)
        for shape in ((width, rank_g), (width, rank_u), (rank_h, width))
    )
    half = n // 2
    shares = [half, n - half] if statically_known_true(half * chunks * blocks >= ENOUGH) else [n]
    d_lows = []
    for i, share in enumerate(shares):
        parts = gu.new_empty(blocks, share * rows, rank_g + rank_u)  # in float32, of r = 16, half of what d_h is
        wrap_triton(_backward_kernel)[(share * chunks * blocks,)](
            gu, low, b_g, b_u, a, d_h, d_low_h, d_g, d_h, parts, d_bg, d_bu, d_a, i * half, share * rows, rows, width,
            CHUNK, RG=rank_g, RU=rank_u, RH=rank_h, BG=padded(rank_g), BU=padded(rank_u), BH=padded(rank_h),
            GELU=gelu, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=2 if small else 4, num_stages=1,
        )  # fmt: skip
        d_lows.append(parts.sum(0, dtype=torch.float32).to(gu.dtype))
    return d_g, d_lows[0] if len(d_lows) == 1 else torch.cat(d_lows), d_bg, d_bu, d_a
