"""A product that is added to what its place holds, for the compiler, which would copy one of the two first.

A library of matrix products reads what it adds to as it writes a tile of the sum, while others are computed; a sum of
its own reads and writes all of it once more. In eager code this is ``Tensor.addmm_``, of which the compiler makes a
product into another place, after a copy. An operator of our own is called as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define("finetuna_func::add_product_", "(Tensor(a!) y, Tensor x, Tensor w) -> ()")


@torch.library.impl("finetuna_func::add_product_", ("cpu", "cuda"))
def _add_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    y.addmm_(x, w)


@torch.library.register_fake("finetuna_func::add_product_")
def _(y: Tensor, x: Tensor, w: Tensor) -> None:
    torch._check(y.shape[0] == x.shape[0] and y.shape[1] == w.shape[1] and x.shape[1] == w.shape[0])


def add_product_(y: Tensor, x: Tensor, w: Tensor) -> None:
    """Adds ``x @ w`` to y, all of them matrices of one dtype."""
    torch.ops.finetuna_func.add_product_(y, x, w)
