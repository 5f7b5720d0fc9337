"""Batches of several adapters, each from a loader of its own, as the one batch that a stack takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetuna_func.data import IGNORED

_PADDING = {"labels": IGNORED, "attention_mask": 0, "position_ids": 0, "token_type_ids": 0}
"""With what is filled up; ``input_ids`` with ``pad_id``."""


def stack_batches(batches: Sequence[Any], *, pad_id: int = 0) -> Any:
    """Returns N batches as one with a leading axis N, of the same kind: for `apply_stacked` and its losses.

    For loops of one's own, over a ``torch.utils.data.DataLoader`` for each adapter::

        for batch in map(ft.stack_batches, zip(*loaders)):  # until the shortest ends
            losses, grads = step(stacked, batch["input_ids"], batch["labels"])

    Args:
        batches: One for each adapter: tensors ``(B, ...)``, or mappings, tuples or lists of them, all alike. Where the
            entries of a mapping have different B or T, ``input_ids`` are filled up with ``pad_id``, ``labels`` with
            -100, and ``attention_mask``, ``position_ids`` and ``token_type_ids`` with 0, at their ends.
        pad_id: Any token id that the model knows.

    Raises:
        ValueError: No batches, of different kinds, or of different shapes where nothing says what is padding:
            no labels and no mask, or a name that is not among these.
        TypeError: Something in them is not a tensor.

    Example:
        >>> short, long = torch.ones(1, 2, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
        >>> stacked = stack_batches([{"input_ids": x, "labels": x} for x in (short, long)])
        >>> stacked["labels"].tolist()
        [[[1, 1, -100], [-100, -100, -100]], [[1, 1, 1], [1, 1, 1]]]
    """
    if not batches:
        raise ValueError("stack_batches: no batches; expected one for each adapter.")
    first = batches[0]
    if isinstance(first, Mapping):
        if any(not isinstance(own, Mapping) or own.keys() != first.keys() for own in batches):
            names = [sorted(own) if isinstance(own, Mapping) else type(own).__name__ for own in batches]
            raise ValueError(f"stack_batches: the batches have {names}; expected the same names in each.")
        marked = "labels" in first or "attention_mask" in first
        padding = _PADDING | {"input_ids": pad_id} if marked else {}
        return {name: _stacked(name, [own[name] for own in batches], padding.get(name)) for name in first}
    if isinstance(first, (tuple, list)):
        if any(type(own) is not type(first) or len(own) != len(first) for own in batches):
            raise ValueError("stack_batches: the batches differ in kind or length; expected them alike.")
        parts = [_stacked(f"part {i}", own, None) for i, own in enumerate(zip(*batches, strict=True))]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return _stacked("batch", batches, None)


def _stacked(name: str, leaves: Sequence[Any], fill: int | None) -> Tensor:
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"stack_batches: {name} is a {type(leaf).__name__}, expected a tensor; use "
                'dataset.with_format("torch"), a collate_fn, or leave it out.'
            )
    shapes = [tuple(leaf.shape) for leaf in leaves]
    if len(set(shapes)) == 1:
        return torch.stack(list(leaves))
    if fill is None or len({len(shape) for shape in shapes}) > 1:
        raise ValueError(
            f"stack_batches: {name} has the shapes {shapes}; expected the same, or mappings with labels or a mask, in "
            f"which these are filled up: input_ids, {', '.join(_PADDING)}."
        )
    common = [max(sizes) for sizes in zip(*shapes, strict=True)]
    out = leaves[0].new_full((len(leaves), *common), fill)
    for i, leaf in enumerate(leaves):
        out[(i, *map(slice, leaf.shape))] = leaf
    return out
