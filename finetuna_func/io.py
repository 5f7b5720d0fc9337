"""Finetunes on disk: a folder in PEFT's format, with our own description beside it.

    adapter_model.safetensors   the tensors, under PEFT's names
    adapter_config.json         what `peft.PeftModel.from_pretrained` reads
    finetuna.json               base fingerprint, exact spec and constants; ignored by others

A save appears whole or not at all, and equal finetunes are the same bytes. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from finetuna_func._base import quantized_leaves
from finetuna_func._files import written_whole
from finetuna_func._filters import join_name, split_name
from finetuna_func._init import weight_norm
from finetuna_func._peft import (
    FACTORS,
    all_file_names,
    beyond_peft,
    fused_parameters,
    fused_shapes,
    params_from_peft,
    peft_config,
    peft_names,
    rank_on_disk,
    read_checkpoint,
    second_names,
    split_off_start,
    tensors_for_peft,
)
from finetuna_func._trees import constants_of
from finetuna_func._types import (
    AdapterSpec,
    Base,
    EmbeddingAdapterConfig,
    Finetuned,
    LinearAdapterConfig,
    Spec,
)

logger = logging.getLogger(__name__)

TENSORS, PEFT_CONFIG, OWN_CONFIG = "adapter_model.safetensors", "adapter_config.json", "finetuna.json"
FORMAT = 1
_CHOOSING = {"rank_pattern", "alpha_pattern", "layers_to_transform", "exclude"}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def save(path: str | os.PathLike[str], tuned: Finetuned) -> Path:
    """Returns the folder it wrote: the finetune in PEFT's format.

    An earlier save in the same folder is replaced; any other folder is left alone. The experts of a fused
    parameter are saved as PEFT's ``target_parameters``, and what is tied to a trained layer under both names. What
    PEFT cannot express (DoRA on some layers only, experts of different ranks or trained directly, layers inside
    ``nn.MultiheadAttention``, convolutions with dilation) is saved for `load` alone: the log says so, and the file
    that PEFT looks for is not written.

    Args:
        path: The folder to write.
        tuned: One finetune (not a stack).

    Raises:
        ValueError: A stack.
        FileExistsError: ``path`` exists and is not an earlier save.

    Example:
        >>> import tempfile
        >>> base, tuned = new_finetuned(tiny_model())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load(save(f"{folder}/adapter", tuned), base)
        >>> again.spec == tuned.spec
        True
    """
    if tuned.stack_size is not None:
        raise ValueError(f"save: expected one finetune, got a stack of {tuned.stack_size}; save each of ft.unstack.")
    target = Path(path)
    fused = fused_parameters(tuned)
    with written_whole(target, OWN_CONFIG, "save") as folder:
        # Copies: safetensors refuses tensors that share memory.
        stored = tensors_for_peft(tuned, fused)
        tensors = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in stored.items()}
        # One entry: safetensors writes several in any order, and equal finetunes are to be equal files.
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        unsaid = beyond_peft(tuned)
        if unsaid:
            logger.warning("%s: no %s is written, since PEFT cannot express %s.", target, PEFT_CONFIG, unsaid)
        else:
            _write_json(folder / PEFT_CONFIG, peft_config(tuned))
        _write_json(folder / OWN_CONFIG, _own_config(tuned) | {"sha256": _sha256((folder / TENSORS).read_bytes())})
    return target


def load(path: str | os.PathLike[str], base: Base) -> Finetuned:
    """Returns the finetune that `save` wrote, bitwise, or that PEFT did, on the devices of ``base``.

    A LoRA checkpoint of PEFT (ranks and alphas by pattern, rsLoRA, DoRA, biases, embeddings,
    ``target_parameters``, ``modules_to_save``) does not say what base it belongs to: names and shapes are checked.

    Args:
        path: The folder.
        base: The base it was trained on.

    Raises:
        FileNotFoundError: No such save.
        ValueError: It was trained on another base (both are named), a file is damaged, or PEFT's
            settings compute something else than `apply` would.
    """
    folder = Path(path)
    foreign = not (folder / OWN_CONFIG).is_file() and (folder / PEFT_CONFIG).is_file()
    if foreign and not (folder / TENSORS).is_file() and list(folder.glob("*.bin")):
        raise FileNotFoundError(f"load: {folder} holds pickled weights, which are never read; save it as safetensors.")
    for name in (PEFT_CONFIG if foreign else OWN_CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"load: {folder} has no {name}; expected a folder written by ft.save or by PEFT.")
    content = (folder / TENSORS).read_bytes()
    if foreign:
        return read_checkpoint(folder / PEFT_CONFIG, _tensors_in(folder, content), base)
    spec, fused, constants, dtypes, checksum = _read_own_config(folder / OWN_CONFIG)
    if spec.base != base.fingerprint:
        raise ValueError(
            f"load: {folder} was trained on base {spec.base!r}, but the base given is {base.fingerprint!r} "
            f"({base.skeleton.name}); load it on the base it was trained on."
        )
    _check_fits(folder / OWN_CONFIG, spec, base)
    spec = _with_forms(folder / OWN_CONFIG, spec, fused, base)
    tensors = _tensors_in(folder, content)
    names = all_file_names(spec, fused)
    missing, unknown = names - tensors.keys(), tensors.keys() - names
    if missing or unknown:
        raise ValueError(
            f"load: {folder / TENSORS} lacks {sorted(missing)[:5]} and has unknown {sorted(unknown)[:5]}; the files "
            "do not belong together."
        )
    shapes: dict[str, tuple[int, ...]] = fused_shapes(base, spec, fused)
    shapes |= {file_name: _expected_shape(base, spec, name) for name, file_name in peft_names(spec, fused).items()}
    for file_name, (name, transposed) in second_names(spec).items():
        shape = _expected_shape(base, spec, name)
        shapes[file_name] = shape[::-1] if transposed else shape
    for name, leaf in tensors.items():
        if tuple(leaf.shape) != shapes[name] or not leaf.is_floating_point():
            raise ValueError(
                f"load: {folder / TENSORS}: {name} is {leaf.dtype} {tuple(leaf.shape)}, expected floating "
                f"point {shapes[name]}."
            )
    if _sha256(content) != checksum:
        raise ValueError(
            f"load: {folder / TENSORS} is not the file that {OWN_CONFIG} was written with (another checksum): it is "
            "damaged, or the files do not belong together."
        )
    for layer in spec.quantized:
        quantized_leaves(base, layer)
    params = params_from_peft(spec, tensors, fused)
    starts = split_off_start(spec, params, dtypes)
    consts = {name: torch.tensor(value, dtype=dtypes[name]) for name, value in constants.items()}
    consts.update(starts)
    for adapter in spec.adapters:
        if getattr(adapter.config, "dora", False):
            norm = weight_norm(base, base.skeleton.layers[adapter.path], spec.quantized)
            name = join_name(adapter.path, "lora_weight_norm")
            consts[name] = norm.to(dtypes.get(name, norm.dtype))
    device = next(iter(base.params.values())).device
    return Finetuned(params, consts, spec).to(device)


def _tensors_in(folder: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return load_tensors(content)
    except (SafetensorError, ValueError, OverflowError) as error:
        raise ValueError(f"load: {folder / TENSORS} is not a readable safetensors file: {error}") from error


def _with_forms(path: Path, spec: Spec, fused: tuple[str, ...], base: Base) -> Spec:
    """Returns the spec with the forms of the base's weights, which the description does not repeat."""
    adapters = tuple(replace(adapter, form=base.skeleton.layers[adapter.path].form) for adapter in spec.adapters)
    ranks: dict[str, set[int]] = {}
    for adapter in adapters:
        if adapter.form.experts:
            ranks.setdefault(split_name(adapter.path)[0], set()).add(rank_on_disk(adapter))
    if any(len(ranks.get(name, ())) != 1 for name in fused):
        raise ValueError(f"load: {path} has {list(fused)} as fused parameters, of which the base knows another form.")
    return base.skeleton.completed(replace(spec, adapters=adapters))


def _expected_shape(base: Base, spec: Spec, name: str) -> tuple[int, ...]:
    path, own = split_name(name)
    adapter = next((a for a in spec.adapters if a.path == path), None)
    if adapter is None or not own.startswith("lora_"):
        return base.skeleton.shapes[name]
    shape = base.skeleton.layers[path].shape
    assert shape is not None
    out_features, in_features = shape
    r = rank_on_disk(adapter)
    kernel = adapter.form.kernel
    if kernel and own in ("lora_a", "lora_b"):
        return (r, *kernel) if own == "lora_a" else (out_features, r, *(1,) * (len(kernel) - 1))
    if own in ("lora_bias", "lora_magnitude"):
        return (out_features,)
    if adapter.kind == "embedding":
        return (r, out_features) if own == "lora_a" else (in_features, r)
    return (r, in_features) if own == "lora_a" else (out_features, r)


def _settings(config: type) -> list[str]:
    """The fields of a resolved config; its patterns were for choosing, and are resolved."""
    return [name for name in config.__slots__ if name not in _CHOOSING]


def _recorded(tuned: Finetuned) -> dict[str, Tensor]:
    """The tensors whose dtype the tensor file does not tell: constants, and factors that share a tensor with theirs."""
    starts = [a.path for a in tuned.spec.adapters if rank_on_disk(a) != a.config.r]
    factors = {join_name(path, name) for path in starts for name in FACTORS}
    return {
        name: leaf for name, leaf in {**tuned.params, **tuned.consts}.items() if name in tuned.consts or name in factors
    }


def _own_config(tuned: Finetuned) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "base": tuned.spec.base,
        "adapters": [
            {"path": a.path, "kind": a.kind, **{name: getattr(a.config, name) for name in _settings(type(a.config))}}
            for a in tuned.spec.adapters
        ],
        "plain": list(tuned.spec.plain),
        "quantized": list(tuned.spec.quantized),
        "fused": list(fused_parameters(tuned)),
        "consts": {name: tuned.consts[name].item() for a in tuned.spec.adapters for name in constants_of(a)},
        "dtypes": {name: str(leaf.dtype).removeprefix("torch.") for name, leaf in _recorded(tuned).items()},
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_own_config(path: Path) -> tuple[Spec, tuple[str, ...], Mapping[str, float], Mapping[str, torch.dtype], str]:
    """Returns what `_own_config` wrote; anything else is a ValueError, whatever a hostile file holds."""
    try:
        config = json.loads(path.read_text("utf-8"))
        if type(config["format"]) is not int or config["format"] != FORMAT:
            raise ValueError(f"format {config['format']!r}; this version of finetuna_func reads format {FORMAT}")
        adapters = tuple(_adapter_from(dict(entry)) for entry in config["adapters"])
        plain, quantized = _names(config["plain"]), _names(config["quantized"])
        spec, fused = Spec(_name(config["base"]), adapters, plain, quantized), _names(config.get("fused", []))
        if len({adapter.path for adapter in adapters}) < len(adapters):
            raise ValueError("an adapter is listed twice")
        constants = {_name(name): float(value) for name, value in config["consts"].items()}
        expected = {name for adapter in adapters for name in constants_of(adapter)}
        if constants.keys() != expected or not all(math.isfinite(value) for value in constants.values()):
            raise ValueError(f"constants {sorted(constants)[:5]} are not the finite numbers that the adapters need")
        known = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}
        dtypes = {_name(name): known[dtype] for name, dtype in config["dtypes"].items()}
        starts = [a.path for a in adapters if rank_on_disk(a) != a.config.r]
        if not dtypes.keys() >= expected | {join_name(path, name) for path in starts for name in FACTORS}:
            raise ValueError("a dtype is missing")
        rates = [value for name, value in constants.items() if split_name(name)[1] == "lora_dropout"]
        if not all(0 <= rate < 1 for rate in rates):
            raise ValueError("a dropout rate is not in [0, 1)")
        return spec, fused, constants, dtypes, _name(config["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"load: {path} is not a description written by ft.save: {error!r}") from error


def _adapter_from(entry: dict[str, Any]) -> AdapterSpec:
    path, kind = _name(entry.pop("path")), entry.pop("kind")
    config = {"linear": LinearAdapterConfig, "embedding": EmbeddingAdapterConfig}[kind]
    if entry.keys() != set(_settings(config)):
        raise ValueError(f"the settings of {path!r} are {sorted(entry)}, expected {sorted(_settings(config))}")
    return AdapterSpec(path, kind, config(**entry))


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a name")
    return value


def _names(values: Any) -> tuple[str, ...]:
    names = tuple(_name(value) for value in values)
    if isinstance(values, str) or len(set(names)) < len(names):
        raise ValueError(f"{values!r} is not a list of distinct names")
    return names


def _check_fits(path: Path, spec: Spec, base: Base) -> None:
    """Raises unless every layer and parameter that the description names is there and of the right kind."""
    layers = base.skeleton.layers
    for adapter in spec.adapters:
        if adapter.path not in layers or layers[adapter.path].type.adapter != adapter.kind:
            raise ValueError(f"load: {path} has a {adapter.kind} adapter on {adapter.path!r}, which the base lacks.")
    for name in spec.plain:
        if name not in base.skeleton.shapes:
            raise ValueError(f"load: {path} trains {name!r} directly, which the base lacks.")
    for layer in spec.quantized:
        fits = layer in layers and layers[layer].quantizable and layers[layer].scheme is None
        if not fits or join_name(layer, "weight") in spec.plain:
            raise ValueError(f"load: {path} quantizes {layer!r}, which is not a frozen float layer of the base.")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
