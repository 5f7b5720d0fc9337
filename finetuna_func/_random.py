"""Counter-based random numbers: a key is a tensor, and the same key always gives the same numbers.

torch's generators are hidden, mutable state, which a pure function may not read. Here a key is a
0-d int64 tensor; every draw is a hash (splitmix64) of the key and the element's index. So draws
batch under ``vmap`` (one key per adapter), replay under activation checkpointing, are the same on
every device, and a training run that stores its key resumes exactly.

Source: Steele, Lea & Flood, "Fast splittable pseudorandom number generators" (2014); Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # odd constant of splitmix64, as signed int64
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_SPLIT = 0x53504C4954  # so that split(key, n) never meets fold_in(key, i)


def key(seed: int, *, device: torch.device | str | None = None) -> Tensor:
    """Returns a key, a 0-d int64 tensor, from an integer seed.

    Example:
        >>> key(0).shape, key(0).dtype
        (torch.Size([]), torch.int64)
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed={seed!r}: expected an integer that fits in 64 bits.")
    return _mix(torch.tensor(seed, dtype=torch.int64, device=device))


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Returns a new key that depends on ``key`` and ``data``; use it per step, layer or adapter.

    Args:
        key: ``()`` int64, or several keys.
        data: An integer, or integers in a tensor: a key for each, in the shape to which both broadcast.

    Example:
        >>> bool(fold_in(key(0), 1) == fold_in(key(0), 2))
        False
    """
    return _mix(_mix(key + _GAMMA) ^ (_times_gamma(data) if isinstance(data, Tensor) else _wrap(data * _GAMMA)))


def split(key: Tensor, num: int = 2) -> Tensor:
    """Returns ``num`` independent keys as an int64 tensor of shape ``(num,)``.

    Example:
        >>> split(key(0), 3).shape
        torch.Size([3])
    """
    return fold_in(key ^ _SPLIT, torch.arange(1, num + 1, device=key.device))


def uniform(key: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Returns float32 numbers in ``[0, 1)`` of the given shape, a function of ``key`` alone.

    Example:
        >>> bool((uniform(key(3), (4,)) == uniform(key(3), (4,))).all())
        True
    """
    count = 1
    for size in shape:
        count *= size
    counter = torch.arange(1, count + 1, device=key.device).reshape(shape)
    bits = _mix(key + _times_gamma(counter))
    return _shift(bits, 40).to(torch.float32) * 2.0**-24


def dropout(key: Tensor, x: Tensor, p: Tensor | float) -> Tensor:
    """Returns ``x`` with each element zeroed with probability ``p`` and the others divided by ``1 - p``.

    Args:
        key: ``()`` int64.
        x: ``(...)``, floating point; so is the result, in the same dtype.
        p: A number or ``()``, in ``[0, 1)``.

    Example:
        >>> dropout(key(0), torch.ones(1000), 0.5).unique().tolist()
        [0.0, 2.0]
    """
    keep = uniform(key, x.shape) >= p
    return x * (keep / (1 - p)).to(x.dtype)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _times_gamma(z: Tensor) -> Tensor:
    """Returns ``z * _GAMMA``, modulo 2 ** 64."""
    # To inductor, a multiple of an arange is arithmetic of an index, which it writes as C++ on signed integers, whose
    # overflow is undefined: on the CPU it then stores beyond the tensor. It does not look through an xor.
    return (z ^ 0) * _GAMMA


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's ``>>`` on int64 copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
