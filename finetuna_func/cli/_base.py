"""Opening what is on disk: bases, tokenizers, adapters."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer

import finetuna_func as ft

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


class Adapter(NamedTuple):
    """An adapter and what to call it."""

    name: str
    tuned: ft.Finetuned


def default_device() -> str:
    """Returns ``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raises unless there is such a device."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    try:
        usable = torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError):  # torch's own words are of drivers and builds
        usable = False
    if not usable:
        known = "; torch sees no GPU" if kinds == ["cpu"] else f", up to cuda:{torch.cuda.device_count() - 1}"
        raise typer.BadParameter(
            f"{device!r} is no device that torch can use here; expected {' or '.join(kinds)}{known}.",
            param_hint="--device",
        )


def open_base(path: Path, device: str | None = None) -> ft.Base:
    """Returns the base in a folder: one that `finetuna quantize` wrote, or a model, quantized on the way."""
    if device is not None:
        check_device(device)
    if not path.is_dir():
        raise FileNotFoundError(f"--base {path}: there is no such folder; finetuna quantize MODEL {path} makes it.")
    quiet_transformers()
    return ft.load_base(path, device=device or default_device())


def quiet_transformers() -> None:
    """Turns off transformers' bars where nobody sees them move."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def write_base(model: str, out: Path, **options: Any) -> ft.Base:
    """Writes the base of a model, a folder, a GGUF file or a name on the hub, to a new folder, and returns it."""
    quiet_transformers()
    base = ft.load_base(model, **options)
    ft.save_base(out, base)
    return base


def write_tokenizer(model: str, out: Path) -> None:
    """Writes the tokenizer of a model, its chat template and its way to end a text, to the folder of its base."""
    source = Path(model)
    if source.is_dir():
        for name in TOKENIZER_FILES:
            if (source / name).is_file() and not (out / name).exists():
                shutil.copyfile(source / name, out / name)
        return
    from transformers import AutoTokenizer

    if source.is_file():
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    else:
        tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(str(out))


def open_tokenizer(path: Path) -> Any:
    """Returns the tokenizer in a folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: there is no tokenizer that can be read; copy the model's tokenizer files into it. ({error})"
        ) from error


class Limits(NamedTuple):
    """What a model can read: how many token ids it knows, and how long a text may be, if it says so."""

    vocabulary: int | None
    positions: int | None


def limits_of(base: ft.Base) -> Limits:
    """Returns what the base can read; an id or a position beyond it would be an error of the device, or nonsense."""
    module: Any = base.skeleton.module()
    table = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
    vocabulary = getattr(table, "num_embeddings", None)
    positions = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    return Limits(vocabulary, positions if isinstance(positions, int) and positions > 0 else None)


def check_reads(base: ft.Base, highest: int, longest: int, where: str) -> None:
    """Raises unless the model knows all token ids up to one, and has so many positions."""
    vocabulary, positions = limits_of(base)
    if vocabulary is not None and highest >= vocabulary:
        raise ValueError(
            f"{where}: the tokenizer gives the id {highest}, but the model knows {vocabulary}; they do not belong "
            "together."
        )
    if positions is not None and longest > positions:
        raise ValueError(f"{where}: {longest} tokens are more than the {positions} positions that the model has.")


def stop_ids(base: ft.Base, tokenizer: Any) -> set[int]:
    """Returns the ids that end an answer, by the tokenizer and by the model's own settings."""
    config = getattr(base.skeleton.module(), "generation_config", None)
    found = {tokenizer.eos_token_id}
    for own in (getattr(config, "eos_token_id", None),):
        found |= set(own) if isinstance(own, (list, tuple)) else {own}
    return {i for i in found if i is not None}


def open_adapters(base: ft.Base, paths: Sequence[Path]) -> list[Adapter]:
    """Returns adapters, named after their folders, or after their paths where folders have the same name."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"--adapter {path}: there is no such folder; expected one of a finished run.")
        if not is_adapter(path):
            inside = sorted(str(own) for own in path.iterdir() if is_adapter(own))
            hint = (
                f"there are {', '.join(inside[:5])} in it" if inside else "expected one of a finished run, or of PEFT"
            )
            raise FileNotFoundError(f"--adapter {path}: is not the folder of an adapter; {hint}.")
    return [Adapter(name, ft.load(path, base)) for name, path in zip(names, paths, strict=True)]


def is_adapter(path: Path) -> bool:
    """Returns whether a folder looks like an adapter's, ours or PEFT's."""
    return any((path / name).is_file() for name in ("finetuna.json", "adapter_config.json"))


def stacks(adapters: Sequence[Adapter]) -> list[list[int]]:
    """Returns which adapters go into one stack each: those that adapt the same layers in the same way."""
    groups: dict[Any, list[int]] = {}
    for i, (_, tuned) in enumerate(adapters):
        layers = tuple((own.path, own.kind) for own in tuned.spec.adapters)
        dtypes = tuple((name, leaf.dtype) for name, leaf in tuned.params.items())
        groups.setdefault((layers, dtypes, tuned.spec.quantized), []).append(i)
    return list(groups.values())


def untrained(base: ft.Base) -> ft.Finetuned:
    """Returns a finetune that computes what the base computes: a fresh adapter on one layer."""
    from finetuna_func.train import linear_layers

    return ft.new_finetuned(base, linear_layers(base)[:1], (), linear_config=ft.LinearAdapterConfig(r=1))
