"""Trees of tensors: pytree registration, stacking of finetunes, and equinox's tree verbs.

`Base` and `Finetuned` are nodes for torch's pytree (so for `torch.func.vmap`'s ``in_dims``,
``torch.compile`` and ``torch.export``) and for optree, in the namespace `NAMESPACE`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import optree
import torch
import torch.nn.functional as F
import torch.utils._pytree as torch_pytree
from torch import Tensor

from finetuna_func._filters import Filter, as_predicate, join_name, near_misses, split_name
from finetuna_func._types import AdapterSpec, Base, Finetuned, Params, Spec, frozen_tree

NAMESPACE = "finetuna_func"

Tree = TypeVar("Tree", Base, Finetuned, Mapping[str, Tensor])


def stack(finetunes: Sequence[Finetuned]) -> Finetuned:
    """Returns N finetunes of one base as one tree whose leaves have a leading axis N.

    Ranks may differ: ``A`` and ``B`` are padded with zero rows and columns, which changes no
    output, stays exactly zero under Adam, and is cut off again by `unstack`. Dropout rates and
    scales may differ as well; they are leaves.

    Args:
        finetunes: At least one; single finetunes of the same base with the same adapted layers
            and plain parameters.

    Raises:
        TypeError: An element is not a `Finetuned`.
        ValueError: None given, one is itself a stack, or they do not fit together.

    Example:
        >>> base, a = new_finetuned(tiny_model(), plain_layers=())
        >>> stacked = stack([a, a])
        >>> stacked.stack_size, stacked.params["fc.lora_a"].shape
        (2, torch.Size([2, 4, 8]))
    """
    finetunes = list(finetunes)
    if not finetunes:
        raise ValueError("stack: expected at least one finetune, got an empty sequence.")
    for position, tuned in enumerate(finetunes):
        if not isinstance(tuned, Finetuned):
            raise TypeError(f"stack: element {position} is a {type(tuned).__name__}; expected Finetuned values.")
        if tuned.stack_size is not None:
            raise ValueError(f"stack: element {position} is itself a stack of {tuned.stack_size}; unstack it first.")
        _check_same_structure(finetunes[0], tuned, position)
    params = {name: pad_and_stack([t.params[name] for t in finetunes], name) for name in finetunes[0].params}
    constant_names = sorted({name for tuned in finetunes for name in tuned.consts})
    consts = {
        name: pad_and_stack([_constant(tuned, name, finetunes) for tuned in finetunes], name) for name in constant_names
    }
    members = tuple(tuned.spec for tuned in finetunes)
    return Finetuned(params, consts, dataclasses.replace(members[0], members=members))


def unstack(stacked: Finetuned) -> list[Finetuned]:
    """Returns the finetunes of a stack, in order, each with its own rank.

    Example:
        >>> base, a = new_finetuned(tiny_model(), plain_layers=())
        >>> [t.spec == a.spec for t in unstack(stack([a, a]))]
        [True, True]
    """
    return [index(stacked, i) for i in range(_require_stack("unstack", stacked))]


def index(stacked: Finetuned, i: int) -> Finetuned:
    """Returns finetune ``i`` of a stack; negative counts from the end.

    Raises:
        ValueError: Not a stack.
        IndexError: No such finetune.
    """
    size = _require_stack("index", stacked)
    if not -size <= i < size:
        raise IndexError(f"index: i={i} but the stack holds {size} finetunes (0 to {size - 1}).")
    spec = stacked.spec.members[i]
    ranks = {adapter.path: adapter.config.r for adapter in spec.adapters}
    # Copies, so that keeping one finetune does not keep the whole stack in memory.
    params = {name: _cut(leaf[i], name, ranks).clone() for name, leaf in stacked.params.items()}
    names = _constant_names(spec)
    consts = {name: _cut(leaf[i], name, ranks).clone() for name, leaf in stacked.consts.items() if name in names}
    return Finetuned(params, consts, spec)


def part_of_stack(stacked: Finetuned, start: int, stop: int) -> Finetuned:
    """Returns finetunes ``start`` to ``stop`` of a stack as a stack: views, padded as the whole is."""
    params = {name: leaf[start:stop] for name, leaf in stacked.params.items()}
    consts = {name: leaf[start:stop] for name, leaf in stacked.consts.items()}
    return Finetuned(params, consts, dataclasses.replace(stacked.spec, members=stacked.spec.members[start:stop]))


def partition(tree: Tree, filter: Filter) -> tuple[Tree, Tree]:
    """Returns the leaves that pass the filter and the others, as two trees of the same type.

    For a `Finetuned` the filter sees `params`; `consts` stay with the first tree.

    Args:
        tree: A flat mapping, a `Base` or a `Finetuned`.
        filter: A regex searched in the name, a dtype, a predicate ``(name, leaf) -> bool``, a bool,
            or several of these (any).

    Raises:
        ValueError: A regex that matches no leaf.

    Example:
        >>> a, b = partition({"x.lora_a": torch.zeros(1), "x.lora_b": torch.ones(1)}, "lora_a$")
        >>> sorted(a), sorted(b)
        (['x.lora_a'], ['x.lora_b'])
    """
    leaves = _leaves(tree)
    _check_filter_matches(filter, leaves)
    predicate = as_predicate(filter)
    chosen = {name: leaf for name, leaf in leaves.items() if predicate(name, leaf)}
    others = {name: leaf for name, leaf in leaves.items() if name not in chosen}
    return _with_leaves(tree, chosen), _with_leaves(tree, others, first=False)


def combine(*trees: Tree) -> Tree:
    """Returns the union of trees with disjoint names; the inverse of `partition`.

    Raises:
        ValueError: No trees, two trees hold the same name, or they are parts of different values.

    Example:
        >>> sorted(combine({"a": torch.zeros(1)}, {"b": torch.zeros(1)}))
        ['a', 'b']
    """
    if not trees:
        raise ValueError("combine: expected at least one tree.")
    leaves: dict[str, Tensor] = {}
    consts: dict[str, Tensor] = {}
    for position, tree in enumerate(trees):
        if type(tree) is not type(trees[0]) and not (isinstance(tree, Mapping) and isinstance(trees[0], Mapping)):
            raise ValueError(
                f"combine: tree {position} is a {type(tree).__name__} but tree 0 is a {type(trees[0]).__name__}."
            )
        if isinstance(tree, Finetuned) and tree.spec != cast(Finetuned, trees[0]).spec:
            raise ValueError(f"combine: tree {position} is part of another finetune than tree 0 (their specs differ).")
        if isinstance(tree, Base) and tree.fingerprint != cast(Base, trees[0]).fingerprint:
            raise ValueError(f"combine: tree {position} is part of another base than tree 0.")
        part = _leaves(tree)
        overlap = sorted(leaves.keys() & part.keys())
        if overlap:
            raise ValueError(f"combine: tree {position} repeats the names {overlap[:5]}; the trees must be disjoint.")
        leaves.update(part)
        if isinstance(tree, Finetuned):
            consts.update(tree.consts)
    if isinstance(trees[0], Finetuned):
        return Finetuned(leaves, consts, trees[0].spec)
    return _with_leaves(trees[0], leaves)


def tree_at(path: str, tree: Tree, fn: Callable[[Tensor], Tensor]) -> Tree:
    """Returns the tree with ``fn`` applied to the leaf called ``path``, or to all that a regex names.

    Args:
        path: A leaf's name, or a regex over whole names.
        tree: A flat mapping, a `Base` or a `Finetuned` (its `params`).
        fn: The new leaf from the old.

    Raises:
        ValueError: Nothing is called that; the message lists near misses.

    Example:
        >>> tree_at("a", {"a": torch.zeros(1), "b": torch.zeros(1)}, lambda leaf: leaf + 1)["a"]
        tensor([1.])
    """
    leaves = _leaves(tree)
    if path in leaves:
        return _with_leaves(tree, {**leaves, path: fn(leaves[path])})
    predicate = as_predicate(f"^(?:{path})$")
    hits = {name: fn(leaf) for name, leaf in leaves.items() if predicate(name, leaf)}
    if not hits:
        raise ValueError(f"tree_at: {path!r} names no leaf. {near_misses(path, leaves)}")
    return _with_leaves(tree, {**leaves, **hits})


def _leaves(tree: Base | Finetuned | Params) -> Params:
    return tree.params if isinstance(tree, (Base, Finetuned)) else tree


def _with_leaves(tree: Any, leaves: Params, *, first: bool = True) -> Any:
    if isinstance(tree, Finetuned):
        return Finetuned(leaves, tree.consts if first else {}, tree.spec)
    if isinstance(tree, Base):
        return dataclasses.replace(tree, params=leaves)
    return dict(leaves)


def _check_filter_matches(filter: Filter, leaves: Params) -> None:
    if isinstance(filter, str):
        if not any(as_predicate(filter)(name, leaf) for name, leaf in leaves.items()):
            raise ValueError(f"partition: the filter {filter!r} matches no leaf. {near_misses(filter, leaves)}")
    elif isinstance(filter, Iterable) and not callable(filter):
        for part in filter:
            _check_filter_matches(part, leaves)


def _require_stack(function: str, stacked: Finetuned) -> int:
    if not isinstance(stacked, Finetuned) or stacked.stack_size is None:
        raise ValueError(f"{function}: expected a stack made by ft.stack([...]), got {stacked!r}.")
    return stacked.stack_size


def _check_same_structure(first: Finetuned, other: Finetuned, position: int) -> None:
    if other.spec.base != first.spec.base:
        raise ValueError(
            f"stack: element {position} belongs to base {other.spec.base!r} but element 0 to {first.spec.base!r}; "
            "only finetunes of one base stack."
        )
    layers = [{(a.path, a.kind) for a in tuned.spec.adapters} for tuned in (first, other)]
    if layers[0] != layers[1]:
        differing = sorted(path for path, _ in layers[0] ^ layers[1])
        raise ValueError(
            f"stack: element {position} adapts other layers than element 0: {differing[:5]}; "
            "make them with the same adapt_layers."
        )
    if first.params.keys() != other.params.keys():
        differing = sorted(first.params.keys() ^ other.params.keys())
        raise ValueError(
            f"stack: element {position} has other parameters than element 0: {differing[:5]}; "
            "make them with the same plain_layers, bias and dora."
        )
    if first.spec.quantized != other.spec.quantized:
        raise ValueError(f"stack: element {position} has other modules_not_to_quantize than element 0.")
    for name, leaf in first.params.items():
        if (leaf.dtype, leaf.device) != (other.params[name].dtype, other.params[name].device):
            raise ValueError(
                f"stack: {name} is {leaf.dtype} on {leaf.device} in element 0 but {other.params[name].dtype} on "
                f"{other.params[name].device} in element {position}; convert one of them."
            )


def pad_and_stack(leaves: list[Tensor], name: str) -> Tensor:
    """Returns leaves called ``name`` as one, those of smaller ranks padded with zeros."""
    dim = _rank_dim(name)
    if dim is not None:
        rank = max(leaf.shape[dim] for leaf in leaves)
        leaves = [
            F.pad(leaf, (0, 0, 0, rank - leaf.shape[0]) if dim == 0 else (0, rank - leaf.shape[1])) for leaf in leaves
        ]
    shapes = {tuple(leaf.shape) for leaf in leaves}
    if len(shapes) > 1:
        raise ValueError(f"stack: {name} has different shapes {sorted(shapes)}.")
    return torch.stack(leaves)


def _cut(leaf: Tensor, name: str, ranks: dict[str, int]) -> Tensor:
    dim = _rank_dim(name)
    return leaf if dim is None else leaf.narrow(dim, 0, ranks[split_name(name)[0]])


def _rank_dim(name: str) -> int | None:
    """The axis of an unstacked leaf that is the rank."""
    suffix = split_name(name)[1]
    return {"lora_a": 0, "lora_b": 1, "lora_a0": 0, "lora_b0": 1}.get(suffix)


def _constant_names(spec: Spec) -> set[str]:
    return {name for adapter in spec.adapters for name in (*constants_of(adapter), *tensor_constants_of(adapter))}


def constants_of(adapter: AdapterSpec) -> dict[str, float]:
    """Returns the numbers that an adapter needs, which are batched but not trained: name -> value."""
    constants = {join_name(adapter.path, "lora_scale"): adapter.config.scale}
    dropout = getattr(adapter.config, "dropout", 0.0)
    if dropout > 0:
        constants[join_name(adapter.path, "lora_dropout")] = dropout
    return constants


def tensor_constants_of(adapter: AdapterSpec) -> tuple[str, ...]:
    """Returns the names of what an adapter keeps of the frozen weight: its rows' norms, its first factors."""
    config = adapter.config
    own = ("lora_weight_norm",) if getattr(config, "dora", False) else ()
    own += ("lora_a0", "lora_b0") if getattr(config, "subtracts_start", False) else ()
    return tuple(join_name(adapter.path, name) for name in own)


def _constant(tuned: Finetuned, name: str, all_tuned: list[Finetuned]) -> Tensor:
    """A finetune's constant; one without dropout beside one with it has rate 0, and likewise for the others."""
    if name in tuned.consts:
        return tuned.consts[name]
    return torch.zeros_like(next(other.consts[name] for other in all_tuned if name in other.consts))


def _flatten_base(base: Base) -> tuple[list[Any], Any]:
    return [dict(base.params)], (base.skeleton, base.fingerprint, _ById(base.derived))


def _unflatten_base(children: Any, context: Any) -> Base:
    (params,) = children
    skeleton, fingerprint, derived = context
    return _bare(Base, params=params, skeleton=skeleton, fingerprint=fingerprint, derived=derived.value)


def _flatten_finetuned(tuned: Finetuned) -> tuple[list[Any], Any]:
    return [dict(tuned.params), dict(tuned.consts)], tuned.spec


def _unflatten_finetuned(children: Any, context: Any) -> Finetuned:
    params, consts = children
    return _bare(Finetuned, params=params, consts=consts, spec=context)


def _bare(cls: type, **fields: Any) -> Any:
    """Builds a node without sorting: pytree machinery may put placeholders where tensors were."""
    node = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(
            node,
            name,
            frozen_tree(value) if name in ("params", "consts") and isinstance(value, dict) else value,
        )
    return node


@dataclasses.dataclass(frozen=True)
class _ById:
    """Compares and hashes a mutable cache by identity, as a treespec's context must."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _key_paths(names: tuple[str, ...]) -> Callable[[Any], tuple[list[Any], Any]]:
    flatten = _flatten_base if names == ("params",) else _flatten_finetuned

    def with_keys(node: Any) -> tuple[list[Any], Any]:
        children, context = flatten(node)
        return [(torch_pytree.GetAttrKey(name), child) for name, child in zip(names, children, strict=True)], context

    return with_keys


def _register() -> None:
    nodes: tuple[tuple[Any, Any, Any, tuple[str, ...]], ...] = (
        (Base, _flatten_base, _unflatten_base, ("params",)),
        (Finetuned, _flatten_finetuned, _unflatten_finetuned, ("params", "consts")),
    )
    register: Any = optree.register_pytree_node  # its types ask for a Collection; a frozen value will do
    for cls, flatten, unflatten, names in nodes:
        torch_pytree.register_pytree_node(
            cls,
            flatten,
            unflatten,
            serialized_type_name=f"finetuna_func.{cls.__name__}",
            flatten_with_keys_fn=_key_paths(names),
        )
        register(
            cls,
            lambda node, flatten=flatten, names=names: (*flatten(node), names),
            lambda context, children, unflatten=unflatten: unflatten(children, context),
            namespace=NAMESPACE,
        )


_register()
