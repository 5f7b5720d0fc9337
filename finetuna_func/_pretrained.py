"""Hugging Face models on tensors that are still in their files.

transformers itself arranges the tensors: it renames, casts, stacks and ties lazy ones as it would
any others, and computes the buffers that no checkpoint holds. The model it returns has its
parameters on disk.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from finetuna_func._filters import join_name
from finetuna_func._lazy import LazyTensor, sources

CONFIG, GENERATION = "config.json", "generation_config.json"


def pretrained(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    cls: type[Any] | None,
    config: Any,
    dtype: torch.dtype | None,
    strict: bool,
) -> nn.Module:
    """Returns what ``from_pretrained(folder)`` would, its parameters lazy.

    Args:
        folder: Where the checkpoint is, for messages and the generation config.
        tensors: Its tensors, by name.
        cls: The model's class, or an Auto class; by default the one that the config names.
        config: Its config.
        dtype: Of the floats; by default what ``from_pretrained`` takes.
        strict: Whether tensors that the model has no use for are an error.

    Raises:
        ValueError: A tensor is missing, left over, or of another shape or kind than the model's.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{folder}: {CONFIG} says that the checkpoint is quantized already. Load it with transformers' "
            "from_pretrained, dequantized or in bitsandbytes' 8 bits, and give that to ft.quantize_base_model."
        )
    cls = model_class(folder, config) if cls is None else concrete(cls, config)
    model, report = _arranged(folder, tensors, cls, config, dtype, _MissingStayUnallocated())
    _check_report(folder, tensors, cls.__name__, report, strict)
    if any(leaf.is_meta for leaf in model.parameters()):  # those that transformers may compute, such as sinusoids
        model, _ = _arranged(folder, tensors, cls, config, dtype, nullcontext())
    _check_floats(model)
    if (folder / GENERATION).is_file() and model.can_generate():
        model.generation_config = generation_config(folder)
    return model


def fitted(folder: Path, tensors: Mapping[str, LazyTensor], module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Returns a copy of a user's module with its parameters and persistent buffers lazy, by name.

    Args:
        folder: For messages.
        tensors: By the names of the module's ``state_dict``; under one name of several that are tied suffices.
        module: On any device; it is not changed. Buffers that are not persistent are its own.
        dtype: Of the floats; by default each parameter's own.

    Raises:
        ValueError: A tensor is missing, left over, or of another shape or kind than the module's.
    """
    expected = module.state_dict(keep_vars=True)
    by_leaf: dict[int, list[str]] = {}
    for name, leaf in expected.items():
        by_leaf.setdefault(id(leaf), []).append(name)
    missing = {names[0] for names in by_leaf.values() if not any(name in tensors for name in names)}
    mismatched = {
        (name, tuple(tensors[name].shape), tuple(leaf.shape))
        for name, leaf in expected.items()
        if name in tensors and tensors[name].shape != leaf.shape
    }
    report = {
        "missing_keys": missing,
        "unexpected_keys": tensors.keys() - expected.keys(),
        "mismatched_keys": mismatched,
    }
    _check_report(folder, tensors, type(module).__name__, report, strict=True)
    memo: dict[int, Any] = {}
    for names in by_leaf.values():
        leaf = expected[names[0]]
        stored = tensors[next(name for name in names if name in tensors)]
        value = stored.to((dtype if leaf.is_floating_point() else None) or leaf.dtype)
        memo[id(leaf)] = nn.Parameter(value, requires_grad=False) if isinstance(leaf, nn.Parameter) else value
    for leaf in itertools.chain(module.parameters(), module.buffers()):
        memo.setdefault(id(leaf), leaf)
    copied = copy.deepcopy(module, memo)
    _check_floats(copied)
    return copied


def read_config(folder: Path) -> Any:
    """Returns the config of a checkpoint; code that comes with it is never run.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of a model that transformers does not know.
    """
    from transformers import AutoConfig

    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}; expected a Hugging Face checkpoint or a folder written by ft.save_base. For "
            "weights of a module of your own, pass model=."
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged or hostile file leads to
        raise ValueError(
            f"{folder / CONFIG}: not the config of a model that transformers knows by itself: {error} "
            "To use code of your own, build the model on the meta device and pass model=."
        ) from error


def generation_config(folder: Path) -> Any:
    """Returns the generation config in a folder."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder / GENERATION}: not a generation config: {error}") from error


def model_class(folder: Path, config: Any, name: str | None = None) -> type[Any]:
    """Returns transformers' class of that name; by default the one that the config names.

    Raises:
        ValueError: None is named, or transformers has no such model.
    """
    import transformers

    names = [name] if name else list(getattr(config, "architectures", None) or ())
    if not names:
        raise ValueError(
            f"{folder / CONFIG} names no architecture; pass model=, a class such as transformers.AutoModelForCausalLM."
        )
    cls = getattr(transformers, str(names[0]), None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ValueError(
            f"{folder}: transformers has no model {names[0]!r}. Pass model=, built with your own code (on the meta "
            "device, so that it takes no memory)."
        )
    return cls


def on_meta(cls: type[Any], config: Any) -> nn.Module:
    """Returns a model of that config without numbers."""
    with torch.device("meta"):
        return cls._from_config(config)


def standard_class(config: Any) -> type[Any]:
    """Returns transformers' causal language model for a config that names no class."""
    from transformers import AutoModelForCausalLM

    return concrete(AutoModelForCausalLM, config)


def concrete(cls: type[Any], config: Any) -> type[Any]:
    """Returns the class of the model that a class of transformers, an Auto class perhaps, makes of a config."""
    if hasattr(cls, "_from_config"):
        return cls
    if not hasattr(cls, "from_config"):
        raise TypeError(f"model: expected a torch.nn.Module or a class of transformers, got {cls!r}.")
    with torch.device("meta"):
        return type(cls.from_config(config))


def _arranged(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    cls: type[Any],
    config: Any,
    dtype: torch.dtype | None,
    missing: AbstractContextManager[Any],
) -> tuple[Any, Mapping[str, Any]]:
    """The model on lazy tensors, and transformers' report of what it found and did not find."""
    options = {} if dtype is None else {"dtype": dtype}
    try:
        with _quiet(), missing:
            return cls.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                ignore_mismatched_sizes=True,  # reported later, with the file
                output_loading_info=True,
                **options,
            )
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(f"{folder}: its tensors do not make a {cls.__name__}: {error}") from error


class _MissingStayUnallocated(TorchFunctionMode):
    """Leaves parameters that the checkpoint lacks on the meta device: they are about to be an error."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty_like and isinstance(args[0], nn.Parameter) and args[0].is_meta:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides transformers' progress bar, which would count tensors that nobody has read yet."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_report(
    folder: Path, tensors: Mapping[str, Tensor], model: str, report: Mapping[str, Any], strict: bool
) -> None:
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        raise ValueError(
            f"{_where(folder, tensors, name)}: {name} has shape {tuple(found)}, but {model} has {tuple(expected)}"
            f"{f' ({len(mismatched)} tensors differ)' if len(mismatched) > 1 else ''}. The weights and {CONFIG} do not "
            "belong together."
        )
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        raise ValueError(
            f"{folder}: lacks {len(missing)} tensors of {model}: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}"
            f"{f' (and has no use for {unexpected[:3]})' if unexpected else ''}. A base needs all weights; a model "
            "with fresh ones is for from_pretrained and ft.quantize_base_model."
        )
    if unexpected and strict:
        raise ValueError(
            f"{_where(folder, tensors, unexpected[0])}: {model} has no use for {len(unexpected)} tensors: "
            f"{', '.join(unexpected[:5])}{', ...' if len(unexpected) > 5 else ''}. Pass strict=False to leave them "
            "out, or model= with the class that has them."
        )


def _where(folder: Path, tensors: Mapping[str, Tensor], name: str) -> str:
    """The file that holds a tensor of the model, as far as its name tells."""
    for stored, leaf in tensors.items():
        if stored == name or stored.endswith(f".{name}") or name.endswith(f".{stored}"):
            return str(getattr(sources(leaf)[0], "file", folder))
    return str(folder)


def _check_floats(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for own, leaf in itertools.chain(module._parameters.items(), module._buffers.items()):
            if leaf is None or not leaf.is_floating_point():
                continue
            for source in sources(leaf):
                if not source.dtype.is_floating_point:
                    raise ValueError(
                        f"{source!r} is {source.dtype}, where {join_name(path, own)} is a floating-point parameter. "
                        "Codes of another quantization are not weights; load such a checkpoint with the library that "
                        "made it."
                    )
