"""Which torch.func transform, if any, the caller is inside of."""

from __future__ import annotations

import torch
from torch._C._functorch import peek_interpreter_stack  # type: ignore[import-not-found]


def inside_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or a forward-mode level is active."""
    return peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
