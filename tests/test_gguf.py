"""GGUF files: bitwise what transformers unpacks, some rows at a time."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from models import assert_same_base, llama

import finetuna_func as ft
from finetuna_func import _lazy

HEADS, KV_HEADS, WIDTH, INNER, LAYERS, VOCAB = 4, 2, 256, 512, 2, 64
F32, F16, BF16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))
K_QUANTS = [gguf.GGMLQuantizationType[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")]
OTHERS = [gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")]


def write(path: Path, kind: gguf.GGMLQuantizationType, *, arch: str = "llama", tied: bool = False, **more) -> Path:
    """Writes a small model whose matrices are stored as ``kind``; its norms are float32, as always in GGUF."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)

    def matrix(name: str, rows: int, columns: int) -> None:
        if kind == F32:
            writer.add_tensor(name, rng.standard_normal((rows, columns), np.float32))
        elif kind == F16:
            writer.add_tensor(name, rng.standard_normal((rows, columns), np.float32).astype(np.float16))
        else:
            packed = gguf.quant_shape_to_byte_shape((rows, columns), kind)
            # Bytes below 56: then no half-precision number among them is infinite or NaN, whatever they mean.
            writer.add_tensor(name, rng.integers(1, 56, packed, np.uint8), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(name, 1 + 0.1 * rng.standard_normal(WIDTH).astype(np.float32))

    matrix("token_embd.weight", VOCAB, WIDTH)
    if not tied:
        matrix("output.weight", VOCAB, WIDTH)
    norm("output_norm.weight")
    for block in range(LAYERS):
        matrix(f"blk.{block}.attn_q.weight", WIDTH, WIDTH)
        matrix(f"blk.{block}.attn_k.weight", WIDTH * KV_HEADS // HEADS, WIDTH)
        matrix(f"blk.{block}.attn_v.weight", WIDTH * KV_HEADS // HEADS, WIDTH)
        matrix(f"blk.{block}.attn_output.weight", WIDTH, WIDTH)
        matrix(f"blk.{block}.ffn_gate.weight", INNER, WIDTH)
        matrix(f"blk.{block}.ffn_up.weight", INNER, WIDTH)
        matrix(f"blk.{block}.ffn_down.weight", WIDTH, INNER)
        norm(f"blk.{block}.attn_norm.weight")
        norm(f"blk.{block}.ffn_norm.weight")
        if arch == "qwen2":
            for own, size in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2)):
                writer.add_tensor(f"blk.{block}.attn_{own}.bias", rng.standard_normal(size).astype(np.float32))
    if more.get("frequencies"):
        writer.add_tensor("rope_freqs.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def unpacked_by_transformers(path: Path, **options) -> transformers.PreTrainedModel:
    config = transformers.GgufConfig(gguf_file=path.name, dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=config, **options
    )


@pytest.mark.parametrize("kind", [F32, F16, BF16, Q8_0, *K_QUANTS, *OTHERS], ids=lambda kind: kind.name)
def test_every_kind_is_what_transformers_unpacks(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(_lazy, "BLOCK", 5000)  # so that matrices are read in parts
    path = write(tmp_path / "model.gguf", kind)
    loaded = ft.load_base(path, modules_not_to_quantize=())
    assert_same_base(loaded, ft.quantize_base_model(unpacked_by_transformers(path), modules_not_to_quantize=()))
    assert all(bool(leaf.any()) for leaf in loaded.params.values() if leaf.dtype == torch.int8)


@pytest.mark.parametrize("arguments", [{}, {"scheme": "blockwise8"}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_architectures_ties_and_arguments(tied, arch, arguments, tmp_path):
    path = write(tmp_path / "model.gguf", Q8_0, arch=arch, tied=tied, frequencies=arch == "llama")
    options = {name: value for name, value in arguments.items() if name == "dtype"}
    rest = {name: value for name, value in arguments.items() if name != "dtype"}
    expected = ft.quantize_base_model(unpacked_by_transformers(path, **options), **rest)
    loaded = ft.load_base(path, **arguments)
    assert bool(loaded.skeleton.ties) == tied
    assert_same_base(loaded, expected)
    assert_same_base(ft.load_base(ft.save_base(tmp_path / "base", loaded), verify=True), expected)


def test_the_rows_of_q_and_k_are_put_in_transformers_order(tmp_path):
    path = write(tmp_path / "model.gguf", F32)
    loaded = ft.load_base(path, modules_not_to_quantize={"q_proj"})
    [stored] = [t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_q.weight"]
    ours = loaded.params["model.layers.0.self_attn.q_proj.weight"]
    raw = torch.from_numpy(np.array(stored.data))
    assert not torch.equal(ours, raw)
    pairs = raw.reshape(HEADS, WIDTH // HEADS // 2, 2, WIDTH)
    assert torch.equal(ours, pairs.transpose(1, 2).reshape(WIDTH, WIDTH))


BROKEN = {
    "cut in the numbers": (lambda p: os.truncate(p, p.stat().st_size - 4000), "not a whole GGUF file"),
    "cut in the header": (lambda p: os.truncate(p, 100), "not a whole GGUF file"),
    "empty": (lambda p: os.truncate(p, 0), "not a GGUF file"),
    "something else": (lambda p: p.write_bytes(b"PK" * 500), "not a GGUF file; for safetensors, give the folder"),
    "counts without end": (lambda p: p.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 16), "not a whole GGUF file"),
    "another width": (lambda p: _replace(p, b"llama.feed_forward_length", INNER, 2 * INNER), "has shape"),
    "more layers": (lambda p: _replace(p, b"llama.block_count", LAYERS, 3), "lacks 9 tensors .*model.layers.2"),
}


def _replace(path: Path, key: bytes, old: int, new: int) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(key) + len(key) + 4
    assert int.from_bytes(content[at : at + 4], "little") == old
    content[at : at + 4] = new.to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize("how", BROKEN)
def test_broken_files(how, tmp_path):
    breaking, message = BROKEN[how]
    path = write(tmp_path / "model.gguf", Q8_0)
    breaking(path)
    with pytest.raises(ValueError, match=f"(?s)model.gguf.*{message}|{tmp_path}.*{message}"):
        ft.load_base(path)


def test_numbers_that_are_none(tmp_path):
    path = write(tmp_path / "model.gguf", F32)
    ft.load_base(path)
    [q] = [t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_q.weight"]
    content = bytearray(path.read_bytes())
    content[q.data_offset : q.data_offset + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight: 1 of 65536 weights are NaN"):
        ft.load_base(path)


def test_architectures_that_are_joined_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "moe.gguf", "qwen3moe")
    writer.add_block_count(1)
    writer.add_vocab_size(8)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"moe\.gguf: .*'qwen3moe'.*from_pretrained\(gguf_file=\.\.\.\)"):
        ft.load_base(tmp_path / "moe.gguf")


def test_a_module_has_no_names_in_gguf(tmp_path):
    with pytest.raises(ValueError, match="pass a class of transformers"):
        ft.load_base(write(tmp_path / "model.gguf", Q8_0), model=llama())


@pytest.mark.slow
def test_smollm2_from_its_gguf_is_smollm2_from_safetensors():
    import real_data

    assert_same_base(ft.load_base(real_data.smollm2_gguf()), ft.load_base(real_data.smollm2_path()))
