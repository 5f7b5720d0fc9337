"""The frozen 8-bit product as one differentiable operation, for every nesting of torch.func.

``y = x @ W.T`` is linear in ``x``, and ``W`` is frozen, so one autograd Function closes over all
derivatives: its tangent is itself, its cotangent is the transposed product, whose cotangent is
itself again. It saves only codes and scales, which live in the base anyway: the dequantized
matrix is never kept for backward. Under ``vmap`` a batched ``x`` is folded into the rows, one
base product for all adapters.

bitsandbytes' own Functions raise or give zero gradients under torch.func; its plain ops are used
inside this Function only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead  # type: ignore[import-not-found]

from finetuna_func._levels import inside_transform
from finetuna_func._quant import Scheme


class _FrozenMatmul(torch.autograd.Function):
    """``x @ W.T``, or ``x @ W`` when ``transposed``; differentiable in ``x`` alone."""

    @staticmethod
    def forward(x: Tensor, scheme: Scheme, transposed: bool, *leaves: Tensor) -> Tensor:
        return scheme.matmul_transposed(x, *leaves) if transposed else scheme.matmul(x, *leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.scheme, ctx.transposed, *leaves = inputs
        ctx.save_for_backward(*leaves)
        ctx.save_for_forward(*leaves)
        ctx.set_materialize_grads(False)  # so that a missing tangent arrives as None, not as zeros

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _reject_derivative_of_base(ctx.needs_input_grad[3:])
        leaves = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0] and grads[0] is not None:
            grad_x = _product(grads[0], ctx.scheme.linearised, not ctx.transposed, *leaves)
        return (grad_x, None, None, *([None] * len(leaves)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        x_dot, _, _, *leaf_dots = tangents
        _reject_derivative_of_base([dot is not None for dot in leaf_dots])
        if x_dot is None:
            return None
        return _FrozenMatmul.apply(x_dot, ctx.scheme.linearised, ctx.transposed, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        x, scheme, transposed, *leaves = args
        x_dim, _, _, *leaf_dims = in_dims
        if any(dim is not None for dim in leaf_dims):  # several bases at once: rare, so one after another
            mapped = list(zip((x, *leaves), (x_dim, *leaf_dims), strict=True))
            slices = [
                [leaf if dim is None else leaf.select(dim, i) for leaf, dim in mapped] for i in range(info.batch_size)
            ]
            return torch.stack([_FrozenMatmul.apply(x_i, scheme, transposed, *rest) for x_i, *rest in slices]), 0
        return _FrozenMatmul.apply(x.movedim(x_dim, 0), scheme, transposed, *leaves), 0


# `apply` asks for it at every call, and finding it out takes longer than starting the product.
_FrozenMatmul.forward.__signature__ = inspect.signature(_FrozenMatmul.forward)  # type: ignore[attr-defined]
# `apply` without what it does for torch.func and for defaults, which takes as long as all else.
_record: Callable[..., Tensor] = super(torch.autograd.Function, _FrozenMatmul).apply  # type: ignore[misc]


def _product(x: Tensor, scheme: Scheme, transposed: bool, *leaves: Tensor) -> Tensor:
    """The Function, or what it computes where nothing records and no transform is active."""
    if inside_transform():
        return _FrozenMatmul.apply(x, scheme, transposed, *leaves)
    if torch.is_grad_enabled():
        return _record(unwrap_if_dead(x), scheme, transposed, *(unwrap_if_dead(leaf) for leaf in leaves))
    return _FrozenMatmul.forward(unwrap_if_dead(x), scheme, transposed, *(unwrap_if_dead(leaf) for leaf in leaves))


class _StraightThrough(torch.autograd.Function):
    """The first-order half of `_FrozenMatmul` for the compiler, for schemes that round the activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scheme: Scheme, *leaves: Tensor) -> Tensor:
        ctx.scheme = scheme
        ctx.save_for_backward(*leaves)
        return scheme.matmul(x, *leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        leaves = ctx.saved_tensors
        grad_x = dequantized_matmul(grads[0], ctx.scheme.linearised, True, *leaves)
        return (grad_x, None, *([None] * len(leaves)))


def frozen_matmul(x: Tensor, scheme: Scheme, *leaves: Tensor) -> Tensor:
    """Returns ``x @ W.T`` of shape ``(..., out)`` in the dtype of ``x`` for a frozen 8-bit ``W``.

    Honours autocast like ``F.linear``. Differentiable in ``x`` to any order, forward and reverse.

    Args:
        x: ``(..., in)``, floating point.
        scheme: The 8-bit format.
        *leaves: Its tensors, in the order of ``scheme.suffixes``.

    Raises:
        TypeError: ``x`` is not floating point.
        RuntimeError: A derivative with respect to the frozen leaves is asked for.

    Example:
        >>> from finetuna_func._quant import Int8
        >>> w = torch.tensor([[127.0, -1.0]])
        >>> frozen_matmul(torch.tensor([[1.0, 2.0]]), Int8(), *Int8().quantize(w).values())
        tensor([[125.]])
    """
    if not x.is_floating_point():
        raise TypeError(
            f"activations of an 8-bit layer are {x.dtype}: the model casts them to the dtype of a layer's "
            "weight, which is that of its codes. Keep that layer in float with modules_not_to_quantize."
        )
    x = x.to(compute_dtype(x))
    if torch.compiler.is_compiling():  # a Function with a jvp breaks the graph
        if scheme.linearised == scheme:
            return dequantized_matmul(x, scheme, False, *leaves)  # and the composite fuses
        return _StraightThrough.apply(x, scheme, *leaves)
    return _product(x, scheme, False, *leaves)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype that a product with ``x`` is computed in: autocast's where it is on, else its own."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def dequantized_matmul(x: Tensor, scheme: Scheme, transposed: bool, *leaves: Tensor) -> Tensor:
    """Returns the same product by dequantizing first: plain torch ops, the reference for `frozen_matmul`."""
    weight = scheme.dequantize(x.dtype, *leaves)
    return torch.matmul(x, weight if transposed else weight.mT)


def _reject_derivative_of_base(needed: Any) -> None:
    if any(needed):
        raise RuntimeError(
            "a derivative with respect to the codes or scales of a frozen 8-bit base was asked for; the base is "
            "a constant. Differentiate with respect to tuned.params, and put a layer that should be trained "
            "directly in plain_layers."
        )
