"""What a transformation is, and the trees it works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from finetuna_func._types import Finetuned, Params
from finetuna_func.optim import _lists as lists

State: TypeAlias = Any
"""A pytree of tensors: a NamedTuple, or a tuple of them. Opaque to everything but its transformation."""

Tree: TypeAlias = "Params | Finetuned"
"""What is optimized: a flat mapping, which is one finetune, or a `Finetuned`, which may be a stack."""

S = TypeVar("S")
Result: TypeAlias = tuple[dict[str, Tensor], S]
"""What an update returns: the new updates, keys sorted, and the next state."""


class InitFn(Protocol):
    """``init(params) -> state``."""

    def __call__(self, params: Tree) -> State: ...


class UpdateFn(Protocol):
    """``update(updates, state, params=None) -> (updates, state)``."""

    def __call__(self, updates: Params, state: State, params: Tree | None = None) -> Result[State]: ...


class GradientTransformation(NamedTuple):
    """A pair of pure functions that turns gradients into updates.

    Attributes:
        init: ``init(params)`` returns the first state.
        update: ``update(updates, state, params=None)`` returns new updates and the next state.
            ``updates`` are gradients, or what an earlier transformation made of them, in the shapes of the params.

    Example:
        >>> params = {"w": torch.ones(2)}
        >>> tx = ft.optim.sgd(0.5)
        >>> updates, state = tx.update({"w": torch.tensor([1.0, 2.0])}, tx.init(params))
        >>> updates
        {'w': tensor([-0.5000, -1.0000])}
    """

    init: InitFn
    update: UpdateFn


class EmptyState(NamedTuple):
    """The state of a transformation that remembers nothing."""


def as_tree(where: str, params: Tree) -> Params:
    """Returns the flat mapping that is optimized."""
    tree = params.params if isinstance(params, Finetuned) else params
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"{where}: got a {type(tree).__name__}, expected a Finetuned or a flat mapping from names to "
            "tensors, such as dict(model.named_parameters())."
        )
    return tree


def checked_leaves(where: str, params: Tree) -> Params:
    """Returns the leaves that `init` was given, after checking that they can be optimized."""
    tree = as_tree(f"{where}(params)", params)
    for name, leaf in tree.items():
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            what = f"dtype {leaf.dtype}" if isinstance(leaf, Tensor) else f"type {type(leaf).__name__}"
            raise TypeError(
                f"{where}(params): leaf {name!r} has {what}, expected a floating-point tensor; leave what is "
                "not trained, such as int8 codes, out of params (Base.params and Finetuned.consts hold it)."
            )
    if isinstance(params, Finetuned) and params.stack_size is not None:
        for name, leaf in [*tree.items(), *params.consts.items()]:
            if leaf.ndim == 0 or leaf.shape[0] != params.stack_size:
                raise ValueError(
                    f"{where}(params): leaf {name!r} of a stack of {params.stack_size} has shape "
                    f"{tuple(leaf.shape)}, expected {params.stack_size} as its first size; under vmap, map "
                    "over tuned.params, as the spec of a Finetuned goes on saying that it is a stack."
                )
    return tree


def zeros(params: Tree, dtype: torch.dtype) -> Tensor:
    """Returns one zero, or one per adapter of a stack, on the device of the params."""
    size = params.stack_size if isinstance(params, Finetuned) else None
    shape = () if size is None else (size,)
    for leaf in as_tree("init", params).values():
        return leaf.new_zeros(shape, dtype=dtype)  # so that under vmap the zero is batched as the leaf is
    return torch.zeros(shape, dtype=dtype)


def zeros_like(leaves: Params) -> dict[str, Tensor]:
    """Returns zeros of the shapes of the leaves, in their wide dtypes."""
    return {name: torch.zeros_like(leaves[name], dtype=wide_dtype(leaves[name])) for name in sorted(leaves)}


def wide_dtype(leaf: Tensor) -> torch.dtype:
    """Returns the dtype in which a leaf is computed: float32 or wider."""
    return torch.float64 if leaf.dtype == torch.float64 else torch.float32


def wide(leaf: Tensor) -> Tensor:
    """Returns the leaf in float32 or wider."""
    return leaf.to(wide_dtype(leaf))


def widest(leaves: Params) -> torch.dtype:
    """Returns the dtype in which all leaves together are computed."""
    return torch.float64 if any(leaf.dtype == torch.float64 for leaf in leaves.values()) else torch.float32


def times(where: str, factor: float | Tensor, tree: Params) -> dict[str, Tensor]:
    """Returns ``factor * leaf`` for each leaf in its wide dtype; a ``(N,)`` factor goes along the leading axis."""
    if isinstance(factor, Tensor) and factor.ndim:
        for name, leaf in tree.items():
            if leaf.shape[:1] != factor.shape:
                raise ValueError(
                    f"{where}: a tensor of shape {tuple(factor.shape)} is one value per adapter, but leaf {name!r} "
                    f"of shape {tuple(leaf.shape)} has no leading axis of size {len(factor)}; stack {len(factor)} "
                    "finetunes, or pass a number or a 0-d tensor (under vmap, make the tensor a mapped argument)."
                )
    leaves, scaled = {name: wide(tree[name]) for name in sorted(tree)}, {}
    for names in lists.batches(leaves):
        scaled.update(zip(names, lists.mul([leaves[name] for name in names], factor), strict=True))
    return {name: scaled[name] for name in leaves}


def stateless(where: str, change: Callable[[Params], dict[str, Tensor]]) -> GradientTransformation:
    """Returns the transformation that applies ``change(updates)``, and remembers nothing."""

    def init(params: Tree) -> EmptyState:
        checked_leaves(f"{where}.init", params)
        return EmptyState()

    def update(updates: Params, state: EmptyState, params: Tree | None = None) -> Result[EmptyState]:
        return change({name: updates[name] for name in sorted(updates)}), state

    return GradientTransformation(init, update)
