"""The transformations that optimizers are chains of."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from finetuna_func._types import Params
from finetuna_func.optim import _lists as lists
from finetuna_func.optim._base import (
    EmptyState,
    GradientTransformation,
    Result,
    Tree,
    as_tree,
    checked_leaves,
    stateless,
    times,
    wide,
    widest,
    zeros,
    zeros_like,
)
from finetuna_func.optim._checks import (
    DECAY,
    FINITE,
    LIMIT,
    NOT_NEGATIVE,
    POSITIVE,
    STEP,
    check_like,
    check_number,
    check_scalar,
)
from finetuna_func.optim._schedules import Schedule
from finetuna_func.optim._updates import global_norm

LearningRate: TypeAlias = "float | Tensor | Schedule"
"""A number, a 0-d tensor, a ``(N,)`` tensor with one value per adapter of a stack, or a schedule."""


class ScaleByAdamState(NamedTuple):
    """Steps taken, ``()`` or ``(N,)`` int64, and the running means of gradients and of their squares."""

    step: Tensor
    mu: dict[str, Tensor]
    nu: dict[str, Tensor]


class TraceState(NamedTuple):
    """The decaying sum of past gradients."""

    trace: dict[str, Tensor]


class ScaleByLearningRateState(NamedTuple):
    """Steps taken, ``()`` or ``(N,)`` int64."""

    step: Tensor


class ClipByGlobalNormState(NamedTuple):
    """Norm of the last updates before they were clipped, ``()`` or ``(N,)``; worth logging."""

    norm: Tensor


def identity() -> GradientTransformation:
    """Returns the transformation that changes nothing.

    Example:
        >>> identity().update({"w": torch.ones(1)}, EmptyState())[0]
        {'w': tensor([1.])}
    """
    return stateless("identity", dict)


def set_to_zero() -> GradientTransformation:
    """Returns the transformation whose updates are all zero; inside `masked`, it freezes leaves.

    Example:
        >>> set_to_zero().update({"w": torch.tensor([float("nan")])}, EmptyState())[0]
        {'w': tensor([0.])}
    """
    return stateless("set_to_zero", zeros_like)


def scale(factor: float | Tensor) -> GradientTransformation:
    """Returns the transformation that multiplies updates by a factor of any sign.

    Args:
        factor: A number, a 0-d tensor, or ``(N,)`` with one factor per adapter.

    Raises:
        ValueError: ``factor`` is not a finite number or a floating-point tensor of those shapes; or,
            at ``update``, it is ``(N,)`` and a leaf lacks that leading axis.

    Example:
        >>> scale(-2.0).update({"w": torch.ones(1)}, EmptyState())[0]
        {'w': tensor([-2.])}
    """
    check_scalar("scale", "factor", factor, FINITE)
    return stateless("scale", lambda updates: times("scale(factor=...)", factor, updates))


def scale_by_learning_rate(learning_rate: LearningRate) -> GradientTransformation:
    """Returns the transformation that multiplies updates by minus the learning rate: the last of a chain.

    Args:
        learning_rate: A number; a 0-d tensor; a ``(N,)`` tensor, one value per adapter, that goes
            along the leading axis of every leaf; or a schedule, called with the number of steps
            taken so far (0 at the first step). The values in a tensor are not checked, as that
            would wait for the device.

    Raises:
        ValueError: A negative or non-finite number, or a tensor that is neither ``()`` nor ``(N,)``
            floating point; or, at ``update``, it is ``(N,)`` and a leaf lacks that leading axis.

    Example:
        >>> tx = scale_by_learning_rate(torch.tensor([1.0, 10.0]))
        >>> grads = {"w": torch.ones(2, 1)}
        >>> tx.update(grads, tx.init(grads))[0]["w"].tolist()
        [[-1.0], [-10.0]]
    """
    where = "scale_by_learning_rate(learning_rate=...)"
    if not callable(learning_rate):
        check_scalar("scale_by_learning_rate", "learning_rate", learning_rate, STEP)

    # Steps are counted for a constant too, so that a run can be resumed with a schedule.
    def init(params: Tree) -> ScaleByLearningRateState:
        checked_leaves("scale_by_learning_rate.init", params)
        return ScaleByLearningRateState(zeros(params, torch.int64))

    def update(
        updates: Params, state: ScaleByLearningRateState, params: Tree | None = None
    ) -> Result[ScaleByLearningRateState]:
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        if isinstance(rate, Tensor) and rate.ndim > 1:
            raise ValueError(
                f"{where}: the schedule returned a tensor of shape {tuple(rate.shape)}, expected () or (N,)."
            )
        return times(where, -rate, updates), ScaleByLearningRateState(state.step + 1)

    return GradientTransformation(init, update)


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0
) -> GradientTransformation:
    """Returns the transformation of gradients to Adam's directions ``m / (sqrt(v) + eps)``, bias corrected.

    Args:
        b1: Decay of the mean ``m`` of gradients, in ``[0, 1)``.
        b2: Decay of the mean ``v`` of squared gradients, in ``[0, 1)``.
        eps: Above 0, so that an element whose gradient was always zero has the direction zero.
        eps_root: Added under the root. Above 0, it makes the step differentiable where a gradient is
            zero, which differentiating through an optimizer needs.

    Raises:
        ValueError: A value is out of range; or, at ``update``, names or shapes are not those of init.

    Source: `Adam <https://arxiv.org/abs/1412.6980>`_, algorithm 1.

    Example:
        >>> tx = scale_by_adam()
        >>> tx.update({"w": torch.tensor([3.0, 0.0])}, tx.init({"w": torch.zeros(2)}))[0]
        {'w': tensor([1., 0.])}
    """
    check_number("scale_by_adam", "b1", b1, DECAY)
    check_number("scale_by_adam", "b2", b2, DECAY)
    check_number("scale_by_adam", "eps", eps, POSITIVE)
    check_number("scale_by_adam", "eps_root", eps_root, NOT_NEGATIVE)

    def init(params: Tree) -> ScaleByAdamState:
        leaves = checked_leaves("scale_by_adam.init", params)
        return ScaleByAdamState(zeros(params, torch.int64), zeros_like(leaves), zeros_like(leaves))

    def update(updates: Params, state: ScaleByAdamState, params: Tree | None = None) -> Result[ScaleByAdamState]:
        check_like("scale_by_adam.update", updates, state.mu, "the params given to init")
        step = state.step + 1
        directions, mu, nu = adam_leaves(updates, state.mu, state.nu, step, b1, b2, eps, eps_root)
        return directions, ScaleByAdamState(step, mu, nu)

    return GradientTransformation(init, update)


def trace(decay: float, nesterov: bool = False) -> GradientTransformation:
    """Returns the transformation of gradients to their decaying sum: momentum, as in ``torch.optim.SGD``.

    Args:
        decay: How much of the sum is kept from step to step, in ``[0, 1)``.
        nesterov: Whether to return the sum looked ahead by one step.

    Raises:
        ValueError: ``decay`` is out of range; or, at ``update``, names or shapes are not those of init.

    Example:
        >>> tx = trace(0.5)
        >>> state = tx.init({"w": torch.zeros(1)})
        >>> for _ in range(2):
        ...     updates, state = tx.update({"w": torch.ones(1)}, state)
        >>> updates
        {'w': tensor([1.5000])}
    """
    check_number("trace", "decay", decay, DECAY)

    def init(params: Tree) -> TraceState:
        return TraceState(zeros_like(checked_leaves("trace.init", params)))

    def update(updates: Params, state: TraceState, params: Tree | None = None) -> Result[TraceState]:
        check_like("trace.update", updates, state.trace, "the params given to init")
        directions, sums = {}, {}
        for names in lists.batches(state.trace):
            old = [state.trace[name] for name in names]
            g = [updates[name].to(state.trace[name].dtype) for name in names]
            new = lists.add(g, old, alpha=decay)
            sums.update(zip(names, new, strict=True))
            directions.update(zip(names, lists.add(g, new, alpha=decay) if nesterov else new, strict=True))
        return in_order(directions), TraceState(in_order(sums))

    return GradientTransformation(init, update)


def add_decayed_weights(weight_decay: float | Tensor) -> GradientTransformation:
    """Returns the transformation that adds ``weight_decay * param`` to the updates.

    Before `scale_by_adam` or `trace` in a chain this is an L2 penalty; after, it is decoupled.

    Args:
        weight_decay: A number of at least 0, a 0-d tensor, or ``(N,)`` with one value per adapter.
            The number 0 changes nothing, and then ``update`` does not need ``params``.

    Raises:
        ValueError: A negative number; or, at ``update``, ``params`` is None, has other names or
            shapes, or a leaf lacks the leading axis of a ``(N,)`` value.

    Example:
        >>> tx = add_decayed_weights(0.5)
        >>> tx.update({"w": torch.zeros(1)}, EmptyState(), {"w": torch.tensor([4.0])})[0]
        {'w': tensor([2.])}
    """
    where = "add_decayed_weights(weight_decay=...)"
    check_scalar("add_decayed_weights", "weight_decay", weight_decay, NOT_NEGATIVE)
    if not isinstance(weight_decay, Tensor) and weight_decay == 0:
        return identity()

    def init(params: Tree) -> EmptyState:
        checked_leaves("add_decayed_weights.init", params)
        return EmptyState()

    def update(updates: Params, state: EmptyState, params: Tree | None = None) -> Result[EmptyState]:
        if params is None:
            raise ValueError(
                "add_decayed_weights.update(params=None): weight decay needs the current params; "
                "call tx.update(updates, state, params), or set weight_decay=0.0."
            )
        leaves = as_tree("add_decayed_weights.update", params)
        check_like("add_decayed_weights.update", updates, leaves, "params")
        decayed, summed = times(where, weight_decay, leaves), {}
        wide_updates = {name: wide(update) for name, update in updates.items()}
        for names in lists.batches(wide_updates):
            u = [wide_updates[name] for name in names]
            d = [decayed[name].to(wide_updates[name].dtype) for name in names]
            summed.update(zip(names, lists.add(u, d), strict=True))
        return in_order(summed), state

    return GradientTransformation(init, update)


def clip_by_global_norm(max_norm: float | Tensor) -> GradientTransformation:
    """Returns the transformation that scales updates down to a norm of at most ``max_norm``.

    The norm is that of all leaves together; for a state initialized with a stack, of all leaves of
    each adapter. The values are those of ``torch.nn.utils.clip_grad_norm_``: updates are
    multiplied by ``min(1, max_norm / (norm + 1e-6))``. The state holds the norm before clipping;
    ``clip_by_global_norm(float("inf"))`` measures it and clips nothing.

    Args:
        max_norm: A number above 0, a 0-d tensor, or ``(N,)`` with one limit per adapter of a stack.

    Raises:
        ValueError: A number not above 0; or, at ``update``, ``max_norm`` is ``(N,)`` and the state is
            not that of a stack of N.

    Source: `Pascanu et al. 2013 <https://arxiv.org/abs/1211.5063>`_.

    Example:
        >>> tx = clip_by_global_norm(1.0)
        >>> grads = {"w": torch.tensor([3.0, 4.0])}
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> updates, state.norm
        ({'w': tensor([0.6000, 0.8000])}, tensor(5.))
    """
    check_scalar("clip_by_global_norm", "max_norm", max_norm, LIMIT)

    def init(params: Tree) -> ClipByGlobalNormState:
        leaves = checked_leaves("clip_by_global_norm.init", params)
        return ClipByGlobalNormState(zeros(params, widest(leaves)))

    def update(
        updates: Params, state: ClipByGlobalNormState, params: Tree | None = None
    ) -> Result[ClipByGlobalNormState]:
        if isinstance(max_norm, Tensor) and max_norm.ndim == 1 and max_norm.shape != state.norm.shape:
            made_for = f"a stack of {len(state.norm)}" if state.norm.ndim else "one finetune"
            raise ValueError(
                f"clip_by_global_norm(max_norm=...): a tensor of shape {tuple(max_norm.shape)} is one limit "
                f"per adapter, but the state was initialized for {made_for}; call init with the stacked "
                "Finetuned, or pass a number."
            )
        if not updates:
            return {}, state
        norm = global_norm(updates, stacked=state.norm.ndim == 1).to(state.norm.dtype)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        where = "clip_by_global_norm.update(updates=...)"
        return times(where, factor, updates), ClipByGlobalNormState(norm)

    return GradientTransformation(init, update)


def adam_leaves(
    updates: Params, mu: Params, nu: Params, step: Tensor, b1: float, b2: float, eps: float, eps_root: float = 0.0
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Returns Adam's directions and new means for the leaves that ``mu`` names; ``step`` counts this one too."""
    directions, new_mu, new_nu = {}, {}, {}
    for names in lists.batches(mu):
        dtype = mu[names[0]].dtype
        g = [updates[name].to(dtype) for name in names]
        m = lists.lerp([mu[name] for name in names], g, 1 - b1)
        v = lists.addcmul(lists.mul([nu[name] for name in names], b2), g, g, 1 - b2)
        direction = adam_direction(m, v, *corrections(b1, b2, step, dtype), eps, eps_root)
        for result, leaves in ((directions, direction), (new_mu, m), (new_nu, v)):
            result.update(zip(names, leaves, strict=True))
    return in_order(directions), in_order(new_mu), in_order(new_nu)


def corrections(b1: float, b2: float, step: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns what the two means are divided by, so that the zeros they began with do not count."""
    return one_minus_power(b1, step, dtype), one_minus_power(b2, step, dtype)


def adam_direction(
    m: list[Tensor], v: list[Tensor], m_correction: Tensor, v_correction: Tensor, eps: float, eps_root: float
) -> list[Tensor]:
    """Returns ``m / (sqrt(v) + eps)`` of the leaves of a batch, both means bias corrected."""
    v_hat = lists.div(v, v_correction)
    root = lists.sqrt(lists.add(v_hat, eps_root) if eps_root else v_hat)
    return lists.div(lists.div(m, m_correction), lists.add(root, eps))


def in_order(tree: Params) -> dict[str, Tensor]:
    """Returns the leaves by name, names sorted."""
    return {name: tree[name] for name in sorted(tree)}


def one_minus_power(decay: float, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``1 - decay ** step``."""
    # By expm1, because in float32 the naive 1 - 0.999 is off by 1e-5 of itself.
    if decay == 0:
        return torch.ones_like(step, dtype=dtype)
    return -torch.expm1(step.to(dtype) * math.log(decay))
