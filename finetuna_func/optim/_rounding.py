"""Params in few bits: rounding that is right on average, and copies in float32.

A bfloat16 number has 8 bits. An update below 1/512 of its param rounds to nothing, at every step
again. Two ways out, to be chosen: `apply_updates` with ``rounding="stochastic"``, which costs no
memory, and `with_master_params`, which costs 4 bytes a param.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finetuna_func import _random
from finetuna_func._types import Finetuned, Params
from finetuna_func.optim import _lists as lists
from finetuna_func.optim._base import (
    GradientTransformation,
    Result,
    State,
    Tree,
    as_tree,
    checked_leaves,
    wide,
    wide_dtype,
)
from finetuna_func.optim._checks import check_like

_CHUNK = 1 << 20  # numbers of an adapter that are rounded at a time; a constant, since the draws depend on it


class MasterParamsState(NamedTuple):
    """Float32 copies of the params that have fewer bits, by name, and the state of the inner transformation."""

    master: dict[str, Tensor]
    inner: State


def with_master_params(tx: GradientTransformation) -> GradientTransformation:
    """Returns ``tx`` working on float32 copies of bfloat16 and float16 params, which its state holds.

    The update of such a param is its difference to the rounded copy, in float64 since float32 does
    not hold all of them; so `apply_updates` gives exactly the copy, rounded to the nearest. The copies
    are what is trained: a change to the params by other means is undone by the next step. Params in
    float32 or wider have no copy. Use it outermost, or last in a chain.

    Args:
        tx: The inner transformation; it sees the copies as params.

    Raises:
        ValueError: At ``update``, ``params`` is None, or names or shapes are not those of init.

    Source: `Mixed precision training <https://arxiv.org/abs/1710.03740>`_, section 3.1.

    Example:
        >>> tx = ft.optim.with_master_params(ft.optim.sgd(1.0))
        >>> params = {"w": torch.ones(1, dtype=torch.bfloat16)}
        >>> state = tx.init(params)
        >>> for _ in range(4):  # 0.998, 0.996, 0.994, 0.992: bfloat16 has 1, 0.9961 and 0.9922
        ...     updates, state = tx.update({"w": torch.tensor([0.002])}, state, params)
        ...     params = ft.optim.apply_updates(params, updates)
        >>> params["w"].item(), state.master["w"]
        (0.9921875, tensor([0.9920]))
    """

    def init(params: Tree) -> MasterParamsState:
        leaves = checked_leaves("with_master_params.init", params)
        master = {name: wide(leaves[name]) for name in sorted(leaves) if leaves[name].dtype != wide_dtype(leaves[name])}
        return MasterParamsState(master, tx.init(_with(params, {**leaves, **master})))

    def update(updates: Params, state: MasterParamsState, params: Tree | None = None) -> Result[MasterParamsState]:
        if params is None:
            raise ValueError(
                "with_master_params.update(params=None): the update is what leads from the current params to the "
                "rounded copies; call tx.update(updates, state, params)."
            )
        leaves = as_tree("with_master_params.update", params)
        check_like("with_master_params.update", updates, leaves, "params")
        low = {name: leaf for name, leaf in leaves.items() if leaf.dtype != wide_dtype(leaf)}
        check_like("with_master_params.update", low, state.master, "the params given to init, of few bits")
        inside, inner = tx.update(updates, state.inner, _with(params, {**leaves, **state.master}))
        result, master = dict(inside), {}
        for names in lists.batches(state.master):
            old = [state.master[name] for name in names]
            new = lists.add(old, [inside[name].to(leaf.dtype) for name, leaf in zip(names, old, strict=True)])
            master.update(zip(names, new, strict=True))
            rounded = [leaf.to(low[name].dtype).double() for name, leaf in zip(names, new, strict=True)]
            steps = lists.add(rounded, [low[name].double() for name in names], alpha=-1)
            result.update(zip(names, steps, strict=True))
        return result, MasterParamsState({name: master[name] for name in sorted(master)}, inner)

    return GradientTransformation(init, update)


def stochastic_leaf(x: Tensor, dtype: torch.dtype, key: Tensor) -> Tensor:
    """Returns a leaf rounded by the numbers that its key decides, or the ``(N,)`` keys of a stack."""
    rows = x.reshape(*key.shape, x.shape[key.ndim :].numel())
    parts = []
    for i, start in enumerate(range(0, rows.shape[-1], _CHUNK)):
        part = rows[..., start : start + _CHUNK]
        u = _random.uniform(_random.fold_in(key, i).unsqueeze(-1), part.shape[-1:])
        parts.append(round_stochastically(part, dtype, u))
    return torch.cat(parts, dim=-1).reshape(x.shape) if parts else x.to(dtype)


def round_stochastically(x: Tensor, dtype: torch.dtype, u: Tensor) -> Tensor:
    """Returns ``x`` rounded to one of its two neighbours in a 16-bit dtype, so that the mean over ``u`` is ``x``.

    Args:
        x: Taken in float32.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        u: Uniform in ``[0, 1)``, multiples of 2 ** -24, in the shape of ``x``.
    """
    x = x.to(torch.float32)
    # Adding a uniform number to the bits that are cut off carries into the others with the right probability. The
    # difference of x and x rounded would be simpler, but compilers take the two casts for none.
    cut = 16 if dtype == torch.bfloat16 else 13
    bits = _bits_as(x, torch.int32) + (u * 2**cut).to(torch.int32)
    rounded = _bits_as(bits & -(1 << cut), torch.float32)
    if dtype == torch.float16:  # whose smallest numbers are multiples of 2 ** -24
        multiple = x.abs() * 2.0**24
        whole = torch.floor(multiple)
        small = torch.copysign((whole + (u < multiple - whole)) * 2.0**-24, x)
        rounded = torch.where(x.abs() < 2.0**-14, small, rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def _bits_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    try:
        return x.view(dtype)
    except RuntimeError:  # torch below 2.13 has no rule for that view under vmap
        return torch.view_copy(x, dtype=dtype)


def _with(params: Tree, leaves: Params) -> Tree:
    return params.replace(params=leaves) if isinstance(params, Finetuned) else dict(leaves)
