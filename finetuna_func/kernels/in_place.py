"""Products that are added to what their place holds, for the compiler, which would copy one of the two first.

A library of matrix products reads what it adds to as it writes a tile of the sum, while others are computed; a sum of
its own reads and writes all of it once more. In eager code this is ``Tensor.addmm_``, of which the compiler makes a
product into another place, after a copy. An operator of our own is called as it is.

A frozen matrix can be given by its codes. It is then dequantized within the operator, and is there for the time of this
product alone; the compiler, which dequantizes what a graph multiplies by, does so some time before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetuna_func._quant import Int8

torch.library.define("finetuna_func::add_product_", "(Tensor(a!) y, Tensor x, Tensor w) -> ()")
torch.library.define(
    "finetuna_func::add_product_of_codes_", "(Tensor(a!) y, Tensor x, Tensor codes, Tensor scales) -> ()"
)


@torch.library.impl("finetuna_func::add_product_", ("cpu", "cuda"))
def _add_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    y.addmm_(x, w)


@torch.library.impl("finetuna_func::add_product_of_codes_", "cpu")
def _add_product_of_codes(y: Tensor, x: Tensor, codes: Tensor, scales: Tensor) -> None:
    y.addmm_(x, Int8().dequantize(y.dtype, codes, scales))


@torch.library.impl("finetuna_func::add_product_of_codes_", "cuda")
def _add_product_of_codes_by_kernel(y: Tensor, x: Tensor, codes: Tensor, scales: Tensor) -> None:
    from finetuna_func.kernels.dequantize import dequantize

    y.addmm_(x, dequantize(codes, scales, y.dtype))


@torch.library.register_fake("finetuna_func::add_product_")
@torch.library.register_fake("finetuna_func::add_product_of_codes_")
def _(y: Tensor, x: Tensor, w: Tensor, *scales: Tensor) -> None:
    torch._check(y.shape[0] == x.shape[0] and y.shape[1] == w.shape[1] and x.shape[1] == w.shape[0])


def add_product_(y: Tensor, x: Tensor, w: Tensor) -> None:
    """Adds ``x @ w`` to y, all of them matrices of one dtype."""
    torch.ops.finetuna_func.add_product_(y, x, w)


def add_product_of_codes_(y: Tensor, x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Adds ``x @ w`` to y, matrices of one 16-bit dtype, with w the int8 codes times a float32 scale of each row."""
    torch.ops.finetuna_func.add_product_of_codes_(y, x, codes, scales)
