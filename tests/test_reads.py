"""A model that computes with a layer's weight itself is found out; one that merely does not run a layer is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from models import assert_close, llama, randomized, relative_error
from torch import Tensor, nn
from torch.func import grad, vmap

import finetuna_func as ft

USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda x, w: x @ w.to(x.dtype),
    "view": lambda x, w: x + w.T.to(x.dtype).sum(),
    "data": lambda x, w: x + w.data.sum(),
    "function": lambda x, w: F.linear(x, w.to(x.dtype)),
    "index": lambda x, w: x + w[0].to(x.dtype),
    "in a list": lambda x, w: x + torch.cat([w, w]).to(x.dtype).sum(),
    "by keyword": lambda x, w: x + torch.sum(input=w).to(x.dtype),
}
QUESTIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dtype": lambda x, w: w.dtype,
    "device": lambda x, w: w.device,
    "shape": lambda x, w: (w.shape, w.size(0), w.ndim, w.numel(), len(w)),
    "is float": lambda x, w: (w.is_floating_point(), w.requires_grad, isinstance(w, Tensor)),
}


class Reader(nn.Module):
    """Uses `other`, or calls it."""

    def __init__(self, use: Callable[[Tensor, Tensor], Any] | None, asks_only: bool = False) -> None:
        super().__init__()
        self.use, self.asks_only = use, asks_only
        self.fc, self.other, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.fc(x)
        if self.use is not None and skip is None:
            used = self.use(x, self.other.weight)
            x = x if self.asks_only else used
        return self.lm_head(x)


def of(model: nn.Module, **arguments: Any) -> tuple[ft.Base, ft.Finetuned]:
    base = ft.quantize_base_model(model, **arguments)
    return base, randomized(ft.new_finetuned(base))


X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
CALLS: dict[str, Callable[[ft.Base, ft.Finetuned], Any]] = {
    "base": lambda base, tuned: ft.apply(base, None, X[0]),
    "apply": lambda base, tuned: ft.apply(base, tuned, X[0]),
    "vmap": lambda base, tuned: vmap(lambda t, x: ft.apply(base, t, x))(ft.stack([tuned] * 2), X),
    "grad": lambda base, tuned: grad(lambda p: ft.apply(base, tuned.replace(params=p), X[0]).sum())(dict(tuned.params)),
    "lean": lambda base, tuned: ft.value_and_grad(lambda t: ft.apply(base, t, X[0]).sum())(tuned),
    "stacked": lambda base, tuned: ft.apply_stacked(base, ft.stack([tuned] * 2), X),
}


@pytest.mark.parametrize("use", USES)
def test_a_use_is_found(use: str) -> None:
    base, tuned = of(Reader(USES[use]))
    for _ in range(2):  # the first call is watched, the second remembers
        with pytest.raises(
            NotImplementedError, match=r"apply: the model computes with the weight of \['other'\] itself"
        ):
            ft.apply(base, tuned, X[0])


@pytest.mark.parametrize("call", CALLS)
def test_in_every_kind_of_call(call: str) -> None:
    base, tuned = of(Reader(USES["matmul"]))
    with pytest.raises(NotImplementedError, match=r"computes with the weight of \['other'\] itself"):
        CALLS[call](base, tuned)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_no_use(question: str) -> None:
    base, tuned = of(Reader(QUESTIONS[question], asks_only=True))
    for call in CALLS.values():
        call(base, tuned)
    assert set(base.skeleton.reads.values()) == {frozenset()}


def test_layers_that_do_not_run_are_no_error() -> None:
    base, tuned = of(Reader(None))
    assert "other" in {adapter.path for adapter in tuned.spec.adapters}
    for call in CALLS.values():
        call(base, tuned)


def test_another_kind_of_call_is_watched_too() -> None:
    base, tuned = of(Reader(USES["matmul"]))
    for _ in range(2):
        ft.apply(base, tuned, X[0], skip=torch.ones(()))
    with pytest.raises(NotImplementedError):
        ft.apply(base, tuned, X[0])
    ft.apply(base, tuned, X[0], skip=torch.ones(()))


@pytest.mark.parametrize("plain", [False, True])
def test_a_float_weight_may_be_used(plain: bool) -> None:
    """Frozen or trained directly, it is what the model finds; with an adapter it would not be."""
    model = Reader(USES["function"])
    base = ft.quantize_base_model(model, modules_not_to_quantize={"other"})
    chosen = {"plain_layers": {"other"} if plain else ()}
    tuned = randomized(ft.new_finetuned(base, adapt_layers={"fc"}, **chosen))
    weight = tuned.params["other.weight"] if plain else model.other.weight.detach()
    other = ft.apply(base, tuned, X[0] + 1)
    without = Reader(lambda x, w: F.linear(x, weight))
    without.load_state_dict(model.state_dict())
    expected = ft.merge(base, tuned)
    assert_close(
        ft.apply(base, tuned, X[0]), torch.func.functional_call(without, expected, (X[0],)), 1e-5, unlike=other
    )
    adapted = randomized(ft.new_finetuned(base, adapt_layers={"fc", "other"}))
    with pytest.raises(NotImplementedError, match="adapter"):
        ft.apply(base, adapted, X[0])


def test_a_table_used_as_a_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(12, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.fc(self.embed(ids)), self.embed.weight)

    ids = torch.arange(6).reshape(2, 3)
    base = ft.quantize_base_model(Tied(), modules_not_to_quantize={"embed"})
    ft.apply(base, ft.new_finetuned(base, adapt_layers={"fc"}), ids)
    with pytest.raises(NotImplementedError, match=r"\['embed'\]"):
        ft.apply(base, ft.new_finetuned(base, adapt_layers={"fc", "embed"}), ids)


def test_tied_layers_hold_one_weight() -> None:
    """Each of them may use it."""
    model = llama(tied=True)
    base, tuned = of(model, modules_not_to_quantize=())
    ids = torch.arange(6).reshape(2, 3)
    ft.apply(base, ft.new_finetuned(base, plain_layers=()), ids)
    ft.apply(base, tuned, inputs_embeds=torch.randn(2, 3, 16))
    assert set(base.skeleton.reads.values()) == {frozenset()}


def test_a_call_that_fails_is_watched_again() -> None:
    base, tuned = of(Reader(USES["matmul"]))
    with pytest.raises(RuntimeError, match="shape"):
        ft.apply(base, tuned, torch.ones(2, 5))
    assert not base.skeleton.reads
    with pytest.raises(NotImplementedError, match="itself"):
        ft.apply(base, tuned, X[0])


class Blocks(nn.Module):
    """Repeated blocks, one of which may use its layer's weight."""

    def __init__(self, use: Callable[[Tensor, Tensor], Any] | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Reader(use) for _ in range(2))
        for block in self.blocks:
            block.lm_head = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_inside_blocks_that_are_computed_again() -> None:
    base = ft.quantize_base_model(Blocks(USES["matmul"]))
    tuned = randomized(ft.new_finetuned(base))
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r"weight of \['blocks\.0\.other', 'blocks\.1\.other'\] itself"):
            ft.apply(base, tuned, X[0], remat="blocks")
    fine = ft.quantize_base_model(Blocks(None))
    tuned = randomized(ft.new_finetuned(fine, linear_config=ft.LinearAdapterConfig(dropout=0.5)))

    def again(**blocks: Any) -> Tensor:
        return ft.apply(fine, tuned, X[0], train=True, rng=ft.random.key(0), **blocks)

    first = again(remat="blocks")  # watched first, which draws no masks of its own
    assert torch.equal(first, again(remat="blocks"))
    assert_close(first, again(), 1e-6, unlike=ft.apply(fine, tuned, X[0]))


# --- what a model sees of an 8-bit weight


def asking(look: Callable[[Tensor], Any], **arguments: Any) -> tuple[nn.Module, ft.Base, list[Any]]:
    """A model that asks for its layer's weight at every call, its base, and what they were told."""
    told: list[Any] = []
    model = Reader(lambda x, w: told.append(look(w)), asks_only=True)
    model.other.to(torch.bfloat16)
    return model, ft.quantize_base_model(model, **arguments), told


@pytest.mark.parametrize("scheme", ["int8", "blockwise8", "nf4"])
def test_codes_are_seen_as_the_float_weight(scheme: str) -> None:
    model, base, told = asking(lambda w: (w.dtype, w.shape, w.device, w.ndim, len(w), w.is_floating_point()))
    for call in (model, lambda x: ft.apply(base, None, x), ft.to_module(base, None)):
        call(X[0])
    assert told == [told[0]] * 3 and told[0][:2] == (torch.bfloat16, (8, 8))
    assert not base.params["other.weight"].is_floating_point()


def test_numbers_of_codes_are_not_seen() -> None:
    """In a call, asking for them is found out; in a module that was given away, they do not look like a result."""
    model, base, told = asking(lambda w: (w.isnan().all().item(), w.untyped_storage().nbytes()))
    for call in (model, ft.to_module(base, None)):
        call(X[0])
    assert told == [(False, 8 * 8 * 2), (True, 2)]
    with pytest.raises(NotImplementedError, match=r"weight of \['other'\] itself"):
        ft.apply(base, None, X[0])


def test_a_float_weight_is_seen_as_it_is() -> None:
    base, _ = of(Reader(None), modules_not_to_quantize={"other"})
    module: Any = ft.to_module(base, None)
    assert torch.equal(module.other.weight, base.params["other.weight"]) and isinstance(
        module.other.weight, nn.Parameter
    )
    assert module.other.weight is module.other._parameters["weight"]


def merged(model: nn.Module, base: ft.Base, tuned: ft.Finetuned | None = None) -> Any:
    module = copy.deepcopy(model)
    module.load_state_dict(ft.merge(base, tuned))
    return module


@pytest.mark.parametrize("scheme", ["int8", "blockwise8", "nf4"])
def test_t5_casts_to_the_dtype_of_a_layer(scheme: str) -> None:
    """It hands ``wo`` what it takes for the dtype of ``wo``; also where that one is kept in float32 among bfloat16."""
    model: Any = next(family for family in FAMILIES if family.name == "T5").make()
    base = ft.quantize_base_model(model, scheme=scheme)
    tuned = randomized(ft.new_finetuned(base, adapt_layers={"wo", "q"}, plain_layers=()))
    ids = torch.arange(4, 16).view(2, 6)
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    expected = merged(model, base, tuned)(**inputs).logits
    frozen = ft.apply(base, None, **inputs).logits
    assert_close(ft.apply(base, tuned, **inputs).logits, expected, 2e-5, unlike=frozen)
    stacked = {name: leaf.expand(2, 2, 6) for name, leaf in inputs.items()}
    both = ft.apply_stacked(base, ft.stack([tuned] * 2), **stacked).logits
    assert_close(both, expected.expand(2, *expected.shape), 2e-5, unlike=frozen.expand(2, *expected.shape))
    model = model.bfloat16()
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.wo.float()
    mixed = ft.quantize_base_model(model, scheme=scheme)
    out = ft.apply(mixed, None, **inputs).logits.float()
    # Two roundings of a number in bfloat16, through four layers.
    assert relative_error(out, merged(model, mixed)(**inputs).logits.float()) < 4 * 2**-7
    assert relative_error(out, expected) > 0.12  # the adapted one
    if scheme == "nf4":  # whose lookup takes half a minute to trace
        return
    compiled = torch.compile(lambda: ft.apply(base, tuned, **inputs, use_cache=False).logits, backend="eager")
    assert_close(compiled(), expected, 2e-5, unlike=frozen)


@pytest.mark.parametrize("scheme", ["int8", "blockwise8", "nf4"])
def test_mamba_casts_to_the_dtype_of_its_head(scheme: str) -> None:
    model: Any = next(family for family in FAMILIES if family.name == "Mamba").make()
    base = ft.quantize_base_model(model, scheme=scheme, modules_not_to_quantize=())
    assert base.skeleton.layers["lm_head"].scheme is not None
    tuned = randomized(ft.new_finetuned(base, adapt_layers={"in_proj", "embeddings"}, plain_layers=()))
    ids = torch.arange(4, 16).view(2, 6)
    expected, frozen = merged(model, base, tuned)(ids).logits, ft.apply(base, None, ids).logits
    assert_close(ft.apply(base, tuned, ids).logits, expected, 1e-5, unlike=frozen)
    assert_close(ft.to_module(base, tuned)(ids).logits, expected, 1e-5, unlike=frozen)
