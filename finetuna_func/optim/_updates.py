"""Updates applied, and measured."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from finetuna_func import _random
from finetuna_func._levels import inside_transform
from finetuna_func._types import Finetuned, Params
from finetuna_func.optim import _lists as lists
from finetuna_func.optim._base import Tree, as_tree, wide_dtype, widest
from finetuna_func.optim._checks import check_like
from finetuna_func.optim._layout import Layout, layout_of
from finetuna_func.optim._rounding import stochastic_leaf


@overload
def apply_updates(
    params: Finetuned, updates: Params, *, rounding: str = "nearest", rng: Tensor | None = None
) -> Finetuned: ...
@overload
def apply_updates(
    params: Params, updates: Params, *, rounding: str = "nearest", rng: Tensor | None = None
) -> dict[str, Tensor]: ...
def apply_updates(
    params: Tree, updates: Params, *, rounding: str = "nearest", rng: Tensor | None = None
) -> dict[str, Tensor] | Finetuned:
    """Returns ``params + updates``: a new `Finetuned` for a `Finetuned`, a dict for a mapping.

    The sum is taken in float32 or wider and rounded to the dtype of each param.

    Args:
        params: What is optimized.
        updates: By name, as ``update`` returns them.
        rounding: ``"nearest"``; or ``"stochastic"``, which rounds bfloat16 and float16 params up or
            down at random, so that the expected param is the sum, exactly: small updates then count
            on average, where rounding to the nearest forgets them. Wider params are not rounded.
        rng: The key that decides stochastic rounding, a new one at each step
            (``ft.random.fold_in(key, step)``). For a stack one key, which is split into one per
            adapter, or ``(N,)`` keys.

    Raises:
        ValueError: Names or shapes of updates and params differ; another ``rounding``; ``rng`` is
            missing, not a key, not needed, or of another shape.

    Source: of stochastic rounding, `Gupta et al. 2015 <https://arxiv.org/abs/1502.02551>`_.

    Example:
        >>> apply_updates({"w": torch.ones(2, dtype=torch.bfloat16)}, {"w": torch.tensor([1.0, 2.0])})
        {'w': tensor([2., 3.], dtype=torch.bfloat16)}
        >>> params, small = {"w": torch.ones(10000, dtype=torch.bfloat16)}, {"w": torch.full((10000,), 1e-3)}
        >>> new = apply_updates(params, small, rounding="stochastic", rng=ft.random.key(0))
        >>> apply_updates(params, small)["w"].float().mean(), new["w"].float().mean()
        (tensor(1.), tensor(1.0010))
    """
    leaves = as_tree("apply_updates", params)
    check_like("apply_updates", updates, leaves, "params")
    keys = _rounding_keys(params, rounding, rng)
    layout = None if keys is not None else _flat_layout(leaves, updates, params)
    if layout is None:
        new = _sums(leaves, updates, keys)
    else:
        new = layout.split(_sums(layout.join(leaves), layout.join(updates), None))
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


def _sums(leaves: Params, updates: Params, keys: Tensor | None) -> dict[str, Tensor]:
    dtypes = {
        name: torch.float64 if updates[name].dtype == torch.float64 else wide_dtype(leaves[name])
        for name in sorted(leaves)
    }
    position = {name: i for i, name in enumerate(dtypes)}
    wide_leaves, new = {name: leaves[name].to(dtype) for name, dtype in dtypes.items()}, {}
    for names in lists.batches(wide_leaves):
        sums = lists.add([wide_leaves[name] for name in names], [updates[name].to(dtypes[name]) for name in names])
        for name, sum_ in zip(names, sums, strict=True):
            dtype = leaves[name].dtype
            if keys is not None and dtype in (torch.bfloat16, torch.float16):
                new[name] = stochastic_leaf(sum_, dtype, _random.fold_in(keys, position[name]))
            else:
                new[name] = sum_.to(dtype)
    return {name: new[name] for name in dtypes}


def _flat_layout(leaves: Params, updates: Params, params: Tree) -> Layout | None:
    """Returns how the updates lie in flat leaves, where they are views of such, as `flatten` returns them."""
    first = next(iter(updates.values()), None)
    if first is None or torch.compiler.is_compiling() or inside_transform() or type(first) is not Tensor:
        return None
    if first.is_meta or first.untyped_storage().nbytes() <= first.nbytes:
        return None
    layout = layout_of("apply_updates(params)", leaves, params.stack_size if isinstance(params, Finetuned) else None)
    return layout if layout.lies(updates) else None


def _rounding_keys(params: Tree, rounding: str, rng: Tensor | None) -> Tensor | None:
    """Returns the key, or one per adapter of a stack; None to round to the nearest."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f'apply_updates(rounding={rounding!r}): expected "nearest" or "stochastic".')
    if rounding == "nearest":
        if rng is not None:
            raise ValueError(
                'apply_updates(rng=...): rounding="nearest" draws no numbers; leave rng out, or pass '
                'rounding="stochastic".'
            )
        return None
    if not isinstance(rng, Tensor) or rng.dtype != torch.int64:
        what = f"a tensor of dtype {rng.dtype}" if isinstance(rng, Tensor) else type(rng).__name__
        raise ValueError(
            f"apply_updates(rng=...): got {what}, and stochastic rounding needs a key that decides it; pass "
            "rng=ft.random.fold_in(ft.random.key(seed), step)."
        )
    size = params.stack_size if isinstance(params, Finetuned) else None
    if size is not None and rng.ndim == 0:
        return _random.split(rng, size)
    expected = () if size is None else (size,)
    if rng.shape != expected:
        allowed = "one key, of shape ()" if size is None else f"() or ({size},), a key each"
        raise ValueError(f"apply_updates(rng=...): got keys of shape {tuple(rng.shape)}, expected {allowed}.")
    return rng
