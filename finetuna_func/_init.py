"""First values of an adapter: random factors, or factors of the frozen weight."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from finetuna_func._base import quantized_leaves
from finetuna_func._filters import join_name
from finetuna_func._layers import float_weight
from finetuna_func._skeleton import Layer
from finetuna_func._types import AdapterSpec, Base, LinearAdapterConfig


def initial_tensors(
    base: Base,
    layer: Layer,
    adapter: AdapterSpec,
    generator: torch.Generator | None,
    float_model: nn.Module | None,
    quantized: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the trained tensors of a fresh adapter and the tensors it keeps of the frozen weight, by name.

    Args:
        base: The base.
        layer: The layer.
        adapter: Its adapter.
        generator: Source of random factors.
        float_model: Source of float weights, for LoftQ.
        quantized: Layers that the base holds in float and the finetune uses in 8 bits.

    Raises:
        ValueError: LoftQ without the float weights, or with those of another model.
    """
    assert layer.shape is not None
    dtype, device = adapter_dtype(layer), layer_device(base, layer)
    config = adapter.config
    if not isinstance(config, LinearAdapterConfig):
        rows, width = layer.shape
        a = torch.zeros(config.r, rows, dtype=dtype, device=device)
        return _named(adapter, lora_a=a, lora_b=_normal((width, config.r), dtype, device, generator)), {}
    out_features, in_features = layer.shape
    kept: dict[str, Tensor] = {}
    b = torch.zeros(out_features, config.r, dtype=dtype, device=device)
    in_float = layer.scheme is None and layer.path not in quantized  # where quantization lost nothing
    if config.init == "default" or (config.init == "loftq" and in_float):
        bound = 1 / math.sqrt(in_features)  # kaiming_uniform with a = sqrt(5), as nn.Linear and PEFT
        a = (2 * _uniform((config.r, in_features), dtype, device, generator) - 1) * bound
    elif config.init == "gaussian":
        a = _normal((config.r, in_features), dtype, device, generator) / config.r
    elif config.init == "loftq":
        lost = _lost_weight(base, layer, float_model, quantized)
        a, b = (factor.to(dtype) for factor in _principal_factors(lost / config.scale, config.r))
    else:
        weight = _frozen_weight(base, layer, quantized)
        if config.init == "pissa":
            a, b = _principal_factors(weight / config.scale, config.r)
        else:
            q, upper = torch.linalg.qr(weight)
            a, b = upper[: config.r], q[:, : config.r]
        a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
        kept.update(lora_a0=a.clone(), lora_b0=b.clone())
    trained = {"lora_a": a, "lora_b": b}
    if config.bias:
        trained["lora_bias"] = torch.zeros(out_features, dtype=dtype, device=device)
    if config.dora:
        weight = _frozen_weight(base, layer, quantized)
        kept["lora_weight_norm"] = weight.norm(dim=1).to(dtype)
        update = 0 if config.subtracts_start else config.scale * (b @ a).to(weight.dtype)
        trained["lora_magnitude"] = (weight + update).norm(dim=1).to(dtype)
    return _named(adapter, **trained), _named(adapter, **kept)


def weight_norm(base: Base, layer: Layer, quantized: Collection[str]) -> Tensor:
    """Returns the norms of the rows of a layer's frozen weight, ``(out,)``, which DoRA needs."""
    return _frozen_weight(base, layer, quantized).norm(dim=1).to(adapter_dtype(layer))


def adapter_dtype(layer: Layer) -> torch.dtype:
    """Returns float32 even on a 16-bit base: adapters are small and trained; float64 on float64."""
    return torch.float64 if layer.dtype == torch.float64 else torch.float32


def layer_device(base: Base, layer: Layer) -> torch.device:
    """Returns where a layer's weight is."""
    return base.params[_weight_name(base, layer)].device


def _named(adapter: AdapterSpec, **tensors: Tensor) -> dict[str, Tensor]:
    return {join_name(adapter.path, own): leaf for own, leaf in tensors.items()}


def _principal_factors(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Returns the best A and B of rank r for ``B @ A ~ weight``, the singular values shared evenly."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[:r].sqrt()
    return (root.unsqueeze(-1) * vh[:r]).contiguous(), (u[:, :r] * root).contiguous()


def _lost_weight(base: Base, layer: Layer, float_model: nn.Module | None, quantized: Collection[str]) -> Tensor:
    """What quantization took from a layer's weight."""
    held = _frozen_weight(base, layer, quantized)
    lost = _float_weight_of(float_model, layer).to(held.device) - held
    if lost.abs().max() > 0.2 * held.abs().max():  # 8 bits lose a hundredth at most, 4 bits a sixth
        raise ValueError(
            f"float_model: the weight of {layer.path!r} is not the one that the base was quantized from; pass the "
            "model that the base was made from."
        )
    return lost


def _frozen_weight(base: Base, layer: Layer, quantized: Collection[str]) -> Tensor:
    """The matrix ``(out, in)`` that a finetune computes with, in at least float32."""
    wide = torch.float64 if layer.dtype == torch.float64 else torch.float32
    name = _weight_name(base, layer)
    scheme, held = layer.scheme, base.params
    if layer.path in quantized:
        scheme, held, name = (
            base.skeleton.default_scheme,
            quantized_leaves(base, layer.path),
            join_name(layer.path, "weight"),
        )
    if scheme is None:
        return float_weight(layer.type, base.params[name]).to(wide)
    return scheme.dequantize(wide, *(held[name + suffix] for suffix in scheme.suffixes))


def _float_weight_of(model: nn.Module | None, layer: Layer) -> Tensor:
    if model is None:
        raise ValueError(
            'LinearAdapterConfig(init="loftq") starts from what quantization lost, so it needs the float weights: pass '
            "new_finetuned(base, ..., float_model=model)."
        )
    try:
        matrix = float_weight(layer.type, model.get_parameter(join_name(layer.path, "weight")).detach())
    except AttributeError:
        matrix = torch.empty(0)
    if matrix.shape != layer.shape:
        raise ValueError(
            f"float_model: {layer.path!r} has a weight of shape {tuple(matrix.shape)}, expected {layer.shape}; pass "
            "the model that the base was made from."
        )
    return matrix.to(torch.float64 if layer.dtype == torch.float64 else torch.float32)


def _weight_name(base: Base, layer: Layer) -> str:
    name = join_name(layer.path, "weight")
    return base.skeleton.ties.get(name, name)


# Drawn where the generator lives and moved, so that a seed means the same numbers on any device.
def _uniform(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    source = generator.device if generator is not None else "cpu"
    return torch.rand(shape, dtype=dtype, device=source, generator=generator).to(device)


def _normal(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    source = generator.device if generator is not None else "cpu"
    return torch.randn(shape, dtype=dtype, device=source, generator=generator).to(device)
