"""Checks of arguments, and what they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from finetuna_func._types import Params

Rule: TypeAlias = tuple[Callable[[float], bool], str]
"""What a number may be, and how to say so."""

FINITE: Rule = (math.isfinite, "a finite number")
DECAY: Rule = (lambda x: 0 <= x < 1, "a number in [0, 1)")
POSITIVE: Rule = (lambda x: 0 < x < math.inf, "a finite number above 0")
NOT_NEGATIVE: Rule = (lambda x: 0 <= x < math.inf, "a finite number of at least 0")
STEP: Rule = (
    NOT_NEGATIVE[0],
    "a finite number of at least 0; it is subtracted, so give the size of the step",
)
LIMIT: Rule = (lambda x: x > 0, 'a number above 0; float("inf") clips nothing, set_to_zero() everything')


def check_number(where: str, argument: str, value: object, rule: Rule) -> None:
    """Raises unless ``value`` is a number that the rule allows."""
    allowed, expected = rule
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not allowed(value):
        raise ValueError(f"{where}({argument}={value!r}): expected {expected}.")


def check_scalar(where: str, argument: str, value: object, rule: Rule) -> None:
    """Checks a number, or the shape and dtype of a tensor in its place; its values stay on the device."""
    if not isinstance(value, Tensor):
        check_number(where, argument, value, rule)
    elif value.ndim > 1 or not value.is_floating_point():
        raise ValueError(
            f"{where}({argument}=...): got a tensor of shape {tuple(value.shape)} and dtype {value.dtype}, "
            "expected a floating-point tensor of shape (), or (N,) with one value per adapter."
        )


def check_steps(where: str, argument: str, steps: object, least: int) -> None:
    """Raises unless ``steps`` is an integer of at least ``least``."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
        raise ValueError(f"{where}({argument}={steps!r}): expected an integer of at least {least}.")


def check_names(where: str, given: Mapping[str, Any], like: Mapping[str, Any], owner: str) -> None:
    """Raises unless both have the same names."""
    if given.keys() != like.keys():
        raise ValueError(
            f"{where}: missing names {some(like.keys() - given.keys())}, unknown names "
            f"{some(given.keys() - like.keys())}; expected exactly the {len(like)} names of {owner}."
        )


def check_like(where: str, updates: Params, like: Params, owner: str) -> None:
    """Raises unless both have the same names and shapes."""
    check_names(f"{where}(updates=...)", updates, like, owner)
    for name, update in updates.items():
        if update.shape != like[name].shape:
            raise ValueError(
                f"{where}(updates=...): {name!r} has shape {tuple(update.shape)}, expected "
                f"{tuple(like[name].shape)}, the shape in {owner}."
            )


def some(names: Iterable[str]) -> str:
    """Returns the first few names."""
    first = sorted(names)
    return f"{first[:5]}{' ...' if len(first) > 5 else ''}"
