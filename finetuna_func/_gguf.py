"""GGUF files (llama.cpp's), as lazy tensors by transformers' names.

What the file says of the model, and which tensor is which of transformers', transformers knows; the
numbers are unpacked by the ``gguf`` package, some rows at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetuna_func._lazy import Box, LazyTensor, lazy
from finetuna_func._pretrained import on_meta, standard_class

# transformers' processors that change one tensor at a time and keep its shape, and parts of the names of those they
# change (llama.cpp orders the rows of q and k by pairs; it adds 1 to the norms of some models).
_CHANGED = {
    "TensorProcessor": (),
    "LlamaTensorProcessor": (".attn_q.", ".attn_k."),
    "NemotronTensorProcessor": ("norm.weight",),
    "Gemma2TensorProcessor": ("norm.weight",),
}


class PackedTensor:
    """A tensor in a GGUF file; read as float32.

    Attributes:
        file: Its file.
        name: Its name there.
        shape: Its shape.
        dtype: float32, whatever it is packed in.
    """

    dtype = torch.float32

    def __init__(self, file: Path, stored: Any, change: Callable[[Any], Any] | None, on_read: Callable[[int], object]):
        self.file, self.name = file, str(stored.name)
        self.shape: tuple[int, ...] = tuple(int(size) for size in reversed(stored.shape))
        self.nbytes = int(stored.n_bytes)
        self._type, self._offset = stored.tensor_type, int(stored.data_offset)
        self._change, self._on_read = change, on_read

    def read(self, box: Box) -> Tensor:
        """Returns a part of it, in memory of its own; only its rows are unpacked, unless their order changes."""
        rows = (0, self.shape[0]) if self._change else box[0]
        part = torch.from_numpy(self._unpacked(*rows))
        inner = box if self._change else ((0, rows[1] - rows[0]), *box[1:])
        whole = part
        for dim, (start, stop) in enumerate(inner):
            part = part.narrow(dim, start, stop - start)
        return part if part.shape == whole.shape else part.clone()

    def _unpacked(self, start: int, stop: int) -> Any:
        import numpy as np
        from gguf.quants import dequantize

        row = self.nbytes // self.shape[0]
        try:
            with self.file.open("rb") as content:
                content.seek(self._offset + start * row)
                data = np.frombuffer(content.read((stop - start) * row), np.uint8).reshape(stop - start, row)
            values = dequantize(data, self._type).reshape(stop - start, *self.shape[1:])
            values = values if self._change is None else self._change(values)
        except (ValueError, NotImplementedError, OSError) as error:
            raise ValueError(f"{self.file}: {self.name} ({self._type.name}) cannot be read: {error}") from error
        self._on_read(data.nbytes)
        return np.array(values, np.float32)  # a copy, since what came may be a view of read-only bytes

    def __repr__(self) -> str:
        return f"{self.name} in {self.file}"


def open_gguf(
    file: Path, cls: type[Any] | None, on_read: Callable[[int], object]
) -> tuple[type[Any], Any, dict[str, LazyTensor]]:
    """Returns the class of model in a GGUF file, its config and its tensors, unread, by transformers' names.

    Args:
        file: The file.
        cls: The class to build; by default the causal language model of the file's architecture.
        on_read: Called with the bytes of every read.

    Raises:
        ImportError: The ``gguf`` package is not installed.
        ValueError: The file is damaged, or of an architecture that is not read tensor by tensor.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"load_base: {file} needs the gguf package: pip install gguf.") from error
    from transformers import AutoConfig, modeling_gguf_pytorch_utils

    with file.open("rb") as content:
        if content.read(4) != b"GGUF":
            raise ValueError(f"{file}: not a GGUF file; for safetensors, give the folder of the checkpoint.")
    try:
        reader = gguf.GGUFReader(os.fspath(file))
        architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
        stored = list(reader.tensors)
        swapped = reader.byte_order == "S"
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:  # whatever a damaged or hostile file leads to
        raise ValueError(f"{file}: not a whole GGUF file of a model that transformers knows: {error}") from error
    if swapped:
        raise ValueError(f"{file}: its numbers are in the other byte order; convert it on a machine like this one.")
    processor = modeling_gguf_pytorch_utils.TENSOR_PROCESSORS.get(
        architecture, modeling_gguf_pytorch_utils.TensorProcessor
    )(config=config.to_dict())
    kind = type(processor).__name__
    if kind not in _CHANGED:
        raise ValueError(
            f"{file}: the tensors of {architecture!r} are taken apart or joined in GGUF, which is not read tensor by "
            "tensor; load it with transformers' from_pretrained(gguf_file=...) and ft.quantize_base_model."
        )
    cls = standard_class(config) if cls is None else cls
    names = modeling_gguf_pytorch_utils.get_gguf_hf_weights_map(on_meta(cls, config), processor)
    tensors: dict[str, LazyTensor] = {}
    for tensor in stored:
        name = str(tensor.name)

        def change(values: Any, name: str = name) -> Any:
            return processor.process(weights=values, name=name).weights

        changes = any(part in name for part in _CHANGED[kind])
        # Names that transformers does not know, such as the frequencies of rotary embeddings, are its to leave out.
        if name in names:
            tensors[names[name]] = lazy(PackedTensor(file, tensor, change if changes else None, on_read))
    return cls, config, tensors
