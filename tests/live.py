"""The bytes of tensors that operations make, counted while they live."""

from __future__ import annotations

import weakref
from typing import Any

import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Counts the storages made inside.

    Attributes:
        now: Bytes alive.
        peak: The most that were alive at once.
        largest: Bytes of the largest.
        devices: Where they were made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.devices: set[str] = set()
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in torch_pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {leaf.untyped_storage()._cdata for leaf in given}
        out = function(*args, **(kwargs or {}))
        for leaf in torch_pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self._sizes:
                    size = self._sizes[storage._cdata] = storage.nbytes()
                    self.now += size
                    self.largest = max(self.largest, size)
                    self.devices.add(leaf.device.type)
                    weakref.finalize(storage, self._forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def _forget(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage, 0)
