"""PEFT's checkpoints against the real `peft`: what it reads of ours, and what is read of its own.

PEFT computes on the float model with the dequantized weights, so both must give the same numbers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB
from models import assert_close, assert_same_finetune, assert_trees_equal, llama, randomized
from safetensors.torch import load_file, save_file
from test_models import float_model
from torch import Tensor, nn

import finetuna_func as ft
from finetuna_func._peft import PREFIX, beyond_peft
from finetuna_func.io import OWN_CONFIG, PEFT_CONFIG, TENSORS

TOLERANCE = 1e-5  # float32, products in another order
EXPERTS = ["Mixtral", "Qwen3-MoE", "GPT-OSS", "Llama 4", "Nemotron-H"]
FIRST = {"Nemotron-H": "up_proj"}
L, E = ft.LinearAdapterConfig, ft.EmbeddingAdapterConfig


class Convolutions(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"one": nn.Conv1d(3, 4, 3, stride=2, padding=1, **settings)})
        self.inner["two"] = nn.Conv2d(1, 5, (2, 3), padding=(1, 0))
        self.lm_head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner["one"](x))
        return self.lm_head(torch.tanh(self.inner["two"](x.unsqueeze(1))).mean((-1, -2)))


@functools.cache
def of_family(name: str) -> tuple[nn.Module, ft.Base]:
    model = next(family for family in FAMILIES if family.name == name).make()
    return model, ft.quantize_base_model(model)


def ids() -> Tensor:
    return torch.randint(4, VOCAB, (2, 6), generator=torch.Generator().manual_seed(3))


def logits(out: Any) -> Tensor:
    return getattr(out, "logits", out)


def peft_reads(model: nn.Module, base: ft.Base, folder: Path, x: Tensor) -> Tensor:
    from peft import PeftModel

    with torch.no_grad():
        return logits(PeftModel.from_pretrained(float_model(model, base, None), str(folder)).eval()(x))


def peft_writes(model: nn.Module, base: ft.Base, folder: Path, x: Tensor, **settings: Any) -> Tensor:
    """Saves a checkpoint with random factors; returns PEFT's own logits with it."""
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(float_model(model, base, None), LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, leaf in peft.named_parameters():
            if leaf.requires_grad:
                change = 0.3 * torch.randn(leaf.shape, generator=generator)
                leaf.copy_(leaf * (1 + change) if "magnitude" in name else leaf + change)
        peft.save_pretrained(str(folder))
        return logits(peft(x))


def check_saved(model: nn.Module, base: ft.Base, tuned: ft.Finetuned, folder: Path, x: Tensor) -> None:
    assert not beyond_peft(tuned)
    ft.save(folder, tuned)
    expected, frozen = logits(ft.apply(base, tuned, x)), logits(ft.apply(base, None, x))
    assert_close(peft_reads(model, base, folder, x), expected, TOLERANCE, unlike=frozen)
    assert_same_finetune(ft.load(folder, base), tuned)
    (folder / OWN_CONFIG).unlink()  # what is left is a checkpoint as of PEFT
    again = ft.load(folder, base)
    assert_close(logits(ft.apply(base, again, x)), expected, TOLERANCE, unlike=frozen)


def check_loaded(model: nn.Module, base: ft.Base, folder: Path, x: Tensor, **settings: Any) -> ft.Finetuned:
    expected = peft_writes(model, base, folder, x, **settings)
    tuned = ft.load(folder, base)
    frozen = logits(ft.apply(base, None, x))
    assert_close(logits(ft.apply(base, tuned, x)), expected, TOLERANCE, unlike=frozen)
    ft.save(folder.with_name("again"), tuned)
    assert_trees_equal(
        dict(sorted(load_file(folder.with_name("again") / TENSORS).items())),
        dict(sorted(load_file(folder / TENSORS).items())),
    )
    return tuned


# --- fused experts


@pytest.mark.parametrize("family", EXPERTS)
def test_peft_reads_experts(family: str, tmp_path: Path) -> None:
    model, base = of_family(family)
    first = FIRST.get(family, "gate_up_proj")
    for i, arguments in enumerate(
        (
            dict(adapt_layers={r".*experts\..*"}, linear_config=L(r=2, alpha=3)),
            dict(
                adapt_layers={"q_proj", rf".*experts\.{first}\.\d+", r".*experts\.down_proj\.\d+"},
                linear_config={"q_proj": L(r=3, alpha=5), first: L(r=2, alpha=3), "down_proj": L(r=1, alpha=2)},
            ),
            dict(adapt_layers={r".*experts\.down_proj\.\d+"}, linear_config=L(r=2, alpha=3, rank_stabilized=True)),
        )
    ):
        plain = () if i else {"lm_head"}
        tuned = randomized(ft.new_finetuned(base, plain_layers=plain, **arguments))
        check_saved(model, base, tuned, tmp_path / str(i), ids())


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_of_peft_are_read(family: str, tmp_path: Path) -> None:
    model, base = of_family(family)
    first = FIRST.get(family, "gate_up_proj")
    both = [f"experts.{first}", "experts.down_proj"]
    tuned = check_loaded(
        model,
        base,
        tmp_path / "both",
        ids(),
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        target_parameters=both,
        rank_pattern={"experts.down_proj": 1},
        alpha_pattern={first: 5},
    )
    ranks = {adapter.path.split(".")[-2]: adapter.config.r for adapter in tuned.spec.adapters}
    assert ranks["down_proj"] == 1 and ranks[first] == 2
    one = dict(r=2, lora_alpha=3, target_modules=[], target_parameters=both[1:], use_rslora=True)
    tuned = check_loaded(model, base, tmp_path / "one", ids(), **one)
    assert all(adapter.path.split(".")[-2] == "down_proj" for adapter in tuned.spec.adapters)


def test_some_experts(tmp_path: Path) -> None:
    """Those without an adapter are zeros to PEFT, and have none when they are loaded."""
    model, base = of_family("Mixtral")
    paths = {r".*layers\.1.*experts\.down_proj\.(0|2)", r".*layers\.0.*experts\.gate_up_proj\.3"}
    tuned = randomized(ft.new_finetuned(base, adapt_layers=paths, plain_layers=(), linear_config=L(r=2, alpha=9)))
    assert len(tuned.spec.adapters) == 3
    check_saved(model, base, tuned, tmp_path / "some", ids())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (dict(linear_config=L(r=2, rank_pattern={r".*\.2": 3})), "experts of one parameter with different ranks"),
        (dict(linear_config=L(r=2, alpha_pattern={r".*\.2": 3.0})), "experts of one parameter with different ranks"),
        (dict(linear_config=L(r=2, dora=True)), "biases or DoRA beside adapted experts"),
        (
            dict(
                adapt_layers={"q_proj", r".*experts\.down_proj\.\d"},
                linear_config={"q_proj": L(r=2, bias=True), "down_proj": L(r=2)},
            ),
            "biases or DoRA beside adapted experts",
        ),
    ],
    ids=["ranks", "scales", "dora", "bias beside"],
)
def test_what_peft_has_no_form_for(arguments: Any, reason: str, tmp_path: Path, caplog: Any) -> None:
    base = of_family("Mixtral")[1]
    tuned = ft.new_finetuned(base, **{"adapt_layers": {r".*experts\.down_proj\.\d"}, "plain_layers": ()} | arguments)
    tuned = randomized(tuned)
    folder = ft.save(tmp_path / "a", tuned)
    assert reason in caplog.text and not (folder / PEFT_CONFIG).exists()
    assert_same_finetune(ft.load(folder, base), tuned)


def test_layers_inside_attention_have_no_form(tmp_path: Path, caplog: Any) -> None:
    base = of_family("nn.MultiheadAttention")[1]
    tuned = randomized(ft.new_finetuned(base, adapt_layers={"q_proj"}, plain_layers=()))
    folder = ft.save(tmp_path / "a", tuned)
    assert "layers inside nn.MultiheadAttention" in caplog.text and not (folder / PEFT_CONFIG).exists()
    assert_same_finetune(ft.load(folder, base), tuned)


def test_experts_start_from_their_weights(tmp_path: Path) -> None:
    """PiSSA's first product is kept beside the factors, in the same tensors."""
    model, base = of_family("Mixtral")
    config = L(r=2, alpha=3, init="pissa")
    tuned = ft.new_finetuned(base, adapt_layers={r".*experts\..*"}, plain_layers=(), linear_config=config)
    check_saved(model, base, randomized(tuned), tmp_path / "a", ids())


# --- convolutions


def convolutions(**settings: Any) -> tuple[nn.Module, ft.Base, Tensor]:
    torch.manual_seed(0)
    model = Convolutions(**settings).eval()
    return model, ft.quantize_base_model(model), torch.randn(2, 3, 8)


@pytest.mark.parametrize("config", [L(r=2, alpha=3), L(r=2, alpha=3, dropout=0.5), L(r=3, alpha=2, bias=True)], ids=str)
def test_peft_reads_convolutions(config: Any, tmp_path: Path) -> None:
    model, base, x = convolutions()
    tuned = randomized(ft.new_finetuned(base, adapt_layers={"one", "two"}, linear_config=config))
    check_saved(model, base, tuned, tmp_path / "a", x)
    shapes = {name: leaf.shape for name, leaf in load_file(tmp_path / "a" / TENSORS).items()}
    assert shapes[f"{PREFIX}inner.two.lora_A.weight"] == (config.r, 1, 2, 3)
    assert shapes[f"{PREFIX}inner.two.lora_B.weight"] == (5, config.r, 1, 1)


def test_convolutions_of_peft_are_read(tmp_path: Path) -> None:
    model, base, x = convolutions()
    settings = dict(r=2, lora_alpha=3, lora_dropout=0.25, target_modules=["one", "two"])
    tuned = check_loaded(model, base, tmp_path / "a", x, **settings)
    assert {getattr(adapter.config, "dropout", None) for adapter in tuned.spec.adapters} == {0.25}


@pytest.mark.parametrize("settings", [dict(dilation=2), dict(padding_mode="circular")], ids=str)
def test_convolutions_that_peft_computes_otherwise(settings: Any, tmp_path: Path, caplog: Any) -> None:
    _, base, _ = convolutions(**settings)
    tuned = randomized(ft.new_finetuned(base, adapt_layers={"one"}))
    folder = ft.save(tmp_path / "a", tuned)
    assert "convolutions with dilation or a padding mode" in caplog.text and not (folder / PEFT_CONFIG).exists()
    assert_same_finetune(ft.load(folder, base), tuned)


# --- other checkpoints of PEFT


@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules=["q_proj", "v_proj"]),
        dict(target_modules="all-linear", use_rslora=True),
        dict(target_modules=["q_proj", "down_proj"], use_dora=True),
        dict(target_modules=["q_proj"], lora_bias=True, lora_dropout=0.1),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
        dict(target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 1}, alpha_pattern={r"layers\.1.*": 7}),
        dict(target_modules=["q_proj"], bias="lora_only"),
    ],
    ids=str,
)
def test_checkpoints_of_peft_are_read(settings: Any, tmp_path: Path) -> None:
    model, base = of_family("Llama")
    tuned = check_loaded(model, base, tmp_path / "a", ids(), **dict(r=2, lora_alpha=3) | settings)
    assert ft.stack([tuned, tuned]).stack_size == 2


def test_tables_of_peft_are_read(tmp_path: Path) -> None:
    """PEFT saves an adapted table whole as well; it is the base's own, or the checkpoint is refused."""
    model, base = of_family("Llama")
    settings = dict(r=2, lora_alpha=3, target_modules=["embed_tokens", "q_proj"])
    expected = peft_writes(model, base, tmp_path / "a", ids(), **settings)
    tensors = load_file(tmp_path / "a" / TENSORS)
    whole = next(name for name in tensors if name.endswith(".base_layer.weight"))
    tuned = ft.load(tmp_path / "a", base)
    assert whole and {a.kind for a in tuned.spec.adapters} == {"embedding", "linear"}
    frozen = logits(ft.apply(base, None, ids()))
    assert_close(logits(ft.apply(base, tuned, ids())), expected, TOLERANCE, unlike=frozen)
    save_file(tensors | {whole: tensors[whole] + 1}, tmp_path / "a" / TENSORS)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is saved whole and is not the base's own"):
        ft.load(tmp_path / "a", base)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "another method": (lambda c, t: c.update(peft_type="IA3"), "peft_type='IA3', which compute something else"),
    "weights changed": (lambda c, t: c.update(init_lora_weights="pissa"), "init_lora_weights='pissa' .convert it"),
    "other tokens": (lambda c, t: c.update(trainable_token_indices=[1]), "trainable_token_indices"),
    "no rank": (lambda c, t: c.pop("r"), "is not PEFT's description of a LoRA adapter"),
    "a rank of text": (lambda c, t: c.update(r="many"), "the rank must be an integer"),
    "another rank": (lambda c, t: c.update(r=3), r"lora_a of .*q_proj is torch.float32 \(2, 16\).*\(3, 16\)"),
    "a broken pattern": (lambda c, t: c.update(rank_pattern={"(": 1}), "is not PEFT's description"),
    "half a pair": (lambda c, t: t.pop(sorted(t)[0]), "lacks one of its two factors"),
    "an unknown layer": (lambda c, t: t.update({f"{PREFIX}x.lora_A.weight": torch.ones(2, 2)}), "x lacks one"),
    "an unknown pair": (
        lambda c, t: t.update({f"{PREFIX}x.lora_{f}.weight": torch.ones(2, 2) for f in "AB"}),
        "it adapts x, which is no layer",
    ),
    "an unknown weight": (lambda c, t: t.update({f"{PREFIX}x.weight": torch.ones(2)}), "x.weight fits no parameter"),
    "a norm of another width": (
        lambda c, t: t.update({f"{PREFIX}model.norm.weight": torch.ones(2)}),
        r"has shape \(2,\), expected \(16,\)",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_checkpoints_that_are_refused(case: str, tmp_path: Path) -> None:
    model, base = of_family("Llama")
    peft_writes(model, base, tmp_path / "a", ids(), r=2, lora_alpha=3, target_modules=["q_proj"])
    folder = tmp_path / "a"
    config, tensors = json.loads((folder / PEFT_CONFIG).read_text()), load_file(folder / TENSORS)
    ft.load(folder, base)
    change, message = HOSTILE[case]
    change(config, tensors)
    (folder / PEFT_CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / TENSORS)
    with pytest.raises(ValueError, match=message):
        ft.load(folder, base)


def test_files_that_are_no_description(tmp_path: Path) -> None:
    model, base = of_family("Llama")
    peft_writes(model, base, tmp_path / "a", ids(), r=2, lora_alpha=3, target_modules=["q_proj"])
    for text in ("", "[]", "{}", '"LORA"', "[" * 100_000, '{"r": 2, "lora_alpha": "x", "peft_type": "LORA"}'):
        (tmp_path / "a" / PEFT_CONFIG).write_text(text)
        with pytest.raises(ValueError, match="load: "):
            ft.load(tmp_path / "a", base)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    base = of_family("Llama")[1]
    (tmp_path / PEFT_CONFIG).write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(FileNotFoundError, match="holds pickled weights, which are never read; save it as safetensors"):
        ft.load(tmp_path, base)


def test_experts_of_another_form_are_refused(tmp_path: Path) -> None:
    """A description that calls parameters fused that this base holds otherwise."""
    base = of_family("Mixtral")[1]
    tuned = ft.new_finetuned(base, adapt_layers={r".*experts\.down_proj\.\d"}, plain_layers=())
    folder = ft.save(tmp_path / "a", tuned)
    config = json.loads((folder / OWN_CONFIG).read_text())
    for fused in (["model.layers.0.self_attn"], [*config["fused"], "x"], config["fused"] * 2, "x", [3]):
        (folder / OWN_CONFIG).write_text(json.dumps(config | {"fused": fused}))
        with pytest.raises(ValueError, match="load: "):
            ft.load(folder, base)
    (folder / OWN_CONFIG).write_text(json.dumps(config | {"fused": config["fused"][:1]}))
    with pytest.raises(ValueError, match=r"lacks .* and has unknown"):
        ft.load(folder, base)
    (folder / OWN_CONFIG).write_text(json.dumps(config))
    assert_same_finetune(ft.load(folder, base), tuned)


# --- tied weights, and parts of parameters


TIED: dict[str, dict[str, Any]] = {
    "a table, with its head": dict(adapt_layers={"q_proj", "embed_tokens"}, plain_layers=()),
    "a table, its head trained": dict(adapt_layers={"q_proj", "embed_tokens"}, plain_layers={"lm_head"}),
    "a table and its head": dict(adapt_layers={"embed_tokens", "lm_head"}, plain_layers=()),
    "a table trained, with its head": dict(adapt_layers={"q_proj"}, plain_layers={"embed_tokens"}),
    "both trained": dict(adapt_layers={"q_proj"}, plain_layers={"embed_tokens", "lm_head"}),
    "neither": dict(adapt_layers={"q_proj"}, plain_layers={"norm"}),
}


@pytest.mark.parametrize("case", TIED)
def test_peft_reads_what_is_tied(case: str, tmp_path: Path) -> None:
    """To PEFT a head does not change with its table, so the file says it twice."""
    model = llama(tied=True)
    base = ft.quantize_base_model(model, modules_not_to_quantize=())
    config = {"linear_config": L(r=2, alpha=3, dropout=0.5), "embedding_config": E(r=3, alpha=5)}
    tuned = randomized(ft.new_finetuned(base, **TIED[case], **config))
    assert bool(tuned.spec.followers) == ("with its head" in case)
    check_saved(model, base, tuned, tmp_path / "a", torch.randint(0, 32, (2, 6)))


def test_peft_reads_tables_of_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    """T5 has one table under three names, and a head."""
    model, base = of_family("T5")
    inputs = {"input_ids": ids(), "decoder_input_ids": ids() + 1}
    tuned = randomized(ft.new_finetuned(base, adapt_layers={"shared", "q"}, plain_layers=()), scale=0.1)
    assert not beyond_peft(tuned) and {f.kind for f in tuned.spec.followers} == {"embedding", "linear"}
    folder = ft.save(tmp_path / "a", tuned)
    assert_same_finetune(ft.load(folder, base), tuned)
    from peft import PeftModel

    expected, frozen = (ft.apply(base, own, **inputs).logits for own in (tuned, None))
    with torch.no_grad():
        found = PeftModel.from_pretrained(float_model(model, base, None), str(folder)).eval()(**inputs).logits
    assert_close(found, expected, 2e-5, unlike=frozen)


@pytest.mark.parametrize(
    "settings", [dict(target_modules=["embed_tokens", "q_proj"]), dict(target_modules=["lm_head"])]
)
def test_in_checkpoints_of_peft_nothing_is_tied(settings: Any, tmp_path: Path) -> None:
    model = llama(tied=True)
    base = ft.quantize_base_model(model)
    x = torch.randint(0, 32, (2, 6))
    expected = peft_writes(model, base, tmp_path / "a", x, r=2, lora_alpha=3, **settings)
    tuned = ft.load(tmp_path / "a", base)
    assert_close(ft.apply(base, tuned, x).logits, expected, TOLERANCE, unlike=ft.apply(base, None, x).logits)
    check_saved(model, base, tuned, tmp_path / "again", x)


def test_a_table_that_peft_trained_without_its_head_is_refused(tmp_path: Path) -> None:
    model = llama(tied=True)
    base = ft.quantize_base_model(model)
    settings = dict(r=2, lora_alpha=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    peft_writes(model, base, tmp_path / "a", torch.randint(0, 32, (2, 6)), **settings)
    with pytest.raises(
        ValueError, match=r"trains model.embed_tokens.weight but not lm_head.weight, which is tied to it"
    ):
        ft.load(tmp_path / "a", base)


@pytest.mark.parametrize(
    ("family", "plain", "name"),
    [
        ("Mixtral", r".*experts\.down_proj\.\d", "experts.down_proj.0.weight"),
        ("GPT-OSS", r".*experts\.gate_up_proj\.\d", "experts.gate_up_proj.0.bias"),
        ("nn.MultiheadAttention", "k_proj", "attention.k_proj.bias"),
    ],
)
def test_parts_of_a_parameter_have_no_form(family: str, plain: str, name: str, tmp_path: Path, caplog: Any) -> None:
    """PEFT could save the whole parameter, of which a finetune has a part; `modules_to_save` would name what is not."""
    base = of_family(family)[1]
    tuned = randomized(ft.new_finetuned(base, adapt_layers={"lm_head"}, plain_layers={plain}))
    folder = ft.save(tmp_path / "a", tuned)
    assert "parts of a larger parameter trained directly, such as" in caplog.text and name in caplog.text
    assert not (folder / PEFT_CONFIG).exists()
    again = ft.load(folder, base)
    assert_same_finetune(again, tuned)
    assert again.spec.packed and set(again.spec.packed) <= set(again.spec.plain)
    assert ft.stack([tuned, again]).spec.packed == tuned.spec.packed


def test_a_router_beside_fused_experts_has_a_form(tmp_path: Path) -> None:
    model, base = of_family("Mixtral")
    tuned = randomized(ft.new_finetuned(base, adapt_layers={"q_proj"}, plain_layers={"gate"}), scale=0.1)
    assert tuned.spec.plain and not tuned.spec.packed
    check_saved(model, base, tuned, tmp_path / "a", ids())


def test_whole_experts_that_peft_trained_are_refused(tmp_path: Path) -> None:
    model, base = of_family("Mixtral")
    settings = dict(r=2, lora_alpha=3, target_modules=["q_proj"], modules_to_save=["experts"])
    peft_writes(model, base, tmp_path / "a", ids(), **settings)
    with pytest.raises(ValueError, match=r"experts.down_proj is held in parts here"):
        ft.load(tmp_path / "a", base)
