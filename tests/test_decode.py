"""A stack's answers are those of Hugging Face's own generate, adapter by adapter."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import pytest
import tiny
import torch
import transformers

import finetuna_func as ft
from finetuna_func.decode import _choose, generate
from finetuna_func.train import linear_layers

PROMPTS = [[5, 6, 7], [9], [30, 31, 32], [1, 2, 3, 4, 5, 6]]


@pytest.fixture(scope="module")
def base() -> ft.Base:
    return ft.quantize_base_model(tiny.model(initializer_range=0.5), modules_not_to_quantize=())


def adapter(base: ft.Base, seed: int, r: int = 2) -> ft.Finetuned:
    torch.manual_seed(seed)
    tuned = ft.new_finetuned(base, {"q_proj", "down_proj"}, (), linear_config=ft.LinearAdapterConfig(r=r))
    return tuned.replace(params={name: 0.5 * torch.randn_like(leaf) for name, leaf in tuned.params.items()})


@pytest.mark.parametrize("n", [1, 2, 3])
def test_greedy_answers_are_those_of_generate(base, n):
    tuned = [adapter(base, seed, seed + 1) for seed in range(n)]
    found = generate(base, ft.stack(tuned), PROMPTS, max_new_tokens=12)
    for own, answers in zip(tuned, found, strict=True):
        model: Any = ft.to_module(base, own)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
            assert answer == out[0, len(prompt) :].tolist()
    assert n == 1 or found[0] != found[1]


SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
FAMILIES = {
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=4),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, sliding_window=4),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=99, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=99,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        init_std=0.5,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    base = ft.quantize_base_model(model, modules_not_to_quantize=())
    options: Any = {"linear_config": ft.LinearAdapterConfig(r=2)}
    tuned = [ft.new_finetuned(base, linear_layers(base), (), **options) for _ in range(2)]
    tuned = [
        own.replace(params={name: 0.5 * torch.randn_like(leaf) for name, leaf in own.params.items()}) for own in tuned
    ]
    prompts = [list(range(5, 12)), [3, 4, 5]]
    found = generate(base, ft.stack(tuned), prompts, max_new_tokens=9)
    for own, answers in zip(tuned, found, strict=True):
        module: Any = ft.to_module(base, own)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            out = module.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None)
            assert answer == out[0, len(prompt) :].tolist()


def test_an_answer_ends_with_a_stopping_id(base):
    stacked = ft.stack([adapter(base, seed) for seed in range(2)])
    free = generate(base, stacked, PROMPTS, max_new_tokens=10)
    stop = free[0][0][3]
    found = generate(base, stacked, PROMPTS, max_new_tokens=10, stop_ids={stop})
    for own, expected in zip(chain(*found), chain(*free), strict=True):
        end = expected.index(stop) + 1 if stop in expected else 10
        assert own == expected[:end]
    assert found[0][0][-1] == stop and len(found[0][0]) <= 4


@pytest.mark.parametrize("length", range(1, 9))
def test_rows_as_many_as_tokens(base, length):
    # Where `apply_stacked` would add rows to some calls and not to others.
    stacked = ft.stack([adapter(base, seed) for seed in range(2)])
    prompts = [list(range(i, i + length)) for i in range(4, 7)]
    together = generate(base, stacked, prompts, max_new_tokens=8)
    singly = [generate(base, stacked, [prompt], max_new_tokens=8) for prompt in prompts]
    assert together == [[answers[n][0] for answers in singly] for n in range(2)]


def test_samples_are_drawn_from_the_distribution_and_by_the_seed():
    logits = torch.tensor([1.0, 3.0, 2.0, -math.inf]).expand(1, 4000, 4)
    keys = ft.random.split(ft.random.key(3), 4000)
    for temperature, top_p, expected in (
        (1.0, 1.0, torch.tensor([1.0, 3.0, 2.0, -math.inf]).softmax(0)),
        (2.0, 1.0, torch.tensor([0.5, 1.5, 1.0, -math.inf]).softmax(0)),
        (1.0, 0.7, torch.tensor([-math.inf, 3.0, 2.0, -math.inf]).softmax(0)),
        (1.0, 1e-9, torch.tensor([0.0, 1.0, 0.0, 0.0])),
    ):
        found = _choose(logits, keys, temperature, top_p)[0].bincount(minlength=4) / 4000
        # Four standard deviations of a share of 4000.
        assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt()).all()
    assert torch.equal(_choose(logits, keys, 1.0, 1.0), _choose(logits, keys, 1.0, 1.0))


def test_sampling_depends_on_the_seed_and_not_on_the_neighbours(base):
    tuned = [adapter(base, seed) for seed in range(2)]
    options: Any = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9}
    both = generate(base, ft.stack(tuned), PROMPTS, **options, seed=1)
    assert both == generate(base, ft.stack(tuned), PROMPTS, **options, seed=1)
    assert both[1] == generate(base, ft.stack(tuned[1:]), PROMPTS, **options, seed=1)[0]
    assert both != generate(base, ft.stack(tuned), PROMPTS, **options, seed=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": [[1], []]}, "prompts"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_refusals(base, options, message):
    with pytest.raises(ValueError, match=message):
        generate(base, ft.stack([adapter(base, 0)]), **{"prompts": [[1]]} | options)
    with pytest.raises(ValueError, match="a stack"):
        generate(base, adapter(base, 0), [[1]])
