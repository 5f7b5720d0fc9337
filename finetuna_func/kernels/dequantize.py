"""A matrix from int8 codes, a number for each row of them.

The compiler makes as good a kernel of the line that this is, for matrices that are values of its graph. This one is for
those that are not, since they exist for the time of one product.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _dequantize_kernel(codes, scales, matrix, width, BLOCK: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK)
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    col = block * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(codes + row * width + col, mask=col < width, other=0).to(tl.float32)
    own *= tl.load(scales + row)
    tl.store(matrix + row * width + col, own.to(matrix.dtype.element_ty), mask=col < width)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``codes * scales`` of each row, ``(rows, width)``, computed in float32.

    Args:
        codes: ``(rows, width)``, int8, contiguous.
        scales: ``(rows,)``, float32, contiguous.
        dtype: Of the matrix.
    """
    rows, width = codes.shape
    matrix = torch.empty(rows, width, dtype=dtype, device=codes.device)
    kernel: Any = _dequantize_kernel  # to which launching adds options
    kernel[(rows * -(-width // BLOCK),)](codes, scales, matrix, width, BLOCK=BLOCK, num_warps=4)
    return matrix
