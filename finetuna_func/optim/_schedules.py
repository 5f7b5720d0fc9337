"""Values that change from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from finetuna_func.optim._checks import NOT_NEGATIVE, check_scalar, check_steps

Schedule: TypeAlias = "Callable[[Tensor], Tensor | float]"
"""Steps taken so far, an int64 tensor of shape ``()`` or ``(N,)`` -> a value of that shape, or a scalar."""


def constant_schedule(value: float | Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the schedule that is ``value`` at every step.

    Args:
        value: A number, a 0-d tensor, or ``(N,)`` with one value per adapter.

    Raises:
        ValueError: A negative number, or a tensor of another shape or an integer dtype.

    Example:
        >>> constant_schedule(0.5)(torch.tensor([0, 9]))
        tensor([0.5000, 0.5000])
    """
    check_scalar("constant_schedule", "value", value, NOT_NEGATIVE)
    return lambda step: value + torch.zeros_like(_fraction(step, 0, 1))


def linear_schedule(init: float | Tensor, end: float | Tensor, steps: int) -> Callable[[Tensor], Tensor]:
    """Returns the schedule that goes in a straight line from ``init`` to ``end``, and stays there.

    Args:
        init: Value at step 0: a number, a 0-d tensor, or ``(N,)`` with one value per adapter.
        end: Value from step ``steps`` on; likewise.
        steps: Length of the line, at least 1.

    Raises:
        ValueError: A negative number, a tensor of another shape, or ``steps`` below 1.

    Example:
        >>> linear_schedule(1.0, 0.0, steps=4)(torch.arange(6))
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000, 0.0000])
    """
    check_scalar("linear_schedule", "init", init, NOT_NEGATIVE)
    check_scalar("linear_schedule", "end", end, NOT_NEGATIVE)
    check_steps("linear_schedule", "steps", steps, 1)
    return lambda step: _between(init, end, _fraction(step, 0, steps))


def warmup_cosine_schedule(
    peak: float | Tensor,
    warmup_steps: int,
    total_steps: int,
    init: float | Tensor = 0.0,
    end: float | Tensor = 0.0,
) -> Callable[[Tensor], Tensor]:
    """Returns the schedule that rises in a line to ``peak`` and falls along half a cosine to ``end``.

    Args:
        peak: Value at step ``warmup_steps``: a number, a 0-d tensor, or ``(N,)`` per adapter.
        warmup_steps: Length of the rise; 0 starts at the peak.
        total_steps: Step at which, and after which, the value is ``end``; above ``warmup_steps``.
        init: Value at step 0, if there is a rise.
        end: Last value.

    Raises:
        ValueError: A negative number, a tensor of another shape, or steps out of order.

    Source: `SGDR <https://arxiv.org/abs/1608.03983>`_ (without restarts).

    Example:
        >>> warmup_cosine_schedule(1.0, warmup_steps=2, total_steps=6)(torch.arange(8))
        tensor([0.0000, 0.5000, 1.0000, 0.8536, 0.5000, 0.1464, 0.0000, 0.0000])
    """
    for argument, value in (("peak", peak), ("init", init), ("end", end)):
        check_scalar("warmup_cosine_schedule", argument, value, NOT_NEGATIVE)
    check_steps("warmup_cosine_schedule", "warmup_steps", warmup_steps, 0)
    check_steps("warmup_cosine_schedule", "total_steps", total_steps, warmup_steps + 1)

    def schedule(step: Tensor) -> Tensor:
        angle = math.pi * _fraction(step, warmup_steps, total_steps - warmup_steps)
        falling = _between(end, peak, (1 + torch.cos(angle)) / 2)
        if warmup_steps == 0:
            return falling
        rising = _between(init, peak, _fraction(step, 0, warmup_steps))
        return torch.where(torch.as_tensor(step) < warmup_steps, rising, falling)

    return schedule


def _fraction(step: Tensor, start: int, steps: int) -> Tensor:
    """Returns how far ``step`` is from ``start`` to ``start + steps``, within [0, 1]."""
    return ((torch.as_tensor(step) - start) / steps).clamp(0.0, 1.0)


def _between(start: float | Tensor, end: float | Tensor, fraction: Tensor) -> Tensor:
    # Exact at both ends, which start + fraction * (end - start) is not.
    return start * (1 - fraction) + end * fraction
