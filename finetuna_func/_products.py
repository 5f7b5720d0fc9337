"""The products of adapted layers that share an input, as one function, for blocks that are compiled.

``y = x @ W.T + low @ B.T`` with ``low = x @ A.T`` is small beside ``x @ W.T`` in operations, not in bytes: a GPU reads
and writes ``y`` about as long as it computes it. Here each wide tensor is touched as few times as its products allow,
forward and backward, which the compiler does not find by itself:

- Layers of one input (queries, keys and values) are one product with their A's, and the cotangent of their input is one
  product with their weights on top of one another.
- A product that is wider than its input takes the adapter up: ``[x, low] @ [W, B].T``, with a few columns more to
  sum over, of which each finetune's rows fill their own. Nothing of the width of ``y`` is added up.

Only first derivatives in reverse mode, all that a compiled block has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def adapted_products(x: Tensor, a: Tensor, weights: Sequence[Tensor], bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns ``x @ W.T + (x @ A.T) @ B.T`` for each layer, ``(N * rows, ..., out)``.

    Args:
        x: ``(N * rows, ..., in)``.
        a: The layers' A's on top of one another, ``(N, sum of r, in)``; of a single finetune without N.
        weights: ``(out, in)`` each, frozen: they get no gradient.
        bs: ``(N, out, r)`` each, with the scale of the adapter in it; of a single finetune without N.

    Returns:
        One product for each layer, in the dtype of all of them.

    Example:
        >>> x, a, w, b = torch.ones(2, 3), torch.ones(1, 3), torch.eye(3), torch.ones(3, 1)
        >>> adapted_products(x, a, [w], [b])[0]
        tensor([[4., 4., 4.],
                [4., 4., 4.]])
    """
    single = a.ndim == 2
    own_a, own_bs = (a.unsqueeze(0), [b.unsqueeze(0) for b in bs]) if single else (a, bs)
    if torch.is_grad_enabled() and (x.requires_grad or own_a.requires_grad or any(b.requires_grad for b in own_bs)):
        ys = _AdaptedProducts.apply(x, own_a, *weights, *own_bs)
        return ys if isinstance(ys, tuple) else (ys,)
    return _products(x, by_rows(x, own_a.shape[0], own_a.mT), weights, own_bs)


def _products(x: Tensor, low: Tensor, weights: Sequence[Tensor], bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    rows = x.reshape(-1, x.shape[-1])
    n = bs[0].shape[0]
    lows = low.view(n, -1, low.shape[-1]).split([b.shape[-1] for b in bs], dim=-1)
    if all(_takes_up(rows, weight.shape[0], n * b.shape[-1]) for weight, b in zip(weights, bs, strict=True)):
        ys = [_taken_up(rows, own, weight, b) for own, weight, b in zip(lows, weights, bs, strict=True)]
    else:
        plain = (rows @ _cat(weights).mT).split([weight.shape[0] for weight in weights], dim=-1)
        ys = [y + torch.bmm(own, b.mT).view(y.shape) for y, own, b in zip(plain, lows, bs, strict=True)]
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


class _AdaptedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, ...]:
        layers = len(rest) // 2
        low = by_rows(x, a.shape[0], a.mT)
        ctx.save_for_backward(x, low, a, *rest)
        ys = _products(x, low, rest[:layers], rest[layers:])
        return ys if layers > 1 else ys[0]  # of one in a tuple the compiler makes a tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, *rest = ctx.saved_tensors
        weights, bs = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        n, widths, ranks = a.shape[0], [w.shape[0] for w in weights], [b.shape[-1] for b in bs]
        g = _cat(grads, dim=-1)
        own_g = g.split(widths, dim=-1)
        grad_low = torch.cat([by_rows(own, n, b) for own, b in zip(own_g, bs, strict=True)], dim=-1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            rows, low_rows = g.reshape(-1, g.shape[-1]), grad_low.view(n, -1, grad_low.shape[-1])
            if _takes_up(rows, x.shape[-1], n * sum(ranks)):
                grad_x = _taken_up(rows, low_rows, _cat(weights).mT, a.mT).view(x.shape)
            else:  # of three axes, or the compiler takes the sum for an `addmm`, which copies one part first
                grad_x = (rows @ _cat(weights)).view(x.shape) + torch.bmm(low_rows, a).view(x.shape)
        grad_a = summed(grad_low, x, n)
        grad_bs = [summed(own, part, n) for own, part in zip(own_g, low.split(ranks, dim=-1), strict=True)]
        return grad_x, grad_a, *([None] * len(weights)), *grad_bs


def by_rows(x: Tensor, n: int, factors: Tensor) -> Tensor:
    """Products ``(rows, T, out)`` of x with ``(N, in, out)``, one for the rows of each finetune.

    Of x as it is, wherever it has three axes: it may not be computed yet, and of a view of such a tensor the compiler
    computes a copy, once for each product that reads one. Here it computes x itself, and other products read views.
    """
    x = x if x.ndim == 3 and x.shape[1] > 1 else x.reshape(n, -1, x.shape[-1])
    each = factors.unsqueeze(1).expand(-1, x.shape[0] // n, -1, -1)
    return torch.bmm(x, each.reshape(x.shape[0], *factors.shape[1:]))


def summed(x: Tensor, y: Tensor, n: int) -> Tensor:
    """``x.T @ y`` over the rows of each finetune, ``(N, width of x, width of y)``."""
    return torch.bmm(x.reshape(n, -1, x.shape[-1]).mT, y.reshape(n, -1, y.shape[-1]))


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


def _takes_up(x: Tensor, width: int, columns: int) -> bool:
    """Whether widening the sum by ``columns`` costs less than adding up what is ``width`` wide.

    It takes as many more operations as there are columns more, and copies x, where adding up reads and writes y.
    """
    rows, narrow = x.shape
    aligned = (narrow + columns) % 8 == 0
    return aligned and 4 * columns <= narrow and 2 * narrow <= width and narrow <= rows


def _taken_up(x: Tensor, low: Tensor, weight: Tensor, b: Tensor) -> Tensor:
    """``x @ W.T + low @ B.T`` as ``[x, low] @ [W, B].T``, ``(N * rows, out)``.

    Args:
        x: ``(N * rows, in)``.
        low: ``(N, rows, r)``. Each finetune has columns of its own, and zeros in those of the others.
        weight: ``(out, in)``.
        b: ``(N, out, r)``.
    """
    n, width, rank = b.shape
    # Zeros times what is infinite are no zeros: a finetune that has diverged must not show in others' rows.
    finite = torch.isfinite(b)
    low = torch.where(finite.all(-2, keepdim=True), low, torch.nan)
    own = torch.eye(n, dtype=torch.bool, device=x.device).view(n, 1, n, 1)
    columns = torch.where(own, low.unsqueeze(2), 0).view(-1, n * rank)
    b = torch.where(finite, b, 0).mT.reshape(n * rank, width).mT
    # The transposed view of a weight is put together as it lies.
    as_it_lies = weight.stride(-1) == 1
    wide = torch.cat([weight, b], dim=-1) if as_it_lies else torch.cat([weight.mT, b.mT]).mT
    return torch.cat([x, columns], dim=-1) @ wide.mT
