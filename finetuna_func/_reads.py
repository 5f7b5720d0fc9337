"""Weights that a model computes with past the layers that hold them.

A layer's 8 bits and its adapter are known to its own forward alone. A module that computes with
``self.proj.weight`` itself would pass them by, silently. So the first call of each kind (same inputs by name, stacked
or not) runs under a mode that sees every torch function, and notes the layers whose weight is used outside their
forward; layers that merely do not run, such as an expert without tokens, are not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from finetuna_func._filters import join_name
from finetuna_func._layers import Call

# What may be asked of a weight that belongs to a layer; beside its properties, but for those that are tensors.
_QUESTIONS = {"dim", "element_size", "get_device", "is_contiguous", "is_floating_point", "is_complex", "ndimension"}
_QUESTIONS |= {"nelement", "numel", "size", "stride", "data_ptr", "__len__", "__hash__", "__repr__"}
_VIEWS = {"T", "mT", "H", "mH", "data", "real", "imag"}


def _asks_only(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", "") not in _VIEWS
    return name in _QUESTIONS


class ReadWatch(TorchFunctionMode):
    """Notes which layers' weights are used while none of their layers runs.

    Attributes:
        found: Paths of those layers.
    """

    def __init__(self, leaves: Mapping[str, Tensor], layers: Mapping[str, Any], call: Call) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._call = call
        self._before: list[str] | None = None
        self._holders: dict[int, set[str]] = {}
        for path, layer in layers.items():
            leaf = leaves.get(join_name(path, "weight"))
            if leaf is not None and layer.type.adapter is not None:
                self._holders.setdefault(id(leaf), set()).add(path)

    def __enter__(self) -> ReadWatch:
        self._before, self._call.running = self._call.running, []
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._call.running = self._before
        super().__exit__(*error)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _asks_only(func):
            for leaf in _tensors((args, kwargs)):
                # What a model sees of an 8-bit weight stands for its codes; see `_layers.seen_weight`.
                holders = self._holders.get(id(getattr(leaf, "_ft_codes", leaf)))
                running = self._call.running
                if holders is not None and not (running and running[-1] in holders):
                    self.found |= holders
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
