"""Activation checkpointing under torch.func and plain autograd: memory for time.

`remat` keeps the inputs of a function and computes it again when its derivative is asked for. It is one
autograd Function that closes over its transforms: the rule of ``vmap`` is the remat of the mapped
function, and its derivative is a ``torch.func.vjp`` taken when the cotangent arrives, itself a remat that can be
differentiated and mapped. ``torch.utils.checkpoint`` can do neither, and within
``functional_call`` it recomputes with the parameters of another call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ParamSpec, TypeVar

import torch
import torch.utils._pytree as torch_pytree
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._C._functorch import (  # type: ignore[import-not-found]
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
    unwrap_if_dead,
)

P = ParamSpec("P")
R = TypeVar("R")

TensorFunction = Callable[..., tuple[Tensor, ...]]


def remat(fn: Callable[P, R]) -> Callable[P, R]:
    """Returns ``fn`` that keeps its inputs alone for the backward pass, and is computed again there.

    Same values, same derivatives, of any order and under ``vmap``; the activations inside live while its
    own derivative is computed and at no other time. ``fn`` must be pure, and every tensor that it
    reads and that needs a derivative must be among its arguments (in any pytree): what it closes over
    must be a constant. Randomness is replayed if it comes from a key of ``ft.random``, not from torch's generator.
    A call under forward-mode differentiation, which keeps nothing, runs ``fn`` as it is.

    Source: `Training Deep Nets with Sublinear Memory Cost <https://arxiv.org/abs/1604.06174>`_.

    Args:
        fn: A pure function of pytrees, returning a pytree.

    Raises:
        TypeError: ``fn`` is not callable, or is a module, which reads parameters that are not among its arguments.
        ValueError: ``fn`` closes over a tensor that needs a derivative, or that was made within a ``torch.func``
            transform (seen where it is a variable of an enclosing function itself, or in a pytree that is).

    Example:
        >>> def fn(x):
        ...     return x.sin().sin().sin()
        >>> x = torch.tensor(0.5)
        >>> torch.equal(torch.func.grad(remat(fn))(x), torch.func.grad(fn)(x))
        True
    """
    if not callable(fn):
        raise TypeError(f"remat: expected a function, got {type(fn).__name__}.")
    if isinstance(fn, nn.Module):
        raise TypeError(
            f"remat: {type(fn).__name__} is a module, whose parameters would get no gradient, since they are not among "
            "its arguments. Pass a function of them: lambda params, x: torch.func.functional_call(module, params, x)."
        )

    @functools.wraps(fn)
    def rematerialized(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # the compiler knows this one, and partitions its graph by it
            if peek_interpreter_stack() is not None:  # and under torch.func inside of what it compiles, it does not
                return fn(*args, **kwargs)
            called = functools.partial(fn, **kwargs)
            return torch.utils.checkpoint.checkpoint(called, *args, use_reentrant=False, preserve_rng_state=False)
        if torch.autograd.forward_ad._current_level >= 0:
            return fn(*args, **kwargs)
        _check_closed_over(fn)
        leaves, spec = torch_pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        out_spec: Any = None
        out_leaves: list[Any] = []
        autocast = _autocast_now()

        def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
            nonlocal out_spec, out_leaves
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            again_args, again_kwargs = torch_pytree.tree_unflatten(filled, spec)
            with ExitStack() as stack:
                for context in autocast:
                    stack.enter_context(torch.autocast(**context))
                out = fn(*again_args, **again_kwargs)  # type: ignore[call-arg]
            out_leaves, out_spec = torch_pytree.tree_flatten(out)
            found = tuple(leaf for leaf in out_leaves if isinstance(leaf, Tensor))
            out_leaves = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in out_leaves]
            return found

        found = iter(_Remat.apply(of_tensors, *(leaves[place] for place in places)))
        kept = [next(found) if leaf is None else leaf[0] for leaf in out_leaves]
        leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # autograd holds what it needs
        return torch_pytree.tree_unflatten(kept, out_spec)

    return rematerialized


class _Remat(torch.autograd.Function):
    """``fn(*tensors)`` that saves the tensors and nothing of what happens inside."""

    @staticmethod
    def forward(fn: TensorFunction, *tensors: Tensor) -> tuple[Tensor, ...]:
        # A Function may not hand an input through as it is.
        return tuple(out.view_as(out) if any(out is t for t in tensors) else out for out in fn(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fn, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(out for out in output if not _differentiable(out)))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        # Where remats nest, saved at the level of a vjp that has ended: what is left of its wrapper is in the way.
        tensors = tuple(unwrap_if_dead(t) for t in ctx.saved_tensors)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        used = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        grads: list[Tensor | None] = [None] * len(tensors)
        if not wanted or not used:
            return None, *grads
        operands = (*tensors, *(cotangent for cotangent in cotangents if cotangent is not None))
        pull = functools.partial(_pull, ctx.fn, wanted, used)
        # Where something may differentiate again, the derivative is a remat itself: torch.func.grad always records.
        # Forward mode, which a Function without a rule for it cannot take, keeps nothing.
        again = not _first_order() and torch.autograd.forward_ad._current_level < 0
        for i, grad in zip(wanted, _Remat.apply(pull, *operands) if again else pull(*operands), strict=True):
            grads[i] = grad
        return None, *grads

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        fn, *tensors = args
        mapped = torch.func.vmap(fn, in_dims=in_dims[1:], randomness=info.randomness)
        out = _Remat.apply(mapped, *tensors)
        return out, (0,) * len(out)


def _pull(fn: TensorFunction, wanted: list[int], used: list[int], *operands: Tensor) -> tuple[Tensor, ...]:
    """The cotangents of the inputs ``wanted``, from all inputs and then the cotangents of the outputs ``used``."""
    tensors, given = operands[: -len(used)], operands[-len(used) :]
    if _first_order():
        return _pull_first_order(fn, tensors, wanted, used, given)

    def of_wanted(*some: Tensor) -> tuple[Tensor, ...]:
        filled = list(tensors)
        for i, tensor in zip(wanted, some, strict=True):
            filled[i] = tensor
        out = fn(*filled)
        return tuple(out[i] for i in used)

    pull = torch.func.vjp(of_wanted, *(tensors[i] for i in wanted))[1]
    return pull(given)


def _pull_first_order(
    fn: TensorFunction, tensors: tuple[Tensor, ...], wanted: list[int], used: list[int], given: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        fresh = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        out = fn(*fresh)
        pairs = [(out[i], cotangent) for i, cotangent in zip(used, given, strict=True) if out[i].requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(tensors[i]) for i in wanted)
        outputs, cotangents = zip(*pairs, strict=True)
        return torch.autograd.grad(
            outputs, [fresh[i] for i in wanted], cotangents, allow_unused=True, materialize_grads=True
        )


def _first_order() -> bool:
    """Whether plain autograd will do, since nothing differentiates again or maps: torch.func.vjp records for that."""
    return peek_interpreter_stack() is None and not torch.is_grad_enabled()


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _check_closed_over(fn: Callable[..., Any]) -> None:
    """Raises if a function closes over what it cannot: a derivative would be zero without a word."""
    code = getattr(fn, "__code__", None)
    for name, cell in zip(getattr(code, "co_freevars", ()), getattr(fn, "__closure__", None) or (), strict=False):
        try:
            leaves = torch_pytree.tree_leaves(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
        for leaf in leaves:
            if isinstance(leaf, Tensor) and (
                is_functorch_wrapped_tensor(leaf) or (leaf.requires_grad and torch.is_grad_enabled())
            ):
                raise ValueError(
                    f"remat: the function closes over {name!r}, which needs a derivative or was made within a "
                    "torch.func transform; no derivative would reach it. Make it an argument, in any pytree (a "
                    "Finetuned is one), or detach it where no transform is active."
                )


def _autocast_now() -> list[dict[str, Any]]:
    """The autocast of this moment, or that there is none, since the backward pass may run under another."""
    return [
        {"device_type": device, "dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
        for device in ("cpu", "cuda")
        if device == "cpu" or torch.cuda.is_available()
    ]
