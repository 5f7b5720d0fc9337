"""A sum over pieces whose gradients are formed with it, while what each piece computed is there.

`_losses` sums the losses of tokens, piece by piece, through a head whose logits are too large to keep. Recomputing them
in the backward pass is a third product with the head; but a sum is linear in its terms, so that the gradient for any
cotangent is that for 1, scaled: it can be formed at once. (So do fused cross-entropies such as that of
`Liger Kernel <https://arxiv.org/abs/2410.10989>`_, for one loss of one model.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from finetuna_func._levels import inside_transform, is_one_of_many
from finetuna_func._remat import remat

Piece = Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]
Gradients = Callable[
    [dict[str, Tensor], dict[str, Tensor], Tensor, Tensor, bool], tuple[Tensor, dict[str, Tensor], Any]
]


def sum_of_pieces(
    piece: Piece,
    leaves: Mapping[str, Tensor],
    hidden: Tensor,
    targets: Tensor,
    size: int,
    n: int | None,
    gradients: Gradients | None = None,
    at_once: int = 1,
) -> Tensor:
    """Returns the sums of losses, ``()``, or ``(N,)`` of a stack.

    By first-order autograd the gradients are formed in the forward pass. Under a transform, the compiler, or where the
    parts of finetunes cannot be told apart, each piece is a `remat`.

    Args:
        piece: ``(leaves, hidden, targets) -> losses`` of some tokens, in the shape of these targets. Pure; a token's
            loss depends on its own hidden state alone, and finetune i's on ``leaf[i]`` alone.
        leaves: What else it reads.
        hidden: ``(tokens, width)``, or ``(N, tokens, width)``.
        targets: ``(tokens,)``, or ``(N, tokens)``.
        size: Tokens of one finetune in a piece.
        n: Of a stack, how many finetunes.
        gradients: Another way to what `gradients_of` returns of the piece, or of several, one after another.
        at_once: How many at most are given to it.
    """
    leaves = dict(leaves)
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    apart = n is None or all(leaves[name].shape[:1] == (n,) for name in names)
    recorded = torch.is_grad_enabled() and bool(names or hidden.requires_grad)
    if not recorded or not apart or inside_transform() or torch.compiler.is_compiling():
        return _rematerialized(piece, leaves, hidden, targets, size)
    constants = {name: leaf for name, leaf in leaves.items() if name not in names}
    gradients = gradients or functools.partial(gradients_of, piece)
    own = (leaves[name] for name in names)
    return _WithGradients.apply(piece, gradients, constants, names, targets, size, at_once, hidden, *own)


def gradients_of(
    piece: Piece,
    constants: dict[str, Tensor],
    leaves: dict[str, Tensor],
    hidden: Tensor,
    targets: Tensor,
    of_hidden: bool,
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Returns the sums of a piece, and the gradients of their sum for leaves and hidden states (or None), detached."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    hidden = hidden.detach().requires_grad_(of_hidden)
    with torch.enable_grad():
        sums = piece(constants | leaves, hidden, targets).sum(-1)
        inputs = [*leaves.values(), *([hidden] if of_hidden else [])]
        found = torch.autograd.grad(sums.sum(), inputs, allow_unused=True, materialize_grads=True)
    return sums.detach(), dict(zip(leaves, found, strict=False)), found[-1] if of_hidden else None


def _rematerialized(piece: Piece, leaves: dict[str, Tensor], hidden: Tensor, targets: Tensor, size: int) -> Tensor:
    pieces = zip(hidden.split(size, dim=-2), targets.split(size, dim=-1), strict=True)
    return torch.stack([remat(piece)(leaves, *own).sum(-1) for own in pieces]).sum(0)


class _WithGradients(torch.autograd.Function):
    """The sums, and what they are differentiated by for a cotangent of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        piece: Piece,
        gradients: Gradients,
        constants: dict[str, Tensor],
        names: list[str],
        targets: Tensor,
        size: int,
        at_once: int,
        hidden: Tensor,
        *leaves: Tensor,
    ) -> Tensor:
        of_hidden = ctx.needs_input_grad[7]
        own = dict(zip(names, leaves, strict=True))
        whole = targets.shape[-1] <= size * at_once
        d_hidden = torch.empty_like(hidden) if of_hidden and not whole else None
        d_leaves: dict[str, Tensor] = {}
        total: Any = 0
        for start in range(0, targets.shape[-1], size * at_once):
            place = slice(start, start + size * at_once)
            sums, found, d_own = gradients(constants, own, hidden[..., place, :], targets[..., place], of_hidden)
            if whole:
                d_hidden = d_own
            elif d_hidden is not None:
                d_hidden[..., place, :] = d_own
            del d_own  # before the next piece
            d_leaves = {name: d_leaves[name].add_(found[name]) for name in names} if d_leaves else found
            total = total + sums
        ctx.again = (piece, constants, names, targets, size)
        formed = [*([] if d_hidden is None else [d_hidden]), *(d_leaves[name] for name in names)]
        ctx.save_for_backward(hidden, *leaves, *formed)  # all of which autograd lets go of after the backward pass
        return total

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (cotangent,), needed = cotangents, ctx.needs_input_grad[7:]
        given, formed = ctx.saved_tensors[: len(needed)], ctx.saved_tensors[len(needed) :]
        if torch.is_grad_enabled():  # it is differentiated again
            piece, constants, names, targets, size = ctx.again
            hidden, *leaves = given
            total = _rematerialized(piece, constants | dict(zip(names, leaves, strict=True)), hidden, targets, size)
            inputs = [t for t, need in zip(given, needed, strict=True) if need]
            found = iter(torch.autograd.grad(total, inputs, cotangent, create_graph=True, materialize_grads=True))
        else:
            found = iter([_scaled(grad, cotangent) for grad in formed])
        return (*([None] * 7), *(next(found) if need else None for need in needed))


def _scaled(grad: Tensor, cotangent: Tensor) -> Tensor:
    """A gradient by the cotangent of its finetune, not rounded to the gradient's dtype before the product."""
    wide = cotangent.reshape(*cotangent.shape, *([1] * (grad.ndim - cotangent.ndim)))
    if is_one_of_many(cotangent):
        return (grad * wide).to(grad.dtype)
    return torch.mul(grad, wide, out=torch.empty_like(grad))  # in one pass, without a temporary in the wider dtype
