"""Tensors that are read when their numbers are asked for.

A `LazyTensor` has a shape, a dtype and a recipe: rows of a file, or a torch operation on other lazy
tensors. Whatever code renames, casts, stacks, splits and ties the tensors of a checkpoint can do so
with lazy ones, which costs nothing; `evaluate` then reads and computes one of them at a time, and
`blocks` a few rows at a time, wherever the recipe goes row by row.

    checkpoint: gate (m, d), up (m, d) per expert  --cat, stack-->  gate_up_proj (E, 2 m, d), lazy
    evaluate(gate_up_proj[3])                      reads the gate and up of expert 3 and nothing else
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten

BLOCK = 1 << 18
"""Numbers read at a time."""

Box = tuple[tuple[int, int], ...]
"""Which part of a tensor: ``(start, stop)`` along each axis."""


class Source(Protocol):
    """A tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that `read` returns."""
        ...

    def read(self, box: Box) -> Tensor:
        """Returns that part of it, in memory of its own; ``()`` for the whole of a 0-d tensor."""
        ...


class LazyTensor(Tensor):
    """A tensor without numbers, and the recipe for them. Operations on it are recorded, not run.

    An operation that needs numbers (a comparison, ``item()``, copying into an ordinary tensor)
    evaluates what it needs; one that would write to a lazy tensor raises.
    """

    _recipe: Source | _Operation

    @staticmethod
    def __new__(cls, recipe: Source | _Operation, like: Tensor, device: torch.device) -> LazyTensor:
        """Returns a lazy tensor of the shape, strides and dtype of ``like``."""
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        self._recipe = recipe
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PARTITIONS:
            return _PARTITIONS[func](*args, **kwargs)
        if func in _FACTORIES:
            return func(*tree_map(_of_that_shape, args), **kwargs)
        arguments = zip(func._schema.arguments, args, strict=False)
        if any(said.alias_info and said.alias_info.is_write and isinstance(arg, LazyTensor) for said, arg in arguments):
            raise RuntimeError(f"{func} writes to a tensor that is still in its file.")
        if func is aten.equal.default:
            return _equal(*args)
        returns_tensor = len(func._schema.returns) == 1 and str(func._schema.returns[0].type) == "Tensor"
        if func._schema.is_mutable or not returns_tensor:
            return func(*tree_map(evaluate, args), **tree_map(evaluate, kwargs))
        device = kwargs.get("device") or next(x.device for x in _tensors(args, kwargs) if isinstance(x, LazyTensor))
        on_meta = {**kwargs, "device": torch.device("meta")} if "device" in kwargs else kwargs
        out = func(*tree_map(_as_meta, args), **tree_map(_as_meta, on_meta))
        if torch.device(device).type == "meta":
            return out
        return LazyTensor(_Operation(func, args, kwargs), out, torch.device(device))


class _Operation:
    """An operation and what it was called with."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.func, self.args, self.kwargs = func, list(args), kwargs


def lazy(source: Source) -> LazyTensor:
    """Returns the tensor in a file, unread."""
    return LazyTensor(source, torch.empty(source.shape, dtype=source.dtype, device="meta"), torch.device("cpu"))


def evaluate(x: Any) -> Any:
    """Returns a lazy tensor as an ordinary one, read and computed now; anything else as it is."""
    if not isinstance(x, LazyTensor):
        return x
    if x.ndim and _by_rows(x):  # so that what it is made of is never there as a whole beside it
        whole = torch.empty(x.shape, dtype=x.dtype)
        for start, rows in blocks(x):
            whole[start : start + rows.shape[0]] = rows
        return whole.to(x.device)
    return _whole(x)


def sources(x: Tensor) -> list[Source]:
    """Returns the tensors in files that a lazy tensor is made of."""
    if not isinstance(x, LazyTensor):
        return []
    if not isinstance(x._recipe, _Operation):
        return [x._recipe]
    return [source for part in _tensors(x._recipe.args, x._recipe.kwargs) for source in sources(part)]


def blocks(x: Tensor, numbers: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yields ``(first row, rows)``, in order: all rows of ``x``, some ``numbers`` numbers at a time (`BLOCK`).

    Evaluated block by block where the recipe allows, otherwise once and then sliced.
    """
    numbers = BLOCK if numbers is None else numbers
    if x.ndim == 0 or x.numel() <= numbers:
        yield 0, _whole(x)
        return
    if not _by_rows(x):
        x = evaluate(x)
    step = max(1, numbers * x.shape[0] // x.numel())
    for start in range(0, x.shape[0], step):
        yield start, _part(x, ((start, min(start + step, x.shape[0])), *((0, size) for size in x.shape[1:])))


def _whole(x: Tensor) -> Tensor:
    value = _part(x, tuple((0, size) for size in x.shape))
    # A part must not keep the whole alive.
    return value.clone() if value.untyped_storage().nbytes() > value.numel() * value.itemsize else value


def _part(x: Tensor, box: Box) -> Tensor:
    """Evaluates ``x[box]``, and as little else as possible."""
    if not isinstance(x, LazyTensor):
        for dim, (start, stop) in enumerate(box):
            x = x.narrow(dim, start, stop - start) if (start, stop) != (0, x.shape[dim]) else x
        return x
    recipe = x._recipe
    if not isinstance(recipe, _Operation):
        return recipe.read(box)
    if recipe.func in _PARTS:
        return _PARTS[recipe.func](box, *recipe.args, **recipe.kwargs)
    return _part(recipe.func(*tree_map(evaluate, recipe.args), **tree_map(evaluate, recipe.kwargs)), box)


def _by_rows(x: Tensor, dim: int = 0, fixed: int = 0) -> bool:
    """Whether a range of ``x`` along ``dim`` is one of a file, at one index of each of the ``fixed`` axes before it."""
    if not isinstance(x, LazyTensor):
        return True
    recipe = x._recipe
    if not isinstance(recipe, _Operation):
        return dim == fixed
    func, args = recipe.func, recipe.args
    if func in _ELEMENTWISE or func in (aten.slice.Tensor, aten.cat.default):
        parts = args[0] if func is aten.cat.default else [args[0]]
        return all(_by_rows(part, dim, fixed) for part in parts)
    if func is aten.select.int:
        return args[1] % args[0].ndim == 0 and _by_rows(args[0], dim + 1, fixed + 1)
    if func is aten.stack.default and (args[1] if len(args) > 1 else 0) == 0:
        return dim == 0 or all(_by_rows(part, dim - 1, fixed - 1) for part in args[0])
    return False


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    pairs = zip(blocks(a), blocks(b), strict=True)
    return all(torch.equal(left, right) for (_, left), (_, right) in pairs)


# --- operations of which a part can be had from parts of their operands


def _elementwise(func: Any) -> Callable[..., Tensor]:
    return lambda box, x, *args, **kwargs: func(_part(x, box), *args, **kwargs)


def _slice(
    box: Box, x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    dim = dim % x.ndim
    if step != 1:
        return _part(aten.slice.Tensor(evaluate(x), dim, start, end, step), box)
    first, last, _ = slice(start, end).indices(x.shape[dim])
    return _part(x, _replaced(box, dim, (first + box[dim][0], min(last, first + box[dim][1]))))


def _select(box: Box, x: Tensor, dim: int, index: int) -> Tensor:
    dim, index = dim % x.ndim, index % x.shape[dim]
    return _part(x, (*box[:dim], (index, index + 1), *box[dim:])).squeeze(dim)


def _unsqueeze(box: Box, x: Tensor, dim: int) -> Tensor:
    dim = dim % (x.ndim + 1)
    return _part(x, (*box[:dim], *box[dim + 1 :])).unsqueeze(dim)


def _transpose(box: Box, x: Tensor, dim0: int, dim1: int) -> Tensor:
    inner = list(box)
    inner[dim0], inner[dim1] = inner[dim1], inner[dim0]
    return _part(x, tuple(inner)).transpose(dim0, dim1)


def _cat(box: Box, parts: list[Tensor], dim: int = 0) -> Tensor:
    dim = dim % parts[0].ndim
    start, stop = box[dim]
    pieces, before = [], 0
    for part in parts:
        low, high = max(start - before, 0), min(stop - before, part.shape[dim])
        if low < high:
            pieces.append(_part(part, _replaced(box, dim, (low, high))))
        before += part.shape[dim]
    if not pieces:
        return _part(parts[0], _replaced(box, dim, (0, 0)))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _stack(box: Box, parts: list[Tensor], dim: int = 0) -> Tensor:
    dim = dim % (parts[0].ndim + 1)
    inner = (*box[:dim], *box[dim + 1 :])
    start, stop = box[dim]
    if start == stop:
        return _part(parts[0], inner).unsqueeze(dim).narrow(dim, 0, 0)
    return torch.stack([_part(part, inner) for part in parts[start:stop]], dim)


def _replaced(box: Box, dim: int, new: tuple[int, int]) -> Box:
    return (*box[:dim], new, *box[dim + 1 :])


_ELEMENTWISE = (
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
    aten._to_copy.default,
    aten.neg.default,
)
_PARTS: dict[Any, Callable[..., Tensor]] = {func: _elementwise(func) for func in _ELEMENTWISE} | {
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unsqueeze.default: _unsqueeze,
    aten.transpose.int: _transpose,
    aten.t.default: lambda box, x: _transpose(box, x, 0, 1),
    aten.cat.default: _cat,
    aten.stack.default: _stack,
}


# --- operations that return several parts


def _split(x: Tensor, sizes: int | list[int], dim: int = 0) -> list[Tensor]:
    length = x.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]


_PARTITIONS: dict[Any, Callable[..., Any]] = {
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: lambda x, dim=0: [x.select(dim, i) for i in range(x.shape[dim])],
}


_FACTORIES = {
    *(getattr(aten, f"{kind}_like").default for kind in ("empty", "zeros", "ones", "full", "rand", "randn")),
    *(getattr(aten, f"new_{kind}").default for kind in ("empty", "zeros", "ones", "full")),
}
"""Operations that look at shape, dtype and device alone; their results are ordinary tensors."""


def _of_that_shape(x: Any) -> Any:
    return torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape) if isinstance(x, LazyTensor) else x


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda x: found.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
    return found


def _as_meta(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
