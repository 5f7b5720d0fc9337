"""A finetune's tensors as a state dict, merged into float weights, or inside an ordinary module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from finetuna_func._filters import join_name, near_misses, split_name
from finetuna_func._functional import bind
from finetuna_func._hf import leave_ties_alone
from finetuna_func._layers import LEAF_NAMES, SMALLEST_NORM, effective_factors, float_weight
from finetuna_func._quant import Scheme
from finetuna_func._skeleton import Layer
from finetuna_func._types import Base, Finetuned


def state_dict(tuned: Finetuned, *, base: Base | None = None) -> dict[str, Tensor]:
    """Returns the changed state by name; with ``base``, the full state, base included.

    The tensors are those of the values, not copies.

    Example:
        >>> base, tuned = new_finetuned(tiny_model(), adapt_layers={"fc"}, plain_layers=())
        >>> sorted(state_dict(tuned))
        ['fc.lora_a', 'fc.lora_b', 'fc.lora_scale']
    """
    changed = {**tuned.params, **tuned.consts}
    if base is None:
        return changed
    _check_base("state_dict", base, tuned)
    return {**base.params, **changed}


def load_state_dict(base: Base, tuned: Finetuned, state: Mapping[str, Tensor], strict: bool = True) -> Finetuned:
    """Returns ``tuned`` with the tensors of a state dict, adapter-only or full.

    Args:
        base: The base of ``tuned``; the base's part of a full state must equal it.
        tuned: Gives the structure; not changed.
        state: From `state_dict`.
        strict: Whether every tensor of ``tuned`` must be there and nothing unknown.

    Raises:
        ValueError: Missing or unknown names (if ``strict``), another shape, or another base's tensors.
        TypeError: Another dtype.

    Example:
        >>> base, tuned = new_finetuned(tiny_model())
        >>> again = load_state_dict(base, tuned, state_dict(tuned))
        >>> all((again.params[k] == v).all() for k, v in tuned.params.items())
        True
    """
    _check_base("load_state_dict", base, tuned)
    own = state_dict(tuned)
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys() - base.params.keys())
    if strict and (missing or unknown):
        hint = f" {near_misses(unknown[0], own)}" if unknown else ""
        raise ValueError(
            f"load_state_dict: {len(missing)} names missing {missing[:5]}, {len(unknown)} unknown {unknown[:5]}.{hint} "
            "Pass strict=False to load what fits."
        )
    for name in sorted(state.keys() & base.params.keys() - own.keys()):
        if state[name].shape != base.params[name].shape or not torch.equal(
            state[name].to(base.params[name].device), base.params[name]
        ):
            raise ValueError(
                f"load_state_dict: {name} differs from that of base {base.fingerprint!r}; this full state was saved "
                "on another base."
            )
    loaded = {name: _fitting(name, state[name], leaf) if name in state else leaf for name, leaf in own.items()}
    return tuned.replace(
        params={name: loaded[name] for name in tuned.params},
        consts={name: loaded[name] for name in tuned.consts},
    )


def merge(base: Base, tuned: Finetuned | None, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Returns the float weights that compute what the finetune computes, under the model's own names.

    Every 8-bit weight is dequantized and its adapter added, in float32 (float64 for float64), then
    rounded once to ``dtype``. Nothing is quantized again. Tied names share a tensor as long as their
    weights are one. Load the result with ``model.load_state_dict``.

    Args:
        base: The base.
        tuned: One finetune (not a stack), or ``None`` for the base alone.
        dtype: Of the result; default each layer's own.

    Raises:
        ValueError: A stack, or an adapter's bias on a layer that has none.

    Example:
        >>> model = tiny_model()
        >>> base, tuned = new_finetuned(model)
        >>> _ = model.load_state_dict(merge(base, tuned))
    """
    if tuned is not None and tuned.stack_size is not None:
        raise ValueError("merge: expected one finetune, got a stack; pass ft.index(stacked, i).")
    leaves = bind(base, tuned)
    merged: dict[str, Tensor] = {}
    by_content: dict[tuple[int, ...], Tensor] = {}
    for name in base.skeleton.state_names():
        path, own = split_name(name)
        path = base.skeleton.same_module.get(path, path)
        source = join_name(path, own)
        layer = base.skeleton.layers.get(path)
        factors = (join_name(path, "lora_a"), join_name(path, "lora_b"))
        sources = [leaves[n].data_ptr() for n in (source, *factors) if n in leaves]
        key = (*sorted(sources), *leaves[source].shape) if own == "weight" else (id(leaves[source]),)
        if key in by_content:
            merged[name] = by_content[key]
            continue
        leaf = leaves[source]
        if layer is not None and layer.shape is not None and own in ("weight", "bias"):
            leaf = _merged_leaf(leaves, layer, own, base.skeleton.default_scheme)
        if leaf.is_floating_point():
            leaf = leaf.to(dtype or (layer.dtype if layer is not None and layer.shape else leaf.dtype))
        by_content[key] = merged[name] = leaf.clone() if leaf is leaves[source] else leaf.contiguous()
    for name, packing in base.skeleton.packings.items():
        merged[name] = packing.join([merged.pop(part) for part in packing.parts])
    return merged


def to_module(base: Base, tuned: Finetuned | None) -> nn.Module:
    """Returns an ordinary module of the model's own class, in eval mode, on the same storage.

    For ``generate``, ``pipeline``, evaluation harnesses, ``torch.export`` and ``torch.compile``. It shares
    every tensor with ``base`` and ``tuned``; treat it as read-only (no parameter requires a gradient). Its
    ``named_parameters`` have the codes; as the attribute ``weight``, a layer in 8 bits shows a float tensor of NaN, for
    code that asks for dtype and shape.

    Args:
        base: The base.
        tuned: One finetune (not a stack), or ``None``.

    Raises:
        ValueError: A stack.

    Example:
        >>> base, tuned = new_finetuned(tiny_model())
        >>> to_module(base, tuned)(torch.zeros(3, dtype=torch.long)).shape
        torch.Size([3, 4])
    """
    if tuned is not None and tuned.stack_size is not None:
        raise ValueError("to_module: expected one finetune, got a stack; pass ft.index(stacked, i).")
    module = base.skeleton.module()
    leave_ties_alone(module)
    parameters: dict[int, nn.Parameter] = {}
    for name, leaf in bind(base, tuned).items():
        path, own = split_name(name)
        owner = module.get_submodule(path)
        if own in owner._parameters:
            parameter = parameters.setdefault(id(leaf), nn.Parameter(leaf.detach(), requires_grad=False))
            owner._parameters[own] = parameter
        elif own in owner._buffers:
            owner._buffers[own] = leaf
        else:
            owner.register_buffer(own, leaf.detach(), persistent=True)
    return module


def _check_base(function: str, base: Base, tuned: Finetuned) -> None:
    if tuned.spec.base != base.fingerprint:
        raise ValueError(
            f"{function}: the finetune belongs to base {tuned.spec.base!r}, but the base given is "
            f"{base.fingerprint!r} ({base.skeleton.name})."
        )


def _merged_leaf(leaves: Mapping[str, Tensor], layer: Layer, own: str, default_scheme: Scheme) -> Tensor:
    path = layer.path
    leaf = leaves[join_name(path, own)]
    wide = torch.float64 if layer.dtype == torch.float64 else torch.float32
    scale = leaves.get(join_name(path, "lora_scale"))
    if own == "bias":
        adapter_bias = leaves.get(join_name(path, "lora_bias"))
        if adapter_bias is None or scale is None:
            return leaf
        return leaf.to(wide) + scale.to(wide) * adapter_bias.to(wide)
    if join_name(path, "lora_bias") in leaves and join_name(path, "bias") not in leaves:
        raise ValueError(
            f"merge: the adapter of {path!r} has a bias (LinearAdapterConfig(bias=True)) but the layer has none to "
            "merge it into; keep the adapter separate, or train with bias=False."
        )
    if not leaf.is_floating_point():
        scheme = layer.scheme or default_scheme
        quantized = [leaves[join_name(path, "weight" + suffix)] for suffix in scheme.suffixes]
        leaf = float_weight(layer.type, scheme.dequantize(wide, *quantized))
    if scale is None:
        return leaf
    adapter = {name: leaves[join_name(path, name)].to(wide) for name in LEAF_NAMES if join_name(path, name) in leaves}
    a, b = effective_factors(adapter)
    delta = adapter["lora_scale"] * ((b @ a).mT if layer.type.adapter == "embedding" else b @ a)
    updated = float_weight(layer.type, leaf.to(wide)) + delta
    if "lora_magnitude" in adapter:
        updated = updated * (adapter["lora_magnitude"] / updated.norm(dim=1).clamp_min(SMALLEST_NORM)).unsqueeze(-1)
    return updated.reshape(leaf.shape) if layer.type.convolution else float_weight(layer.type, updated)


def _fitting(name: str, new: Tensor, old: Tensor) -> Tensor:
    if new.shape != old.shape:
        raise ValueError(
            f"load_state_dict: {name} has shape {tuple(new.shape)}, expected {tuple(old.shape)}; was it saved with "
            "another rank or layer?"
        )
    if new.dtype != old.dtype:
        raise TypeError(
            f"load_state_dict: {name} is {new.dtype}, expected {old.dtype}; convert it with .to({old.dtype})."
        )
    return new.detach().to(old.device)
