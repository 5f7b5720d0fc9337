"""Updates applied, and measured."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from finetuna_func._types import Finetuned, Params
from finetuna_func.optim import _lists as lists
from finetuna_func.optim._base import Tree, as_tree, wide, widest
from finetuna_func.optim._checks import check_like


@overload
def apply_updates(params: Finetuned, updates: Params) -> Finetuned: ...
@overload
def apply_updates(params: Params, updates: Params) -> dict[str, Tensor]: ...
def apply_updates(params: Tree, updates: Params) -> dict[str, Tensor] | Finetuned:
    """Returns ``params + updates``: a new `Finetuned` for a `Finetuned`, a dict for a mapping.

    The sum is taken in float32 or wider and rounded to the dtype of each param.

    Raises:
        ValueError: Names or shapes of updates and params differ.

    Example:
        >>> apply_updates({"w": torch.ones(2, dtype=torch.bfloat16)}, {"w": torch.tensor([1.0, 2.0])})
        {'w': tensor([2., 3.], dtype=torch.bfloat16)}
    """
    leaves = as_tree("apply_updates", params)
    check_like("apply_updates", updates, leaves, "params")
    wide_leaves, new = {name: wide(leaf) for name, leaf in leaves.items()}, {}
    for names in lists.batches(wide_leaves):
        xs = [wide_leaves[name] for name in names]
        sums = lists.add(xs, [updates[name].to(wide_leaves[name].dtype) for name in names])
        new.update({name: sum_.to(leaves[name].dtype) for name, sum_ in zip(names, sums, strict=True)})
    new = {name: new[name] for name in sorted(new)}
    return params.replace(params=new) if isinstance(params, Finetuned) else new


def global_norm(tree: Tree, stacked: bool = False) -> Tensor:
    """Returns the 2-norm of all leaves together, in float32 (float64 if any leaf is float64).

    Args:
        tree: A flat mapping, or a `Finetuned`, whose ``params`` are meant.
        stacked: Whether every leaf has a leading axis N, to give one norm for each: shape ``(N,)``
            instead of ``()``. A stacked `Finetuned` always is.

    Raises:
        ValueError: ``stacked``, and the leaves have no common leading axis (an empty tree has none).

    Example:
        >>> tree = {"a": torch.tensor([[3.0], [1.0]]), "b": torch.tensor([[4.0], [0.0]])}
        >>> global_norm(tree, stacked=True), global_norm({"c": tree["a"][0], "d": tree["b"][0]})
        (tensor([5., 1.]), tensor(5.))
    """
    leaves = as_tree("global_norm", tree)
    norm, dtype = torch.linalg.vector_norm, widest(leaves)
    if not stacked and (not isinstance(tree, Finetuned) or tree.stack_size is None):
        norms: dict[str, Tensor] = {}
        for names in lists.batches(leaves):
            norms.update(zip(names, lists.norms([leaves[name] for name in names], dtype), strict=True))
        return norm(torch.stack([norms[name] for name in sorted(norms)])) if norms else torch.zeros(())
    sizes = {tuple(leaf.shape[:1]) for leaf in leaves.values()}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"global_norm(stacked=True): the leading axes of the {len(leaves)} leaves are {sorted(sizes)}, "
            "expected the same (N,) for all; for one finetune, or an empty tree, pass stacked=False."
        )
    of_each = [norm(leaves[name].reshape(len(leaves[name]), -1), dim=1, dtype=dtype) for name in sorted(leaves)]
    return norm(torch.stack(of_each), dim=0)
