"""A call mapped over finetunes is one stacked call where that is surely the same, and otherwise what it was."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as torch_pytree
from families import FAMILIES, Family
from live import Live
from models import bert, finetunes, gpt2, gradients_by_autograd, llama, opt
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import finetuna_func as ft
from finetuna_func import _fold, _losses
from finetuna_func._skeleton import Skeleton

N, B, T = 3, 2, 6
FP32 = 1e-5  # sums of other lengths, in float32
EXACT = 1e-12  # in float64
IDS = torch.randint(4, 32, (N, B, T), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(N, B, T, dtype=torch.long)
MASK[0, 0, :2] = MASK[2, 1, :1] = 0
LABELS = torch.where(torch.rand(N, B, T, generator=torch.Generator().manual_seed(1)) < 0.3, -100, IDS)


@pytest.fixture(scope="module")
def base() -> ft.Base:
    return ft.quantize_base_model(llama())


@pytest.fixture(scope="module")
def exact() -> ft.Base:
    """In float64, with fused attention, whose softmax is too."""
    return ft.quantize_base_model(llama().double())


@pytest.fixture(scope="module")
def fused() -> ft.Base:
    """In float64, of a model whose eager attention computes in float64 as well."""
    return ft.quantize_base_model(gpt2().double())


@pytest.fixture(scope="module")
def eager() -> ft.Base:
    """The same, with attention that has derivatives of all kinds outside of vmap as well."""
    model = gpt2().double()
    model.set_attn_implementation("eager")
    return ft.quantize_base_model(model)


class Stacks(list[int | None]):
    """How many finetunes each run of a skeleton was for: ``None`` for one, mapped or not."""

    @property
    def folded(self) -> bool:
        """Whether all runs, and at least one, were of stacks; only such or none may have been seen."""
        assert self, "no model ran"
        assert None not in self or set(self) == {None}, self
        return None not in self


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> Stacks:
    seen, original = Stacks(), Skeleton.calling

    def calling(self: Skeleton, **fields: Any) -> Any:
        if fields:  # without, a piece of the head asks for this thread's module
            seen.append(fields.get("stack"))
        return original(self, **fields)

    monkeypatch.setattr(Skeleton, "calling", calling)
    return seen


@pytest.fixture
def unfolded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a function of which nothing is folded."""

    def call(function: Callable[..., Any], *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(_fold, "only_vmap", lambda: None)
            return function(*args)

    return call


def largest_difference(found: Any, expected: Any) -> float:
    """Largest difference over the largest number, of all leaves together."""
    pairs = list(zip(torch_pytree.tree_leaves(found), torch_pytree.tree_leaves(expected), strict=True))
    assert all(f.shape == e.shape and f.dtype == e.dtype for f, e in pairs)
    scale = max(float(e.abs().max()) for _, e in pairs)
    return max(float((f - e).detach().abs().max()) for f, e in pairs) / scale


def assert_same(found: Any, expected: Any, tolerance: float) -> None:
    """Close, and at least 20 times as far from the same of the finetunes in another order."""
    assert largest_difference(found, expected) <= tolerance
    others = torch_pytree.tree_map(lambda leaf: leaf.roll(1, 0), expected)
    assert largest_difference(found, others) > 20 * tolerance


def loop(function: Callable[..., Any], *stacks: Any) -> Any:
    """The function of each finetune by itself, put together."""
    n = next(leaf.shape[0] for leaf in torch_pytree.tree_leaves(stacks))
    each = [
        function(*torch_pytree.tree_map(lambda leaf: leaf[i], stacks))  # noqa: B023
        for i in range(n)
    ]
    return torch_pytree.tree_map(lambda *leaves: torch.stack(leaves), *each)


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def loss_of(base: ft.Base, **options: Any) -> Callable[..., Tensor]:
    def loss(tuned: ft.Finetuned, ids: Tensor) -> Tensor:
        return cross_entropy(ft.apply(base, tuned, input_ids=ids, **options)["logits"], ids)

    return loss


def of_params(function: Callable[..., Any], tuned: ft.Finetuned) -> Callable[..., Any]:
    return lambda params, *rest: function(tuned.replace(params=params), *rest)


# --- the same function


INPUTS: dict[str, tuple[Any, Any]] = {  # keyword inputs of N finetunes, and what vmap maps
    "ids": ({"input_ids": IDS}, {"input_ids": 0}),
    "shared ids": ({"input_ids": IDS[0]}, {"input_ids": None}),
    "ids of another axis": ({"input_ids": IDS.movedim(0, 2)}, {"input_ids": 2}),
    "mask": ({"input_ids": IDS, "attention_mask": MASK}, {"input_ids": 0, "attention_mask": 0}),
    "shared mask": ({"input_ids": IDS, "attention_mask": MASK[0]}, {"input_ids": 0, "attention_mask": None}),
    "positions": (
        {"input_ids": IDS, "position_ids": torch.arange(T).flip(0).expand(N, B, T)},
        {"input_ids": 0, "position_ids": 0},
    ),
    "packed": (  # two texts in some rows, in others one
        {"input_ids": IDS, "position_ids": torch.tensor([[[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]]).expand(N, B, T)},
        {"input_ids": 0, "position_ids": 0},
    ),
    "hidden states": ({"input_ids": IDS, "output_hidden_states": True}, {"input_ids": 0, "output_hidden_states": None}),
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("make", [llama, gpt2, opt, bert])
def test_vmap_is_the_loop(make: Callable[[], nn.Module], inputs: str, stacks: Stacks):
    base = ft.quantize_base_model(make())
    given, dims = INPUTS[inputs]
    tuned = ft.stack(finetunes(base, N))

    def run(tuned: ft.Finetuned, given: dict[str, Any]) -> Any:
        out = ft.apply(base, tuned, **given)
        found = [out["logits"], *(out["hidden_states"] if given.get("output_hidden_states") else ())]
        return [leaf * given["attention_mask"].unsqueeze(-1) if "attention_mask" in given else leaf for leaf in found]

    found = vmap(run, in_dims=(0, dims))(tuned, given)
    assert stacks.folded and N in stacks
    stacks.clear()
    each = [
        run(ft.index(tuned, i), {k: v if dims[k] is None else v.select(dims[k], i) for k, v in given.items()})
        for i in range(N)
    ]
    assert not stacks.folded
    assert_same(found, torch_pytree.tree_map(lambda *leaves: torch.stack(leaves), *each), FP32)


def test_embeddings_and_a_mask_of_four_axes(exact: ft.Base, stacks: Stacks):
    tuned = ft.stack(finetunes(exact, N))
    x = torch.randn(N, B, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    visible = (torch.ones(T, T).tril().bool() & (MASK != 0)[:, :, None, None, :]) | torch.eye(T).bool()

    def run(tuned: ft.Finetuned, x: Tensor, visible: Tensor) -> Tensor:
        return ft.apply(exact, tuned, inputs_embeds=x, attention_mask=visible)["logits"]

    found = vmap(run)(tuned, x, visible)
    assert stacks.folded
    assert_same(found, loop(run, tuned, x, visible), EXACT)


CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "bias": dict(linear_config=ft.LinearAdapterConfig(r=2, bias=True)),
    "dora": dict(linear_config=ft.LinearAdapterConfig(r=2, dora=True)),
    "pissa": dict(linear_config=ft.LinearAdapterConfig(r=2, init="pissa")),
    "plain norms": dict(adapt_layers={"q_proj"}, plain_layers={"norm", "input_layernorm"}),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_kind_of_finetune(exact: ft.Base, config: str, stacks: Stacks):
    tuned = ft.stack(finetunes(exact, N, **CONFIGS[config]))
    found = ft.stacked_value_and_grad(loss_of(exact), in_dims=(0, 0))(tuned, IDS)
    assert stacks.folded
    raw = vmap(ft.value_and_grad(loss_of(exact)))(tuned, IDS)
    assert stacks.folded
    expected = loop(ft.value_and_grad(loss_of(exact)), tuned, IDS)
    assert_same(found, expected, EXACT)
    assert_same(raw, expected, EXACT)


def test_finetunes_of_several_ranks(exact: ft.Base, stacks: Stacks):
    tuned = [finetunes(exact, 1, linear_config=ft.LinearAdapterConfig(r=r, alpha=2.0 * r))[0] for r in (1, 4, 2)]
    found = vmap(lambda t, x: ft.apply(exact, t, x)["logits"])(ft.stack(tuned), IDS)
    assert stacks.folded
    expected = torch.stack([ft.apply(exact, t, x)["logits"] for t, x in zip(tuned, IDS, strict=True)])
    assert_same(found, expected, EXACT)


@pytest.mark.parametrize("route", ["vmap", "vmap grad"])
@pytest.mark.parametrize("keys", ["one each", "one"])
def test_dropout_draws_the_same_masks(
    fused: ft.Base, route: str, keys: str, stacks: Stacks, unfolded: Callable[..., Any]
):
    """The masks of the mapped call: the same numbers, to the rounding of float64, where half of all are dropped."""
    base = fused
    assert base.skeleton.dropouts
    config = ft.LinearAdapterConfig(r=2, dropout=0.5)
    tuned = ft.stack(finetunes(base, N, linear_config=config))
    rng = ft.random.split(ft.random.key(3), N)

    def loss(tuned: ft.Finetuned, ids: Tensor, rng: Tensor) -> Tensor:
        return cross_entropy(ft.apply(base, tuned, input_ids=ids, train=True, rng=rng)["logits"], ids)

    dims: Any = (0, 0, 0) if keys == "one each" else (0, 0, None)
    rng = rng if keys == "one each" else rng[0]
    if route == "vmap":
        run = ft.stacked_value_and_grad(loss, in_dims=dims)
    else:
        run = vmap(ft.value_and_grad(loss), in_dims=dims)
    found = run(tuned, IDS, rng)
    assert stacks.folded
    stacks.clear()
    expected = unfolded(run, tuned, IDS, rng)
    assert not stacks.folded
    assert_same(found, expected, EXACT)
    assert largest_difference(found, run(tuned, IDS, rng + 1)) > 1e3 * EXACT


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_which_families(family: Family, stacks: Stacks):
    """Those of the list fold, and are known to have a stacked form; the others do not fold, and never try to."""
    base = ft.quantize_base_model(family.make())
    inputs = family.inputs((N, B), torch.Generator().manual_seed(0))
    tuned = ft.stack([ft.new_finetuned(base, **family.custom)] * N)
    if family.name not in NOT_FOLDED:
        vmap(lambda t, x: ft.apply(base, t, **x)["logits"])(tuned, inputs)
        assert stacks.folded
        assert not family.gaps.keys() & {"stacked", "stacked_custom", "stacked_grad", "mask_stacked"}
    else:
        assert not base.skeleton.rows_apart


NOT_FOLDED = {
    *("Qwen3-Next", "Jamba", "Nemotron-H", "Mamba", "Mamba 2", "RecurrentGemma"),  # ask a mask how many rows it has
    *("T5", "BART", "M2M100, NLLB", "Marian", "Whisper"),  # clamp all rows if one is infinite
    *("DeBERTa-v2", "Longformer", "CLIP"),  # have no stacked form
    *("Wav2Vec2", "ViT", "DINOv2", "Swin", "ConvNeXt"),  # are no language models
    *("MLP", "CNN and Linear", "nn.MultiheadAttention", "nn.TransformerEncoder", "nn.EmbeddingBag"),  # nor known
}


# --- derivatives


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_loop(exact: ft.Base, masked: bool, stacks: Stacks):
    tuned = ft.stack(finetunes(exact, N))

    def loss(tuned: ft.Finetuned, ids: Tensor, mask: Tensor) -> Tensor:
        out = ft.apply(exact, tuned, input_ids=ids, **({"attention_mask": mask} if masked else {}))["logits"]
        each = F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").reshape(B, T - 1)
        return (each * mask[:, :-1] * mask[:, 1:]).sum()

    expected = loop(
        lambda t, x, m: gradients_by_autograd(lambda p: loss(t.replace(params=p), x, m), t.params), tuned, IDS, MASK
    )
    assert not stacks.folded
    stacks.clear()
    lean = ft.stacked_value_and_grad(loss, in_dims=(0, 0, 0))(tuned, IDS, MASK)[1]
    raw = vmap(grad(of_params(loss, ft.index(tuned, 0))))(dict(tuned.params), IDS, MASK)
    nested = vmap(ft.value_and_grad(loss))(tuned, IDS, MASK)[1]
    assert stacks.folded and len(stacks) == 3
    for found in (lean, raw, nested):
        assert_same(found, expected, EXACT)


def test_gradients_of_inputs(exact: ft.Base, stacks: Stacks):
    """A prompt that all finetunes share gets a gradient from each; consts too, and what is not asked for none."""
    tuned = ft.stack(finetunes(exact, N))
    x = torch.randn(B, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(x: Tensor, scales: dict[str, Tensor], tuned: ft.Finetuned) -> Tensor:
        return ft.apply(exact, tuned.replace(consts=scales), inputs_embeds=x)["logits"].sin().sum()

    run = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0, 0))
    found = run(x, dict(tuned.consts), tuned)
    assert stacks.folded
    expected = loop(lambda c, t: grad(loss, argnums=(0, 1))(x, c, t), dict(tuned.consts), tuned)
    assert_same(found, expected, EXACT)


ORDERS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "grad of grad": lambda f, p, x: grad(lambda p: sum(g.square().sum() for g in grad(f)(p, x).values()))(p),
    "hvp": lambda f, p, x: jvp(lambda p: grad(f)(p, x), (p,), (p,))[1],
    "jvp": lambda f, p, x: jvp(lambda p: f(p, x), (p,), (p,))[1],
    "vjp": lambda f, p, x: vjp(lambda p: f(p, x), p)[1](torch.tensor(2.0, dtype=torch.float64))[0],
    "vjp twice": lambda f, p, x: [
        pull(torch.tensor(v, dtype=torch.float64))[0] for pull in [vjp(lambda p: f(p, x), p)[1]] for v in (1.0, 3.0)
    ],
    "jacrev": lambda f, p, x: jacrev(lambda p: torch.stack([f(p, x), f(p, x.flip(1)).square()]))(p),
    "jacfwd": lambda f, p, x: jacfwd(lambda p: f({**p, LEAF: p[LEAF]}, x))(p)[LEAF],
    "hessian": lambda f, p, x: hessian(lambda own: f({**p, LEAF: own}, x))(p[LEAF]),
    "derivative of a vjp": lambda f, p, x: grad(
        lambda v: sum(g.sin().sum() for g in vjp(lambda p: f(p, x), p)[1](v)[0].values())
    )(torch.tensor(2.0, dtype=torch.float64)),
    "derivative by a vjp made before": lambda f, p, x: [
        grad(lambda v: sum(g.sin().sum() for g in pull(v)[0].values()))(torch.tensor(2.0, dtype=torch.float64))  # noqa: B023
        for pull in [vjp(lambda p: f(p, x), p)[1]]
    ],
    "tangent by a vjp made before": lambda f, p, x: [
        jvp(lambda v: sum(g.sin().sum() for g in pull(v)[0].values()), *2 * [(torch.tensor(2.0, dtype=torch.float64),)])  # noqa: B023
        for pull in [vjp(lambda p: f(p, x), p)[1]]
    ],
    "stopped": lambda f, p, x: grad(lambda p: f(p, x) * without(f, p, x))(p),
}
LEAF = "transformer.h.1.mlp.c_fc.lora_b"


def without(f: Any, p: Any, x: Any) -> Tensor:
    with torch.no_grad():
        return f(p, x)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["apply", "loss"])
def test_every_other_derivative(fused: ft.Base, eager: ft.Base, order: str, kind: str):
    def run(base: ft.Base) -> Callable[..., Any]:
        loss = loss_of(base) if kind == "apply" else functools.partial(ft.causal_lm_loss, base)
        return functools.partial(ORDERS[order], of_params(loss, finetunes(base, N)[0]))

    params = dict(ft.stack(finetunes(fused, N)).params)
    assert_same(vmap(run(fused))(params, IDS), loop(run(eager), params, IDS), 10 * EXACT)


@pytest.mark.parametrize("made", ["before", "inside"])
def test_in_inference_mode(exact: ft.Base, made: str, stacks: Stacks, unfolded: Callable[..., Any]):
    """What the mapped call gives: torch.func.grad leaves the mode, in later versions of torch, or gives zeros."""
    tuned = ft.stack(finetunes(exact, N))
    left = set()

    def loss(tuned: ft.Finetuned, ids: Tensor) -> Tensor:
        left.add(not torch.is_inference_mode_enabled())
        return loss_of(exact)(tuned, ids)

    expected = ft.stacked_value_and_grad(loss_of(exact), in_dims=(0, 0))(tuned, IDS)
    stacks.clear()
    with torch.inference_mode():
        given = tuned if made == "before" else tuned.replace(params={k: v.clone() for k, v in tuned.params.items()})
        found = vmap(ft.value_and_grad(loss))(given, IDS)
        assert stacks.folded == (made == "before" and left == {True})
        assert largest_difference(found, unfolded(vmap(ft.value_and_grad(loss)), given, IDS)) <= 1e-6  # of a softmax
        assert_same(vmap(loss)(given, IDS), expected[0], EXACT)  # in float32, which eager attention has
    if left == {True}:
        assert_same(found, expected, 1e-6)


OUTSIDE: dict[str, Callable[[Any, Any], Any]] = {
    "grad": lambda f, p: grad(lambda p: vmap(f)(p, IDS).sin().sum())(p),
    "jvp": lambda f, p: jvp(lambda p: vmap(f)(p, IDS), (p,), (p,))[1],
    "jacrev": lambda f, p: jacrev(lambda p: vmap(f)(p, IDS))(p),
    "grad of vmap of grad": lambda f, p: grad(
        lambda p: sum(g.sin().sum() for g in vmap(grad(f))(p, IDS).values())  # type: ignore[arg-type, return-value]
    )(p),
    "plain of vmap": lambda f, p: gradients_by_autograd(lambda p: vmap(f)(p, IDS).sin().sum(), p),
    "plain of vmap of grad": lambda f, p: gradients_by_autograd(
        lambda p: sum(g.sin().sum() for g in vmap(grad(f))(p, IDS).values()),  # type: ignore[arg-type, return-value]
        p,
    ),
    "chunks": lambda f, p: vmap(f, chunk_size=2)(p, IDS),
}


@pytest.mark.parametrize("order", OUTSIDE)
@pytest.mark.parametrize("kind", ["apply", "loss"])
def test_every_derivative_of_a_mapped_call(
    fused: ft.Base, order: str, kind: str, stacks: Stacks, unfolded: Callable[..., Any]
):
    """What is differentiated outside of the vmap, a second time too, equals what it is without folding."""
    tuned = finetunes(fused, N)
    loss = loss_of(fused) if kind == "apply" else functools.partial(ft.causal_lm_loss, fused)
    params = dict(ft.stack(tuned).params)
    found = OUTSIDE[order](of_params(loss, tuned[0]), params)
    assert stacks.folded == (order in ("plain of vmap", "chunks"))
    assert_same(found, unfolded(OUTSIDE[order], of_params(loss, tuned[0]), params), EXACT)


# --- where it is not surely the same


def mapped(base: ft.Base, **given: Any) -> Callable[[ft.Finetuned], Any]:
    dims = {name: 0 if isinstance(value, Tensor) else None for name, value in given.items()}
    return lambda tuned: vmap(lambda t, x: ft.apply(base, t, **x)["logits"], in_dims=(0, dims))(tuned, given)


REFUSED: dict[str, dict[str, Any]] = {
    "positions without rows": {
        **{
            "input_ids": IDS,
            "attention_mask": torch.ones_like(MASK),
        },  # with a mask nobody asks whether they are packed
        "position_ids": torch.arange(T).flip(0).expand(N, 1, T),
    },
    "attentions": {"input_ids": IDS, "output_attentions": True},
    "labels": {"input_ids": IDS, "labels": IDS},
}


@pytest.mark.parametrize("inputs", REFUSED)
def test_inputs_that_are_not_rows(inputs: str, stacks: Stacks):
    base = ft.quantize_base_model(gpt2())
    given = REFUSED[inputs]
    tuned = ft.stack(finetunes(base, N))
    found = mapped(base, **given)(tuned)
    assert not stacks.folded
    expected = loop(lambda t, x: ft.apply(base, t, **{**given, **x})["logits"], tuned, only_tensors(given))
    assert_same(found, expected, FP32)


def only_tensors(given: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}


NESTED: dict[str, Callable[[ft.Base, ft.Finetuned], Any]] = {
    "per sample": lambda base, tuned: vmap(grad(of_params(loss_of(base), ft.index(tuned, 0))), in_dims=(None, 0))(
        dict(ft.index(tuned, 0).params), IDS[:, :1]
    ),
    "per sample of each": lambda base, tuned: vmap(vmap(loss_of(base), in_dims=(None, 0)))(tuned, IDS.unsqueeze(2)),
    "of each per sample": lambda base, tuned: vmap(vmap(loss_of(base)), in_dims=(None, 1))(tuned, IDS.unsqueeze(2)),
    "one finetune": lambda base, tuned: vmap(loss_of(base), in_dims=(None, 0))(ft.index(tuned, 0), IDS),
    "some leaves": lambda base, tuned: vmap(
        lambda own, ids: loss_of(base)(ft.index(tuned, 0).replace(params={**ft.index(tuned, 0).params, **own}), ids)
    )({name: leaf for name, leaf in tuned.params.items() if "q_proj" in name}, IDS),
    "the base model": lambda base, tuned: vmap(lambda ids: ft.apply(base, None, ids)["logits"])(IDS),
    "several bases": lambda base, tuned: vmap(lambda w, t, ids: loss_of(with_norm(base, w))(t, ids))(
        base.params["model.norm.weight"] * torch.arange(1.0, N + 1).unsqueeze(1), tuned, IDS
    ),
    "a gradient of the base": lambda base, tuned: vmap(
        lambda t, ids: grad(lambda w: loss_of(with_norm(base, w))(t, ids))(base.params["model.norm.weight"])
    )(tuned, IDS),
}


def with_norm(base: ft.Base, weight: Tensor) -> ft.Base:
    return ft.Base({**base.params, "model.norm.weight": weight}, base.skeleton, base.fingerprint)


@pytest.mark.parametrize("nested", NESTED)
def test_other_vmaps(base: ft.Base, nested: str, stacks: Stacks, unfolded: Callable[..., Any]):
    tuned = ft.stack(finetunes(base, N))
    found = NESTED[nested](base, tuned)
    assert not stacks.folded
    expected = unfolded(NESTED[nested], base, tuned)
    pairs = zip(torch_pytree.tree_leaves(found), torch_pytree.tree_leaves(expected), strict=True)
    assert all(torch.equal(f, e) for f, e in pairs)


# --- where there is no stacked form


def test_what_fails_once_is_not_tried_again(stacks: Stacks):
    """A classifier that takes one row at a time, having no padding token to find the last one by."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    base = ft.quantize_base_model(GPT2ForSequenceClassification(config).eval())
    assert base.skeleton.rows_apart
    tuned = ft.stack(finetunes(base, N))

    def run(ids: Tensor) -> Tensor:
        return vmap(lambda t, x: ft.apply(base, t, x)["logits"])(tuned, ids)

    found = run(IDS[:, :1])
    assert stacks == [N, None]  # tried, and mapped
    assert_same(found, loop(lambda t, x: ft.apply(base, t, x)["logits"], tuned, IDS[:, :1]), FP32)
    stacks.clear()
    assert torch.equal(run(IDS[:, :1]), found)
    assert stacks == [None]
    grads = vmap(grad(lambda p, x: ft.apply(base, ft.index(tuned, 0).replace(params=p), x)["logits"].sin().sum()))
    expected = loop(
        grad(lambda p, x: ft.apply(base, ft.index(tuned, 0).replace(params=p), x)["logits"].sin().sum()),
        dict(tuned.params),
        IDS[:, :1],
    )
    assert_same(grads(dict(tuned.params), IDS[:, :1]), expected, FP32)


def test_an_input_at_fault_is_told_of_and_forgotten(base: ft.Base, stacks: Stacks):
    tuned = ft.stack(finetunes(base, N))
    for wrong in (IDS + 100, IDS.float()):
        with pytest.raises((IndexError, RuntimeError), match=r"out of range|index|Long"):
            vmap(loss_of(base))(tuned, wrong)
    assert not base.skeleton.unfolded
    stacks.clear()
    vmap(loss_of(base))(tuned, IDS)
    assert stacks.folded


def test_out_of_memory_is_no_reason_to_need_more(base: ft.Base, stacks: Stacks, monkeypatch: pytest.MonkeyPatch):
    from finetuna_func import _functional

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    tuned = ft.stack(finetunes(base, N))
    with monkeypatch.context() as patch:
        patch.setattr(_functional, "run_stacked", fails)
        with pytest.raises(torch.OutOfMemoryError):
            vmap(loss_of(base))(tuned, IDS)
    assert not stacks and not base.skeleton.unfolded


def test_a_part_of_a_users_own_keeps_a_model_from_folding(stacks: Stacks):
    class Centred(nn.Module):
        """Rows meet: under vmap those of one finetune, in a stacked call all."""

        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    model = llama()
    model.model.norm = nn.Sequential(model.model.norm, Centred())
    base = ft.quantize_base_model(model)
    tuned = ft.stack(finetunes(base, N))
    found = vmap(lambda t, x: ft.apply(base, t, x)["logits"])(tuned, IDS)
    assert not stacks.folded
    assert_same(found, loop(lambda t, x: ft.apply(base, t, x)["logits"], tuned, IDS), FP32)
    assert largest_difference(ft.apply_stacked(base, tuned, IDS)["logits"], found) > 1e-3  # which is why


# --- the loss


LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "labels": {"labels": LABELS},
    "mask": {"attention_mask": MASK},
    "sum": {"reduction": "sum", "labels": LABELS},
    "none": {"reduction": "none", "attention_mask": MASK},
    "pieces": {"chunk_tokens": 5},
    "remat": {"remat": "blocks", "chunk_tokens": 5},
    "dropout": {"train": True, "rng": ft.random.split(ft.random.key(0), N)},
}


@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.parametrize("adapted_head", [False, True])
def test_the_loss_is_that_of_a_stack(options: str, adapted_head: bool, stacks: Stacks):
    base = ft.quantize_base_model(llama().double())
    config = ft.LinearAdapterConfig(r=2, dropout=0.25)
    head: dict[str, Any] = dict(adapt_layers={"q_proj", "lm_head"}, plain_layers=()) if adapted_head else {}
    tuned = ft.stack(finetunes(base, N, linear_config=config, **head))
    mapped = {name: value for name, value in LOSSES[options].items() if isinstance(value, Tensor)}
    others = {name: value for name, value in LOSSES[options].items() if name not in mapped}

    def loss(tuned: ft.Finetuned, ids: Tensor, mapped: dict[str, Tensor]) -> Tensor:
        found = ft.causal_lm_loss(base, tuned, ids, **mapped, **others)
        return found if others.get("reduction") != "none" else found.sin().sum((-2, -1))

    found = ft.stacked_value_and_grad(loss, in_dims=(0, 0, 0))(tuned, IDS, mapped)
    raw = vmap(ft.value_and_grad(loss))(tuned, IDS, mapped)
    assert stacks.folded
    stacks.clear()
    expected = ft.stacked_value_and_grad(loss)(tuned, IDS, mapped)
    assert stacks.folded
    stacks.clear()
    each = loop(ft.value_and_grad(loss), tuned, IDS, mapped)
    assert not stacks.folded
    for other in (found, raw, each):
        assert_same(other, expected, EXACT)


def test_the_head_sees_the_same_pieces(base: ft.Base, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    original = _losses._head_losses

    def noting(module: Any, call: Any, hidden: Tensor, *rest: Any) -> Tensor:
        seen.append(hidden[..., 0].numel())
        return original(module, call, hidden, *rest)

    monkeypatch.setattr(_losses, "_head_losses", noting)
    vmap(lambda t, x: ft.causal_lm_loss(base, t, x, chunk_tokens=10))(ft.stack(finetunes(base, N)), IDS)
    assert seen == [9, 9, 9, 9]  # three tokens of each finetune; mapped, a piece would be ten of each


# --- as fast, and as small


class Operations(TorchDispatchMode):
    """Counts what reaches a kernel, or a view."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def cost(run: Callable[[], Any]) -> tuple[int, int]:
    """Operations, and bytes at the peak."""
    run()  # the first call of each kind looks for weights that are read past their layers
    with Operations() as operations:
        run()
    with Live() as live:
        run()
    return operations.count, live.peak


@pytest.mark.parametrize("kind", ["apply", "loss"])
def test_the_cost_is_that_of_a_stack(kind: str, unfolded: Callable[..., Any]):
    """Up to an expanded const or two; and a gradient inside the vmap costs what one outside of it does.

    (It keeps what the loss makes of the logits once more, since torch.func.grad records that for a second derivative.)
    """
    base = ft.quantize_base_model(llama(num_hidden_layers=4, hidden_size=32, intermediate_size=64))
    tuned = ft.stack(finetunes(base, 4))
    ids = torch.randint(4, 32, (4, 2, 24), generator=torch.Generator().manual_seed(0))

    def one(tuned: ft.Finetuned, ids: Tensor) -> Tensor:
        return ft.causal_lm_loss(base, tuned, ids) if kind == "loss" else loss_of(base)(tuned, ids)

    def many(tuned: ft.Finetuned, ids: Tensor) -> Tensor:
        if kind == "loss":
            return ft.causal_lm_loss(base, tuned, ids)
        return vmap(cross_entropy)(ft.apply_stacked(base, tuned, input_ids=ids)["logits"], ids)

    folded = cost(lambda: ft.stacked_value_and_grad(many)(tuned, ids))
    mapped = cost(lambda: ft.stacked_value_and_grad(one, in_dims=(0, 0))(tuned, ids))
    raw = cost(lambda: vmap(ft.value_and_grad(one))(tuned, ids))
    assert mapped[0] <= 1.02 * folded[0] and mapped[1] <= 1.02 * folded[1]
    assert raw[0] <= 1.05 * folded[0] and raw[1] <= (1.02 if kind == "loss" else 1.3) * folded[1]

    before = unfolded(cost, lambda: ft.stacked_value_and_grad(one, in_dims=(0, 0))(tuned, ids))
    assert before[0] > 1.3 * folded[0] and before[1] > 1.1 * folded[1]
    before = unfolded(cost, lambda: vmap(ft.value_and_grad(one))(tuned, ids))
    assert before[0] > 1.5 * folded[0] and before[1] > 2 * folded[1]


def test_a_record_goes_as_it_is_read(base: ft.Base):
    """Nothing of a step is alive when its gradients are there."""
    tuned = ft.stack(finetunes(base, N))
    run = vmap(ft.value_and_grad(loss_of(base)))
    run(tuned, IDS)
    with Live() as live:
        out = run(tuned, IDS)
    assert 0 < live.now <= sum(leaf.untyped_storage().nbytes() for leaf in torch_pytree.tree_leaves(out))
    assert live.peak > 5 * live.now


# --- blocks


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many graphs the compiler has made; they run as they were captured."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()


@pytest.mark.parametrize("route", ["vmap", "vmap grad"])
@pytest.mark.parametrize("kind", ["apply", "loss"])
def test_compiled_blocks(route: str, kind: str, graphs: Callable[[], int]):
    base = ft.quantize_base_model(llama(num_hidden_layers=3))
    tuned = ft.stack(finetunes(base, N))

    def run(**options: Any) -> Any:
        loss = loss_of(base, **options) if kind == "apply" else functools.partial(ft.causal_lm_loss, base, **options)
        if route == "vmap":
            return ft.stacked_value_and_grad(lambda t, x: loss(t, x), in_dims=(0, 0))(tuned, IDS)
        return vmap(ft.value_and_grad(lambda t, x: loss(t, x)))(tuned, IDS)

    expected = run()
    assert graphs() == 0
    found = run(compile="blocks")
    assert graphs() == (2 if kind == "apply" else 3)  # a block, the last norm; and the head
    assert_same(found, expected, FP32)


@pytest.mark.parametrize("route", ["vmap", "vmap grad"])
def test_recomputed_blocks(exact: ft.Base, route: str):
    """The activations of one block are alive instead of those of all eight."""
    base = ft.quantize_base_model(llama(num_hidden_layers=8).double())
    tuned = ft.stack(finetunes(base, N))
    ids = IDS.repeat(1, 1, 4)

    def run(**options: Any) -> Any:
        loss = loss_of(base, **options)
        if route == "vmap":
            return ft.stacked_value_and_grad(loss, in_dims=(0, 0))(tuned, ids)
        return vmap(ft.value_and_grad(loss))(tuned, ids)

    assert_same(run(remat="blocks"), run(), EXACT)
    assert cost(lambda: run(remat="blocks"))[1] < 0.5 * cost(run)[1]


def test_remat_of_the_loss(exact: ft.Base, stacks: Stacks):
    tuned = ft.stack(finetunes(exact, N))
    loss = loss_of(exact)
    found = ft.stacked_value_and_grad(lambda t, x: ft.remat(loss)(t, x), in_dims=(0, 0))(tuned, IDS)
    assert stacks.folded
    assert_same(found, ft.stacked_value_and_grad(loss, in_dims=(0, 0))(tuned, IDS), EXACT)


def test_threads(base: ft.Base):
    tuned = ft.stack(finetunes(base, N))
    run = vmap(ft.value_and_grad(loss_of(base)))
    expected = run(tuned, IDS)
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        for _ in range(3):
            found[number] = run(tuned, IDS)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert_same(found[number], expected, FP32)
