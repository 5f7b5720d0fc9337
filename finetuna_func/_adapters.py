"""Making a finetune: which layers are adapted, which are trained directly, and their first values."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from finetuna_func._base import DEFAULT_HEAD, quantize_base_model, quantized_leaves
from finetuna_func._filters import as_names, join_name, lookup, matches, select, split_name
from finetuna_func._init import adapter_dtype, initial_tensors, layer_device
from finetuna_func._layers import float_weight
from finetuna_func._skeleton import Layer
from finetuna_func._trees import constants_of
from finetuna_func._types import (
    AdapterConfig,
    AdapterSpec,
    Base,
    EmbeddingAdapterConfig,
    Finetuned,
    LinearAdapterConfig,
    Selector,
    Spec,
)
from finetuna_func._unpack import unpacked

logger = logging.getLogger(__name__)


@overload
def new_finetuned(
    base_or_model: Base,
    adapt_layers: Selector | None = ...,
    plain_layers: Selector | None = ...,
    embedding_config: EmbeddingAdapterConfig | Mapping[str, EmbeddingAdapterConfig] = ...,
    linear_config: LinearAdapterConfig | Mapping[str, LinearAdapterConfig] = ...,
    modules_not_to_quantize: Selector | None = ...,
    modules_not_to_freeze: Selector = ...,
    generator: torch.Generator | None = ...,
    float_model: nn.Module | None = ...,
) -> Finetuned: ...
@overload
def new_finetuned(
    base_or_model: nn.Module,
    adapt_layers: Selector | None = ...,
    plain_layers: Selector | None = ...,
    embedding_config: EmbeddingAdapterConfig | Mapping[str, EmbeddingAdapterConfig] = ...,
    linear_config: LinearAdapterConfig | Mapping[str, LinearAdapterConfig] = ...,
    modules_not_to_quantize: Selector | None = ...,
    modules_not_to_freeze: Selector = ...,
    generator: torch.Generator | None = ...,
    float_model: nn.Module | None = ...,
) -> tuple[Base, Finetuned]: ...
def new_finetuned(
    base_or_model: Base | nn.Module,
    adapt_layers: Selector | None = None,
    plain_layers: Selector | None = None,
    embedding_config: EmbeddingAdapterConfig | Mapping[str, EmbeddingAdapterConfig] = EmbeddingAdapterConfig(),
    linear_config: LinearAdapterConfig | Mapping[str, LinearAdapterConfig] = LinearAdapterConfig(),
    modules_not_to_quantize: Selector | None = None,
    modules_not_to_freeze: Selector = (),
    generator: torch.Generator | None = None,
    float_model: nn.Module | None = None,
) -> Finetuned | tuple[Base, Finetuned]:
    """Returns a fresh finetune of a base; or, given a model, the quantized base and a finetune of it.

    A fresh finetune computes what the base computes: one factor of every adapter starts at zero.
    The base is shared, never copied: a finetune costs its own tensors only.

    Selectors are leaf names (``"q_proj"``), dotted paths, or regexes over whole paths; a container
    stands for the layers below it.

    Args:
        base_or_model: A `Base`, or a module to quantize first.
        adapt_layers: Layers that get a LoRA adapter. Default: every Linear and Embedding that is
            not plain (of tied layers, the first; the others follow it) and not smaller than the rank.
        plain_layers: Modules whose parameters are trained directly, in this finetune's own copy:
            not quantized, not frozen, not adapted. Default: ``lm_head``, where there is one. If the
            base holds such a layer in 8 bits it is dequantized, with a warning.
        embedding_config: One config, or one per layer by selector; a dict must cover every
            adapted embedding.
        linear_config: Likewise for the linear layers.
        modules_not_to_quantize: Layers that must be in float, beside the plain ones; an error if
            the base holds one in 8 bits. Default: all layers are as the base has them. If given,
            every other float layer is used in 8 bits by this finetune: quantized once, shared by
            all finetunes of this base. (For a module: default ``lm_head``.)
        modules_not_to_freeze: Modules trained directly that may be adapted as well; an error if
            the base holds one in 8 bits.
        generator: Source of the random initial factors; default torch's own.
        float_model: The model the base was made from; for ``LinearAdapterConfig(init="loftq")``, which
            starts from what the base lost. (Given a module, that module.)

    Raises:
        ValueError: A selector that matches nothing or names no adaptable layer, a layer both adapted
            and plain, a rank larger than the layer, a config dict that lacks a layer.

    Example:
        >>> base = quantize_base_model(tiny_model())
        >>> tuned = new_finetuned(base, adapt_layers={"fc"}, linear_config=LinearAdapterConfig(r=2))
        >>> {name: tuple(leaf.shape) for name, leaf in tuned.params.items()}
        {'fc.lora_a': (2, 8), 'fc.lora_b': (8, 2), 'lm_head.bias': (4,), 'lm_head.weight': (4, 8)}
    """
    if isinstance(base_or_model, nn.Module):
        base = _quantize_first(base_or_model, plain_layers, modules_not_to_quantize, modules_not_to_freeze)
        tuned = new_finetuned(
            base,
            adapt_layers,
            plain_layers,
            embedding_config,
            linear_config,
            None,
            modules_not_to_freeze,
            generator,
            base_or_model,
        )
        return base, tuned
    if not isinstance(base_or_model, Base):
        raise TypeError(f"base_or_model: expected a Base or a torch module, got {type(base_or_model).__name__}.")
    base = base_or_model
    plain, adapted = _choose_layers(base, adapt_layers, plain_layers)
    layers = [base.skeleton.layers[path] for path in sorted(adapted)]
    wanted = [layer.path for layer in layers if _config_wants(layer, embedding_config, linear_config)]
    _check_choices(layers, wanted, embedding_config, linear_config)
    if adapt_layers is None:
        wanted = _without_small([base.skeleton.layers[path] for path in wanted], embedding_config, linear_config)
    unfrozen = _owners("modules_not_to_freeze", modules_not_to_freeze, base)
    for path in sorted(unfrozen - plain):
        if path in base.skeleton.layers and base.skeleton.layers[path].scheme is not None:
            raise ValueError(
                f"modules_not_to_freeze: {path!r} is quantized in the base and cannot be trained in 8 bits; keep it in "
                "float with quantize_base_model(modules_not_to_quantize=...), or put it in plain_layers."
            )
    quantized = _layers_to_quantize(base, modules_not_to_quantize, plain | unfrozen)
    adapters = tuple(_adapter_spec(base.skeleton.layers[path], embedding_config, linear_config) for path in wanted)
    _check_patterns(adapters, embedding_config, linear_config)
    for adapter in adapters:
        if getattr(adapter.config, "dora", False) and adapter.path in plain | unfrozen:
            raise ValueError(
                f"linear_config: {adapter.path!r} has dora=True and is in modules_not_to_freeze; DoRA's norm is of a "
                "frozen weight. Choose one of them."
            )
    plain_params: dict[str, Tensor] = {}
    for path in sorted(plain | unfrozen):
        plain_params.update(_plain_copies(base, path))
    params: dict[str, Tensor] = dict(plain_params)
    consts: dict[str, Tensor] = {}
    source = None if float_model is None else unpacked(float_model)[0]
    for adapter in adapters:
        layer = base.skeleton.layers[adapter.path]
        start, kept = initial_tensors(base, layer, adapter, generator, source, quantized)
        params.update(start)
        consts.update(kept)
        for name, value in constants_of(adapter).items():
            consts[name] = torch.tensor(value, dtype=adapter_dtype(layer), device=layer_device(base, layer))
    spec = Spec(base.fingerprint, adapters, tuple(sorted(plain_params)), tuple(sorted(quantized)))
    return Finetuned(params, consts, base.skeleton.completed(spec))


def _quantize_first(
    model: nn.Module, plain: Selector | None, not_to_quantize: Selector | None, not_to_freeze: Selector
) -> Base:
    paths = [path for path, _ in unpacked(model)[0].named_modules() if path]
    for argument, selectors in (("plain_layers", plain), ("modules_not_to_freeze", not_to_freeze)):
        select(argument, as_names(argument, selectors), paths)  # so that the message names the right argument
    kept = set(as_names("modules_not_to_quantize", not_to_quantize))
    kept |= set(as_names("plain_layers", plain)) | set(as_names("modules_not_to_freeze", not_to_freeze))
    if plain is None or not_to_quantize is None:
        kept |= {name for name in DEFAULT_HEAD if any(matches(name, path) for path in paths)}
    return quantize_base_model(model, modules_not_to_quantize=kept)


def _choose_layers(base: Base, adapt: Selector | None, plain: Selector | None) -> tuple[set[str], set[str]]:
    """Returns the paths of plain modules and of adapted layers."""
    adaptable = {path for path, layer in base.skeleton.layers.items() if layer.adaptable}
    adapt_names = as_names("adapt_layers", adapt)
    adapted: set[str] = set()
    if adapt is not None:
        # Every module can be named, so that naming one that takes no adapter gets its own message.
        named = _named("adapt_layers", adapt_names, base, adaptable | set(base.skeleton.owners))
        adapted = named & adaptable
        for name in adapt_names:
            if not _named("adapt_layers", (name,), base, adaptable | set(base.skeleton.owners)) & adaptable:
                raise ValueError(
                    f"adapt_layers: {name!r} names only modules that take no adapter; adaptable layers are Linear, "
                    "Embedding and registered types. Use plain_layers to train a module directly."
                )
    if plain is None:
        heads = {path for path in base.skeleton.owners if any(matches(name, path) for name in DEFAULT_HEAD)}
        chosen_plain = heads - adapted
    else:
        chosen_plain = _owners("plain_layers", plain, base)
        both = sorted(chosen_plain & adapted)
        if both:
            raise ValueError(
                f"adapt_layers and plain_layers both name {both[:5]}; a layer is either adapted or trained directly. "
                "To do both, use adapt_layers and modules_not_to_freeze."
            )
    if adapt is None:
        followers = {split_name(alias)[0] for alias in base.skeleton.ties if alias.endswith(".weight")}
        convolutions = {path for path in adaptable if base.skeleton.layers[path].type.convolution}
        unasked = convolutions | {path for path in adaptable if _unreachable(base, path)}
        adapted = adaptable - chosen_plain - followers - unasked
    for path in sorted(adapted):
        out_of_reach = _unreachable(base, path)
        if out_of_reach:
            raise ValueError(
                f"adapt_layers: {path!r} shares its weight with {out_of_reach}, whose class is not registered, so an "
                "adapter on the one would not reach the other. Register the class, or leave the layer out."
            )
    return chosen_plain, adapted


def _unreachable(base: Base, path: str) -> list[str]:
    """Returns the modules tied to a layer that cannot follow its adapter."""
    name = join_name(path, "weight")
    sharers = [split_name(alias)[0] for alias, canonical in base.skeleton.ties.items() if canonical == name]
    return [sharer for sharer in sharers if sharer not in base.skeleton.layers]


def _owners(argument: str, selectors: Selector, base: Base) -> set[str]:
    return _named(argument, as_names(argument, selectors), base, set(base.skeleton.owners))


def _named(argument: str, names: tuple[str, ...], base: Base, paths: set[str]) -> set[str]:
    """Returns the paths that the selectors name; a module that has several may be named by any."""
    first = {other: path for other, path in base.skeleton.same_module.items() if path in paths}
    return {first.get(path, path) for path in select(argument, names, paths | first.keys())}


def _layers_to_quantize(base: Base, not_to_quantize: Selector | None, plain: set[str]) -> set[str]:
    """Returns the layers that the base holds in float and this finetune uses in 8 bits."""
    if not_to_quantize is None:
        return set()
    layers = {path: layer for path, layer in base.skeleton.layers.items() if layer.quantizable}
    names = as_names("modules_not_to_quantize", not_to_quantize)
    kept = select("modules_not_to_quantize", names, base.skeleton.owners)
    for path in sorted(kept & layers.keys()):
        if layers[path].scheme is not None:
            raise ValueError(
                f"modules_not_to_quantize: {path!r} is already quantized in the base, and going back would keep its "
                "rounding; make a base with quantize_base_model(modules_not_to_quantize=...), or put it in "
                "plain_layers to train a dequantized copy."
            )
    sharers: dict[str, set[str]] = {}
    for path in base.skeleton.owners:
        name = join_name(path, "weight")
        sharers.setdefault(base.skeleton.ties.get(name, name), set()).add(path)
    chosen: set[str] = set()
    for name, group in sharers.items():
        owner = split_name(name)[0]
        if group <= layers.keys() and layers[owner].scheme is None and not group & kept and owner not in plain:
            quantized_leaves(base, owner)
            chosen.add(owner)
    return chosen


def _config_for(
    layer: Layer,
    embedding_config: EmbeddingAdapterConfig | Mapping[str, EmbeddingAdapterConfig],
    linear_config: LinearAdapterConfig | Mapping[str, LinearAdapterConfig],
) -> tuple[str, AdapterConfig]:
    if layer.type.adapter == "embedding":
        return "embedding_config", _config_of("embedding_config", embedding_config, EmbeddingAdapterConfig, layer.path)
    return "linear_config", _config_of("linear_config", linear_config, LinearAdapterConfig, layer.path)


def _config_wants(layer: Layer, embedding_config: Any, linear_config: Any) -> bool:
    """Whether the layer's config has it in ``layers_to_transform`` and not in ``exclude``."""
    argument, config = _config_for(layer, embedding_config, linear_config)
    if any(matches(name, layer.path) for name in as_names(f"{argument}.exclude", config.exclude)):
        return False
    return config.layers_to_transform is None or _block_of(layer.path) in _blocks(argument, config.layers_to_transform)


def _block_of(path: str) -> int | None:
    """The number of the repeated block that a layer is in: the first number of its path."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def _blocks(argument: str, given: Any) -> tuple[int, ...]:
    blocks = (given,) if isinstance(given, int) else given
    if isinstance(blocks, (str, bytes)) or not isinstance(blocks, Iterable) or not all(type(b) is int for b in blocks):
        raise TypeError(f"{argument}.layers_to_transform: expected numbers of blocks, got {given!r}.")
    return tuple(blocks)


def _without_small(layers: list[Layer], embedding_config: Any, linear_config: Any) -> list[str]:
    """Leaves out what nobody named and is smaller than the rank: token types, heads of two classes.

    If no layer of a kind is large enough it is the rank that is wrong, and the layers stay, to be told so.
    """
    fitting = {
        layer.path for layer in layers if _resolved(layer, embedding_config, linear_config)[1].r <= _smaller_side(layer)
    }
    kinds = {layer.type.adapter for layer in layers if layer.path in fitting}
    for layer in layers:
        if layer.path not in fitting and layer.type.adapter in kinds:
            logger.info(
                "%s of shape %s is smaller than the rank; it gets no adapter by default.", layer.path, layer.shape
            )
    return [layer.path for layer in layers if layer.path in fitting or layer.type.adapter not in kinds]


def _smaller_side(layer: Layer) -> int:
    assert layer.shape is not None
    return min(layer.shape)


def _check_choices(layers: list[Layer], wanted: list[str], embedding_config: Any, linear_config: Any) -> None:
    """Raises for a choice in the configs that chooses nothing."""
    for argument, given, kind in (
        ("embedding_config", embedding_config, "embedding"),
        ("linear_config", linear_config, "linear"),
    ):
        paths = [layer.path for layer in layers if layer.type.adapter == kind]
        for config in given.values() if isinstance(given, Mapping) else (given,):
            select(f"{argument}.exclude", as_names(f"{argument}.exclude", config.exclude), paths, what=f"{kind} layer")
            if config.layers_to_transform is not None and paths:
                blocks = {_block_of(path) for path in paths}
                missing = [b for b in _blocks(argument, config.layers_to_transform) if b not in blocks]
                if missing or not _blocks(argument, config.layers_to_transform):
                    there = sorted(block for block in blocks if block is not None)
                    raise ValueError(
                        f"{argument}.layers_to_transform={config.layers_to_transform!r}: there is no block {missing}; "
                        f"the adapted layers are in blocks {there}."
                    )
    if layers and not wanted:
        raise ValueError("exclude and layers_to_transform leave no layer to adapt; to adapt none, use adapt_layers=().")


def _resolved(layer: Layer, embedding_config: Any, linear_config: Any) -> tuple[str, AdapterConfig]:
    """Returns the argument's name and the layer's own config, patterns applied."""
    argument, config = _config_for(layer, embedding_config, linear_config)
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name) is not None and not isinstance(getattr(config, name), Mapping):
            raise TypeError(f"{argument}.{name}: expected a dict by layer, got {getattr(config, name)!r}.")
    r = lookup(f"{argument}.rank_pattern", config.rank_pattern or {}, layer.path, default=config.r)
    alpha = lookup(f"{argument}.alpha_pattern", config.alpha_pattern or {}, layer.path, default=config.alpha)
    return argument, dataclasses.replace(
        config, r=r, alpha=alpha, rank_pattern=None, alpha_pattern=None, layers_to_transform=None, exclude=()
    )


def _adapter_spec(layer: Layer, embedding_config: Any, linear_config: Any) -> AdapterSpec:
    assert layer.type.adapter is not None and layer.shape is not None
    argument, config = _resolved(layer, embedding_config, linear_config)
    if layer.type.convolution and getattr(config, "dora", False):
        raise ValueError(f"{argument}: an adapter on the convolution {layer.path!r} takes no dora.")
    largest = _smaller_side(layer)
    if config.r > largest:
        raise ValueError(
            f"{argument}: rank r={config.r} is larger than layer {layer.path!r} of shape {layer.shape}; use r <= "
            f"{largest}, give this layer its own config, or train it directly with plain_layers."
        )
    return AdapterSpec(layer.path, layer.type.adapter, config, layer.form)


def _check_patterns(adapters: tuple[AdapterSpec, ...], embedding_config: Any, linear_config: Any) -> None:
    """Raises for a selector in the configs that names no adapted layer."""
    for argument, given, kind in (
        ("embedding_config", embedding_config, "embedding"),
        ("linear_config", linear_config, "linear"),
    ):
        paths = [adapter.path for adapter in adapters if adapter.kind == kind]
        what = f"adapted {kind} layer"
        if isinstance(given, Mapping):
            select(argument, given, paths, what=what)
        entries = given.items() if isinstance(given, Mapping) else [(None, given)]
        for key, config in entries:
            own = [path for path in paths if key is None or matches(key, path)]
            for name in ("rank_pattern", "alpha_pattern"):
                select(f"{argument}.{name}", getattr(config, name) or (), own, what=what)


def _config_of(argument: str, config: object, expected: type, path: str) -> AdapterConfig:
    if isinstance(config, Mapping):
        config = lookup(argument, config, path)
    if not isinstance(config, expected):
        raise TypeError(
            f"{argument}: expected {expected.__name__} or a dict of them by layer, got {type(config).__name__} for "
            f"{path!r}."
        )
    return config  # type: ignore[return-value]


def _plain_copies(base: Base, path: str) -> dict[str, Tensor]:
    """Returns this finetune's own copies of the parameters of a module; 8-bit ones are dequantized."""
    copies: dict[str, Tensor] = {}
    layer = base.skeleton.layers.get(path)
    for name in base.skeleton.owners[path]:
        canonical = base.skeleton.ties.get(name, name)
        leaf = base.params[canonical]
        if leaf.is_floating_point():
            copies[name] = leaf.clone()
        elif layer is not None and layer.scheme is not None and name.endswith("weight"):
            warnings.warn(
                f"plain_layers: {path!r} is quantized in the base; its trained copy starts from the dequantized "
                "weights and keeps their rounding; to avoid it, use quantize_base_model(modules_not_to_quantize=...).",
                stacklevel=3,
            )
            leaves = [base.params[canonical + suffix] for suffix in layer.scheme.suffixes]
            copies[name] = float_weight(layer.type, layer.scheme.dequantize(layer.dtype, *leaves)).contiguous()
        else:
            raise TypeError(f"plain_layers: {name} is {leaf.dtype}, which cannot be trained; leave {path!r} out.")
    return copies
