"""Bases from disk and to disk: tensor by tensor, so that the float model never exists.

`load_base` reads a Hugging Face checkpoint (safetensors, or a GGUF file), quantizing as it goes, or
what `save_base` wrote:

    base.json                        which model, which formats, which tensors; the fingerprint
    config.json                      of a Hugging Face model
    base-00001-of-00002.safetensors  codes, scales and floats, as they are in `Base.params`

A saved base is mapped, not read: processes on one machine share its pages. A save appears whole or
not at all. Nothing is ever unpickled, and no code that comes with a checkpoint is run.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from finetuna_func._base import DEFAULT_HEAD, fingerprint_of, quantize_base_model
from finetuna_func._files import written_whole
from finetuna_func._filters import join_name
from finetuna_func._lazy import sources
from finetuna_func._pretrained import (
    CONFIG,
    GENERATION,
    fitted,
    generation_config,
    model_class,
    on_meta,
    pretrained,
    read_config,
)
from finetuna_func._quant import Int8, Scheme, SchemeChoice, scheme_named
from finetuna_func._shards import open_file, open_shards
from finetuna_func._skeleton import Skeleton
from finetuna_func._types import Base, Params, Selector
from finetuna_func._unpack import unpacked

DESCRIPTION = "base.json"
FORMAT = 1
SHARD_BYTES = 5 * 10**9
AS_IT_IS = "as it is"
"""The format of a saved base, int8 of a checkpoint."""


def load_base(
    path: str | os.PathLike[str],
    *,
    scheme: SchemeChoice = AS_IT_IS,
    matmul: str | None = None,
    modules_not_to_quantize: Selector = DEFAULT_HEAD,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    model: nn.Module | type[Any] | None = None,
    strict: bool = True,
    revision: str | None = None,
    schemes: Mapping[str, Scheme] | None = None,
    verify: bool = False,
    progress: bool | None = None,
) -> Base:
    """Returns the base in a checkpoint, quantized tensor by tensor, or one that `save_base` wrote.

    From a checkpoint, the base is that of ``quantize_base_model(from_pretrained(path))``, bit for bit
    and with the same fingerprint, but the float model never exists: weights are read a few rows at a
    time where the format allows (``"int8"``), otherwise one matrix at a time.

    A base that `save_base` wrote is mapped: it takes no memory of its own until its pages are read,
    and then shares them with other processes. Writing to its tensors does not reach the file. Its
    numbers are those that were saved, bit for bit; what is computed of them can differ in the last
    bits, since the order of sums depends on how tensors are aligned in memory.

    Args:
        path: A folder with a Hugging Face checkpoint in safetensors, or written by `save_base`; a GGUF
            file; or a name on the Hugging Face hub, which its library downloads to its own cache.
        scheme: As in `quantize_base_model`; by default ``"int8"``, and as it is of a saved base.
        matmul: Likewise; by default ``"w8a16"``.
        modules_not_to_quantize: Likewise.
        dtype: Float dtype of the model; by default what ``from_pretrained`` takes, the config's.
        device: Where the base lives; the CPU by default.
        model: The class to build, such as ``transformers.AutoModelForSequenceClassification``, if not
            the one that the checkpoint names; or a module of your own, of any numbers (on the meta
            device it takes no memory), whose weights are in the file by the names of its
            ``state_dict``. It is not changed.
        strict: Whether tensors in a checkpoint that the model has no use for are an error.
        revision: Of a name on the hub.
        schemes: Formats of your own that a saved base is in, by the name they give themselves.
        verify: Whether a saved base is read through and compared with its checksums.
        progress: Whether to show a bar, by bytes; by default if standard error is a terminal.

    Raises:
        FileNotFoundError: No such folder, file or name, or a part of it is missing.
        ValueError: A file is damaged, or does not belong with the others or with the model; the
            message names file and tensor. Pickled checkpoints and those quantized already are refused.

    Example:
        >>> import tempfile
        >>> base = quantize_base_model(tiny_model())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load_base(save_base(f"{folder}/base", base), model=tiny_model())
        >>> again.fingerprint == base.fingerprint
        True
    """
    source = Path(path)
    if not source.exists():
        source = _from_hub(path, revision)
    if (source / DESCRIPTION).is_file():
        given: dict[str, Any] = {"matmul": matmul, "dtype": dtype}
        if scheme != AS_IT_IS:
            given["scheme"] = scheme or "None"
        if modules_not_to_quantize is not DEFAULT_HEAD:
            given["modules_not_to_quantize"] = modules_not_to_quantize
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"load_base({wrong[0]}=...): {source} holds a base that is quantized already; leave it out, or load "
                "the original checkpoint."
            )
        return _load_saved(source, model, device, schemes or {}, verify)
    if verify or schemes:
        raise ValueError("load_base(verify=..., schemes=...) are for a base that ft.save_base wrote.")
    with tqdm(
        desc=f"Loading {source.name}",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None if progress is None else not progress,
    ) as bar:
        loaded = _lazy_model(source, model, dtype, strict, bar, _Reading(bar))
        return quantize_base_model(
            loaded,
            modules_not_to_quantize=modules_not_to_quantize,
            scheme="int8" if scheme == AS_IT_IS else scheme,
            matmul=matmul or "w8a16",
            device=device,
        )


def save_base(path: str | os.PathLike[str], base: Base, *, max_shard_bytes: int = SHARD_BYTES) -> Path:
    """Returns the folder it wrote: the base as it is, for `load_base`.

    An earlier save in the same folder is replaced; any other folder is left alone. Tensors on an
    accelerator pass through the host a file at a time.

    Args:
        path: The folder to write.
        base: The base, with what was quantized later for its finetunes.
        max_shard_bytes: Size of a file at which another is begun; a single tensor may be larger.

    Raises:
        FileExistsError: ``path`` exists and is not an earlier save.
        ValueError: ``max_shard_bytes`` is not positive.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"save_base(max_shard_bytes={max_shard_bytes}): expected a positive number of bytes.")
    target = Path(path)
    tensors = _stored_tensors(base)
    shards = _shards(tensors, max_shard_bytes)
    with written_whole(target, DESCRIPTION, "save_base") as folder:
        checksums: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = folder / f"base-{number:05}-of-{len(shards):05}.safetensors"
            # One entry: safetensors writes several in any order, and equal bases are to be equal files.
            save_file(_separate(tensors, names), file, metadata={"format": "pt"})
            checksums[file.name] = _sha256(file)
        module = base.skeleton.module()
        config = getattr(module, "config", None)
        if hasattr(config, "to_json_file"):
            config.to_json_file(folder / CONFIG)  # type: ignore[union-attr]
            if getattr(module, "generation_config", None) is not None:
                module.generation_config.to_json_file(folder / GENERATION)  # type: ignore[union-attr]
        placed = dict(zip(checksums, shards, strict=True))
        text = json.dumps(_describe(base, tensors, placed, checksums), indent=1)
        (folder / DESCRIPTION).write_text(text + "\n", "utf-8")
    return target


# --- checkpoints


class _Reading:
    """Counts what is read, on the bar; and gives memory that was freed since back to the system, every 16 MB.

    The C library would keep it in its heap, in pieces between which something small lives on and which its aligned
    allocations do not fit again: up to a third of a base of 1.2 GB.
    """

    def __init__(self, bar: Any):
        self._bar, self._since = bar, 0
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc has it

    def __call__(self, nbytes: int) -> None:
        self._bar.update(nbytes)
        self._since += nbytes
        if self._since >= 1 << 24 and self._trim is not None:
            self._trim(0)
            self._since = 0


def _lazy_model(
    source: Path,
    model: nn.Module | type[Any] | None,
    dtype: torch.dtype | None,
    strict: bool,
    bar: Any,
    on_read: Callable[[int], object],
) -> nn.Module:
    cls = model if isinstance(model, type) else None
    if source.is_file():
        if isinstance(model, nn.Module):
            raise ValueError(
                f"load_base(model=...): {source} names tensors in its own way; pass a class of transformers."
            )
        from finetuna_func._gguf import open_gguf

        cls, config, tensors = open_gguf(source, cls, on_read)
    else:
        tensors = open_shards(source, on_read)
        config = None if isinstance(model, nn.Module) else read_config(source)
    bar.reset(total=sum(getattr(stored, "nbytes", 0) for leaf in tensors.values() for stored in sources(leaf)))
    if isinstance(model, nn.Module):
        return fitted(source, tensors, model, dtype)
    return pretrained(source, tensors, cls=cls, config=config, dtype=dtype, strict=strict)


def _from_hub(path: str | os.PathLike[str], revision: str | None) -> Path:
    """Returns the folder in the hub's own cache."""
    if not isinstance(path, str) or path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"load_base: {os.fspath(path)} does not exist.")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            path, revision=revision, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["*/*"]
        )
    except Exception as error:  # of the network, of the cache, of the name
        raise FileNotFoundError(
            f"load_base: there is no folder or file {path!r}, and the Hugging Face hub gave no model of that name: "
            f"{error} Check the name and the network, or give the folder of a checkpoint on disk."
        ) from error
    return Path(folder)


# --- saved bases


@dataclass(frozen=True)
class _Tensor:
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, leaf: Tensor) -> _Tensor:
        return cls(leaf.dtype, tuple(leaf.shape))


@dataclass(frozen=True)
class _Description:
    """What base.json says, checked to be of the right types."""

    fingerprint: str
    model: str
    architecture: str
    library: str
    default_scheme: Any
    schemes: Mapping[str, Any]
    ties: Mapping[str, str]
    module: Mapping[str, _Tensor]
    tensors: Mapping[str, _Tensor]
    derived: Mapping[str, tuple[str, ...]]
    files: Mapping[str, str]
    placed: Mapping[str, tuple[str, ...]]


def _describe(
    base: Base, tensors: Params, placed: Mapping[str, Iterable[str]], checksums: Mapping[str, str]
) -> dict[str, Any]:
    skeleton = base.skeleton
    module = {name: leaf for name, leaf in _named_tensors(skeleton.module()) if name not in skeleton.ties}
    return {
        "format": FORMAT,
        "fingerprint": base.fingerprint,
        "model": skeleton.name,
        "architecture": hashlib.sha256(skeleton.architecture.encode()).hexdigest(),
        "library": _library(),
        "default_scheme": _scheme_to_json(skeleton.default_scheme),
        "schemes": {
            path: _scheme_to_json(layer.scheme) for path, layer in skeleton.layers.items() if layer.scheme is not None
        },
        "ties": dict(skeleton.ties),
        "module": {name: _tensor_to_json(_Tensor.of(leaf)) for name, leaf in module.items()},
        "tensors": {name: _tensor_to_json(_Tensor.of(leaf)) for name, leaf in tensors.items()},
        "derived": {path: list(leaves) for path, leaves in base.derived.items()},
        "files": dict(checksums),
        "placed": {file: list(names) for file, names in placed.items()},
    }


def _read_description(path: Path) -> _Description:
    """Returns what `_describe` wrote; anything else is a ValueError, whatever a hostile file holds."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if type(found["format"]) is not int or found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}; this version of finetuna_func reads format {FORMAT}")
        files = {_name(file): _name(digest) for file, digest in found["files"].items()}
        placed = {_name(file): tuple(map(_name, names)) for file, names in found["placed"].items()}
        tensors = {_name(name): _tensor_from_json(value) for name, value in found["tensors"].items()}
        if any(set(file) & set("/\\:") or not file.endswith(".safetensors") for file in files):
            raise ValueError(f"{sorted(files)} are not files of this folder")
        if files.keys() != placed.keys() or sorted(itertools.chain(*placed.values())) != sorted(tensors):
            raise ValueError("the tensors and the files that hold them do not agree")
        return _Description(
            fingerprint=_name(found["fingerprint"]),
            model=_name(found["model"]),
            architecture=_name(found["architecture"]),
            library=_name(found["library"]),
            default_scheme=found["default_scheme"],
            schemes=dict(found["schemes"]),
            ties={_name(alias): _name(name) for alias, name in found["ties"].items()},
            module={_name(name): _tensor_from_json(value) for name, value in found["module"].items()},
            tensors=tensors,
            derived={_name(layer): tuple(map(_name, leaves)) for layer, leaves in found["derived"].items()},
            files=files,
            placed=placed,
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"load_base: {path} is not a description written by ft.save_base: {error!r}") from error


def _load_saved(
    folder: Path,
    model: nn.Module | type[Any] | None,
    device: torch.device | str | None,
    own_schemes: Mapping[str, Scheme],
    verify: bool,
) -> Base:
    described = _read_description(folder / DESCRIPTION)
    default = _scheme_from_json(folder, described.default_scheme, own_schemes)
    schemes = {path: _scheme_from_json(folder, value, own_schemes) for path, value in described.schemes.items()}
    tensors = _mapped(folder, described, verify)
    skeleton = _skeleton(folder, described, model, schemes, default)
    derived: dict[str, Params] = {
        path: {name: tensors.pop(_derived_name(path, name)) for name in names}
        for path, names in described.derived.items()
    }
    _check_leaves(folder, skeleton, tensors, described)
    base = Base(tensors, skeleton, described.fingerprint, derived)
    if verify and (found := fingerprint_of(skeleton, base.params)) != described.fingerprint:
        raise ValueError(f"load_base: {folder} has the fingerprint {found}, but says {described.fingerprint}.")
    return base if device is None else base.to(device)


def _mapped(folder: Path, described: _Description, verify: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file_name, names in described.placed.items():
        file = folder / file_name
        if not file.is_file():
            raise FileNotFoundError(f"load_base: {file} is missing; it holds {', '.join(names[:3])}.")
        if verify and (digest := _sha256(file)) != described.files[file_name]:
            raise ValueError(
                f"load_base: {file} has sha256 {digest}, but {DESCRIPTION} was written with "
                f"{described.files[file_name]}: it is damaged, or the files do not belong together."
            )
        with open_file(file) as opened:
            found = set(opened.keys())
            if lost := sorted(set(names) - found):
                raise ValueError(f"load_base: {file} lacks {lost[:5]}, which {DESCRIPTION} says are in it.")
            if more := sorted(found - set(names)):
                raise ValueError(f"load_base: {file} holds {more[:5]}, of which {DESCRIPTION} says nothing.")
            for name in names:
                tensors[name] = opened.get_tensor(name)
                if _Tensor.of(tensors[name]) != described.tensors[name]:
                    raise ValueError(
                        f"load_base: {file}: {name} is {_Tensor.of(tensors[name])}, but {DESCRIPTION} says "
                        f"{described.tensors[name]}."
                    )
    return tensors


def _skeleton(
    folder: Path,
    described: _Description,
    model: nn.Module | type[Any] | None,
    schemes: Mapping[str, Scheme],
    default: Scheme,
) -> Skeleton:
    if isinstance(model, nn.Module):
        model, packings = unpacked(model)
        memo: dict[int, Any] = {}
        for leaf in itertools.chain(model.parameters(), model.buffers()):
            meta = torch.empty_like(leaf, device="meta", requires_grad=False)
            memo[id(leaf)] = nn.Parameter(meta, requires_grad=False) if isinstance(leaf, nn.Parameter) else meta
        module = copy.deepcopy(model, memo)
    elif not (folder / CONFIG).is_file():
        raise ValueError(
            f"load_base: {folder} is the base of a {described.model}, which is no model of transformers; pass "
            f"model=, a {described.model} of any numbers (it can be on the meta device)."
        )
    else:
        config = read_config(folder)
        made = on_meta(model or model_class(folder, config, described.model), config)
        if (folder / GENERATION).is_file():
            made.generation_config = generation_config(folder)
        module, packings = unpacked(made)
    _restate(folder, module, described)
    skeleton = Skeleton(module, schemes, default, packings)
    unknown = sorted(path for path in schemes if path not in skeleton.layers or not skeleton.layers[path].quantizable)
    if unknown:
        raise ValueError(
            f"load_base: {folder} holds {unknown[:5]} in 8 bits, but this {skeleton.name} has no such layers. Register "
            "your own classes with ft.register_layer before loading, as when the base was made."
        )
    changed = hashlib.sha256(skeleton.architecture.encode()).hexdigest() != described.architecture
    # What a config says may be worded otherwise by another version of the libraries.
    if changed and (isinstance(model, nn.Module) or described.library == _library()):
        raise ValueError(
            f"load_base: {folder} was saved from another model than {'the one given' if model else CONFIG}: its "
            "classes or settings differ, and so would its results."
        )
    return skeleton


def _restate(folder: Path, module: nn.Module, described: _Description) -> None:
    """Gives a module on the meta device the dtypes and ties of the one that was saved."""
    fresh: dict[str, Tensor] = {}
    seen: set[str] = set()
    for path, child in module.named_modules():
        for own_tensors in (child._parameters, child._buffers):
            for own, leaf in own_tensors.items():
                if leaf is None:
                    continue
                name = join_name(path, own)
                canonical = described.ties.get(name, name)
                seen |= {name, canonical}
                said = described.module.get(canonical)
                if said is None or said.shape != tuple(leaf.shape):
                    raise ValueError(
                        f"load_base: {folder}: {name} has shape {tuple(leaf.shape)} in the model, and "
                        f"{'is not' if said is None else f'has {said.shape}'} in the saved base."
                    )
                if canonical not in fresh:
                    meta = torch.empty(said.shape, dtype=said.dtype, device="meta")
                    is_parameter = own_tensors is child._parameters
                    fresh[canonical] = nn.Parameter(meta, requires_grad=False) if is_parameter else meta
                own_tensors[own] = fresh[canonical]  # type: ignore[assignment]
    if lost := sorted((described.module.keys() | described.ties.keys()) - seen):
        raise ValueError(f"load_base: {folder}: the model has no {lost[:5]}, which the saved base has.")


def _check_leaves(folder: Path, skeleton: Skeleton, tensors: Params, described: _Description) -> None:
    """Raises unless the tensors are those that the skeleton's layers need."""
    needed = skeleton.required - skeleton.ties.keys()
    if tensors.keys() != needed:
        raise ValueError(
            f"load_base: {folder} lacks {sorted(needed - tensors.keys())[:5]} and has unknown "
            f"{sorted(tensors.keys() - needed)[:5]}; the files do not belong together."
        )
    quantized: set[str] = set()
    for path, layer in skeleton.layers.items():
        name = join_name(path, "weight")
        if layer.scheme is None or name in skeleton.ties:
            continue
        leaves = [tensors[name + suffix] for suffix in layer.scheme.suffixes]
        quantized |= {name + suffix for suffix in layer.scheme.suffixes}
        if not _makes(layer.scheme, leaves, layer.shape, layer.dtype):
            shapes = [(leaf.dtype, tuple(leaf.shape)) for leaf in leaves]
            raise ValueError(f"load_base: {folder}: {name} is {shapes}, which is no {layer.scheme} of {layer.shape}.")
    for name, leaf in tensors.items():
        if name not in quantized and _Tensor.of(leaf) != described.module[name]:
            raise ValueError(f"load_base: {folder}: {name} is {_Tensor.of(leaf)}, expected {described.module[name]}.")


def _makes(scheme: Scheme, leaves: list[Tensor], shape: tuple[int, int] | None, dtype: torch.dtype) -> bool:
    """Whether leaves of these shapes can be those of a matrix; found out without computing it."""
    if isinstance(scheme, Int8):
        return [_Tensor.of(leaf) for leaf in leaves] == [
            _Tensor(torch.int8, shape or ()),
            _Tensor(torch.float32, (shape or ())[:1]),
        ]
    try:
        matrix = scheme.dequantize(dtype, *(torch.empty_like(leaf, device="meta") for leaf in leaves))
    except NotImplementedError:  # a format whose operations know no meta device
        return True
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False
    return tuple(matrix.shape) == shape


def _stored_tensors(base: Base) -> dict[str, Tensor]:
    """The base's tensors and those derived from it later, by their names in the files."""
    derived = {
        _derived_name(path, name): leaf for path, leaves in base.derived.items() for name, leaf in leaves.items()
    }
    return {**base.params, **derived}


def _derived_name(path: str, name: str) -> str:
    return f"derived:{path}:{name}"


def _separate(tensors: Params, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors on the host, contiguous, no two in the same memory (which safetensors refuses)."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in names:
        leaf = tensors[name].detach().cpu().contiguous()
        if leaf.numel() and leaf.data_ptr() in seen:
            leaf = leaf.clone()
        seen.add(leaf.data_ptr())
        separate[name] = leaf
    return separate


def _shards(tensors: Params, most: int) -> list[list[str]]:
    """Names in order, a new list whenever the bytes of the last would be more than ``most``."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, leaf in tensors.items():
        nbytes = leaf.numel() * leaf.itemsize
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _scheme_to_json(scheme: Scheme) -> dict[str, Any]:
    """A format by its public names; one of the user's own by its name alone."""
    for matmul in ("w8a16", "w8a8"):
        try:
            if scheme_named(scheme.name, matmul) == scheme:
                return {"scheme": scheme.name, "matmul": matmul}
        except ValueError:
            continue
    return {"own": scheme.name, "repr": repr(scheme)}


def _scheme_from_json(folder: Path, said: Any, own: Mapping[str, Scheme]) -> Scheme:
    try:
        if "own" not in said:
            return scheme_named(_name(said["scheme"]), _name(said["matmul"]))
        name, text = _name(said["own"]), _name(said["repr"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"load_base: {folder / DESCRIPTION}: {said!r} is no format: {error}") from error
    if name not in own:
        raise ValueError(f"load_base: {folder} is in a format of your own; pass schemes={{{name!r}: ...}}, {text}.")
    if repr(own[name]) != text:
        raise ValueError(f"load_base(schemes={{{name!r}: {own[name]!r}}}): {folder} was saved with {text}.")
    return own[name]


def _named_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for path, child in module.named_modules():
        for own, leaf in itertools.chain(child._parameters.items(), child._buffers.items()):
            if leaf is not None:
                yield join_name(path, own), leaf


def _tensor_to_json(tensor: _Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _tensor_from_json(value: Any) -> _Tensor:
    dtype_name, shape = value
    dtype = getattr(torch, _name(dtype_name), None)
    if not isinstance(dtype, torch.dtype) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{value!r} is no dtype and shape")
    return _Tensor(dtype, tuple(shape))


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a name")
    return value


def _library() -> str:
    from importlib.metadata import version

    return f"torch {version('torch')}, transformers {version('transformers')}"


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
