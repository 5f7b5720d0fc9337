"""Arithmetic on lists of leaves.

A stack of finetunes has hundreds of small leaves, and starting a kernel for each takes longer than
its arithmetic. So transformations compute on lists: `batches` says which leaves go together, and a
list of several goes through ``torch._foreach_*``, which starts few kernels, or at least starts them
without going through Python. A list of one is the ordinary operation. As ``_foreach`` has no
batching rules, and compilers fuse better by themselves, inside a torch.func transform and under
``torch.compile`` every list has one leaf. The values are the same either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finetuna_func._levels import inside_transform
from finetuna_func._types import Params

_NUMBERS = 1 << 24  # of a batch at most, so that its temporaries stay small beside the model


def batches(tree: Params) -> list[list[str]]:
    """Returns the names of a tree, each once, in lists that are computed together.

    The leaves of a list have one dtype and one device, and together at most 2 ** 24 numbers, or they
    are one leaf.
    """
    names = sorted(tree)
    if torch.compiler.is_compiling() or inside_transform():
        return [[name] for name in names]
    done: list[list[str]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[str], int]] = {}
    for name in names:
        leaf = tree[name]
        kind, size = (leaf.dtype, leaf.device), leaf.numel()
        known = type(leaf) is Tensor or type(leaf) is nn.Parameter  # a subclass may know nothing of lists
        if not known or size > _NUMBERS:
            done.append([name])
            continue
        batch, total = filling.get(kind, ([], 0))
        if not batch or total + size > _NUMBERS:
            batch, total = [], 0
            done.append(batch)
        batch.append(name)
        filling[kind] = batch, total + size
    return done


def mul(xs: list[Tensor], by: float | Tensor | list[Tensor]) -> list[Tensor]:
    """Returns each ``x * by``; a ``(N,)`` tensor goes along the leading axis."""
    if len(xs) == 1:
        return [xs[0] * _of_one(by, xs[0])]
    return list(torch._foreach_mul(xs, _of_several(by, xs)))


def div(xs: list[Tensor], by: float | Tensor | list[Tensor]) -> list[Tensor]:
    """Returns each ``x / by``, likewise."""
    if len(xs) == 1:
        return [xs[0] / _of_one(by, xs[0])]
    return list(torch._foreach_div(xs, _of_several(by, xs)))


def add(xs: list[Tensor], ys: float | list[Tensor], alpha: float = 1) -> list[Tensor]:
    """Returns each ``x + alpha * y``; a number is added as it is."""
    if isinstance(ys, (int, float)):
        return [xs[0] + ys] if len(xs) == 1 else list(torch._foreach_add(xs, ys))
    if len(xs) == 1:
        return [torch.add(xs[0], ys[0], alpha=alpha)]
    return list(torch._foreach_add(xs, ys, alpha=alpha))


def lerp(xs: list[Tensor], ys: list[Tensor], weight: float) -> list[Tensor]:
    """Returns each ``x + weight * (y - x)``."""
    return [torch.lerp(xs[0], ys[0], weight)] if len(xs) == 1 else list(torch._foreach_lerp(xs, ys, weight))


def addcmul(xs: list[Tensor], ys: list[Tensor], zs: list[Tensor], value: float) -> list[Tensor]:
    """Returns each ``x + value * y * z``."""
    if len(xs) == 1:
        return [torch.addcmul(xs[0], ys[0], zs[0], value=value)]
    return list(torch._foreach_addcmul(xs, ys, zs, value=value))


def sqrt(xs: list[Tensor]) -> list[Tensor]:
    """Returns each ``sqrt(x)``."""
    return [torch.sqrt(xs[0])] if len(xs) == 1 else list(torch._foreach_sqrt(xs))


def norms(xs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Returns the 2-norm ``()`` of each."""
    if len(xs) == 1:
        return [torch.linalg.vector_norm(xs[0], dtype=dtype)]
    return list(torch._foreach_norm(xs, 2, dtype=dtype))


def along(value: Tensor, leaf: Tensor) -> Tensor:
    """Returns a ``()`` or ``(N,)`` value in the shape that broadcasts along the leading axis of a leaf."""
    return value.reshape(value.shape + (1,) * (leaf.ndim - 1)) if value.ndim else value


def _of_one(by: float | Tensor | list[Tensor], x: Tensor) -> Any:
    if isinstance(by, Tensor):
        return along(by, x).to(x.dtype)
    return by if isinstance(by, (int, float)) else by[0]


def _of_several(by: float | Tensor | list[Tensor], xs: list[Tensor]) -> Any:
    if not isinstance(by, Tensor):
        return by
    by = by.to(xs[0].dtype)
    if by.ndim == 0 and by.device == xs[0].device:
        return by
    shaped = {ndim: by.reshape(by.shape + (1,) * (ndim - 1)) if by.ndim else by for ndim in {x.ndim for x in xs}}
    return [shaped[x.ndim] for x in xs]
