"""Bases from checkpoints, bitwise those of the float model; bases on disk; and files that mean harm."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import huggingface_hub
import pytest
import torch
import transformers
from families import FAMILIES
from models import (
    Everything,
    Mlp,
    TiedLm,
    Tiny,
    assert_close,
    assert_same_base,
    assert_unchanged,
    bert,
    gpt2,
    llama,
    opt,
    snapshot,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import finetuna_func as ft
from finetuna_func import checkpoint
from finetuna_func._quant import Int8
from finetuna_func._skeleton import Skeleton

DESCRIPTION, INDEX, WEIGHTS = "base.json", "model.safetensors.index.json", "model.safetensors"
IDS = torch.arange(12).reshape(2, 6)
SUMS = 1e-5  # the order of sums depends on how tensors are aligned in memory, and so in a mapped file


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def mixtral(**settings: Any) -> Any:
    config = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    config |= dict(num_key_value_heads=2, num_local_experts=3, max_position_embeddings=32)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**config | settings)).eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Llama checkpoint in several files."""
    llama().save_pretrained(tmp_path / "llama", max_shard_size="3KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 2
    return tmp_path / "llama"


@pytest.fixture
def base() -> ft.Base:
    return ft.quantize_base_model(llama())


@pytest.fixture
def saved(base, tmp_path) -> Path:
    return ft.save_base(tmp_path / "saved", base, max_shard_bytes=3000)


# --- from a checkpoint: what quantize_base_model makes of from_pretrained


HF_FAMILIES = [family for family in FAMILIES if isinstance(family.make(), transformers.PreTrainedModel)]


@pytest.mark.parametrize("family", HF_FAMILIES, ids=lambda family: family.name)
def test_every_family(family, tmp_path):
    model = family.make().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = ft.load_base(tmp_path, modules_not_to_quantize=())
    expected = ft.quantize_base_model(type(model).from_pretrained(tmp_path), modules_not_to_quantize=())
    assert_same_base(loaded, expected)
    again = ft.load_base(ft.save_base(tmp_path / "saved", loaded, max_shard_bytes=20_000), verify=True)
    assert_same_base(again, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"scheme": "blockwise8"},
        {"scheme": "nf4"},
        {"scheme": None},
        {"scheme": {"0": "nf4", "*": "blockwise8"}},
        {"matmul": "w8a8"},
        {"modules_not_to_quantize": ()},
        {"modules_not_to_quantize": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), mixtral, gpt2], ids=["llama", "tied", "moe", "gpt2"])
def test_arguments_are_those_of_quantize_base_model(make, arguments, tmp_path):
    if make is gpt2 and "q_proj" in arguments.get("modules_not_to_quantize", ()):
        arguments = {"modules_not_to_quantize": {"c_attn", "wte"}}
    make().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = ft.quantize_base_model(model, **arguments)
    loaded = ft.load_base(tmp_path, **arguments)
    assert_same_base(loaded, expected)
    assert_same_base(ft.load_base(ft.save_base(tmp_path / "saved", loaded), verify=True), expected)


def test_outputs_are_the_same_and_those_of_other_weights_differ(folder, tmp_path):
    loaded = ft.load_base(folder)
    expected = ft.quantize_base_model(transformers.AutoModelForCausalLM.from_pretrained(folder))
    out = ft.apply(loaded, None, input_ids=IDS).logits
    assert torch.equal(out, ft.apply(expected, None, input_ids=IDS).logits)
    llama(seed=1).save_pretrained(tmp_path / "other")
    other = ft.load_base(tmp_path / "other")
    assert other.fingerprint != loaded.fingerprint
    assert not torch.equal(out, ft.apply(other, None, input_ids=IDS).logits)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_dtypes(stored, dtype, tmp_path):
    llama().to(stored).save_pretrained(tmp_path)
    options = {} if dtype is None else {"dtype": dtype}
    expected = ft.quantize_base_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options))
    loaded = ft.load_base(tmp_path, dtype=dtype)
    assert loaded.skeleton.dtype == (dtype or stored)
    assert_same_base(loaded, expected)


def test_a_head_that_was_saved_beside_its_table_is_tied_if_it_equals_it(tmp_path):
    llama(tied=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for head in (tensors["model.embed_tokens.weight"].clone(), torch.ones(32, 16)):
        save_file(tensors | {"lm_head.weight": head}, tmp_path / WEIGHTS, metadata={"format": "pt"})
        loaded = ft.load_base(tmp_path)
        assert_same_base(loaded, ft.quantize_base_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)))
        assert bool(loaded.skeleton.ties) == (not bool((head == 1).all()))


def test_another_class_than_the_one_named(tmp_path):
    bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no use for .*cls\.predictions"):
        ft.load_base(tmp_path, model=transformers.AutoModel, modules_not_to_quantize=())
    bare = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"lacks 2 tensors of BertModel: pooler\.dense\.bias"):
        ft.load_base(tmp_path / "bare", modules_not_to_quantize=())


def test_left_over_tensors_may_be_left_out(tmp_path):
    model = opt()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors | {"extra.weight": torch.ones(2)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"model\.safetensors: OPTForCausalLM has no use for 1 tensors: .*strict=False"
    ):
        ft.load_base(tmp_path)
    assert_same_base(ft.load_base(tmp_path, strict=False), ft.quantize_base_model(model))


def test_what_generates_is_kept(tmp_path):
    model = llama()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    loaded = ft.load_base(tmp_path)
    again = ft.load_base(ft.save_base(tmp_path / "saved", loaded))
    for each in (loaded, again):
        module = ft.to_module(each, None)
        assert module.generation_config.max_new_tokens == 7
        assert module.generate(IDS[:1], do_sample=False).shape == (1, 13)


def test_a_module_of_your_own(tmp_path):
    torch.manual_seed(0)
    model = Everything().eval()
    save_file(model.state_dict(), tmp_path / WEIGHTS)
    template = Everything().eval()
    before = snapshot(template)
    assert_same_base(ft.load_base(tmp_path, model=template), ft.quantize_base_model(model))
    assert_unchanged(template, before)
    with pytest.raises(ValueError, match="temperature is on the meta device"):
        ft.load_base(tmp_path, model=Everything().to("meta"))


def test_a_module_of_your_own_on_the_meta_device_with_ties_in_another_dtype(tmp_path):
    torch.manual_seed(0)
    model = TiedLm()
    save_file({name: leaf for name, leaf in model.state_dict().items() if name != "embed.weight"}, tmp_path / WEIGHTS)
    with torch.device("meta"):
        template = TiedLm()
    assert_same_base(ft.load_base(tmp_path, model=template), ft.quantize_base_model(model))
    half = ft.load_base(tmp_path, model=template, dtype=torch.bfloat16)
    assert_same_base(half, ft.quantize_base_model(copy.deepcopy(model).bfloat16()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc2.weight"), r"lacks 1 tensors of Mlp: fc2\.weight"),
        (lambda t: t.update(new=torch.ones(1)), r"model\.safetensors: Mlp has no use for 1 tensors: new"),
        (lambda t: t.update({"fc2.weight": torch.ones(9, 10)}), r"model\.safetensors: fc2\.weight has shape \(9, 10\)"),
        (
            lambda t: t.update({"fc2.weight": torch.ones(10, 10).char()}),
            r"fc2\.weight in .*model\.safetensors is torch",
        ),
    ],
)
def test_a_module_that_the_weights_do_not_fit(change, message, tmp_path):
    tensors = Mlp().state_dict()
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        ft.load_base(tmp_path, model=Mlp())


def test_nothing_is_written(folder):
    before = contents(folder)
    ft.load_base(folder)
    assert contents(folder) == before


def test_a_base_trains_like_any_other(folder):
    loaded = ft.load_base(folder)
    tuned = ft.new_finetuned(loaded, linear_config=ft.LinearAdapterConfig(r=2))

    def loss(tuned):
        return ft.apply(loaded, tuned, input_ids=IDS).logits.square().mean()

    value, gradients = ft.value_and_grad(loss)(tuned)
    assert value > 0 and any(bool(leaf.any()) for leaf in gradients.values())


# --- memory, progress, the hub

PEAK = """
import re, sys, torch, transformers
from pathlib import Path
import finetuna_func as ft
def resident(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
small, large = sys.argv[1:]
ft.load_base(small)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
base = ft.load_base(large)
print(resident("VmHWM") - before, base.nbytes)
"""


def test_the_float_model_never_exists(tmp_path):
    """The promise: 1.15 times the base and the largest tensor. The float model is four times the base."""
    llama().save_pretrained(tmp_path / "small")
    sizes = dict(vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    model = llama(**sizes, num_attention_heads=8, num_key_value_heads=8)
    model.save_pretrained(tmp_path / "large", max_shard_size="20MB")
    largest = max(leaf.nbytes for leaf in model.parameters())
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    peak, nbytes = map(int, done.stdout.split())
    assert nbytes > 60e6
    assert peak <= 1.15 * nbytes + largest


def test_the_bar_counts_bytes(folder, capfd):
    total = sum(leaf.nbytes for leaf in llama().parameters())
    ft.load_base(folder, progress=True)
    shown = capfd.readouterr().err
    assert "Loading llama: 100%" in shown and f"{total / 1024:.1f}k" in shown
    for quiet in (None, False):  # None shows it on terminals only, and this is none
        ft.load_base(folder, progress=quiet)
        assert "Loading" not in capfd.readouterr().err


def test_names_on_the_hub_go_to_its_library(folder, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = ft.load_base("someone/some-model", revision="v2")
    assert loaded.fingerprint == ft.load_base(folder).fingerprint
    [(name, options)] = asked
    assert name == "someone/some-model" and options["revision"] == "v2"
    assert options["allow_patterns"] == ["*.safetensors", "*.json"]  # nothing pickled is even downloaded


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    def snapshot_download(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=r"no folder or file 'someone/model'.*offline.*Check the name"):
        ft.load_base("someone/model")
    for path in (Path("no/such"), "/no/such/folder", "./no"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            ft.load_base(path)


# --- files that are not what they should be


def _edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def _edit_tensors(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file(tensors | {name: change(tensors[name]).contiguous()}, file, metadata={"format": "pt"})
            return
    raise AssertionError(name)


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def _header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"

BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file is missing": (lambda f: _shard(f).unlink(), r"model-00002-of-.* is missing, which .*index\.json names"),
    "a file is cut": (lambda f: os.truncate(_shard(f), 2000), r"model-00002.*: not a whole safetensors file"),
    "a file is empty": (lambda f: os.truncate(_shard(f), 0), r"model-00002.*: not a whole safetensors file"),
    "a file is text": (lambda f: _shard(f).write_text("x" * 5000), r"model-00002.*: not a whole safetensors file"),
    "a header is too long": (
        lambda f: _shard(f).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
        r"model-00002.*: not a whole safetensors file",
    ),
    "a header lies about the shape": (
        lambda f: _header(_shard(f), lambda h: next(v for k, v in h.items() if k[0] != "_").update(shape=[1 << 40])),
        r"model-00002.*: not a whole safetensors file",
    ),
    "a header lies about the place": (
        lambda f: _header(_shard(f), lambda h: [v.update(data_offsets=[0, 64]) for k, v in h.items() if k[0] != "_"]),
        r"model-00002.*: not a whole safetensors file",
    ),
    "a path leads out": (
        lambda f: _edit(f / INDEX, lambda v: v["weight_map"].update({Q_PROJ: "../../etc/passwd.safetensors"})),
        r"index\.json: not an index.*q_proj.*\.\./\.\./etc/passwd",
    ),
    "a path is no safetensors file": (
        lambda f: _edit(f / INDEX, lambda v: v["weight_map"].update({Q_PROJ: "pytorch_model.bin"})),
        r"not an index.*q_proj.*pytorch_model\.bin",
    ),
    "an index is no index": (lambda f: (f / INDEX).write_text("[]"), r"index\.json: not an index"),
    "an index is cut": (lambda f: os.truncate(f / INDEX, 40), r"index\.json: not an index"),
    "an index is nested without end": (
        lambda f: (f / INDEX).write_text('{"weight_map":' + "[" * 100_000),
        r"index\.json: not an index",
    ),
    "an index has no tensors": (lambda f: _edit(f / INDEX, lambda v: {"weight_map": {}}), r"index\.json: not an index"),
    "an index names what is not there": (
        lambda f: _edit(f / INDEX, lambda v: v["weight_map"].update(ghost="model-00002-of-" + _shard(f).name[-17:])),
        r"model-00002.*: lacks \['ghost'\], which .*index\.json says",
    ),
    "two files hold a tensor": (
        lambda f: save_file(load_file(_shard(f)) | load_file(sorted(f.glob("*.safetensors"))[0]), _shard(f)),
        r"model-00002.*: holds \[.*as well: .* in .*model-00001",
    ),
    "a tensor has another shape": (
        lambda f: _edit_tensors(f, Q_PROJ, lambda t: t[:8]),
        r"model-0000.*safetensors: model.layers.0.self_attn.q_proj.weight has shape \(8, 16\), but Llama.* \(16, 16\)",
    ),
    "a tensor has another dtype": (
        lambda f: _edit_tensors(f, Q_PROJ, lambda t: t.to(torch.int8)),
        r"model.layers.0.self_attn.q_proj.weight in .*model-0000.*safetensors is torch.int8",
    ),
    "a tensor is in a format of others": (
        lambda f: _edit_tensors(f, Q_PROJ, lambda t: t.to(torch.float8_e4m3fn)),
        r"model-0000.*: model.layers.0.self_attn.q_proj.weight is stored as F8_E4M3",
    ),
    "a tensor is not finite": (
        lambda f: _edit_tensors(f, Q_PROJ, lambda t: t.fill_diagonal_(torch.nan)),
        r"model.layers.0.self_attn.q_proj.weight: 16 of 256 weights are NaN",
    ),
    "the config is of a larger model": (
        lambda f: _edit(f / "config.json", lambda v: v.update(num_hidden_layers=5)),
        r"lacks 27 tensors of LlamaForCausalLM: model.layers.2.input_layernorm.weight",
    ),
    "the config is of a wider model": (
        lambda f: _edit(f / "config.json", lambda v: v.update(hidden_size=1 << 15, head_dim=4)),
        r"lm_head.weight has shape \(32, 16\), but LlamaForCausalLM has \(32, 32768\)",
    ),
    "the config is no config": (lambda f: (f / "config.json").write_text("]"), r"config\.json: not the config"),
    "the config is missing": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "the config is of an unknown model": (
        lambda f: (f / "config.json").write_text('{"model_type": "no such"}'),
        r"config\.json: not the config of a model that transformers knows",
    ),
    "the config names no class": (
        lambda f: _edit(f / "config.json", lambda v: v.pop("architectures") and v),
        r"config\.json names no architecture; pass model=",
    ),
    "the config names what is no model": (
        lambda f: _edit(f / "config.json", lambda v: v.update(architectures=["AutoConfig"])),
        r"transformers has no model 'AutoConfig'",
    ),
    "the config wants its own code": (
        lambda f: (f / "config.json").write_text(
            json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}})
        ),
        r"config\.json: not the config of a model that transformers knows by itself",
    ),
    "the checkpoint is quantized": (
        lambda f: _edit(f / "config.json", lambda v: v.update(quantization_config={"quant_method": "bitsandbytes"})),
        r"config\.json says that the checkpoint is quantized already",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_checkpoints_name_file_and_tensor(how, folder):
    breaking, message = BROKEN[how]
    ft.load_base(folder)
    breaking(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=re.compile(message, re.DOTALL)):
        ft.load_base(folder)


def test_a_file_that_shrinks_while_it_is_read(folder, monkeypatch):
    def shrink(*args, **kwargs):
        for file in folder.glob("*.safetensors"):
            os.truncate(file, 1500)
        return pretrained(*args, **kwargs)

    pretrained = checkpoint.pretrained
    monkeypatch.setattr(checkpoint, "pretrained", shrink)
    with pytest.raises(ValueError, match=r"model-0000.*: .*weight cannot be read, the file is shorter"):
        ft.load_base(folder)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_and_never_opened(name, tmp_path):
    llama().config.save_pretrained(tmp_path)
    bomb = Bomb()
    bomb.path = str(tmp_path / "exploded")
    (tmp_path / name).write_bytes(pickle.dumps(bomb))
    with pytest.raises(FileNotFoundError, match=rf"{name}.*could run code.*save_pretrained write safetensors"):
        ft.load_base(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "said"), [("adapter_model.safetensors", "holds an adapter"), ("m.gguf", "give its own path: .*m.gguf")]
)
def test_folders_of_something_else(name, said, tmp_path):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=said):
        ft.load_base(tmp_path)


def test_nothing_stays_open_or_allocated_after_an_error(folder):
    os.truncate(_shard(folder), 2000)

    def ft_files():
        return [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)]

    with pytest.raises(ValueError):
        ft.load_base(folder)
    assert not [name for name in ft_files() if str(folder) in name]


def _is_link(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


# --- bases on disk


MODULES: dict[str, Callable[[], nn.Module]] = {
    "tiny": Tiny,
    "everything": Everything,
    "tied": TiedLm,
    "tied, head first": lambda: TiedLm(head_first=True),
    "half": lambda: Everything().bfloat16(),
    "double": lambda: Mlp().double(),
    "attention": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    "mixed": lambda: nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4)),
    "one layer": lambda: nn.Linear(3, 2),
}


@pytest.mark.parametrize("scheme", ["int8", "blockwise8", "nf4"])
@pytest.mark.parametrize("name", MODULES)
def test_there_and_back(name, scheme, tmp_path):
    torch.manual_seed(0)
    model = MODULES[name]().eval()
    base = ft.quantize_base_model(model, scheme=scheme, modules_not_to_quantize=())
    before = snapshot(base)
    folder = ft.save_base(tmp_path / "base", base, max_shard_bytes=200)
    assert_unchanged(base, before)
    for template in (MODULES[name](), MODULES[name]().to("meta"), MODULES[name]().float()):
        was = snapshot(template) if not next(template.parameters()).is_meta else None
        assert_same_base(ft.load_base(folder, model=template, verify=True), base)
        if was is not None:
            assert_unchanged(template, was)


def test_w8a8_and_floats_kept(tmp_path):
    base = ft.quantize_base_model(llama(tied=True), matmul="w8a8", modules_not_to_quantize={"down_proj"})
    again = ft.load_base(ft.save_base(tmp_path / "base", base))
    assert_same_base(again, base)
    other = ft.apply(ft.quantize_base_model(llama(tied=True)), None, input_ids=IDS).logits
    out, expected = (ft.apply(each, None, input_ids=IDS).logits for each in (again, base))
    assert_close(out, expected, SUMS, unlike=other)


def test_bitsandbytes_layers_that_were_taken_over(tmp_path):
    layer = bitsandbytes.nn.Linear8bitLt(8, 6, has_fp16_weights=False).to("cpu")  # which quantizes it
    model = nn.Sequential(layer, nn.ReLU())
    base = ft.quantize_base_model(model, modules_not_to_quantize=())
    assert base.params["0.weight"].dtype == torch.int8
    folder = ft.save_base(tmp_path / "base", base)
    assert_same_base(ft.load_base(folder, model=model), base)


def test_what_was_quantized_later_is_kept(base, tmp_path):
    tuned = ft.new_finetuned(base, plain_layers=(), modules_not_to_quantize=())
    assert base.derived.keys() == {"lm_head"}
    again = ft.load_base(ft.save_base(tmp_path / "base", base))
    assert again.derived.keys() == {"lm_head"}
    for name, leaf in base.derived["lm_head"].items():
        assert torch.equal(again.derived["lm_head"][name], leaf)
    out, expected = (ft.apply(each, tuned, input_ids=IDS).logits for each in (again, base))
    assert_close(out, expected, SUMS, unlike=ft.apply(base, None, input_ids=IDS).logits)


def test_a_finetune_finds_its_base_again(base, saved, tmp_path):
    tuned = ft.new_finetuned(base)
    again = ft.load_base(saved)
    assert ft.load(ft.save(tmp_path / "adapter", tuned), again).spec == tuned.spec


def test_a_loaded_base_is_saved_again(saved, tmp_path):
    again = ft.load_base(saved)
    for size in (500, 10**9):
        assert_same_base(ft.load_base(ft.save_base(tmp_path / "second", again, max_shard_bytes=size)), again)


def test_shards(base, tmp_path):
    one = ft.save_base(tmp_path / "one", base)
    many = ft.save_base(tmp_path / "many", base, max_shard_bytes=1000)
    each = ft.save_base(tmp_path / "each", base, max_shard_bytes=1)
    numbers = [len(list(folder.glob("*.safetensors"))) for folder in (one, many, each)]
    assert numbers[0] == 1 and 1 < numbers[1] < numbers[2] == len(base.params)
    for file in many.glob("*.safetensors"):
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(leaf.nbytes for leaf in tensors.values()) <= 1000
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        ft.save_base(tmp_path / "none", base, max_shard_bytes=0)


def test_writing_to_a_leaf_does_not_reach_the_file(base, saved):
    before = contents(saved)
    again = ft.load_base(saved)
    with pytest.raises(TypeError):
        again.params["x"] = torch.ones(1)
    for leaf in again.params.values():
        leaf.zero_()
    assert contents(saved) == before
    assert_same_base(ft.load_base(saved), base)


SHARING = """
import re, sys
import finetuna_func as ft
base = ft.load_base(sys.argv[1])
total = sum(int(leaf.view(-1).sum()) for leaf in base.params.values() if leaf.dtype.itemsize == 1)
print(total, flush=True)
sys.stdin.readline()
shared = 0
for block in re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read()):
    if ".safetensors" in block:
        shared += 1024 * int(re.search(r"Shared_Clean:\\s+(\\d+)", block)[1])
print(shared, flush=True)
sys.stdin.readline()
"""


def test_processes_share_the_pages(tmp_path):
    wide = llama(hidden_size=256, intermediate_size=1024, vocab_size=2048)
    base = ft.quantize_base_model(wide, modules_not_to_quantize=())
    folder = ft.save_base(tmp_path / "base", base)
    command = [sys.executable, "-c", SHARING, str(folder)]
    pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    try:
        assert len({child.stdout.readline() for child in both}) == 1
        for child in both:
            child.stdin.write("\n")
            child.stdin.flush()
        for child in both:
            assert int(child.stdout.readline()) >= 0.95 * base.nbytes
    finally:
        for child in both:
            child.communicate("\n")


def test_an_earlier_save_is_replaced_and_other_folders_are_not(base, saved, tmp_path):
    mapped = ft.load_base(saved)
    other = ft.quantize_base_model(llama(seed=3))
    ft.save_base(saved, other)
    assert len(list(saved.glob("*.safetensors"))) == 1
    assert_same_base(ft.load_base(saved), other)
    assert_same_base(mapped, base)  # whoever has mapped the old files keeps them
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    with pytest.raises(FileExistsError, match="mine exists and does not hold an earlier save"):
        ft.save_base(tmp_path / "mine", base)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not lose"


@pytest.mark.parametrize("step", ["save_file", "_sha256", "_describe"])
def test_a_save_that_fails_leaves_what_was(step, saved, monkeypatch, tmp_path):
    before, siblings = contents(saved), sorted(tmp_path.iterdir())
    calls = []

    def fail(*args, **kwargs):
        calls.append(step)
        if len(calls) == 2 or step == "_describe":
            raise OSError("disk full")
        return original(*args, **kwargs)

    original = getattr(checkpoint, step)
    monkeypatch.setattr(checkpoint, step, fail)
    other = ft.quantize_base_model(llama(seed=3))
    for target in (saved, tmp_path / "new"):
        calls.clear()
        with pytest.raises(OSError, match="disk full"):
            ft.save_base(target, other, max_shard_bytes=3000)
    assert contents(saved) == before and sorted(tmp_path.iterdir()) == siblings


def test_a_killed_save_leaves_what_was(saved, monkeypatch, tmp_path):
    before = contents(saved)
    other = ft.quantize_base_model(llama(seed=3))
    monkeypatch.setattr(checkpoint, "_sha256", lambda file: os._exit(9))
    for target in (saved, tmp_path / "new"):
        child = os.fork()
        if child == 0:
            ft.save_base(target, other)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    assert contents(saved) == before and not (tmp_path / "new").exists()
    ft.load_base(saved, verify=True)


@dataclasses.dataclass(frozen=True)
class Mine(Int8):
    """A format of the user's own."""

    name: str = "mine"


def test_a_format_of_your_own(tmp_path):
    model = Mlp()
    made = ft.quantize_base_model(model)
    skeleton = Skeleton(model, {"fc1": Mine(), "fc2": Mine()}, Mine())
    base = ft.Base(made.params, skeleton, "0123456789abcdef")
    folder = ft.save_base(tmp_path / "base", base)
    assert_same_base(ft.load_base(folder, model=model, schemes={"mine": Mine()}), base)
    with pytest.raises(
        ValueError, match=r"in a format of your own; pass schemes=\{'mine': \.\.\.\}, Mine\(name='mine'"
    ):
        ft.load_base(folder, model=model)
    other = Mine(suffixes=("", "_s"))
    with pytest.raises(ValueError, match=r"was saved with Mine\(name='mine', suffixes=\('', '_scale'\)\)"):
        ft.load_base(folder, model=model, schemes={"mine": other})


def test_arguments_for_a_checkpoint_are_refused_with_a_saved_base(saved, folder):
    for given in (
        {"scheme": "int8"},
        {"scheme": None},
        {"matmul": "w8a8"},
        {"dtype": torch.float32},
        {"modules_not_to_quantize": ()},
    ):
        with pytest.raises(ValueError, match=rf"load_base\({next(iter(given))}=.*quantized already"):
            ft.load_base(saved, **given)
    for given in ({"verify": True}, {"schemes": {"mine": Mine()}}):
        with pytest.raises(ValueError, match="are for a base that"):
            ft.load_base(folder, **given)


def _first(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def _other_base(folder: Path) -> Path:
    return ft.save_base(folder.parent / "other", ft.quantize_base_model(llama(seed=5)), max_shard_bytes=3000)


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no json": (lambda f: (f / DESCRIPTION).write_text("{"), r"base\.json is not a description"),
    "another format": (lambda f: _edit(f / DESCRIPTION, lambda v: v.update(format=2)), r"reads format 1"),
    "a file is missing": (lambda f: _first(f).unlink(), r"base-00001.* is missing; it holds"),
    "a file is cut": (lambda f: os.truncate(_first(f), 900), r"base-00001.*: not a whole safetensors file"),
    "a path leads out": (
        lambda f: _edit(
            f / DESCRIPTION,
            lambda v: (v["files"].update({"../x.safetensors": ""}), v["placed"].update({"../x.safetensors": []})) and v,
        ),
        r"\.\./x\.safetensors.* are not files of this folder",
    ),
    "a tensor is missing": (
        lambda f: save_file({k: v for k, v in list(load_file(_first(f)).items())[1:]}, _first(f)),
        r"base-00001.* lacks \[",
    ),
    "a tensor is left over": (
        lambda f: save_file(load_file(_first(f)) | {"extra": torch.ones(1)}, _first(f)),
        r"base-00001.* holds \['extra'\]",
    ),
    "a tensor has another shape": (
        lambda f: _edit_tensors(f, Q_PROJ, lambda t: t[:3]),
        r"base-0000.*: model.layers.0.self_attn.q_proj.weight is .*\(3, 16\)",
    ),
    "codes are floats": (
        lambda f: _edit_tensors(f, Q_PROJ, lambda t: t.float()),
        r"base-0000.*: model.layers.0.self_attn.q_proj.weight is .*float32",
    ),
    "file and description lie alike": (
        lambda f: (
            _edit_tensors(f, Q_PROJ + "_scale", lambda t: t[:1]),
            _edit(f / DESCRIPTION, lambda v: v["tensors"].update({Q_PROJ + "_scale": ["float32", [1]]})),
        ),
        r"model.layers.0.self_attn.q_proj.weight is .*\(1,\).*, which is no Int8",
    ),
    "another norm": (
        lambda f: _edit(f / "config.json", lambda v: v.update(rms_norm_eps=0.5)),
        r"saved from another model than config\.json",
    ),
    "another width": (
        lambda f: _edit(f / "config.json", lambda v: v.update(intermediate_size=32)),
        r"gate_proj.weight has shape \(32, 16\) in the model, and has \(24, 16\)",
    ),
    "more layers": (
        lambda f: _edit(f / "config.json", lambda v: v.update(num_hidden_layers=3)),
        r"model.layers.2.* in the model, and is not in the saved base",
    ),
    "fewer layers": (
        lambda f: _edit(f / "config.json", lambda v: v.update(num_hidden_layers=1)),
        r"the model has no \['model.layers.1",
    ),
    "another class": (
        lambda f: _edit(f / DESCRIPTION, lambda v: v.update(model="os.system")),
        r"transformers has no model 'os.system'",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"base of a LlamaForCausalLM.* pass model="),
    "an unknown format": (
        lambda f: _edit(f / DESCRIPTION, lambda v: v.update(default_scheme={"scheme": "int3", "matmul": "w8a16"})),
        r"'int3'.* is no format",
    ),
    "a layer that is none": (
        lambda f: _edit(f / DESCRIPTION, lambda v: v["schemes"].update({"model.norm": v["default_scheme"]})),
        r"holds \['model.norm'\] in 8 bits, but this LlamaForCausalLM has no such layers",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_spoiled_saves(how, saved):
    spoil, message = SPOILED[how]
    ft.load_base(saved)
    spoil(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=re.compile(message, re.DOTALL)):
        ft.load_base(saved)


@pytest.mark.parametrize("how", ["one bit", "a file of another base", "the fingerprint"])
def test_verify_finds_what_a_quick_load_does_not(how, saved):
    if how == "one bit":
        content = bytearray(_first(saved).read_bytes())
        content[-1] ^= 1
        _first(saved).write_bytes(content)
    elif how == "a file of another base":
        _first(saved).write_bytes(_first(_other_base(saved)).read_bytes())
    else:
        _edit(saved / DESCRIPTION, lambda v: v.update(fingerprint="0" * 16))
    ft.load_base(saved)
    message = "has the fingerprint" if how == "the fingerprint" else r"base-00001.* has sha256 .*damaged"
    with pytest.raises(ValueError, match=message):
        ft.load_base(saved, verify=True)


@pytest.mark.parametrize("junk", [None, 3, "x", [], {}, [1], {"a": 1}, [["float32", [2]]], ["no dtype", [2]], -1])
def test_a_hostile_description_is_a_value_error(junk, saved):
    said = json.loads((saved / DESCRIPTION).read_text())
    allowed = {"ties": ({},), "derived": ({},)}
    for key in said:
        (saved / DESCRIPTION).write_text(json.dumps({**said, key: junk}))
        if junk in allowed.get(key, ()) and not isinstance(junk, list):
            continue
        if key in ("architecture", "library", "fingerprint") and junk == "x":
            continue  # any text will do, until it is compared
        with pytest.raises(ValueError):
            ft.load_base(saved)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_the_module_must_be_the_one_that_was_saved(tmp_path):
    base = ft.quantize_base_model(Tiny())
    folder = ft.save_base(tmp_path / "base", base)
    with pytest.raises(ValueError, match="base of a Tiny, which is no model of transformers; pass model="):
        ft.load_base(folder)
    with pytest.raises(ValueError, match=r"embed.weight has shape \(17, 8\) in the model, and has \(16, 8\)"):
        ft.load_base(folder, model=Tiny(vocab=17))
    other = Tiny()
    other.norm.eps = 0.5
    with pytest.raises(ValueError, match="saved from another model than the one given"):
        ft.load_base(folder, model=other)
    unknown = Tiny()
    unknown.fc = Doubled(8, 8, bias=False)
    with pytest.raises(ValueError, match=r"holds \['fc'\] in 8 bits.*ft.register_layer"):
        ft.load_base(folder, model=unknown)


# --- the real model


@pytest.fixture(scope="module")
def smollm2_base(smollm2):
    return ft.quantize_base_model(smollm2[0])


def test_smollm2(smollm2, smollm2_base, tmp_path):
    import real_data

    loaded = ft.load_base(real_data.smollm2_path())
    assert_same_base(loaded, smollm2_base)
    again = ft.load_base(ft.save_base(tmp_path / "base", loaded))
    assert_same_base(again, smollm2_base)
    ids = torch.arange(100, 116)[None]
    out, expected = (ft.apply(each, None, input_ids=ids).logits for each in (again, smollm2_base))
    assert_close(out, expected, 1e-5, unlike=smollm2[0](ids).logits)
