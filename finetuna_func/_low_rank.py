"""An adapter's first product beside its input, for plain autograd.

``y = x @ W.T + (x @ A.T) @ B.T`` reads x twice, so its cotangent is a sum of two. Autograd would form both and then add
them up, a pass over what is as wide as x for each adapted layer. Here the second product is added into the first, which
nobody else has seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetuna_func._levels import inside_transform


def with_low_rank(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x anew and ``x @ A.T``, of shapes ``(rows, in)`` and ``(rows, r)``, or with a leading N.

    What is made of the x returned must be products with matrices alone: their cotangents are written over.

    Args:
        x: ``(rows, in)``; of a stack ``(N, rows, in)``.
        a: ``(r, in)``; of a stack ``(N, r, in)``.

    Example:
        >>> x, low = with_low_rank(torch.ones(2, 3), torch.ones(1, 3))
        >>> low
        tensor([[3.],
                [3.]])
    """
    if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad):
        return _WithLowRank.apply(x, a)
    return x, _matmul(x, a.mT)


class _WithLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, a)
        ctx.set_materialize_grads(False)
        return x.view_as(x), _matmul(x, a.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        x, a = ctx.saved_tensors
        grad_x, grad_low = grads
        if grad_low is None:
            return grad_x, None
        grad_a = _matmul(grad_low.mT, x) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_a
        # Not where this is differentiated again, or mapped: then others read the cotangent as well.
        own = grad_x is not None and not torch.is_grad_enabled() and not inside_transform()
        if grad_x is None:
            grad_x = _matmul(grad_low, a)
        elif not own:
            grad_x = grad_x + _matmul(grad_low, a)
        elif x.ndim == 2:
            grad_x.addmm_(grad_low, a)
        else:
            grad_x.baddbmm_(grad_low, a)
        return grad_x, grad_a


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    return torch.mm(x, y) if x.ndim == 2 else torch.bmm(x, y)  # `torch.matmul` makes four views of three axes first
