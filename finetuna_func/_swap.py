"""A module called on given tensors, as ``torch.func.functional_call`` does it, with the places looked up once.

A step sets and restores some thousand tensors, each of which ``functional_call`` looks up by its dotted name: two
milliseconds, for a model of 16 layers, in which a GPU has nothing to do yet. A skeleton's module is called again and
again on tensors of the same names, so it remembers where they belong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetuna_func._filters import split_name

_NOTHING = object()  # where a tensor is set that the module does not have otherwise


def call_on(module: nn.Module, leaves: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns ``functional_call(module, leaves, args, kwargs)``, of ties those tensors that are named.

    Args:
        module: One whose submodules stay what they are.
        leaves: Tensors by dotted name.
        args: For the module.
        kwargs: Likewise.

    Raises:
        AttributeError: A name of a module that is not there.

    Example:
        >>> call_on(nn.Linear(2, 1, bias=False), {"weight": torch.ones(1, 2)}, (torch.ones(2),), {})
        tensor([2.])
    """
    if torch.compiler.is_compiling():  # which knows functional_call
        return torch.func.functional_call(module, dict(leaves), args, dict(kwargs), tie_weights=False)
    places: _Places = vars(module).setdefault("_ft_places", _Places())
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, leaf in leaves.items():
            place = places.get(name)
            if place is None:
                place = places[name] = _place(module, name)
            own, key = place
            before.append((own, key, own.get(key, _NOTHING)))
            own[key] = leaf
        return module(*args, **kwargs)
    finally:
        for own, key, value in reversed(before):
            if value is _NOTHING:
                del own[key]
            else:
                own[key] = value


class _Places(dict[str, tuple[dict[str, Any], str]]):
    """Where tensors belong, by name; a copy of the module finds out anew."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Places:
        return _Places()


def _place(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary of a module that a tensor is looked up in, and its key."""
    path, own = split_name(name)
    holder = module.get_submodule(path)
    for registered in (holder._parameters, holder._buffers):
        if own in registered:
            return registered, own
    return vars(holder), own
