"""Gradients of finetunes: first order by plain autograd where nothing differentiates again.

``torch.func.grad`` always records for a second derivative, which on large models costs twice the
time and memory. So `value_and_grad`, called outermost, runs plain autograd on fresh leaves, and
inside another transform it is ``torch.func.grad_and_value``. The values are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from finetuna_func._division import chunks_of_stack, joined_aux
from finetuna_func._levels import inside_transform
from finetuna_func._types import Finetuned

Gradients = dict[str, Tensor]
_A_TENSOR = object()


def value_and_grad(loss_fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., tuple[Any, Gradients]]:
    """Returns a function that gives the loss, ``()``, and its gradient with respect to the finetune's params.

    The result has the signature of ``loss_fn``. Among its positional arguments there is exactly one
    `Finetuned`; the gradient is a dict ``{name: tensor}`` like its ``params``. Neither carries a graph:
    to differentiate through it, nest it in a ``torch.func`` transform.

    Args:
        loss_fn: A pure function of a finetune and anything else, returning a scalar loss; with
            ``has_aux`` a pair ``(loss, aux)``, and the first result is then that pair.
        has_aux: Whether ``loss_fn`` returns a pair.

    Raises:
        TypeError: No finetune among the positional arguments, several, or an integer parameter.
        ValueError: The loss is not a scalar.

    Example:
        >>> base, tuned = new_finetuned(tiny_model())
        >>> def loss_fn(tuned, ids):
        ...     return apply(base, tuned, ids).square().mean()
        >>> loss, grads = value_and_grad(loss_fn)(tuned, torch.zeros(3, dtype=torch.long))
        >>> loss.shape, grads.keys() == tuned.params.keys()
        (torch.Size([]), True)
    """

    def value_and_grad_fn(*args: Any, **kwargs: Any) -> tuple[Any, Gradients]:
        position = finetune_position("value_and_grad", args)
        tuned: Finetuned = args[position]
        _check_trainable(tuned)

        def loss_of(params: dict[str, Tensor]) -> tuple[Tensor, Any]:
            out = loss_fn(*_replaced(args, position, tuned.replace(params=params)), **kwargs)
            loss, aux = _loss_and_aux("value_and_grad", out, has_aux)
            if loss.ndim:
                raise ValueError(
                    f"value_and_grad: loss_fn returned a tensor of shape {tuple(loss.shape)}; expected a scalar. "
                    "Reduce it, or use stacked_value_and_grad for one loss per finetune."
                )
            return loss, aux

        if inside_transform():
            loss, aux, grads = _any_order(loss_of, tuned)
            return ((loss, aux) if has_aux else loss), grads
        loss, aux, grads = _first_order(loss_of, tuned)
        return ((loss, aux) if has_aux else loss), grads

    return value_and_grad_fn


def stacked_value_and_grad(
    loss_fn: Callable[..., Any], in_dims: Any = None, has_aux: bool = False, chunk_size: int | None = None
) -> Callable[..., tuple[Any, Gradients]]:
    """Returns a function that gives N losses ``(N,)`` and the stacked gradients of a stack of finetunes.

    Equals ``vmap(value_and_grad(loss_fn))``, but as one first-order backward of the sum of the losses:
    finetune i's loss reads slice i alone, so the gradient of the sum is the stack of the gradients.

    With a ``chunk_size`` of k, that is done for k finetunes after another, and only k finetunes'
    activations are in memory at a time. The stack is cut, and so are positional arguments: with
    ``in_dims`` where it says so; without, every tensor in them, which must then have a leading axis N.
    Keyword arguments, a `Base`, and what is not a tensor go to each chunk as they are. A single key
    for ``apply_stacked`` would be split anew in every chunk; pass N of them,
    ``ft.random.split(key, N)``.

    Args:
        loss_fn: With ``in_dims=None``, a function of the whole stack that returns losses ``(N,)``,
            through `apply_stacked`. Otherwise a function of one finetune that returns a scalar, which is mapped;
            as fast where `apply` says that it is one stacked call then.
        in_dims: As for ``torch.func.vmap``: one entry per positional argument, 0 for the stack and
            for what differs between finetunes, ``None`` for what they share.
        has_aux: Whether ``loss_fn`` returns ``(loss, aux)``. With ``chunk_size``, tensors in ``aux``
            have the leading axis of the losses, and are concatenated; all else must be equal in each chunk.
        chunk_size: How many finetunes at a time, at least 1 (the last chunk may be smaller); ``None``
            for all at once.

    Raises:
        TypeError: As for `value_and_grad`.
        ValueError: Not a stack, losses that are not ``(N,)``, a ``chunk_size`` below 1, or with it an
            argument or an ``aux`` that cannot be cut or joined.

    Example:
        >>> base, tuned = new_finetuned(tiny_model())
        >>> stacked = stack([tuned, tuned])
        >>> def loss_fn(stacked, ids):
        ...     return apply_stacked(base, stacked, ids).square().mean(dim=(1, 2))
        >>> losses, grads = stacked_value_and_grad(loss_fn)(stacked, torch.zeros(2, 3, dtype=torch.long))
        >>> losses.shape, grads["fc.lora_a"].shape
        (torch.Size([2]), torch.Size([2, 4, 8]))
    """
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(
            f"stacked_value_and_grad(chunk_size={chunk_size!r}): expected an integer of at least 1, or None."
        )

    def of_chunk(args: Sequence[Any], kwargs: dict[str, Any], position: int) -> tuple[Tensor, Any, Gradients]:
        stacked: Finetuned = args[position]

        def sum_of_losses(params: dict[str, Tensor]) -> tuple[Tensor, Any]:
            inputs = _replaced(args, position, stacked.replace(params=params))
            if in_dims is None:
                out = loss_fn(*inputs, **kwargs)
            else:
                out = torch.func.vmap(lambda *a: loss_fn(*a, **kwargs), in_dims=in_dims)(*inputs)
            losses, aux = _loss_and_aux("stacked_value_and_grad", out, has_aux)
            if losses.shape != (stacked.stack_size,):
                raise ValueError(
                    f"stacked_value_and_grad: the losses have shape {tuple(losses.shape)}, expected "
                    f"({stacked.stack_size},), one per finetune. With in_dims=None loss_fn gets the whole stack and "
                    "must not average over its axis; give in_dims to map a loss of one finetune."
                )
            return losses.sum(), (losses, aux)

        gradient = _any_order if inside_transform() else _first_order
        _, (losses, aux), grads = gradient(sum_of_losses, stacked)
        return losses, aux, grads

    def stacked_value_and_grad_fn(*args: Any, **kwargs: Any) -> tuple[Any, Gradients]:
        position = finetune_position("stacked_value_and_grad", args)
        stacked: Finetuned = args[position]
        if stacked.stack_size is None:
            raise ValueError(
                "stacked_value_and_grad: expected a stack made by ft.stack([...]); for one finetune use value_and_grad."
            )
        _check_trainable(stacked)
        if chunk_size is None:
            losses, aux, grads = of_chunk(args, kwargs, position)
        else:
            chunks = [
                of_chunk(part, kwargs, position)
                for part in chunks_of_stack(args, kwargs, position, in_dims, chunk_size)
            ]
            losses = torch.cat([chunk[0] for chunk in chunks])
            aux = joined_aux([chunk[1] for chunk in chunks], [len(chunk[0]) for chunk in chunks])
            # Leaf by leaf, giving up the parts, so that the gradients are never there twice.
            grads = {name: torch.cat([chunk[2].pop(name) for chunk in chunks]) for name in stacked.params}
        return ((losses, aux) if has_aux else losses), grads

    return stacked_value_and_grad_fn


def _first_order(
    loss_of: Callable[[dict[str, Tensor]], tuple[Tensor, Any]], tuned: Finetuned
) -> tuple[Tensor, Any, Gradients]:
    """Loss, aux and gradients by plain autograd on fresh leaves; nothing outside sees them."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in tuned.params.items()}
        loss, aux = loss_of(leaves)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        else:  # the loss does not depend on the parameters
            found = [torch.zeros_like(leaf) for leaf in leaves.values()]
    aux = torch_pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, aux)
    return loss.detach(), aux, dict(zip(leaves, found, strict=True))


def _any_order(
    loss_of: Callable[[dict[str, Tensor]], tuple[Tensor, Any]], tuned: Finetuned
) -> tuple[Tensor, Any, Gradients]:
    """The same through torch.func, which differentiates again; its aux holds tensors only, so others go around it."""
    spec: Any = None
    around: list[Any] = []

    def with_tensors(params: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        nonlocal spec, around
        loss, aux = loss_of(params)
        leaves, spec = torch_pytree.tree_flatten(aux)
        around = [_A_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return loss, [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    grads, (loss, tensors) = torch.func.grad_and_value(with_tensors, has_aux=True)(dict(tuned.params))
    remaining = iter(tensors)
    leaves = [next(remaining) if leaf is _A_TENSOR else leaf for leaf in around]
    return loss, torch_pytree.tree_unflatten(leaves, spec), grads


def finetune_position(function: str, args: tuple[Any, ...]) -> int:
    """Returns where the one finetune among the arguments is."""
    positions = [i for i, arg in enumerate(args) if isinstance(arg, Finetuned)]
    if len(positions) != 1:
        kinds = ", ".join(type(arg).__name__ for arg in args) or "nothing"
        raise TypeError(
            f"{function}: expected exactly one Finetuned among the positional arguments, to differentiate with "
            f"respect to; got {len(positions)} in ({kinds}). Close over the others."
        )
    return positions[0]


def _replaced(args: Sequence[Any], position: int, tuned: Finetuned) -> tuple[Any, ...]:
    return (*args[:position], tuned, *args[position + 1 :])


def _check_trainable(tuned: Finetuned) -> None:
    for name, leaf in tuned.params.items():
        if not leaf.is_floating_point():
            raise TypeError(
                f"params: {name} is {leaf.dtype}; trainable parameters are floating point. Keep integers in consts."
            )


def _loss_and_aux(function: str, out: Any, has_aux: bool) -> tuple[Tensor, Any]:
    if has_aux:
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"{function}(has_aux=True): loss_fn must return (loss, aux), got {type(out).__name__}.")
        loss, aux = out
    else:
        loss, aux = out, None
    if not isinstance(loss, Tensor):
        raise TypeError(f"{function}: loss_fn must return a tensor, got {type(loss).__name__}.")
    return loss, aux
