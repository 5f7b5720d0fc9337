"""Where leaves lie in flat buffers: one for each dtype and device, a row for each adapter of a stack.

An adapter's numbers stand next to one another, so counts, norms and learning rates of a buffer ``(N, P)`` are per
adapter as those of its leaves are. Taken apart, a buffer gives views; leaves that are such views are put together
again without a copy.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetuna_func._levels import inside_transform
from finetuna_func._types import Params

_ALIGNMENT = 16  # leaves of a multiple of so many numbers come first, since kernels are slower on badly aligned ones


class Place(NamedTuple):
    """Where a leaf lies in a row of its buffer, next to the one before."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    size: int


class Buffer(NamedTuple):
    """A flat leaf: its name, the numbers of a row, and what lies where in it."""

    name: str
    length: int
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Layout:
    """How a tree of leaves lies in flat ones.

    Attributes:
        size: Adapters of a stack, a row each; None for one finetune.
        buffers: The flat leaves.
    """

    size: int | None
    buffers: tuple[Buffer, ...]

    def join(self, tree: Params) -> dict[str, Tensor]:
        """Returns the flat leaves, ``(P,)`` or ``(N, P)``; without a copy where the leaves lie as `split` lays them."""
        return {buffer.name: self._join(buffer, tree) for buffer in self.buffers}

    def lies(self, tree: Params) -> bool:
        """Returns whether the leaves lie as `split` lays them, so that `join` copies nothing."""
        return all(self._lying(buffer, tree) is not None for buffer in self.buffers)

    def split(self, flat: Params) -> dict[str, Tensor]:
        """Returns the leaves, names sorted: views of the flat ones."""
        leaves: dict[str, Tensor] = {}
        for buffer in self.buffers:
            parts = flat[buffer.name].split([place.size for place in buffer.places], dim=-1)
            for place, part in zip(buffer.places, parts, strict=True):
                leaves[place.name] = part.reshape(place.shape)
        return {name: leaves[name] for name in sorted(leaves)}

    @property
    def _lead(self) -> tuple[int, ...]:
        return () if self.size is None else (self.size,)

    def _join(self, buffer: Buffer, tree: Params) -> Tensor:
        lying = self._lying(buffer, tree)
        if lying is not None:
            return lying
        return torch.cat([tree[place.name].reshape(*self._lead, place.size) for place in buffer.places], dim=-1)

    def _lying(self, buffer: Buffer, tree: Params) -> Tensor | None:
        """Returns the flat leaf that the leaves of a buffer are views of, in their places; None if they are not."""
        if torch.compiler.is_compiling() or inside_transform():  # where addresses mean nothing
            return None
        recorded, first, start = torch.is_grad_enabled(), None, 0
        for place in buffer.places:
            leaf = tree[place.name]
            if type(leaf) not in (Tensor, nn.Parameter) or leaf.is_meta:  # a fake tensor, say, which has no address
                return None
            if recorded and leaf.requires_grad:  # a derivative is asked for, and goes through the leaf
                return None
            if place.size == 0:
                continue
            if first is None:
                first, start = leaf, leaf.data_ptr() - place.offset * leaf.itemsize
            address = start + place.offset * leaf.itemsize
            if leaf.dtype != first.dtype or leaf.data_ptr() != address or leaf.stride() != place.strides:
                return None
        if first is None:
            return None
        # If all of the range is in the storage of one leaf, all leaves are in it: no two storages have an address.
        storage, size = first.untyped_storage(), first.itemsize
        before = start - storage.data_ptr()
        if before < 0 or before + (self.size or 1) * buffer.length * size > storage.nbytes():
            return None
        shape, strides = (*self._lead, buffer.length), (*(buffer.length for _ in self._lead), 1)
        return torch.as_strided(first.detach(), shape, strides, before // size)


def layout_of(where: str, tree: Params, size: int | None) -> Layout:
    """Returns how the leaves of a tree lie in flat ones.

    Args:
        where: Of what the error speaks.
        tree: The leaves.
        size: Adapters of a stack; None for one finetune.

    Raises:
        ValueError: A leaf of a stack of another size.
    """
    if size is not None:
        for name, leaf in tree.items():
            if leaf.shape[:1] != (size,):
                raise ValueError(
                    f"{where}: leaf {name!r} has shape {tuple(leaf.shape)}, expected {size} as its first size, one "
                    f"for each adapter of the stack of {size} that init was given."
                )
    kinds = tuple((name, tuple(tree[name].shape), tree[name].dtype, tree[name].device) for name in sorted(tree))
    return _layout(kinds, size) if torch.compiler.is_compiling() else _cached_layout(kinds, size)


def _layout(kinds: tuple[tuple[Any, ...], ...], size: int | None) -> Layout:
    groups: dict[Any, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape, dtype, device in kinds:
        groups.setdefault((dtype, device), []).append((name, shape))
    return Layout(size, tuple(_buffer(leaves, size) for leaves in groups.values()))


_cached_layout = functools.lru_cache(maxsize=32)(_layout)


def _buffer(leaves: list[tuple[str, tuple[int, ...]]], size: int | None) -> Buffer:
    own = [(name, shape, shape if size is None else shape[1:]) for name, shape in leaves]
    own.sort(key=lambda leaf: math.prod(leaf[2]) % _ALIGNMENT != 0)
    length = sum(math.prod(one) for _, _, one in own)
    places, offset = [], 0
    for name, shape, one in own:
        strides = tuple(math.prod(one[axis + 1 :]) for axis in range(len(one)))
        places.append(Place(name, shape, strides if size is None else (length, *strides), offset, math.prod(one)))
        offset += math.prod(one)
    return Buffer(_name_of(tuple(name for name, *_ in own), tuple(one for *_, one in own)), length, tuple(places))


@torch.compiler.assume_constant_result
def _name_of(names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> str:
    """Returns a name that says what lies in a buffer, so that a state of other leaves is found out by it."""
    return f"{len(names)} leaves {zlib.crc32(repr((names, shapes)).encode()):08x}"
