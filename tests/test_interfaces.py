"""What others' tools do with the values of this library: generation, harnesses, export, optimizers.

The reference is always the plain float model with the merged weights, which knows nothing of it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from models import assert_close, randomized
from torch import Tensor, nn
from transformers import pipeline

import finetuna_func as ft

TOLERANCE = 1e-5  # float32, products in another order
PROMPTS = ["the abc", "12 he", "the the"]


class Pair:
    """A finetune as a module, and the float models of it and of its base."""

    def __init__(self, **arguments: Any) -> None:
        model = tiny.model(num_key_value_heads=2)
        keep = {"modules_not_to_quantize": ()} if arguments.get("plain_layers") == () else {}
        self.base = ft.quantize_base_model(model, **keep)
        self.tuned = randomized(ft.new_finetuned(self.base, **arguments))
        self.module: Any = ft.to_module(self.base, self.tuned)
        self.plain = tiny.model(num_key_value_heads=2, tie_word_embeddings=False)
        self.plain.load_state_dict(ft.merge(self.base, self.tuned))
        self.frozen = tiny.model(num_key_value_heads=2, tie_word_embeddings=False)
        self.frozen.load_state_dict(ft.merge(self.base, None))
        self.tokenizer = tiny.tokenizer(padding_side="left")


@pytest.fixture(scope="module", params=["tied", "own head"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """With everything adapted and the head tied to the table; and with a head of its own, trained directly."""
    return Pair(plain_layers=()) if request.param == "tied" else Pair()


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


IDS = torch.arange(30).view(2, 15) + 60


def test_generate(pair: Pair) -> None:
    inputs = pair.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    options = [{"do_sample": False}, {"num_beams": 3}, {"do_sample": False, "use_cache": False}]
    for own in options:
        made, expected, base = (
            model.generate(**inputs, max_new_tokens=12, **own) for model in (pair.module, pair.plain, pair.frozen)
        )
        assert torch.equal(made, expected) and not torch.equal(made, base)


def test_pipeline(pair: Pair) -> None:
    def texts(model: Any) -> list[str]:
        generator = pipeline("text-generation", model=model, tokenizer=pair.tokenizer)
        found = generator(PROMPTS, max_new_tokens=12, do_sample=False, batch_size=2)
        return [own[0]["generated_text"] for own in found]

    assert texts(pair.module) == texts(pair.plain) != texts(pair.frozen)


# --- lm_eval


def harness(model: Any, tokenizer: Any, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, **options)


def requests(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, own, i) for i, own in enumerate(arguments)]


def check_harness(
    module: Any, plain: Any, frozen: Any, tokenizer: Any, contexts: list[str], endings: list[str], **options: Any
) -> None:
    """All three kinds of requests, in batches that are padded."""
    told = [harness(model, tokenizer, batch_size=2, **options) for model in (module, plain, frozen)]
    pairs = [(context, ending) for context in contexts for ending in endings]
    lengths = torch.tensor([len(tokenizer(ending)["input_ids"]) for _, ending in pairs])

    def likelihoods(lm: Any) -> tuple[Tensor, list[bool]]:
        found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        return torch.tensor([value for value, _ in found], dtype=torch.float64), [greedy for _, greedy in found]

    (own, greedy), (expected, expected_greedy), (base, _) = (likelihoods(lm) for lm in told)
    # A log-probability is a difference of logits of about 10, each off by some 1e-5 of that.
    assert ((own - expected).abs() <= 2e-4 * lengths).all() and greedy == expected_greedy
    assert ((own - base).abs() > 20 * 2e-4 * lengths).any()
    rolling = [lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(c,) for c in contexts])) for lm in told]
    assert rolling[0] == pytest.approx(rolling[1], rel=1e-4) and rolling[0] != pytest.approx(rolling[2], rel=2e-3)
    asked = [(context, {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}) for context in contexts]
    made = [lm.generate_until(requests("generate_until", asked), disable_tqdm=True) for lm in told]
    assert made[0] == made[1] != made[2]


def test_lm_eval(pair: Pair) -> None:
    models = (pair.module, pair.plain, pair.frozen)
    check_harness(*models, pair.tokenizer, PROMPTS, [" the", " abc 12"], max_length=128)
    # The harness ties weights when it takes a model over, which must not undo a finetune's own head.
    assert_close(logits(pair.module, IDS), logits(pair.plain, IDS), TOLERANCE, unlike=logits(pair.frozen, IDS))
    own_head = pair.module.lm_head._parameters["weight"] is not pair.module.model.embed_tokens._parameters["weight"]
    assert own_head == ("lm_head.weight" in pair.tuned.params)


@pytest.mark.slow
def test_lm_eval_on_real_weights(smollm2: Any) -> None:
    model, tokenizer = smollm2
    base = ft.quantize_base_model(model)
    tuned = randomized(ft.new_finetuned(base, {"q_proj", "v_proj", "down_proj"}, ()), scale=0.1)
    plain, frozen = (type(model)(model.config).eval() for _ in range(2))
    plain.load_state_dict(ft.merge(base, tuned))
    frozen.load_state_dict(ft.merge(base, None))
    contexts = ["The capital of France is", "An old man had", "Two and two make"]
    module = ft.to_module(base, tuned)
    check_harness(module, plain, frozen, tokenizer, contexts, [" Paris", " a dog"], max_length=256)


# --- torch.export, torch.compile


class Logits(nn.Module):
    """Ids to logits alone, so that the program needs no class of transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def test_export(pair: Pair, tmp_path: Path) -> None:
    """For batches and lengths that were not there, and in a process that knows neither model nor library."""
    rows, length = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("length", min=2, max=200)
    program = torch.export.export(Logits(pair.module), (IDS,), dynamic_shapes={"ids": {0: rows, 1: length}})
    assert program.state_dict["model.model.layers.0.self_attn.q_proj.weight"].dtype == torch.int8
    torch.export.save(program, tmp_path / "module.pt2")
    batches = [IDS, IDS.view(3, 10), IDS[:1]]
    torch.save(batches, tmp_path / "ids.pt")
    script = """
import sys, torch
run = torch.export.load("module.pt2").module()
torch.save([run(ids).detach() for ids in torch.load("ids.pt")], "out.pt")
assert not {"finetuna_func", "transformers"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for ids, loaded in zip(batches, torch.load(tmp_path / "out.pt"), strict=True):
        for own in (program.module()(ids), loaded):
            assert_close(own, logits(pair.plain, ids), TOLERANCE, unlike=logits(pair.frozen, ids))


def test_compiled_module(pair: Pair) -> None:
    """In one graph, without a break."""
    compiled = torch.compile(pair.module, fullgraph=True, backend="eager")
    for ids in (IDS, IDS.view(3, 10)):
        made = logits(compiled, ids, use_cache=False)
        assert_close(made, logits(pair.plain, ids), TOLERANCE, unlike=logits(pair.frozen, ids))


# --- torch.optim


@pytest.mark.parametrize("stacked", [False, True])
def test_torch_optim_trains_a_finetune(stacked: bool) -> None:
    """In float64, where five steps of AdamW differ by roundings: some 1e-16 of the gradient, divided by its size."""
    base = ft.quantize_base_model(tiny.model().double(), modules_not_to_quantize=())
    tuned = randomized(ft.new_finetuned(base, plain_layers=()))
    ids = IDS
    if stacked:
        tuned, ids = ft.stack([tuned, randomized(ft.new_finetuned(base, plain_layers=()), seed=1)]), IDS.view(2, 1, 15)
    run = ft.apply_stacked if stacked else ft.apply

    def loss_of(tuned: ft.Finetuned) -> Tensor:
        out = run(base, tuned, ids).logits[..., :-1, :]
        return F.cross_entropy(out.flatten(0, -2), ids[..., 1:].flatten())

    settings: dict[str, Any] = {"weight_decay": 0.1}
    own = {name: leaf.clone().requires_grad_() for name, leaf in tuned.params.items()}
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2, **settings)
    tx = ft.optim.adamw(1e-2, **settings)
    ours, state = tuned, tx.init(tuned)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(tuned.replace(params=own)).backward()
        optimizer.step()
        grads = torch.func.grad(lambda p, t=ours: loss_of(t.replace(params=p)))(dict(ours.params))
        updates, state = tx.update(grads, state, ours)
        ours = ft.optim.apply_updates(ours, updates)
    for name, leaf in ours.params.items():
        assert (own[name].detach() - leaf).abs().max() < 1e-9, name
        assert (tuned.params[name] - leaf).abs().max() > 1e-3, name
    # What it trained is a finetune like any other, and the one it began with is as it was.
    made = tuned.replace(params={name: leaf.detach() for name, leaf in own.items()})
    assert loss_of(made) < loss_of(tuned) - 0.1
    assert all(not leaf.requires_grad for leaf in tuned.params.values())
