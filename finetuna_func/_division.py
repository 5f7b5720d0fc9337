"""Arguments of a call divided into parts along an axis, as ``torch.func.vmap`` names axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from finetuna_func._random import fold_in
from finetuna_func._trees import part_of_stack
from finetuna_func._types import Base, Finetuned

KEY = "key"  # instead of an axis: each part gets a key of its own


@dataclass(frozen=True)
class Divided:
    """The positional arguments of a call, and along which axis each of their leaves is divided.

    Attributes:
        leaves: The leaves of each argument.
        axes: For each leaf its axis; ``None`` for what every part gets whole.
        specs: The structure of each argument.
        size: How long the axes are, all of them; ``None`` if nothing is divided.
    """

    leaves: list[list[Any]]
    axes: list[list[Any]]
    specs: list[Any]
    size: int | None

    def part(self, start: int, stop: int, number: int = 0) -> list[Any]:
        """Returns the arguments with what is divided cut to ``start:stop``, and with the keys of part ``number``.

        They are views, not copies.
        """

        def cut(leaf: Any, axis: Any) -> Any:
            if axis is None:
                return leaf
            return fold_in(leaf, number) if axis == KEY else leaf.narrow(axis, start, stop - start)

        return [
            torch_pytree.tree_unflatten([cut(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True)], spec)
            for leaves, axes, spec in zip(self.leaves, self.axes, self.specs, strict=True)
        ]


def divide(function: str, args: Sequence[Any], in_dims: Any, *, hint: str) -> Divided:
    """Returns the arguments ready to be cut.

    Args:
        function: Who asks, for messages.
        args: Positional arguments.
        in_dims: An axis for all, or one entry per argument: an axis, ``None``, or a structure of these.
            Finetunes and bases are never cut here.
        hint: What to do about a leaf that cannot be cut.

    Raises:
        TypeError: A leaf with an axis is not a tensor.
        ValueError: ``in_dims`` has another structure, a leaf lacks its axis, or axes differ in length.
    """
    entries = list(in_dims) if isinstance(in_dims, (tuple, list)) else [in_dims] * len(args)
    if len(entries) != len(args):
        raise ValueError(
            f"{function}(in_dims={in_dims!r}): {len(entries)} entries for {len(args)} positional arguments; expected "
            "one for each."
        )
    leaves, axes, specs = [], [], []
    size: int | None = None
    for i, (arg, entry) in enumerate(zip(args, entries, strict=True)):
        own, spec = torch_pytree.tree_flatten(arg, is_leaf=lambda node: isinstance(node, (Base, Finetuned)))
        frozen = [isinstance(leaf, (Base, Finetuned)) for leaf in own]
        own_axes = torch_pytree._broadcast_to_and_flatten(entry, spec)
        if own_axes is None:
            raise ValueError(
                f"{function}(in_dims={in_dims!r}): the entry of argument {i} has another structure than it."
            )
        own_axes = [None if is_frozen else axis for axis, is_frozen in zip(own_axes, frozen, strict=True)]
        for leaf, axis in zip(own, own_axes, strict=True):
            if axis is None:
                continue
            if axis == KEY:
                if not isinstance(leaf, Tensor) or leaf.dtype != torch.int64:
                    raise TypeError(f'{function}(in_dims="key"): argument {i} is no key; make one with ft.random.key.')
                continue
            if isinstance(axis, bool) or not isinstance(axis, int):
                raise ValueError(f"{function}(in_dims={in_dims!r}): {axis!r} is not an axis.")
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{function}: argument {i} holds a {type(leaf).__name__}, which has no axis. {hint}")
            if not -leaf.ndim <= axis < leaf.ndim:
                raise ValueError(f"{function}: argument {i} has shape {tuple(leaf.shape)} and no axis {axis}. {hint}")
            if size is not None and leaf.shape[axis] != size:
                raise ValueError(
                    f"{function}: argument {i} has shape {tuple(leaf.shape)}, so {leaf.shape[axis]} along axis {axis}; "
                    f"expected {size}, as of what comes before it. {hint}"
                )
            size = leaf.shape[axis]
        leaves.append(own)
        axes.append(own_axes)
        specs.append(spec)
    return Divided(leaves, axes, specs, size)


def chunks_of_stack(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, in_dims: Any, chunk_size: int
) -> Iterator[tuple[Any, ...]]:
    """Yields the arguments of each chunk of the stack."""
    stacked: Finetuned = args[position]
    n = stacked.stack_size or 0
    function = f"stacked_value_and_grad(chunk_size={chunk_size})"
    if in_dims is None:
        dims: Any = tuple(
            torch_pytree.tree_map(
                lambda leaf: 0 if isinstance(leaf, Tensor) else None,
                arg,
                is_leaf=lambda node: isinstance(node, (Base, Finetuned)),
            )
            for arg in args
        )
        hint = (
            f"Without in_dims, every tensor among the positional arguments has one slice for each of the {n} "
            "finetunes; pass by keyword what they share, and instead of a key ft.random.split(key, N)."
        )
        keys = [leaf for leaf in torch_pytree.tree_leaves(kwargs) if isinstance(leaf, Tensor)]
        if any(leaf.ndim == 0 and leaf.dtype == torch.int64 for leaf in keys):
            raise ValueError(
                f"{function}: a keyword argument is a 0-d int64 tensor, as a key is, which every chunk would split "
                "anew. Pass ft.random.split(key, N) by position; close over it if it is no key."
            )
    else:
        entries = list(in_dims) if isinstance(in_dims, (tuple, list)) else [in_dims] * len(args)
        if len(entries) != len(args) or entries[position] != 0:
            raise ValueError(
                f"{function}: in_dims={in_dims!r} for {len(args)} positional arguments; expected an entry for each, "
                f"and 0 for the stack, which is argument {position}."
            )
        dims = tuple(entries)
        hint = "in_dims says along which axis to cut, None for what all finetunes share."
    divided = divide(function, args, dims, hint=hint)
    if divided.size is not None and divided.size != n:
        raise ValueError(f"{function}: the arguments have {divided.size} slices for {n} finetunes. {hint}")
    for start in range(0, n, chunk_size):
        stop = min(start + chunk_size, n)
        part = divided.part(start, stop)
        yield (*part[:position], part_of_stack(stacked, start, stop), *part[position + 1 :])


def joined_aux(parts: list[Any], sizes: list[int]) -> Any:
    """Returns the aux of all chunks as one: tensors concatenated, all else as it was in each."""
    where = "stacked_value_and_grad(chunk_size=..., has_aux=True)"
    flat = [torch_pytree.tree_flatten(part) for part in parts]
    specs = [spec for _, spec in flat]
    if any(spec != specs[0] for spec in specs):
        raise ValueError(f"{where}: the aux of two chunks differ in structure.")
    joined = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        if all(isinstance(leaf, Tensor) for leaf in leaves):
            if any(leaf.shape[:1] != (size,) for leaf, size in zip(leaves, sizes, strict=True)):
                raise ValueError(
                    f"{where}: the aux of the chunks holds tensors of shapes "
                    f"{[tuple(leaf.shape) for leaf in leaves]}; expected leading axes {sizes}, a slice for each "
                    "finetune, so that they can be joined."
                )
            joined.append(torch.cat(leaves))
        elif any(type(leaf) is not type(leaves[0]) or leaf != leaves[0] for leaf in leaves):
            raise ValueError(
                f"{where}: the chunks disagree about aux: {leaves[:5]}. Return "
                "a tensor with a leading axis, or what is the same for all."
            )
        else:
            joined.append(leaves[0])
    return torch_pytree.tree_unflatten(joined, specs[0])
