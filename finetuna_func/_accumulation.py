"""The gradients of a batch, computed in micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finetuna_func._division import divide
from finetuna_func._transforms import Gradients, finetune_position

_HINT = 'Give in_dims: for each argument its batch axis, None for what all parts share, "key" for a key.'


def accumulate_gradients(
    grad_fn: Callable[..., tuple[Any, Gradients]],
    micro_batches: int,
    *,
    in_dims: Any = 0,
    weight: Callable[..., Tensor | float] | None = None,
) -> Callable[..., tuple[Any, Gradients]]:
    """Returns ``grad_fn`` computed in micro-batches: the loss and gradients of the batch, at the memory of a part.

    The arguments are cut along their batch axis into ``micro_batches`` parts whose sizes differ by at
    most one, and losses and gradients of the parts are averaged with weights, in float32 or wider.
    By default a part weighs as many examples as it has: right if the loss is a mean over examples. If it
    is a mean over something else, ``weight`` has to count that, or the result is not that of the batch:
    for a mean over tokens that are not padding, their number.

    Args:
        grad_fn: From `value_and_grad` or `stacked_value_and_grad`, with or without aux.
        micro_batches: How many parts, at least 1 and at most the size of the batch.
        in_dims: Along which axis to cut: one for all positional arguments, or an entry for each, a
            structure like it, or ``None`` for what every part gets whole. For a key, ``"key"``: each
            part gets another one made of it, as the same key gives the same masks. The finetune and a
            `Base` are never cut, whatever their entry. Keyword arguments go to every part as they are.
        weight: Called with the arguments of a part; returns its weight, at least 0: a number, a 0-d
            tensor, or for a stack ``(N,)``, one per finetune. A part of weight 0 does not count, whatever
            its loss.

    Returns:
        A function of the same arguments. With aux it returns the list of the parts' ``aux``.

    Raises:
        TypeError: As for `value_and_grad`; or a leaf to be cut is not a tensor.
        ValueError: ``micro_batches`` is below 1 or above the size of the batch; arguments whose sizes
            differ; a weight that is negative or of another shape.

    Example:
        >>> base, tuned = new_finetuned(tiny_model())
        >>> def loss_fn(tuned, ids):
        ...     return apply(base, tuned, ids).square().mean()
        >>> ids = torch.arange(10).reshape(5, 2)
        >>> loss, grads = value_and_grad(loss_fn)(tuned, ids)
        >>> in_parts, _ = accumulate_gradients(value_and_grad(loss_fn), micro_batches=3)(tuned, ids)
        >>> torch.testing.assert_close(in_parts, loss)
    """
    function = "accumulate_gradients"
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 1:
        raise ValueError(f"{function}(micro_batches={micro_batches!r}): expected an integer of at least 1.")

    def accumulated(*args: Any, **kwargs: Any) -> tuple[Any, Gradients]:
        finetune_position(function, args)
        divided = divide(function, args, in_dims, hint=_HINT)
        if divided.size is None or divided.size < micro_batches:
            raise ValueError(
                f"{function}(micro_batches={micro_batches}): the batch has {divided.size or 'no'} examples along the "
                f"axes in_dims={in_dims!r}; expected at least one for each micro-batch."
            )
        bounds = [divided.size * i // micro_batches for i in range(micro_batches + 1)]
        mean = _WeightedMean()
        auxes, has_aux = [], False
        for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
            part = divided.part(start, stop, i)
            out, grads = grad_fn(*part, **kwargs)
            loss, aux = out if isinstance(out, tuple) else (out, None)
            has_aux = isinstance(out, tuple)
            auxes.append(aux)
            mean.add(stop - start if weight is None else _checked_weight(weight(*part, **kwargs), loss), loss, grads)
            del out, loss, aux, grads  # while the next part is computed, they would be there beside the sums
        loss, grads = mean.result()
        return ((loss, auxes) if has_aux else loss), grads

    return accumulated


class _WeightedMean:
    """Sums of losses and gradients, and of their weights, in float32 or wider."""

    def __init__(self) -> None:
        self.weight: Tensor | float = 0
        self.sums: dict[str, Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def add(self, weight: Tensor | float, loss: Tensor, grads: Gradients) -> None:
        self.weight = self.weight + weight
        leaves = {"": loss, **grads}  # no parameter has the empty name
        self.dtypes = {name: leaf.dtype for name, leaf in leaves.items()}
        for name in list(leaves):
            leaf = leaves.pop(name)
            leaf = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
            if isinstance(weight, Tensor):
                along = _along(weight, leaf).to(leaf.dtype)
                leaf = torch.where(along == 0, torch.zeros_like(leaf), leaf * along)  # not nan * 0
            else:
                leaf = leaf * weight if weight else torch.zeros_like(leaf)
            self.sums[name] = self.sums[name] + leaf if name in self.sums else leaf

    def result(self) -> tuple[Tensor, Gradients]:
        means = {}
        for name in list(self.sums):
            total = self.sums.pop(name)
            weight = self.weight
            if isinstance(weight, Tensor):
                total = total / _along(weight, total).to(total.dtype)
            else:
                total = total / weight if weight else total / total.new_zeros(())
            means[name] = total.to(self.dtypes[name])
        return means.pop(""), means


def _along(weight: Tensor, leaf: Tensor) -> Tensor:
    return weight.reshape(weight.shape + (1,) * (leaf.ndim - weight.ndim)) if weight.ndim else weight


def _checked_weight(weight: Any, loss: Tensor) -> Tensor | float:
    if isinstance(weight, Tensor):
        if weight.ndim and weight.shape != loss.shape:
            raise ValueError(
                f"accumulate_gradients(weight=...): it returned a tensor of shape {tuple(weight.shape)}, expected () "
                f"or {tuple(loss.shape)}, as the loss has."
            )
        return weight.to(torch.promote_types(loss.dtype, torch.float32))
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise ValueError(
            f"accumulate_gradients(weight=...): it returned {weight!r}, expected a number of at least 0 or a tensor."
        )
    return weight
