"""The factors of adapters made ready for a call, many layers' at once.

A layer computes with A in the model's dtype, and with ``lora_scale * B``. Made in each layer, forward and backward,
that is a thousand small kernels a step, which take the host longer to launch than a GPU to run. Factors of one shape
are stacked instead, over the layers, and scaled and cast together: the same numbers and the same derivatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finetuna_func._filters import join_name
from finetuna_func._layers import conv1d, linear
from finetuna_func._ops import compute_dtype
from finetuna_func._skeleton import Skeleton

_USES_OF_THE_SCALE = ("lora_bias", "lora_magnitude", "lora_a0")  # other than on B alone


def ready_factors(skeleton: Skeleton, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a call, the factors of layers in repeated blocks as they are computed with.

    Where B holds the scale already there is no ``lora_scale``. Layers outside of the blocks stay as they are: what runs
    more than once in a call gets a sum of derivatives, which belongs into the adapter's own dtype.

    Args:
        skeleton: The model's.
        leaves: Tensors by dotted name.

    Example:
        >>> base, tuned = new_finetuned(tiny_model())  # without repeated blocks
        >>> leaves = {**base.params, **tuned.params, **tuned.consts}
        >>> ready_factors(base.skeleton, leaves) == leaves
        True
    """
    out = dict(leaves)
    groups: dict[Any, list[str]] = {}
    for path, layer in skeleton.layers_in_blocks.items():
        if layer.type.forward in (linear, conv1d) and _is_scaled_alone(path, leaves):
            for own in ("lora_a", "lora_b"):
                leaf = leaves[join_name(path, own)]
                if compute_dtype(leaf) != leaf.dtype:
                    return out  # autocast decides what factors are cast to, where they are used
                kind = (own, layer.dtype, leaf.shape, leaf.dtype, leaf.requires_grad)
                groups.setdefault(kind, []).append(path)
    for (own, dtype, *_), paths in groups.items():
        names = [join_name(path, own) for path in paths]
        if own == "lora_a" and leaves[names[0]].dtype == dtype:
            continue
        together = torch.stack([leaves[name] for name in names])
        if own == "lora_b":
            scales = torch.stack([out.pop(join_name(path, "lora_scale")) for path in paths])
            together = together * scales.unsqueeze(-1).unsqueeze(-1)  # before it is rounded
        out.update(zip(names, together.to(dtype).unbind(), strict=True))
    return out


def _is_scaled_alone(path: str, leaves: Mapping[str, Tensor]) -> bool:
    """Whether a layer is adapted, not ready yet, and its scale goes into B and nowhere else."""
    if join_name(path, "lora_scale") not in leaves:
        return False
    return not any(join_name(path, own) in leaves for own in _USES_OF_THE_SCALE)
