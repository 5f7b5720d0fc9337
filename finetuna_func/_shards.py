"""The tensor files of a Hugging Face checkpoint, as lazy tensors by name.

    model.safetensors                                        or
    model.safetensors.index.json  {"weight_map": {name: file}}  and the files it names

Only safetensors are opened: whatever is pickled is refused, not read.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetuna_func._lazy import Box, LazyTensor, lazy

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        name: Its name there.
        shape: Its shape.
        dtype: Its dtype.
    """

    def __init__(self, opened: _File, name: str, entry: Mapping[str, Any]):
        self.name, self._opened = name, opened
        self.shape: tuple[int, ...] = tuple(entry["shape"])
        self._start: int = entry["data_offsets"][0]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"{self.file}: {name} is stored as {entry['dtype']}; expected one of {', '.join(_DTYPES)}. A "
                "checkpoint that is quantized already has to be loaded by the library that made it."
            )
        self.dtype = _DTYPES[entry["dtype"]]

    @property
    def file(self) -> Path:
        """Its file."""
        return self._opened.path

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return self.dtype.itemsize * math.prod(self.shape)

    def read(self, box: Box) -> Tensor:
        """Returns a part of it, in memory of its own."""
        # What is read: one index of each of the first axes, a range of the next, all of those behind.
        ranged = next((dim for dim, (start, stop) in enumerate(box) if stop - start != 1), len(box) - 1)
        read = (*box[: ranged + 1], *((0, size) for size in self.shape[ranged + 1 :]))
        part = torch.empty([stop - start for start, stop in read], dtype=self.dtype)
        first = 0
        for (start, _), size in zip(read, self.shape, strict=True):
            first = first * size + start
        self._opened.read_into(part, self._start + first * self.dtype.itemsize, self.name)
        if read == box:
            return part
        for dim in range(ranged + 1, len(box)):
            part = part.narrow(dim, box[dim][0], box[dim][1] - box[dim][0])
        return part.clone()

    def __repr__(self) -> str:
        return f"{self.name} in {self.file}"


class _File:
    """An open safetensors file. Read, not mapped: pages of a mapped file would stay beside what is made of them."""

    def __init__(self, path: Path, on_read: Callable[[int], object]):
        open_file(path)  # which checks that the header is whole and that the tensors in it fill the file
        self.path, self._on_read = path, on_read
        self._lock, self._content = threading.Lock(), path.open("rb", buffering=0)
        length = int.from_bytes(self._content.read(8), "little")
        self._data = 8 + length
        self.entries: dict[str, Any] = json.loads(self._content.read(length))
        self.entries.pop("__metadata__", None)

    def read_into(self, part: Tensor, offset: int, name: str) -> None:
        """Fills a contiguous tensor from the file's data."""
        if not part.numel():
            return
        view = memoryview(part.reshape(-1).view(torch.uint8).numpy().data)
        done = 0
        with self._lock:
            self._content.seek(self._data + offset)
            while done < len(view):
                count = self._content.readinto(view[done:])
                if not count:
                    raise ValueError(
                        f"{self.path}: {name} cannot be read, the file is shorter than when it was opened."
                    )
                done += count
        self._on_read(done)


def open_shards(folder: Path, on_read: Callable[[int], object]) -> dict[str, LazyTensor]:
    """Returns all tensors of a checkpoint, unread; files stay open as long as the tensors live.

    Args:
        folder: With one safetensors file, or several and an index.
        on_read: Called with the bytes of every read.

    Raises:
        FileNotFoundError: No safetensors, or a file that the index names is missing.
        ValueError: A file or the index is damaged, or the two do not belong together.
    """
    if (folder / ONE).is_file():
        return _tensors_of(folder / ONE, on_read)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(_nothing_to_read(folder))
    placed = _read_index(folder / INDEX)
    tensors: dict[str, LazyTensor] = {}
    for file_name in sorted(set(placed.values())):
        file = folder / file_name
        if not file.is_file():
            lost = sorted(name for name, where in placed.items() if where == file_name)
            raise FileNotFoundError(
                f"{folder}: the file {file_name} is missing, which {INDEX} names for {len(lost)} tensors "
                f"({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}); download it again."
            )
        found = _tensors_of(file, on_read)
        if twice := sorted(found.keys() & tensors.keys()):
            first = tensors[twice[0]]._recipe
            raise ValueError(f"{file}: holds {twice[:3]} as well: {first!r}. The files do not belong together.")
        if lost := sorted(name for name, where in placed.items() if where == file_name and name not in found):
            raise ValueError(f"{file}: lacks {lost[:5]}, which {INDEX} says are in it.")
        tensors.update(found)
    return tensors


def open_file(file: Path) -> Any:
    """Returns safetensors' handle of a file; its header is checked to fit the file.

    Raises:
        ValueError: It is no whole safetensors file.
    """
    try:
        return safe_open(os.fspath(file), framework="pt")
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{file}: not a whole safetensors file: {error}") from error


def _tensors_of(file: Path, on_read: Callable[[int], object]) -> dict[str, LazyTensor]:
    opened = _File(file, on_read)
    return {name: lazy(StoredTensor(opened, name, entry)) for name, entry in opened.entries.items()}


def _read_index(path: Path) -> Mapping[str, str]:
    try:
        placed = json.loads(path.read_text("utf-8"))["weight_map"]
        if not isinstance(placed, dict) or not placed:
            raise ValueError("weight_map is not a table of names")
        for name, file_name in placed.items():
            # Names with a folder could lead anywhere.
            if not isinstance(file_name, str) or not file_name.endswith(".safetensors") or set(file_name) & set("/\\:"):
                raise ValueError(
                    f"{name!r} is said to be in {file_name!r}, which is no safetensors file of this folder"
                )
        return placed
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not an index of a checkpoint: {error!r}") from error


def _nothing_to_read(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    said = f"{folder}: expected {ONE}, or {INDEX} and its files."
    if "adapter_model.safetensors" in names:
        return f"{said} It holds an adapter; load its base first, then the adapter with ft.load."
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return f"{said} To load a GGUF file, give its own path: {folder / ggufs[0]}"
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]:
        return (
            f"{said} It holds {pickles[:3]}, which are pickled and could run code, so they are not opened. Convert "
            "them where you trust them: transformers' from_pretrained and save_pretrained write safetensors."
        )
    return f"{said} It holds {names[:5]}."
