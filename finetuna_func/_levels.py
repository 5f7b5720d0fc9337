"""Which torch.func transform, if any, the caller is inside of."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C._functorch import (  # type: ignore[import-not-found]
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
    is_legacy_batchedtensor,
    maybe_get_level,
    peek_interpreter_stack,
)


def inside_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or a forward-mode level is active."""
    return peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def only_vmap() -> tuple[int, bool] | None:
    """Returns the level of the one ``vmap`` that is active, and whether a first derivative is taken inside it.

    ``None`` if there is none, or anything else beside them: another vmap, a derivative of another kind, or of it.
    """
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0:
        return None
    levels = get_interpreter_stack() or []
    kinds = [level.key() for level in levels]
    if kinds not in ([TransformType.Vmap], [TransformType.Vmap, TransformType.Grad]):
        return None
    return levels[0].level(), len(levels) == 2


def without_gradient(tensor: Tensor) -> Tensor:
    """Returns what the levels of ``grad`` hold: a tensor, or one that a ``vmap`` maps."""
    while is_gradtrackingtensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def is_mapped(tensor: Tensor, level: int) -> bool:
    """Whether the ``vmap`` of this level maps a tensor, whatever levels of ``grad`` are inside it."""
    tensor = without_gradient(tensor)
    return is_batchedtensor(tensor) and maybe_get_level(tensor) == level


def is_recorded_outside(tensors: Iterable[Tensor]) -> bool:
    """Whether plain autograd, outside of all transforms, records what happens to one of these tensors, or never may."""

    def innermost(tensor: Tensor) -> Tensor:
        while is_functorch_wrapped_tensor(tensor):
            tensor = get_unwrapped(tensor)
        return tensor

    return any(own.requires_grad or own.is_inference() for own in map(innermost, tensors))


def is_one_of_many(cotangent: Tensor) -> bool:
    """Whether autograd takes several cotangents at once: for ``is_grads_batched``, by a vmap older than torch.func."""
    return inside_transform() or is_legacy_batchedtensor(cotangent)
