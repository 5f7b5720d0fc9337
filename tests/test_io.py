"""Finetunes on disk: bitwise there and back, PEFT reads them, and no file, however broken, does harm."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import (
    Everything,
    Tiny,
    assert_close,
    assert_same_finetune,
    assert_unchanged,
    finetunes,
    llama,
    randomized,
    snapshot,
)
from safetensors.torch import load_file, save_file
from torch import nn

import finetuna_func as ft
from finetuna_func import EmbeddingAdapterConfig, LinearAdapterConfig
from finetuna_func import io as ft_io

TENSORS, PEFT_CONFIG, OWN_CONFIG = "adapter_model.safetensors", "adapter_config.json", "finetuna.json"


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return ft.quantize_base_model(Everything().eval())


@pytest.fixture(scope="module")
def tuned(base):
    linear = {"fc1": LinearAdapterConfig(r=2, alpha=3, dropout=0.1, bias=True), "fc2": LinearAdapterConfig(r=3)}
    return randomized(
        ft.new_finetuned(base, linear_config=linear, embedding_config=EmbeddingAdapterConfig(r=1, alpha=0.3))
    )


@pytest.fixture
def saved(tuned, tmp_path) -> Path:
    return ft.save(tmp_path / "adapter", tuned)


# --- there and back


def test_the_identity(base, tuned, saved):
    before = snapshot(tuned)
    again = ft.load(saved, base)
    assert_same_finetune(again, tuned)
    assert_unchanged(tuned, before)
    ids = torch.randint(0, 20, (2, 5))
    assert torch.equal(ft.apply(base, again, ids), ft.apply(base, tuned, ids))
    assert not torch.equal(ft.apply(base, again, ids), ft.apply(base, None, ids))
    assert sorted(p.name for p in saved.iterdir()) == [PEFT_CONFIG, TENSORS, OWN_CONFIG]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"adapt_layers": (), "plain_layers": ()},
        {"adapt_layers": (), "plain_layers": {"norm", "conv", "gain"}},
        {"plain_layers": ()},
        {"modules_not_to_freeze": {"norm"}},
        {"plain_layers": (), "modules_not_to_quantize": ()},
        {"linear_config": LinearAdapterConfig(r=1, alpha=-2.5, dropout=0.3, bias=True)},
    ],
)
def test_every_kind_of_finetune(base, arguments, tmp_path):
    tuned = randomized(ft.new_finetuned(base, **arguments))
    assert_same_finetune(ft.load(ft.save(tmp_path / "a", tuned), base), tuned)


def test_what_was_quantized_later_loads_on_a_new_base(tmp_path):
    model = Tiny()
    tuned = randomized(ft.new_finetuned(ft.quantize_base_model(model), plain_layers=(), modules_not_to_quantize=()))
    assert tuned.spec.quantized == ("lm_head",)
    fresh = ft.quantize_base_model(model)
    again = ft.load(ft.save(tmp_path / "a", tuned), fresh)
    assert_same_finetune(again, tuned)
    assert ft.apply(fresh, again, torch.zeros(1, 3, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_the_model(dtype, tmp_path):
    base = ft.quantize_base_model(Tiny().to(dtype))
    tuned = randomized(ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=3)))
    assert_same_finetune(ft.load(ft.save(tmp_path / "a", tuned), base), tuned)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parameters_of_another_dtype_than_the_constants(dtype, tmp_path):
    """A finetune that was trained in 16 bits: alpha / r stays the float32 that it was."""
    base = ft.quantize_base_model(Tiny())
    tuned = randomized(ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=3)))
    low = tuned.replace(params={name: leaf.to(dtype) for name, leaf in tuned.params.items()})
    assert_same_finetune(ft.load(ft.save(tmp_path / "a", low), base), low)


def test_changed_constants_survive(base, tuned, tmp_path):
    changed = tuned.replace(consts={name: leaf * 1.7 for name, leaf in tuned.consts.items()})
    assert_same_finetune(ft.load(ft.save(tmp_path / "a", changed), base), changed)


def test_special_numbers_survive(base, tmp_path):
    tuned = ft.new_finetuned(base, adapt_layers=(), plain_layers={"norm"})
    odd = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3e38, -1.0])
    changed = tuned.replace(params={**tuned.params, "norm.weight": odd})
    again = ft.load(ft.save(tmp_path / "a", changed), base)
    assert torch.equal(again.params["norm.weight"].view(torch.int32), odd.view(torch.int32))


def test_views_and_gradients_are_saved_plainly(base, tuned, tmp_path):
    stacked = ft.stack([tuned, randomized(tuned, 7)])
    one = ft.index(stacked, 1)
    folder = ft.save(tmp_path / "a", one)
    assert_same_finetune(ft.load(folder, base), one)
    assert (folder / TENSORS).stat().st_size < one.num_params * 4 + 8000  # not the whole stack
    wild = tuned.replace(
        params={
            n: leaf.t().contiguous().t().requires_grad_() if leaf.ndim == 2 else leaf
            for n, leaf in tuned.params.items()
        }
    )
    again = ft.load(ft.save(tmp_path / "b", wild), base)
    assert not any(leaf.requires_grad for leaf in again.params.values())
    assert all(torch.equal(again.params[n], leaf) for n, leaf in tuned.params.items())


def test_shared_tensors_can_be_saved(base, tmp_path):
    """Two names may hold one tensor, as two factors of zeros."""
    tuned = ft.new_finetuned(base, adapt_layers={"embed", "pos"}, plain_layers=())
    shared = tuned.params["embed.lora_b"]
    tied = tuned.replace(params={**tuned.params, "pos.lora_b": shared})
    again = ft.load(ft.save(tmp_path / "a", tied), base)
    assert_same_finetune(again, tied)


def test_loading_does_not_change_the_base(base, saved):
    before = snapshot(base)
    ft.load(saved, base)
    assert_unchanged(base, before)


def test_paths(base, tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (
        "relative",
        "deep/er/still",
        str(tmp_path / "text"),
        Path("ending/"),
        "with space",
        "uni-ö",
        ".hidden",
    ):
        assert_same_finetune(ft.load(ft.save(path, tuned), base), tuned)
    assert not [p for p in tmp_path.rglob(".*-*")]  # no staging folder stays behind


def test_modes_of_the_files(saved):
    assert stat.S_IMODE(saved.stat().st_mode) == 0o755
    umask = os.umask(0)
    os.umask(umask)
    for file in saved.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444 & ~umask, file


def test_the_description_is_readable(base, tuned, saved):
    own = json.loads((saved / OWN_CONFIG).read_text())
    assert own["base"] == base.fingerprint
    assert {a["path"] for a in own["adapters"]} == {"embed", "fc1", "fc2", "pos"}
    with open(saved / TENSORS, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert header["__metadata__"] == {"format": "pt"}


def test_equal_finetunes_are_equal_files(tmp_path):
    """Made and saved in processes in which sets and maps have other orders; and another finetune is another file."""
    script = """
import sys, torch, finetuna_func as ft
from families import FAMILIES
from models import randomized
model = next(family for family in FAMILIES if family.name == "Mixtral").make()
base = ft.quantize_base_model(model, modules_not_to_quantize={"lm_head", "k_proj"})
start = ft.LinearAdapterConfig(r=3, init="pissa")
configs = {"q_proj": ft.LinearAdapterConfig(r=2, dropout=0.5), "v_proj": start, r".*experts.*": start}
tuned = ft.new_finetuned(
    base, {"q_proj", "v_proj", r".*experts.*"}, {"lm_head", "k_proj", "norm"}, linear_config=configs,
    generator=torch.Generator().manual_seed(0),
)
ft.save_base(sys.argv[1] + "/base", base)
for i in range(2):
    ft.save(f"{sys.argv[1]}/{i}", randomized(tuned, seed=i))
"""
    paths = [str(Path(__file__).parent), str(Path(ft.__file__).parents[1])]
    found = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(paths)}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / seed)], env=environment, check=True)
        files = sorted(path for path in (tmp_path / seed).rglob("*") if path.is_file())
        found.append({str(path.relative_to(tmp_path / seed)): path.read_bytes() for path in files})
    assert found[0] == found[1] and {"0/finetuna.json", "1/adapter_model.safetensors"} <= found[0].keys()
    assert found[0]["0/adapter_model.safetensors"] != found[0]["1/adapter_model.safetensors"]


# --- saving over, and failing


def test_saving_again_replaces(base, tuned, saved):
    other = randomized(tuned, 3)
    assert ft.save(saved, other) == saved
    assert_same_finetune(ft.load(saved, base), other)
    assert sorted(p.name for p in saved.parent.iterdir()) == [saved.name]


@pytest.mark.parametrize("kind", ["file", "folder", "foreign"])
def test_what_is_no_save_is_left_alone(tuned, tmp_path, kind):
    target = tmp_path / "mine"
    if kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        if kind == "foreign":
            (target / TENSORS).write_bytes(b"precious")
    with pytest.raises(FileExistsError) as error:
        ft.save(target, tuned)
    assert str(error.value) == f"save: {target} exists and does not hold an earlier save; choose another path."
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    if kind == "foreign":
        assert (target / TENSORS).read_bytes() == b"precious"


class Broken(Exception):
    pass


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("step", ["save_file", "peft_config", "_own_config", "_write_json"])
def test_a_failing_save_leaves_nothing_and_keeps_the_old(base, tuned, tmp_path, monkeypatch, step, earlier):
    target = tmp_path / "a"
    if earlier:
        ft.save(target, tuned)

    def fail(*args, **kwargs):
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(ft_io, step, fail)
        with pytest.raises(Broken):
            ft.save(target, randomized(tuned, 5))
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if earlier else [])
    if earlier:
        assert_same_finetune(ft.load(target, base), tuned)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_keeps_the_old(base, tuned, tmp_path, monkeypatch, failing):
    target = ft.save(tmp_path / "a", tuned)
    rename, calls = os.replace, []

    def fail(source, destination):
        calls.append(source)
        if len(calls) == failing:
            raise OSError("no space left on device")
        rename(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(ft_io.os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            ft.save(target, randomized(tuned, 5))
    assert_same_finetune(ft.load(target, base), tuned)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_stack_is_not_saved(tuned, tmp_path):
    with pytest.raises(ValueError) as error:
        ft.save(tmp_path / "a", ft.stack([tuned, tuned]))
    assert str(error.value) == "save: expected one finetune, got a stack of 2; save each of ft.unstack."
    assert not list(tmp_path.iterdir())


# --- loading what does not fit


def test_a_wrong_base_names_both(base, saved):
    torch.manual_seed(1)
    other = ft.quantize_base_model(Everything())
    with pytest.raises(ValueError) as error:
        ft.load(saved, other)
    assert str(error.value) == (
        f"load: {saved} was trained on base '{base.fingerprint}', but the base given is '{other.fingerprint}' "
        "(Everything); load it on the base it was trained on."
    )


def test_missing_files(base, saved, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        ft.load(tmp_path / "nowhere", base)
    assert (
        str(error.value)
        == f"load: {tmp_path / 'nowhere'} has no {OWN_CONFIG}; expected a folder written by ft.save or by PEFT."
    )
    (saved / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {TENSORS}; expected a folder written by ft.save"):
        ft.load(saved, base)


def test_the_file_for_peft_is_not_needed(base, tuned, saved):
    (saved / PEFT_CONFIG).unlink()
    assert_same_finetune(ft.load(saved, base), tuned)


class Bomb:
    """What a pickle would run."""

    def __reduce__(self):
        return (os.abort, ())


def as_header(header: dict, payload: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


TENSOR_ATTACKS = {
    "empty": b"",
    "short": b"\x00" * 7,
    "zeros": b"\x00" * 100,
    "text": b"not a tensor file at all",
    "pickle": pickle.dumps(Bomb()),
    "pickle protocol 0": pickle.dumps(Bomb(), protocol=0),
    "huge header": struct.pack("<Q", 2**63) + b"{}",
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "no json": struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
    "a list": as_header([1, 2, 3]),
    "offsets beyond": as_header({"x": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}}),
    "offsets negative": as_header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
    "offsets overlap": as_header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "xy"}, b"\0" * 4),
    "shape overflows": as_header({"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}}),
    "shape is text": as_header({"x": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, b"\0" * 4),
    "unknown dtype": as_header({"x": {"dtype": "OBJ", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "no tensors": as_header({}),
    "other tensors": as_header({"../x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "deep json": b"[" * 100_000,
}


@pytest.fixture
def never_unpickle(monkeypatch):
    """Whatever unpickles fails the test."""

    def unpickle(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, unpickle)


@pytest.mark.parametrize("attack", TENSOR_ATTACKS)
def test_hostile_tensor_files(base, saved, attack, never_unpickle):
    (saved / TENSORS).write_bytes(TENSOR_ATTACKS[attack])
    with pytest.raises(ValueError, match=re.escape(f"load: {saved / TENSORS} ")):
        ft.load(saved, base)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 20, 100, -1, -100])
def test_truncated_tensor_files(base, saved, cut, never_unpickle):
    data = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(data[:cut])
    with pytest.raises(ValueError, match="is not a readable safetensors file: "):
        ft.load(saved, base)
    (saved / TENSORS).write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="is not a readable safetensors file: "):
        ft.load(saved, base)


def test_tensors_that_do_not_belong(base, saved):
    good = load_file(saved / TENSORS)
    name = "base_model.model.fc1.lora_A.weight"
    assert name in good

    def message(tensors) -> str:
        save_file(tensors, saved / TENSORS)
        with pytest.raises(ValueError) as error:
            ft.load(saved, base)
        return str(error.value)

    prefix = f"load: {saved / TENSORS}"
    assert message({**good, "base_model.model.zz": torch.ones(1)}) == (
        f"{prefix} lacks [] and has unknown ['base_model.model.zz']; the files do not belong together."
    )
    assert message({n: t for n, t in good.items() if n != name}) == (
        f"{prefix} lacks ['{name}'] and has unknown []; the files do not belong together."
    )
    assert message({**good, name: torch.zeros(3, 8)}) == (
        f"{prefix}: {name} is torch.float32 (3, 8), expected floating point (2, 8)."
    )
    assert message({**good, name: good[name].T.contiguous()}).endswith("(8, 2), expected floating point (2, 8).")
    assert message({**good, name: torch.zeros(2, 8, dtype=torch.int64)}).endswith(
        f"{name} is torch.int64 (2, 8), expected floating point (2, 8)."
    )
    assert message({**good, name: torch.zeros(())}).endswith("(), expected floating point (2, 8).")
    plain = "base_model.model.lm_head.weight"
    assert message({**good, plain: torch.zeros(20, 9)}).endswith(
        f"{plain} is torch.float32 (20, 9), expected floating point (20, 8)."
    )
    assert "complex" in message({**good, name: torch.zeros(2, 8, dtype=torch.complex64)})


def deep(depth: int) -> str:
    return "[" * depth


# Each changes the parsed description, or returns the text of another.
CONFIG_ATTACKS = {
    "empty": lambda c: "",
    "text": lambda c: "hello",
    "cut": lambda c: json.dumps(c)[:-20],
    "null": lambda c: "null",
    "list": lambda c: "[1]",
    "number": lambda c: "3",
    "deep": lambda c: deep(100_000),
    "long number": lambda c: '{"format": ' + "9" * 5000 + "}",
    "other format": lambda c: c.update(format=2),
    "format true": lambda c: c.update(format=True),
    "format 1.0": lambda c: c.update(format="1"),
    "no adapters": lambda c: c.pop("adapters") and None,
    "no consts": lambda c: c.pop("consts") and None,
    "adapters dict": lambda c: c.update(adapters={"a": 1}),
    "adapters numbers": lambda c: c.update(adapters=[1]),
    "adapters null": lambda c: c.update(adapters=None),
    "adapter twice": lambda c: c["adapters"].append(dict(c["adapters"][0])),
    "adapter twice, another rank": lambda c: c["adapters"].append({**c["adapters"][0], "r": 2}),
    "adapter unknown path": lambda c: c["adapters"][0].update(path="zz"),
    "adapter path number": lambda c: c["adapters"][0].update(path=3),
    "adapter path with slashes": lambda c: c["adapters"][0].update(path="../../etc/passwd"),
    "adapter on a norm": lambda c: c["adapters"][0].update(path="norm"),
    "adapter on dropout": lambda c: c["adapters"][0].update(path="drop"),
    "adapter of another kind": lambda c: c["adapters"][0].update(kind="linear", dropout=0.0, bias=False),
    "adapter of no kind": lambda c: c["adapters"][0].update(kind="conv"),
    "adapter kind list": lambda c: c["adapters"][0].update(kind=["linear"]),
    "adapter extra field": lambda c: c["adapters"][0].update(hook="os.system"),
    "rank text": lambda c: c["adapters"][0].update(r="1"),
    "rank float": lambda c: c["adapters"][0].update(r=1.0),
    "rank zero": lambda c: c["adapters"][0].update(r=0),
    "rank huge": lambda c: c["adapters"][0].update(r=10**9),
    "alpha text": lambda c: c["adapters"][0].update(alpha="x"),
    "alpha huge": lambda c: c["adapters"][0].update(alpha=10**400),
    "alpha nan": lambda c: c["adapters"][0].update(alpha=float("nan")),
    "dropout text": lambda c: c["adapters"][1].update(dropout="half"),
    "dropout null": lambda c: c["adapters"][1].update(dropout=None),
    "bias gone": lambda c: c["adapters"][1].update(bias=False),
    "bias text": lambda c: c["adapters"][1].update(bias="yes, please"),
    "consts list": lambda c: c.update(consts=[1.0]),
    "consts text": lambda c: c["consts"].update({"fc1.lora_scale": "x"}),
    "consts null": lambda c: c["consts"].update({"fc1.lora_scale": None}),
    "consts list inside": lambda c: c["consts"].update({"fc1.lora_scale": [1.0]}),
    "consts huge": lambda c: c["consts"].update({"fc1.lora_scale": 10**400}),
    "consts nan": lambda c: c["consts"].update({"fc1.lora_scale": float("nan")}),
    "consts dropout above one": lambda c: c["consts"].update({"fc1.lora_dropout": 1.5}),
    "consts unknown": lambda c: c["consts"].update({"zz.lora_scale": 1.0}),
    "consts missing": lambda c: c["consts"].pop("fc1.lora_scale") and None,
    "plain text": lambda c: c.update(plain="lm_head.weight"),
    "plain numbers": lambda c: c["plain"].append(3),
    "plain lists": lambda c: c["plain"].append(["x"]),
    "plain null": lambda c: c.update(plain=None),
    "plain unknown": lambda c: c["plain"].append("zz.weight"),
    "plain with slashes": lambda c: c["plain"].append("../lm_head.weight"),
    "plain twice": lambda c: c["plain"].append(c["plain"][0]),
    "plain buffer": lambda c: c["plain"].append("shift"),
    "quantized unknown": lambda c: c["quantized"].append("zz"),
    "quantized numbers": lambda c: c["quantized"].append(3),
    "quantized lists": lambda c: c["quantized"].append(["fc1"]),
    "quantized a norm": lambda c: c["quantized"].append("norm"),
    "quantized already": lambda c: c["quantized"].append("fc1"),
    "quantized and plain": lambda c: c["quantized"].append("lm_head"),
    "quantized null": lambda c: c.update(quantized=None),
    "base number": lambda c: c.update(base=3),
    "base list": lambda c: c.update(base=["x"]),
}


@pytest.mark.parametrize("attack", CONFIG_ATTACKS)
def test_hostile_descriptions(base, saved, attack, never_unpickle):
    """A clear ValueError that names the file or folder; never another exception, never a wrong finetune."""
    description = json.loads((saved / OWN_CONFIG).read_text())
    text = CONFIG_ATTACKS[attack](description)
    (saved / OWN_CONFIG).write_text(json.dumps(description) if text is None else text)
    derived = dict(base.derived)
    with pytest.raises(ValueError, match=f"^load: {re.escape(str(saved))}"):
        ft.load(saved, base)
    assert base.derived == derived


def test_bytes_that_are_no_text(base, saved):
    (saved / OWN_CONFIG).write_bytes(b"\xff\xfe\x00" * 10)
    with pytest.raises(ValueError, match=r"is not a description written by ft\.save"):
        ft.load(saved, base)


def test_files_of_two_saves_do_not_mix(base, tuned, saved, tmp_path):
    other = ft.save(tmp_path / "other", finetunes(base, 1, adapt_layers={"fc1"})[0])
    (saved / TENSORS).write_bytes((other / TENSORS).read_bytes())
    with pytest.raises(ValueError, match="the files do not belong together"):
        ft.load(saved, base)
    # The same names and shapes on another base: the tensor file says which base it is of
    torch.manual_seed(4)
    strange = ft.quantize_base_model(Everything())
    third = ft.save(tmp_path / "third", finetunes(strange, 1, adapt_layers={"fc1"})[0])
    (other / TENSORS).write_bytes((third / TENSORS).read_bytes())
    with pytest.raises(ValueError, match="the files do not belong together"):
        ft.load(other, base)


# --- PEFT reads it


def dequantized(model: nn.Module, base: ft.Base) -> nn.Module:
    model.load_state_dict(ft.merge(base, None))
    return model


@pytest.mark.parametrize(
    "arguments",
    [
        {"plain_layers": ()},
        {"plain_layers": (), "adapt_layers": {"q_proj", "v_proj"}},
        {},  # with a plain head
        {"plain_layers": {"lm_head", "norm"}},
        {
            "plain_layers": (),
            "linear_config": {
                "q_proj": LinearAdapterConfig(r=2, alpha=3.0),
                r".*\.(k|v|o|gate|up|down)_proj": LinearAdapterConfig(r=4, alpha=0.5, dropout=0.1),
                "lm_head": LinearAdapterConfig(r=1, alpha=1),
            },
            "embedding_config": EmbeddingAdapterConfig(r=3, alpha=7),
        },
        {"plain_layers": (), "adapt_layers": {r".*_proj"}, "linear_config": LinearAdapterConfig(r=2, bias=True)},
        {"adapt_layers": {"layers.1.mlp.up_proj", "embed_tokens"}, "plain_layers": ()},
        {"adapt_layers": {"layers.0"}, "plain_layers": {"layers.1.input_layernorm"}},
    ],
    ids=["all", "q and v", "plain head", "plain head and norm", "ranks and scales", "bias", "few", "one block"],
)
@pytest.mark.filterwarnings("ignore:plain_layers")
def test_peft_reads_a_save(arguments, tmp_path):
    from peft import PeftModel

    base = ft.quantize_base_model(llama())
    tuned = finetunes(base, 1, **arguments)[0]
    folder = ft.save(tmp_path / "adapter", tuned)
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    floating = dequantized(llama(), base)
    with torch.no_grad():
        untouched = floating(ids).logits
        peft = PeftModel.from_pretrained(floating, str(folder)).eval()
        logits = peft(ids).logits
        mine = ft.apply(base, tuned, ids).logits
        assert_close(logits, mine, 1e-5, unlike=untouched)
        merged = peft.merge_and_unload()(ids).logits if not arguments.get("linear_config") else logits
        assert_close(merged, mine, 1e-5, unlike=untouched)


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "olora", "loftq"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_peft_reads_every_option(init, dora, rank_stabilized, table, tmp_path):
    """Or the save is refused, where PEFT cannot say it; never another number."""
    from peft import PeftModel

    base = ft.quantize_base_model(llama())
    config = LinearAdapterConfig(r=2, alpha=3, init=init, dora=dora, rank_stabilized=rank_stabilized)
    layers = {"q_proj", "up_proj", "embed_tokens"} if table else {"q_proj", "up_proj"}
    tuned = finetunes(
        base, 1, adapt_layers=layers, plain_layers=(), linear_config=config, float_model=llama(),
    )[0]  # fmt: skip
    assert_same_finetune(ft.load(ft.save(tmp_path / "adapter", tuned), base), tuned)
    if dora and table:  # PEFT would give the table DoRA as well, without a word
        assert not (tmp_path / "adapter" / PEFT_CONFIG).exists()
        return
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    floating = dequantized(llama(), base)
    with torch.no_grad():
        untouched = floating(ids).logits
        logits = PeftModel.from_pretrained(floating, str(tmp_path / "adapter")).eval()(ids).logits
    assert_close(logits, ft.apply(base, tuned, ids).logits, 1e-5, unlike=untouched)


def test_some_layers_with_dora_and_rslora(tmp_path):
    from peft import PeftModel

    base = ft.quantize_base_model(llama())
    config = {"q_proj": LinearAdapterConfig(r=2, alpha=3, rank_stabilized=True), "v_proj": LinearAdapterConfig(r=3)}
    tuned = finetunes(base, 1, adapt_layers=set(config), plain_layers=(), linear_config=config)[0]
    folder = ft.save(tmp_path / "adapter", tuned)
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    floating = dequantized(llama(), base)
    with torch.no_grad():
        untouched = floating(ids).logits
        logits = PeftModel.from_pretrained(floating, str(folder)).eval()(ids).logits
    assert_close(logits, ft.apply(base, tuned, ids).logits, 1e-5, unlike=untouched)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_options_in_another_dtype_survive(dtype, init, tmp_path):
    base = ft.quantize_base_model(Tiny())
    config = LinearAdapterConfig(r=2, dora=True, init=init)
    tuned = randomized(ft.new_finetuned(base, linear_config=config))
    low = tuned.replace(params={name: leaf.to(dtype) for name, leaf in tuned.params.items()})
    assert_same_finetune(ft.load(ft.save(tmp_path / "a", low), base), low)


def test_peft_reads_a_tied_model(tmp_path):
    """Plain head on a tied model: PEFT unties it by modules_to_save, as we do."""
    from peft import PeftModel

    base = ft.quantize_base_model(llama(tied=True))
    tuned = finetunes(base, 1, adapt_layers={"q_proj"})[0]
    folder = ft.save(tmp_path / "adapter", tuned)
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    floating = dequantized(llama(tied=True), base)
    with torch.no_grad():
        untouched = floating(ids).logits
        logits = PeftModel.from_pretrained(floating, str(folder)).eval()(ids).logits
    assert_close(logits, ft.apply(base, tuned, ids).logits, 1e-5, unlike=untouched)


def test_peft_does_not_adapt_what_we_did_not(tmp_path):
    """PEFT matches target_modules by suffix: a layer of the same name deeper down must not catch an adapter."""
    from peft import PeftModel

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.inner = nn.ModuleDict({"fc": nn.Linear(6, 6)})

        def forward(self, x):
            return self.inner["fc"](torch.tanh(self.fc(x)))

    torch.manual_seed(0)
    model = Nested()
    base = ft.quantize_base_model(model)
    tuned = randomized(ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=2)))
    only = {"adapt_layers": [r"fc"], "linear_config": LinearAdapterConfig(r=2)}
    assert len(tuned.spec.adapters) == 2 and len(ft.new_finetuned(base, **only).spec.adapters) == 2
    outer = randomized(ft.new_finetuned(base, adapt_layers=[r"(?!inner).*"], plain_layers=()))
    assert [a.path for a in outer.spec.adapters] == ["fc"]
    folder = ft.save(tmp_path / "adapter", outer)
    floating = dequantized(model, base)
    x = torch.randn(3, 6)
    with torch.no_grad():
        untouched = floating(x)
        peft = PeftModel.from_pretrained(floating, str(folder)).eval()
        assert_close(peft(x), ft.apply(base, outer, x), 1e-5, unlike=untouched)
    assert type(peft.base_model.model.inner["fc"]) is nn.Linear
