"""The products of adapted layers that share an input, as one function, for blocks that are compiled.

``y = x @ W.T + low @ B.T`` with ``low = x @ A.T`` is small beside ``x @ W.T`` in operations, not in bytes: a GPU reads
and writes ``y`` about as long as it computes it. Here each wide tensor is touched as few times as its products allow,
forward and backward, which the compiler does not find by itself:

- Layers of one input (queries, keys and values) are one product with their A's, and the cotangent of their input is one
  product with their weights on top of one another.
- A product that is wider than its input takes the adapter up: ``[x, low] @ [W, B].T``, with a few columns more to
  sum over, of which each finetune's rows fill their own. Nothing of the width of ``y`` is added up.
- Where there are kernels, an adapter's products from or to few columns are `kernels.low_rank`: the cotangent of ``y``
  is read once for both of its products, and the frozen product is added to the adapter's as it is written.

Only first derivatives in reverse mode, all that a compiled block has.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from finetuna_func._quant import Int8

_FEW = 16  # parts

Codes: TypeAlias = "tuple[Tensor, Tensor]"
"""Of a matrix: int8 codes, and a float32 scale of each of their rows."""


def adapted_products(
    x: Tensor, a: Tensor, weights: Sequence[Tensor], bs: Sequence[Tensor], *, use_kernels: bool = False
) -> tuple[Tensor, ...]:
    """Returns ``x @ W.T + (x @ A.T) @ B.T`` for each layer, ``(N * rows, ..., out)``.

    Args:
        x: ``(N * rows, ..., in)``.
        a: The layers' A's on top of one another, ``(N, sum of r, in)``; of a single finetune without N.
        weights: ``(out, in)`` each, frozen: they get no gradient.
        bs: ``(N, out, r)`` each, with the scale of the adapter in it; of a single finetune without N.
        use_kernels: Whether an adapter's products are computed by `kernels.low_rank`.

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
        ys = _AdaptedProducts.apply(x, own_a, use_kernels, *weights, *own_bs)
        return ys if isinstance(ys, tuple) else (ys,)
    return _products(x, by_rows(x, own_a.shape[0], own_a.mT), weights, own_bs, use_kernels)


def _products(
    x: Tensor, low: Tensor, weights: Sequence[Tensor], bs: Sequence[Tensor], use_kernels: bool
) -> tuple[Tensor, ...]:
    rows, low = x.reshape(-1, x.shape[-1]), low.reshape(-1, low.shape[-1])
    ranks = [b.shape[-1] for b in bs]
    if all(_takes_up(rows, weight.shape[0], b.shape[0] * b.shape[-1]) for weight, b in zip(weights, bs, strict=True)):
        lows = [own.unflatten(0, (bs[0].shape[0], -1)) for own in low.split(ranks, dim=-1)]
        ys = [_taken_up(rows, own, weight, b) for own, weight, b in zip(lows, weights, bs, strict=True)]
    elif use_kernels:
        together = added([rows], [_cat(weights).mT], low, bs, True)
        # Each by itself: of a view that is kept for the backward pass, all would be kept.
        ys = [y.contiguous() for y in together.split([weight.shape[0] for weight in weights], dim=-1)]
    else:
        plain = (rows @ _cat(weights).mT).split([weight.shape[0] for weight in weights], dim=-1)
        ys = [y + expanded(low, at, b) for y, at, b in zip(plain, _firsts(ranks), bs, strict=True)]
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


class _AdaptedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, use_kernels: bool, *rest: Tensor) -> Tensor | tuple[Tensor, ...]:
        layers = len(rest) // 2
        low = by_rows(x, a.shape[0], a.mT)
        ctx.save_for_backward(x, low, a, *rest)
        ctx.use_kernels = use_kernels
        ys = _products(x, low, rest[:layers], rest[layers:], use_kernels)
        return ys if layers > 1 else ys[0]  # of one in a tuple the compiler makes a tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, *rest = ctx.saved_tensors
        weights, bs = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        n, rank = a.shape[0], sum(b.shape[-1] for b in bs)
        g = _side_by_side(grads) if ctx.use_kernels else _cat(grads, dim=-1)
        grad_low, grad_bs = contracted(g, low, bs, ctx.use_kernels)
        grad_x = None
        if ctx.needs_input_grad[0]:
            rows, low_rows = g.reshape(-1, g.shape[-1]), grad_low.reshape(-1, grad_low.shape[-1])
            if _takes_up(rows, x.shape[-1], n * rank):
                grad_x = _taken_up(rows, low_rows.view(n, -1, rank), _cat(weights).mT, a.mT).view(x.shape)
            else:
                grad_x = added([g], [_cat(weights)], low_rows, [a], ctx.use_kernels, upright=True)
        grad_a = summed(grad_low, x, n)
        return grad_x, grad_a, None, *([None] * len(weights)), *grad_bs


def added(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor] | Sequence[Codes],
    low: Tensor,
    factors: Sequence[Tensor],
    use_kernels: bool,
    *,
    upright: bool = False,
) -> Tensor:
    """Returns the sum of ``x @ weight`` for each x, and of the products of adapters, ``(N * rows, ..., width)``.

    Args:
        xs: ``(N * rows, ..., in)`` each.
        weights: ``(in, width)`` each; or, of each, int8 codes and the scales of their rows.
        low: ``(N * rows, all columns)``; of the adapters of layers side by side, one after another.
        factors: ``(N, own width, r)`` of each of them; upright ``(N, r, own width)``.
        use_kernels: Whether `kernels` computes them, the frozen products being added in place.
        upright: Whether the factors are so.
    """
    axis = 2 if upright else 1
    widths, ranks = [own.shape[axis] for own in factors], [own.shape[3 - axis] for own in factors]
    rows, shape = [x.reshape(-1, x.shape[-1]) for x in xs], (*xs[0].shape[:-1], sum(widths))
    products = list(zip(rows, weights, strict=True))
    if use_kernels:
        from finetuna_func.kernels.in_place import add_product_, add_product_of_codes_
        from finetuna_func.kernels.low_rank import expand_, runs

        # The sum starts with the adapters' products, which is the faster order. But not that of several weights which
        # the compiler dequantizes, when memory is scarcest: an empty place is taken long before it is filled.
        start = weights[0] if len(products) > 1 and isinstance(weights[0], Tensor) else None
        y = low.new_empty(low.shape[0], sum(widths)) if start is None else rows[0] @ start

        def add_adapters() -> None:
            for run in runs(widths, ranks):
                own = _cat(factors[run], axis).contiguous()
                at, first = sum(widths[: run.start]), sum(ranks[: run.start])
                expand_(y, at, low, first, own, widths[run], upright, start is not None)

        if start is None:
            add_adapters()
        for x, weight in products[start is not None :]:
            if isinstance(weight, Tensor):
                add_product_(y, x, weight)
            else:
                add_product_of_codes_(y, x, *weight)
        if start is not None:
            add_adapters()
        return y.view(shape)
    factors = [own if upright else own.mT for own in factors]
    parts = [expanded(low, first, own, upright=True) for first, own in zip(_firsts(ranks), factors, strict=True)]
    # Of three axes, if x is, or the compiler takes the sum for an `addmm`, which copies one part first.
    matrices = [own if isinstance(own, Tensor) else Int8().dequantize(low.dtype, *own) for own in weights]
    plain = [(x @ matrix).view(shape) for x, matrix in zip(rows, matrices, strict=True)]
    return functools.reduce(torch.add, [*plain, _cat(parts, -1).view(shape)])


def expanded(low: Tensor, first: int, factors: Tensor, *, upright: bool = False) -> Tensor:
    """Products of some columns of low, those from ``first`` on, with each finetune's factors, ``(N * rows, width)``.

    Args:
        low: ``(N * rows, all columns)``.
        first: The first of r columns.
        factors: ``(N, width, r)``; upright ``(N, r, width)``.
        upright: Whether the factors are so.
    """
    factors = factors if upright else factors.mT
    own = low[:, first : first + factors.shape[1]]
    return torch.bmm(own.reshape(factors.shape[0], -1, own.shape[-1]), factors).flatten(0, 1)


def contracted(dy: Tensor, low: Tensor, bs: Sequence[Tensor], use_kernels: bool) -> tuple[Tensor, list[Tensor]]:
    """Returns the cotangents of low and of each B, where what layers side by side put out has the cotangent dy.

    Args:
        dy: ``(N * rows, ..., all columns)``, of one layer after another.
        low: ``(N * rows, ..., all columns)``, likewise: what is multiplied by the B's.
        bs: ``(N, own width, r)`` of each layer.
        use_kernels: Whether `kernels.low_rank` computes them, reading dy once.

    Returns:
        That of low, and ``(N, own width, r)`` for each layer.
    """
    n, widths, ranks = bs[0].shape[0], [b.shape[1] for b in bs], [b.shape[2] for b in bs]
    d_lows: list[Tensor] = []
    d_bs: list[Tensor] = []
    if use_kernels:
        from finetuna_func.kernels.low_rank import contract, parts_of, runs

        rows, lows = dy.reshape(-1, dy.shape[-1]).contiguous(), low.reshape(-1, low.shape[-1]).contiguous()
        for run in runs(widths, ranks):
            b, own = _cat(bs[run], 1).contiguous(), widths[run]
            d_low, d_b = contract(rows, lows, b, own, sum(widths[: run.start]), sum(ranks[: run.start]))
            d_lows += [_sum(parts, 0).to(dy.dtype) for parts in d_low.split(parts_of(own))]
            d_bs += [_sum(parts, 1).to(dy.dtype) for parts in d_b.split(own, dim=2)]
        return _cat(d_lows, -1).view(low.shape), d_bs
    for first, at, b in zip(_firsts(widths), _firsts(ranks), bs, strict=True):
        g, own = dy[..., first : first + b.shape[1]], low[..., at : at + b.shape[2]]
        d_lows.append(by_rows(g, n, b).view(*dy.shape[:-1], b.shape[2]))
        d_bs.append(summed(g, own, n))
    return _cat(d_lows, -1), d_bs


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


def _sum(parts: Tensor, dim: int) -> Tensor:
    """The sum of parts; of a few one by one, which the compiler makes part of what is next, and not a reduction."""
    count = parts.shape[dim]
    if isinstance(count, int) and count <= _FEW:
        return functools.reduce(torch.add, parts.unbind(dim))
    return parts.sum(dim)


def _firsts(widths: Sequence[int]) -> list[int]:
    return [sum(widths[:i]) for i in range(len(widths))]


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """``torch.cat(parts, -1)``, of parts that are computed where they belong.

    Of a `cat` the compiler makes one kernel that computes what each column might be: for queries and keys, whose
    cotangents are turned by their positions, it has more to compute than a GPU can while it reads and writes.
    """
    if len(parts) == 1:
        return parts[0]
    widths = [part.shape[-1] for part in parts]
    whole = parts[0].new_empty(*parts[0].shape[:-1], sum(widths))
    for at, part in zip(_firsts(widths), parts, strict=True):
        whole[..., at : at + part.shape[-1]] = part
    return whole


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
