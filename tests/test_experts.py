"""Experts taken apart: the classes that are listed, against the sources and the modules of transformers."""

from __future__ import annotations

import ast
import collections
import functools
import importlib
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import assert_close, assert_unchanged, randomized, snapshot
from torch import Tensor, nn
from torch.func import vmap

import finetuna_func as ft
from finetuna_func._experts import _LIKE_MIXTRAL, _OTHERS, LAYOUTS
from finetuna_func._unpack import unpacked

# Classes that transformers calls experts too, and why they are not taken apart.
LEFT_WHOLE = {
    "openai_privacy_filter.OpenAIPrivacyFilter": "computes in float32, whatever its dtype",
    "longcat_flash.LongcatFlash": "holds matrices for experts that compute nothing",
    "dbrx.Dbrx": "reads the parameters of a module below it",
    "jetmoe.JetMoeParallel": "one product at a time, for sorted tokens",
    "inkling.InklingShared": "shared by all tokens, not routed",
    "aria.AriaGroupedGemm": "of older versions",
}
TOKENS, WIDTH, EXPERTS = 6, 8, 4
SETTINGS = dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], EXPERTS)
SETTINGS |= dict.fromkeys(["intermediate_size", "moe_intermediate_size"], 12)
SETTINGS |= dict.fromkeys(["hidden_size", "moe_hidden_size"], WIDTH)


def named(name: str) -> Any:
    family, _, stem = name.partition(".")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, f"{stem}Experts")


def made(name: str) -> Any:
    """A module of the class, in float32, its numbers neither zero nor equal."""
    settings = SETTINGS | dict(hidden_act="silu", mlp_hidden_act="relu2", swiglu_limit=1.5, swiglu_alpha=1.7)
    settings |= dict(post_norm_eps=1e-6, moe_latent_size=None, _experts_implementation="eager")
    settings |= dict(hidden_activation="gelu", mlp_gate_softcap=2.0, mlp_up_softcap=3.0)
    experts = named(name)(SimpleNamespace(**settings, to_dict=lambda: settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in experts.parameters():
            leaf.copy_(0.5 * torch.randn(leaf.shape, generator=generator))
    return experts


def present(name: str) -> bool:
    family, _, stem = name.partition(".")
    source = Path(transformers.__file__).parent / "models" / family / f"modeling_{family}.py"
    if not source.is_file():
        return False
    _, found, text = source.read_text("utf-8").partition(f"class {stem}Experts(")
    return bool(found) and "self.down_proj = nn.Parameter(" in text.partition("\nclass ")[0]


def routed() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(TOKENS)])
    return x, index, torch.rand(TOKENS, 2, generator=generator)  # the last expert gets no token


@functools.cache
def forwards() -> dict[str, str]:
    """The methods of every class of experts in transformers' sources, but for how it is made."""
    found: dict[str, str] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text("utf-8")
        if "Experts(" not in text:
            continue
        for node in ast.parse(text).body:
            if (
                isinstance(node, ast.ClassDef)
                and node.name.endswith("Experts")
                and "nn.Module" in map(ast.unparse, node.bases)
            ):
                methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("__")]
                name = f"{path.parent.name}.{node.name.removesuffix('Experts')}"
                found[name] = "\n".join(map(ast.unparse, methods))
    return found


def test_every_class_with_mixtrals_forward_is_listed() -> None:
    found = forwards()
    same = {name for name, source in found.items() if source == found["mixtral.Mixtral"]}
    assert same == set(_LIKE_MIXTRAL.split()) & found.keys()
    assert len(same) > 40


def test_every_other_class_is_listed_or_has_a_reason() -> None:
    found = forwards()
    others = found.keys() - set(_LIKE_MIXTRAL.split())
    assert others == (_OTHERS.keys() | LEFT_WHOLE.keys()) & found.keys()
    assert not LAYOUTS.keys() & LEFT_WHOLE.keys()


@pytest.mark.parametrize(
    "name", filter(present, ["mixtral.Mixtral", "qwen3_next.Qwen3Next", "gemma4.Gemma4Text", *_OTHERS])
)
def test_a_stand_in_computes_the_same(name: str) -> None:
    experts = made(name)
    before = snapshot(experts)
    stand_in, packings = unpacked(experts)
    assert_unchanged(experts, before)
    x, index, weights = routed()
    with torch.no_grad():
        if LAYOUTS[name].sorted:
            inputs: tuple[Tensor, ...] = (x.repeat(EXPERTS, 1) * torch.rand(EXPERTS * TOKENS, 1),)
        else:
            inputs = x, index, weights
        expected = experts(*inputs)
        unlike = experts(*(leaf.flip(0) for leaf in inputs))
        assert_close(stand_in(*inputs), expected, 2e-6, unlike=unlike)
        batched = [torch.stack([leaf, leaf.flip(0)]) for leaf in inputs]
        mapped = vmap(stand_in)(*batched)
        assert_close(mapped, torch.stack([expected, unlike]), 2e-6, unlike=torch.stack([unlike, expected]))
    state = stand_in.state_dict()
    for own, leaf in experts.named_parameters():
        whole = packings[own].join([state[part] for part in packings[own].parts]) if own in packings else state[own]
        assert torch.equal(whole, leaf)
        assert own not in packings or state[packings[own].parts[0]].untyped_storage().data_ptr() == leaf.data_ptr()


def test_a_token_may_be_sent_nowhere() -> None:
    """The index after the last expert counts for nothing."""
    experts = made("mixtral.Mixtral")
    stand_in, _ = unpacked(experts)
    x, index, weights = routed()
    expected = stand_in(x, index, weights * torch.tensor([1.0, 0.0]))
    index[:, 1] = EXPERTS
    for out in (stand_in(x, index, weights), vmap(stand_in)(x[None], index[None], weights[None])[0]):
        assert_close(out, expected, 2e-6, unlike=expected.flip(0))


def test_no_token_at_all() -> None:
    stand_in, _ = unpacked(made("gpt_oss.GptOss"))
    x, index, weights = (leaf[:0] for leaf in routed())
    assert stand_in(x, index, weights).shape == (0, WIDTH)
    assert vmap(stand_in)(x[None], index[None], weights[None]).shape == (1, 0, WIDTH)


def test_in_bfloat16() -> None:
    experts = made("mixtral.Mixtral").bfloat16()
    stand_in, _ = unpacked(experts)
    x, index, weights = routed()
    with torch.no_grad():
        out = stand_in(x.bfloat16(), index, weights)
        mapped = vmap(stand_in)(x.bfloat16()[None], index[None], weights[None])[0]
        exact = unpacked(experts.float())[0](x.bfloat16().float(), index, weights)
    for actual in (out, mapped):
        assert actual.dtype == torch.bfloat16
        assert_close(actual, exact, 3 * 2**-8, unlike=exact.flip(0))  # each product, the gate and the sum are rounded


def test_every_expert_is_quantized_and_adapted() -> None:
    experts = made("gpt_oss.GptOss")
    base = ft.quantize_base_model(nn.ModuleList([experts])[0])
    quantized = [name for name, leaf in base.params.items() if leaf.dtype == torch.int8]
    assert collections.Counter(name.split(".")[0] for name in quantized) == {
        "gate_up_proj": EXPERTS,
        "down_proj": EXPERTS,
    }
    shapes = {base.params[name].shape for name in quantized}
    assert shapes == {torch.Size([24, WIDTH]), torch.Size([WIDTH, 12])}  # (out, in), a scale per output
    tuned = randomized(ft.new_finetuned(base))
    assert len(tuned.spec.adapters) == 2 * EXPERTS
    merged = made("gpt_oss.GptOss")
    merged.load_state_dict(ft.merge(base, tuned))
    inputs = routed()
    with torch.no_grad():
        assert_close(ft.apply(base, tuned, *inputs), merged(*inputs), 5e-6, unlike=experts(*inputs))


class Bank(nn.Module):
    """Experts of a class that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.banks = nn.Parameter(torch.randn(3, 8, 8))
        self.place = nn.Parameter(torch.randn(1, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.banks).sum(0) + self.place[0, 0]


def test_experts_of_other_classes_are_left_whole_and_said_to_be(caplog: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Bank(), nn.Conv1d(2, 2, 3, padding=1))
    with caplog.at_level(logging.WARNING):
        base = ft.quantize_base_model(model)
    said = "1 is a Bank, which holds matrices in one parameter and is not taken apart; banks stay in float."
    assert caplog.messages == [said]
    assert base.params["1.banks"].is_floating_point()
    tuned = ft.new_finetuned(base, plain_layers={"1"})
    assert "1.banks" in tuned.params
