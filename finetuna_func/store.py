"""Many finetunes on one base, of which few are on the device.

    store = ft.Store(base, resident=4)
    store.put("first", tuned, tx.init(tuned))                    # as many as memory, or the disk, holds
    ft.apply(base, store["first"], ids)                          # comes to the device, and stays while it is used

    names = ["first", "second"]
    stacked, state = store.stack(names), store.stack_states(names)
    ...                                                          # train
    store.update(names, stacked, state)

A store is the one thing here that changes; what goes in and comes out are frozen values.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetuna_func._trees import index, pad_and_stack, stack
from finetuna_func._types import Base, Finetuned, Spec
from finetuna_func.io import load, save

_ON_DISK = object()


@dataclass(frozen=True)
class _Entry:
    """One finetune and what rides along, in host memory, or in a folder that is written once.

    Attributes:
        spec: Of the finetune.
        shapes: Of its params.
        tuned: The finetune; ``None`` if it is on disk.
        state: The leaves of what rides along; of tensors that are on disk, a placeholder.
        structure: Of what rides along; ``None`` if nothing does.
        folder: Where they are on disk; ``None`` if they are not.
    """

    spec: Spec
    shapes: dict[str, torch.Size]
    tuned: Finetuned | None
    state: list[Any]
    structure: Any
    folder: Path | None


class Store:
    """Finetunes by name, and with each any tree of tensors that belongs to it, such as an optimizer's state.

    All are kept in host memory (pinned, if the device is a GPU), or with ``folder`` on disk. A finetune
    that is looked up comes to the device, and the ``resident`` ones used last stay there. Everything
    written goes to the host or the disk at once, so that what leaves the device is never lost, and
    comes back bitwise. On a CPU without ``folder``, device and host are the same memory.

    ``store[name]``, ``store[name] = tuned``, ``del store[name]``, ``name in store``, ``len`` and
    iteration are those of a dict; assigning keeps the state that the name has, if any. All methods may
    be called from several threads; each is done as a whole.

    Args:
        base: The base of all finetunes.
        resident: How many finetunes may be on the device at a time, at least 1. A stack counts while
            it is made; then it is the caller's.
        device: Where finetunes are used; that of ``base`` by default.
        folder: An empty or new folder for what is not resident; each finetune in it is a folder of
            `save`, beside its state. It is not read again by another store, and not removed.

    Raises:
        TypeError: ``base`` is not a `Base`.
        ValueError: ``resident`` is not an integer of at least 1.
        FileExistsError: ``folder`` is not empty, or not a folder.

    Example:
        >>> base, tuned = new_finetuned(tiny_model())
        >>> store, tx = ft.Store(base, resident=2), ft.optim.adamw(1e-3)
        >>> for name in ("first", "second", "third"):
        ...     store.put(name, tuned, tx.init(tuned))
        >>> names = ["first", "third"]
        >>> stacked, state = store.stack(names), store.stack_states(names)
        >>> updates, state = tx.update(dict(stacked.params), state, stacked)
        >>> store.update(names, ft.optim.apply_updates(stacked, updates), state)
        >>> [int(store.state(name)[0].step) for name in store]
        [1, 0, 1]
    """

    def __init__(
        self,
        base: Base,
        *,
        resident: int,
        device: torch.device | str | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(base, Base):
            raise TypeError(f"Store(base=...): got a {type(base).__name__}, expected a Base.")
        if isinstance(resident, bool) or not isinstance(resident, int) or resident < 1:
            raise ValueError(f"Store(resident={resident!r}): expected an integer of at least 1.")
        self._base, self._capacity = base, resident
        self._device = next(iter(base.params.values())).device if device is None else torch.device(device)
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
                raise FileExistsError(f"Store(folder={str(folder)!r}): expected an empty or new folder.")
            self._folder.mkdir(parents=True, exist_ok=True)
        self._entries: dict[str, _Entry] = {}
        self._residents: OrderedDict[str, Finetuned] = OrderedDict()  # the one used last comes last
        self._lock = threading.RLock()
        self._numbers = itertools.count()

    def __repr__(self) -> str:
        where = "in host memory" if self._folder is None else f"in {str(self._folder)!r}"
        return f"Store({len(self)} finetunes {where}, {len(self._residents)} of {self._capacity} on {self._device})"

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Finetuned:
        with self._lock:
            entry = self._entry(name)
            if name not in self._residents:
                self._make_room(1)
                self._residents[name] = _moved(self._on_host(entry), self._device)
            self._residents.move_to_end(name)
            return self._residents[name]

    def __setitem__(self, name: str, tuned: Finetuned) -> None:
        with self._lock:
            old = self._entries.get(name)
            self.put(name, tuned, None if old is None else self._state_on_host(old))

    def __delitem__(self, name: str) -> None:
        with self._lock:
            entry = self._entry(name)
            del self._entries[name]
            self._residents.pop(name, None)
            _remove(entry)

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the finetunes on the device, that used last at the end."""
        with self._lock:
            return tuple(self._residents)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the finetunes on the device."""
        with self._lock:
            return sum(tuned.nbytes for tuned in self._residents.values())

    def put(self, name: str, tuned: Finetuned, state: Any = None) -> None:
        """Keeps one finetune under a name, and a tree with it; replaces what the name had.

        Args:
            name: Any string.
            tuned: One finetune of this store's base.
            state: A pytree of tensors (other leaves are kept as they are); ``None`` for none.

        Raises:
            TypeError: ``name`` is not a string, or ``tuned`` not a `Finetuned`.
            ValueError: ``tuned`` is a stack, or belongs to another base.
        """
        if not isinstance(name, str):
            raise TypeError(f"Store: got the name {name!r} of type {type(name).__name__}, expected a string.")
        if not isinstance(tuned, Finetuned):
            raise TypeError(f"Store: got a {type(tuned).__name__} for {name!r}, expected a Finetuned.")
        if tuned.stack_size is not None:
            raise ValueError(f"Store: {name!r} is a stack of {tuned.stack_size}; keep each of ft.unstack by a name.")
        if tuned.spec.base != self._base.fingerprint:
            raise ValueError(
                f"Store: {name!r} belongs to base {tuned.spec.base!r}, but this store is of {self._base.fingerprint!r}."
            )
        with self._lock:
            self._commit({name: self._written(name, tuned, state)})

    def state(self, name: str) -> Any:
        """Returns the tree that was kept with a finetune, on the device; ``None`` if there was none.

        Raises:
            KeyError: No such name.
        """
        with self._lock:
            return _moved(self._state_on_host(self._entry(name)), self._device)

    def stack(self, names: Sequence[str]) -> Finetuned:
        """Returns several finetunes as one stack on the device, as `ft.stack` does.

        Others leave the device first, so that not more than ``resident`` are there.

        Raises:
            KeyError: No such name.
            ValueError: No names, a name twice, more than ``resident``, or finetunes that do not stack.
        """
        with self._lock:
            entries = self._several("stack", names)
            self._make_room(len(entries))
            # Stacked on the host, since on the device they would be there twice.
            return _moved(stack([self._on_host(entry) for entry in entries]), self._device)

    def stack_states(self, names: Sequence[str]) -> Any:
        """Returns the trees of several finetunes as one on the device, every tensor with a leading axis N.

        For states of ``ft.optim``, that is the state of the stack. Moments of smaller ranks are padded
        with zeros as their params are.

        Raises:
            KeyError: No such name.
            ValueError: As for `stack`; or a finetune has no state, or states of another structure or shape.
        """
        with self._lock:
            entries = self._several("stack_states", names)
            for name, entry in zip(names, entries, strict=True):
                if entry.structure is None or entry.structure != entries[0].structure:
                    what = "no state" if entry.structure is None else f"a state of another structure than {names[0]!r}"
                    raise ValueError(f"Store.stack_states: {name!r} has {what}; put each with the same kind of state.")
            states = [self._state_on_host(entry) for entry in entries]
            paths = [path for path, _ in torch_pytree.tree_leaves_with_path(states[0])]
            columns = zip(*(torch_pytree.tree_leaves(state) for state in states), strict=True)
            stacked = [
                _stacked_leaf(names, entries, path, list(leaves)) for path, leaves in zip(paths, columns, strict=True)
            ]
            return _moved(torch_pytree.tree_unflatten(stacked, entries[0].structure), self._device)

    def update(self, names: Sequence[str], stacked: Finetuned, states: Any = None) -> None:
        """Keeps the finetunes of a stack under these names, in order: all, or if anything fails none.

        Args:
            names: Of the finetunes, as they were given to `stack`.
            stacked: What became of that stack.
            states: What became of `stack_states`; ``None`` to leave the states as they are.

        Raises:
            KeyError: No such name.
            ValueError: ``stacked`` is not a stack of so many, or of other finetunes (their layers or ranks
                differ); or a tensor of ``states`` lacks the leading axis N.
        """
        with self._lock:
            entries = self._several("update", names, limited=False)
            size = stacked.stack_size if isinstance(stacked, Finetuned) else None
            if size != len(entries):
                what = f"a stack of {size}" if size is not None else "no stack"
                raise ValueError(f"Store.update: got {what} for {len(entries)} names; expected one finetune for each.")
            for name, entry, member in zip(names, entries, stacked.spec.members, strict=True):
                if member != entry.spec:
                    raise ValueError(
                        f"Store.update: the finetune in the place of {name!r} has other layers, ranks or another base "
                        "than the one kept by that name; give the names in the order of the stack, or use put."
                    )
            written: dict[str, _Entry] = {}
            try:
                for i, (name, entry) in enumerate(zip(names, entries, strict=True)):
                    kept = states is None
                    state = self._state_on_host(entry) if kept else _unstacked_state(states, i, stacked, entry)
                    written[name] = self._written(name, index(stacked, i), state)
            except BaseException:
                for entry in written.values():
                    _remove(entry)
                raise
            self._commit(written)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            known = f"{sorted(self._entries)[:5]}{' ...' if len(self._entries) > 5 else ''}"
            raise KeyError(f"Store: no finetune is called {name!r}; there are {len(self._entries)}: {known}.")
        return self._entries[name]

    def _several(self, method: str, names: Sequence[str], limited: bool = True) -> list[_Entry]:
        if isinstance(names, str):
            raise ValueError(f"Store.{method}: got the string {names!r}, expected a list of names.")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Store.{method}: got the names {list(names)}, expected at least one, each once.")
        if limited and len(names) > self._capacity:
            raise ValueError(
                f"Store.{method}: got {len(names)} names, but resident={self._capacity} is how many may be on the "
                "device; ask for fewer, or make the store with a larger number."
            )
        return [self._entry(name) for name in names]

    def _make_room(self, number: int) -> None:
        while len(self._residents) > self._capacity - number:
            self._residents.popitem(last=False)

    def _commit(self, written: dict[str, _Entry]) -> None:
        replaced = [self._entries[name] for name in written if name in self._entries]
        self._entries.update(written)
        for name in written:
            self._residents.pop(name, None)
        for entry in replaced:
            _remove(entry)

    def _written(self, name: str, tuned: Finetuned, state: Any) -> _Entry:
        """Returns the entry of a finetune, which is then on the host or on disk, but not yet known by its name."""
        shapes = {key: leaf.shape for key, leaf in tuned.params.items()}
        leaves, structure = ([], None) if state is None else torch_pytree.tree_flatten(state)
        if self._folder is None:
            tuned, leaves = _on_host((tuned, leaves), pinned=self._device.type == "cuda")
            return _Entry(tuned.spec, shapes, tuned, leaves, structure, None)
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:50]
        folder = Path(tempfile.mkdtemp(prefix=f"{next(self._numbers):06}-{readable}-", dir=self._folder))
        try:
            save(folder / "finetune", tuned)
            tensors = {str(i): _own(leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
            save_file(tensors, folder / "state.safetensors")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        leaves = [_ON_DISK if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return _Entry(tuned.spec, shapes, None, leaves, structure, folder)

    def _on_host(self, entry: _Entry) -> Finetuned:
        if entry.folder is None:
            assert entry.tuned is not None
            return entry.tuned
        return load(entry.folder / "finetune", self._base).to("cpu")

    def _state_on_host(self, entry: _Entry) -> Any:
        if entry.structure is None:
            return None
        leaves = entry.state
        if entry.folder is not None:
            tensors = load_file(entry.folder / "state.safetensors")
            leaves = [tensors[str(i)] if leaf is _ON_DISK else leaf for i, leaf in enumerate(leaves)]
        return torch_pytree.tree_unflatten(leaves, entry.structure)


def _moved(tree: Any, device: torch.device) -> Any:
    """Returns a tree on a device; copies from pinned memory go on while Python does."""
    return torch_pytree.tree_map(
        lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, tree
    )


def _on_host(tree: Any, *, pinned: bool) -> Any:
    """Returns a tree in host memory; what is there already is not copied, unless it has to be pinned."""
    streams = set()

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach()
        if not pinned:
            leaf = leaf.to("cpu")
            # A part of a larger tensor would keep all of it.
            return leaf if leaf.untyped_storage().nbytes() == leaf.nbytes else leaf.clone()
        if leaf.is_pinned():
            return leaf
        if leaf.is_cuda:
            streams.add(torch.cuda.current_stream(leaf.device))
        return torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=True).copy_(leaf, non_blocking=True)

    tree = torch_pytree.tree_map(moved, tree)
    for stream in streams:  # once for all leaves
        stream.synchronize()
    return tree


def _own(leaf: Tensor) -> Tensor:
    """Returns a copy in host memory: safetensors refuses tensors that share theirs."""
    return leaf.detach().to("cpu", copy=True).contiguous()


def _remove(entry: _Entry) -> None:
    if entry.folder is not None:
        shutil.rmtree(entry.folder, ignore_errors=True)


def _param_name(path: tuple[Any, ...]) -> str | None:
    """The name of the param that a leaf of a state stands beside, if it lies in a mapping by such names."""
    last = path[-1] if path else None
    return last.key if isinstance(last, torch_pytree.MappingKey) and isinstance(last.key, str) else None


def _stacked_leaf(names: Sequence[str], entries: list[_Entry], path: tuple[Any, ...], leaves: list[Any]) -> Any:
    where = f"Store.stack_states: state{torch_pytree.keystr(path)}"
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        if any(isinstance(leaf, Tensor) or leaf != leaves[0] for leaf in leaves):
            raise ValueError(f"{where} is {leaves[:5]}; expected tensors, or the same value for all.")
        return leaves[0]
    if len({(leaf.shape, leaf.dtype) for leaf in leaves}) == 1:
        return torch.stack(leaves)
    param = _param_name(path)
    beside = all(param in entry.shapes and leaf.shape == entry.shapes[param] for leaf, entry in zip(leaves, entries))  # noqa: B905
    if param is not None and beside and len({leaf.dtype for leaf in leaves}) == 1 and leaves[0].is_floating_point():
        return pad_and_stack(leaves, param)
    kinds = {name: (leaf.dtype, tuple(leaf.shape)) for name, leaf in zip(names, leaves, strict=True)}
    raise ValueError(
        f"{where} differs: {kinds}. Only moments in floating point can be padded to a larger rank; stack finetunes of "
        "one rank."
    )


def _unstacked_state(states: Any, i: int, stacked: Finetuned, entry: _Entry) -> Any:
    """Returns the state of finetune ``i``, cut to its own rank."""
    size = stacked.stack_size

    def own(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.shape[:1] != (size,):
            raise ValueError(
                f"Store.update: state{torch_pytree.keystr(path)} has shape {tuple(leaf.shape)}, expected a leading "
                f"axis of {size}, one slice for each finetune."
            )
        param, leaf = _param_name(path), leaf[i]
        if param is not None and param in stacked.params and leaf.shape == stacked.params[param].shape[1:]:
            leaf = leaf[tuple(slice(0, length) for length in entry.shapes[param])]
        return leaf.clone(memory_format=torch.contiguous_format)

    return torch_pytree.tree_map_with_path(own, states)
