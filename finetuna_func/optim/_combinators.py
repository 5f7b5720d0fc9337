"""Transformations made of others: in a row, on some leaves, on all leaves as one, every few calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from finetuna_func._types import Finetuned, Params
from finetuna_func.optim import _lists as lists
from finetuna_func.optim._base import (
    GradientTransformation,
    Result,
    State,
    Tree,
    as_tree,
    checked_leaves,
    zeros,
    zeros_like,
)
from finetuna_func.optim._checks import check_like, check_names, some
from finetuna_func.optim._layout import layout_of

LeafFilter: TypeAlias = "Callable[[str, Tensor], bool] | Mapping[str, bool]"
"""Which leaves: a predicate on ``(name, leaf)``, or an entry for every name."""


class MaskedState(NamedTuple):
    """State of the inner transformation, which knows only the leaves that the filter selects."""

    inner: State


class FlattenState(NamedTuple):
    """State of the inner transformation on flat leaves, and a zero, or one for each adapter of a stack.

    The shape of ``stack``, ``()`` or ``(N,)``, says which of the two it is.
    """

    inner: State
    stack: Tensor


class Flattened(GradientTransformation):
    """What `flatten` returns: a transformation that `compile_step` knows to run on flat leaves throughout.

    Attributes:
        inner: The transformation of the flat leaves.
    """

    inner: GradientTransformation


class MultiStepsState(NamedTuple):
    """Calls since the last step, ``()`` or ``(N,)`` int64, the sum of their gradients, the inner state."""

    micro_step: Tensor
    total: dict[str, Tensor]
    inner: State


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Returns the transformation that applies the given ones in order; its state is the tuple of theirs.

    Raises:
        ValueError: At ``update``, if the state was made by a chain of another length.

    Example:
        >>> from finetuna_func.optim import chain, scale
        >>> tx = chain(scale(2.0), scale(3.0))
        >>> tx.update({"w": torch.ones(1)}, tx.init({"w": torch.ones(1)}))[0]
        {'w': tensor([6.])}
    """

    def init(params: Tree) -> State:
        return tuple(tx.init(params) for tx in transformations)

    def update(updates: Params, state: State, params: Tree | None = None) -> Result[State]:
        if len(state) != len(transformations):
            raise ValueError(
                f"chain.update(state=...): got a state of {len(state)} parts for a chain of "
                f"{len(transformations)} transformations; pass the state made by this chain's own init."
            )
        updates, states = dict(updates), []
        for tx, part in zip(transformations, state, strict=True):
            updates, part = tx.update(updates, part, params)
            states.append(part)
        return updates, tuple(states)

    return GradientTransformation(init, update)


def masked(tx: GradientTransformation, filter: LeafFilter) -> GradientTransformation:
    """Returns ``tx`` applied to some leaves only; the others pass through **unchanged**, as in optax.

    Passed through means that a plain gradient stays a gradient: to freeze the other leaves, chain
    with ``masked(set_to_zero(), others)``.

    Args:
        tx: The inner transformation; it never sees the other leaves.
        filter: A function ``(name, leaf) -> bool``, called with the params at ``init`` and with the
            updates at ``update``, so it should go by name and shape; or a mapping ``name -> bool``
            with exactly the names of the params.

    Raises:
        TypeError: ``filter`` is neither, or yields something other than a bool.
        ValueError: A function selects no leaf (a mapping may), or a mapping has other names.

    Example:
        >>> from finetuna_func.optim import masked, scale
        >>> tx = masked(scale(10.0), lambda name, leaf: name.endswith("lora_b"))
        >>> params = {"q.lora_a": torch.ones(1), "q.lora_b": torch.ones(1)}
        >>> tx.update(params, tx.init(params))[0]
        {'q.lora_a': tensor([1.]), 'q.lora_b': tensor([10.])}
    """
    if not callable(filter) and not isinstance(filter, Mapping):
        raise TypeError(
            f"masked(filter={filter!r}): expected a function (name, leaf) -> bool or a mapping name -> bool."
        )

    def mask_of(where: str, tree: Params) -> dict[str, bool]:
        if isinstance(filter, Mapping):
            check_names(f"{where}(filter=...)", filter, tree, "the params")
            mask = dict(filter)
        else:
            mask = {name: filter(name, leaf) for name, leaf in tree.items()}
        for name, chosen in mask.items():
            if not isinstance(chosen, bool):
                raise TypeError(
                    f"{where}(filter=...): got {chosen!r} of type {type(chosen).__name__} for leaf {name!r}, "
                    "expected a bool; decide by name or shape, not by the value of a tensor."
                )
        return mask

    def select(params: Tree, mask: Mapping[str, bool]) -> Tree:
        kept = {name: leaf for name, leaf in as_tree("masked", params).items() if mask[name]}
        # A part of a stack is still a stack, and the inner transformation has to know.
        return Finetuned(kept, params.consts, params.spec) if isinstance(params, Finetuned) else kept

    def init(params: Tree) -> MaskedState:
        leaves = checked_leaves("masked.init", params)
        mask = mask_of("masked.init", leaves)
        if callable(filter) and leaves and not any(mask.values()):
            raise ValueError(
                f"masked.init(filter=...): the function selects none of the {len(leaves)} leaves, named "
                f"{some(leaves)}; correct it, or say so by a mapping of every name to False."
            )
        return MaskedState(tx.init(select(params, mask)))

    def update(updates: Params, state: MaskedState, params: Tree | None = None) -> Result[MaskedState]:
        mask = mask_of("masked.update", updates)
        chosen = {name: leaf for name, leaf in updates.items() if mask[name]}
        if params is not None:
            check_names("masked.update(updates=...)", updates, as_tree("masked.update(params)", params), "params")
            params = select(params, mask)
        inside, inner = tx.update(chosen, state.inner, params)
        merged = {name: inside[name] if mask[name] else updates[name] for name in sorted(updates)}
        return merged, MaskedState(inner)

    return GradientTransformation(init, update)


def flatten(tx: GradientTransformation) -> Flattened:
    """Returns ``tx`` on flat leaves: all leaves of one dtype and device are one, ``(P,)``, or ``(N, P)`` of a stack.

    A stack has hundreds of small leaves, and starting a kernel on each takes longer than its arithmetic. Flat, a step
    of ``chain(clip_by_global_norm(1.0), adamw(1e-3))`` is some thirty operations whatever the number of leaves, and
    `compile_step` makes a kernel or two of them. The state is flat. Updates, and what `apply_updates` makes of them,
    are views of flat tensors; such params are put together again without a copy.

    The results are those of ``tx``, but for the rounding of sums, if it computes each number by itself and from sums
    over all numbers of an adapter, as everything here does but `masked`, whose filter sees the flat leaves
    (``masked(flatten(tx), filter)`` is what is meant), and `scale_by_adam8bit`, whose blocks may then span leaves
    (never adapters), and which keeps small leaves in 8 bits too. Use it outermost.

    Temporaries are as large as a flat leaf, where many leaves are computed in parts; and a leaf of the new params keeps
    all of them in memory, as a view does.

    Args:
        tx: The inner transformation.

    Raises:
        ValueError: At ``update``, updates and ``params`` differ in names or shapes, or a leaf is not of the stack that
            init was given; the inner transformation finds out other leaves than at init by the names of the flat ones.

    Source: `optax.flatten <https://optax.readthedocs.io/en/latest/api/transformations.html#optax.flatten>`_.

    Example:
        >>> params = {"a": torch.zeros(2, 3), "b": torch.ones(16)}
        >>> tx = ft.optim.flatten(ft.optim.trace(0.5))
        >>> updates, state = tx.update(params, tx.init(params))
        >>> [leaf.shape for leaf in state.inner.trace.values()], updates["a"].shape
        ([torch.Size([22])], torch.Size([2, 3]))
    """

    def init(params: Tree) -> FlattenState:
        leaves = checked_leaves("flatten.init", params)
        size = params.stack_size if isinstance(params, Finetuned) else None
        flat = layout_of("flatten.init(params)", leaves, size).join(leaves)
        inner = tx.init(Finetuned(flat, params.consts, params.spec) if isinstance(params, Finetuned) else flat)
        return FlattenState(inner, zeros(params, torch.int64))

    def update(updates: Params, state: FlattenState, params: Tree | None = None) -> Result[FlattenState]:
        like, flat = updates, None
        if params is not None:
            like = as_tree("flatten.update", params)
            check_like("flatten.update", updates, like, "params")
        size = len(state.stack) if state.stack.ndim else None
        layout = layout_of(f"flatten.update({'updates' if params is None else 'params'})", like, size)
        if params is not None:
            flat = layout.join(like)
        new, inner = tx.update(layout.join(updates), state.inner, flat)
        return layout.split(new), FlattenState(inner, state.stack)

    flattened = Flattened(init, update)
    flattened.inner = tx
    return flattened


def multi_steps(tx: GradientTransformation, every: int) -> GradientTransformation:
    """Returns ``tx`` applied once every ``every`` calls, to the mean gradient; zero updates in between.

    As nothing may branch on a counter in a tensor, ``tx`` is computed at every call and its result
    kept at every ``every``-th one.

    Args:
        tx: The inner transformation.
        every: How many gradients make one step, at least 1.

    Raises:
        ValueError: ``every`` is not an integer of at least 1, or the gradients have other names.

    Example:
        >>> from finetuna_func.optim import multi_steps, sgd
        >>> tx = multi_steps(sgd(1.0), every=2)
        >>> state = tx.init({"w": torch.zeros(1)})
        >>> first, state = tx.update({"w": torch.tensor([1.0])}, state)
        >>> second, state = tx.update({"w": torch.tensor([3.0])}, state)
        >>> first["w"].item(), second["w"].item()
        (0.0, -2.0)
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"multi_steps(every={every!r}): expected an integer of at least 1.")

    def init(params: Tree) -> MultiStepsState:
        leaves = checked_leaves("multi_steps.init", params)
        return MultiStepsState(zeros(params, torch.int64), zeros_like(leaves), tx.init(params))

    def update(updates: Params, state: MultiStepsState, params: Tree | None = None) -> Result[MultiStepsState]:
        check_like("multi_steps.update", updates, state.total, "the params given to init")
        total, mean = {}, {}
        for names in lists.batches(state.total):
            old = [state.total[name] for name in names]
            sums = lists.add(old, [updates[name].to(state.total[name].dtype) for name in names])
            total.update(zip(names, sums, strict=True))
            mean.update(zip(names, lists.div(sums, every), strict=True))
        micro_step = state.micro_step + 1
        stepping = micro_step == every
        stepped, inner = tx.update(mean, state.inner, params)

        def choose(then: Tensor, otherwise: Tensor) -> Tensor:
            return torch.where(lists.along(stepping, otherwise), then, otherwise)

        def or_zero(then: Tensor) -> Tensor:
            return choose(then, torch.zeros_like(then))

        return {name: or_zero(u) for name, u in stepped.items()}, MultiStepsState(
            micro_step=micro_step % every,
            total={name: choose(torch.zeros_like(total[name]), total[name]) for name in sorted(total)},
            inner=pytree.tree_map(choose, inner, state.inner),
        )

    return GradientTransformation(init, update)
