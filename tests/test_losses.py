"""`ft.causal_lm_loss` against the plain formula on full logits, and how little of them it makes.

The formula is stated here again. Compared in float32 at 1e-5 of the largest number, the tolerance of the conformance
suite for the model itself, gradients at twice that; in float64, where the arithmetic is the same but for the order of
sums, at 1e-12.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as torch_pytree
from families import FAMILIES, Family
from live import Live
from models import SmallLm, Tiny, assert_close, finetunes, gpt2, llama
from torch import Tensor
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import finetuna_func as ft
from finetuna_func import _losses

FP32, EXACT = 1e-5, 1e-12
N, B, T = 3, 2, 7
FAMILY = {family.name: family for family in FAMILIES}
CAUSAL = [family for family in FAMILIES if family.labels is not None and set(family.outputs) == {"logits"}]
CAUSAL = [family for family in CAUSAL if family.generates and set(family.masks) <= {"attention_mask"}]
IN_CI = {"GPT-J", "OPT", "Mixtral", "Gemma 2", "Cohere", "MPT"}
FAMILIES_OF_CAUSAL = [
    pytest.param(family, id=family.name, marks=() if family.name in IN_CI else pytest.mark.slow) for family in CAUSAL
]
IDS = torch.randint(4, 32, (N, B, T), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(N, B, T, dtype=torch.long)
LEFT, RIGHT = MASK.clone(), MASK.clone()
LEFT[:, 0, :3] = 0
RIGHT[:, 1, 4:] = 0


def formula(logits: Tensor, labels: Tensor, reduction: str = "mean", ignore_index: int = -100) -> Tensor:
    """``(..., B, T, V)`` and ``(..., B, T)`` to a loss for all but the last two axes of the labels."""
    logits, labels = logits[..., :-1, :], labels[..., 1:]
    counted = labels != ignore_index
    chosen = torch.where(counted, labels, 0).unsqueeze(-1)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.where(counted, wide.logsumexp(-1) - wide.gather(-1, chosen).squeeze(-1), 0)
    if reduction == "none":
        return losses
    total = losses.sum((-2, -1))
    return total if reduction == "sum" else total / counted.sum((-2, -1)).clamp(min=1)


def plain(
    base: ft.Base, tuned: ft.Finetuned | None, ids: Tensor, labels: Tensor | None = None, **options: Any
) -> Tensor:
    """The whole logits, by `apply` or `apply_stacked`."""
    reductions = {name: options.pop(name) for name in ("reduction", "ignore_index") if name in options}
    stacked = tuned is not None and tuned.stack_size is not None
    out = (
        ft.apply_stacked(base, tuned, input_ids=ids, **options)
        if stacked
        else ft.apply(base, tuned, input_ids=ids, **options)
    )
    return formula(out.logits, ids if labels is None else labels, **reductions)


def gradients(loss_fn: Callable[..., Tensor], base: ft.Base, tuned: ft.Finetuned, *args: Any, **options: Any) -> Any:
    one = tuned.stack_size is None
    transform = ft.value_and_grad if one else ft.stacked_value_and_grad
    return transform(lambda t: loss_fn(base, t, *args, **options))(tuned)


def assert_gradients(found: Any, expected: Any, tolerance: float, *, unlike: Any) -> None:
    """Values by themselves; gradients relative to the largest of all at twice the tolerance."""
    assert_close(found[0], expected[0], tolerance, unlike=unlike[0])
    assert list(found[1]) == list(expected[1])
    scale = max(float(leaf.abs().max()) for leaf in expected[1].values())
    assert max(float((found[1][n] - e).abs().max()) for n, e in expected[1].items()) <= 2 * tolerance * scale
    assert max(float((found[1][n] - u).abs().max()) for n, u in unlike[1].items()) > 40 * tolerance * scale


# --- every family


@pytest.mark.parametrize("family", FAMILIES_OF_CAUSAL)
def test_every_family(family: Family):
    """Single, stacked and the base alone; caps and scales after the head are the model's own."""
    base = ft.quantize_base_model(family.make())
    tuned = finetunes(base, N, **family.custom)
    stacked = ft.stack(tuned)
    labels = IDS.clone()
    labels[:, 0, :3] = -100
    with torch.no_grad():
        of_base = ft.causal_lm_loss(base, None, IDS[0], labels[0], chunk_tokens=5, reduction="none")
        assert of_base.shape == (B, T - 1)
        assert of_base.dtype == torch.float32
        expected, unlike = (plain(base, t, IDS[0], labels[0], reduction="none") for t in (None, tuned[0]))
        assert_close(of_base, expected, FP32, unlike=unlike)
    expected = gradients(plain, base, tuned[0], IDS[0], labels[0])
    found = gradients(ft.causal_lm_loss, base, tuned[0], IDS[0], labels[0], chunk_tokens=5)
    assert_gradients(found, expected, FP32, unlike=gradients(plain, base, tuned[1], IDS[0], labels[0]))
    expected = gradients(plain, base, stacked, IDS, labels)
    found = gradients(ft.causal_lm_loss, base, stacked, IDS, labels, chunk_tokens=5)
    unlike = torch_pytree.tree_map(lambda leaf: leaf.roll(1, 0), expected)
    assert_gradients(found, expected, FP32, unlike=unlike)


@pytest.mark.parametrize(("name", "setting"), [("Gemma 2", "final_logit_softcapping"), ("Granite", "logits_scaling")])
def test_what_comes_after_the_head(name: str, setting: str):
    """A cap, or a scale, that bites: other settings give another loss."""
    model = FAMILY[name].make()
    assert getattr(model.config, setting) is not None
    losses = []
    for value in (0.5, 2.0):
        setattr(model.config, setting, value)
        model.logits_scaling = value  # where Granite keeps it
        base = ft.quantize_base_model(model)
        tuned = finetunes(base, 1)[0]
        losses.append(ft.causal_lm_loss(base, tuned, IDS[0], chunk_tokens=3))
        assert_close(losses[-1], plain(base, tuned, IDS[0]), FP32, unlike=losses[0] * 1.1)
    assert not torch.allclose(*losses, rtol=0.01)


def test_a_router_loss_of_the_config_is_no_obstacle():
    """Outputs of the body beside its hidden states have no row per sample and are nobody's business here."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    base = ft.quantize_base_model(MixtralForCausalLM(MixtralConfig(**sizes, output_router_logits=True)).eval())
    tuned = finetunes(base, N)
    loop = torch.stack([ft.causal_lm_loss(base, t, i) for t, i in zip(tuned, IDS, strict=True)])
    expected = torch.stack([plain(base, t, i) for t, i in zip(tuned, IDS, strict=True)])
    assert_close(loop, expected, FP32, unlike=expected.roll(1))
    assert_close(ft.causal_lm_loss(base, ft.stack(tuned), IDS), expected, FP32, unlike=expected.roll(1))


# --- every kind of head


HEADS: dict[str, dict[str, Any]] = {
    "plain": {"plain_layers": {"lm_head"}},
    "frozen": {"plain_layers": set()},
    "adapted": {"adapt_layers": {"lm_head", "q_proj"}, "plain_layers": set()},
    "adapted with a bias": {
        "adapt_layers": {"lm_head"},
        "plain_layers": set(),
        "linear_config": ft.LinearAdapterConfig(r=3, alpha=2.0, bias=True),
    },
    "DoRA": {
        "adapt_layers": {"lm_head", "q_proj"},
        "plain_layers": set(),
        "linear_config": ft.LinearAdapterConfig(r=3, alpha=2.0, dora=True),
    },
}


@pytest.mark.parametrize("int8", [True, False], ids=["int8 head", "float head"])
@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head(head: str, tied: bool, int8: bool):
    """Frozen in 8 bits or float, trained, adapted; tied to an embedding that is adapted where the head is not."""
    base = ft.quantize_base_model(llama(tied=tied), modules_not_to_quantize=None if int8 else {"lm_head"})
    assert (base.params["model.embed_tokens.weight" if tied else "lm_head.weight"].dtype == torch.int8) == int8
    options = dict(HEADS[head])
    if head == "frozen" and tied:
        options["adapt_layers"] = {"embed_tokens", "q_proj"}
    tuned = finetunes(base, N, **options)
    stacked = ft.stack(tuned)
    expected = gradients(plain, base, stacked, IDS)
    for chunk in (4, 9):  # one token of each at a time, or three
        found = gradients(ft.causal_lm_loss, base, stacked, IDS, chunk_tokens=chunk)
        assert_gradients(found, expected, FP32, unlike=torch_pytree.tree_map(lambda leaf: leaf.roll(1, 0), expected))
    expected = gradients(plain, base, tuned[0], IDS[0])
    found = gradients(ft.causal_lm_loss, base, tuned[0], IDS[0], chunk_tokens=3)
    assert_gradients(found, expected, FP32, unlike=gradients(plain, base, tuned[1], IDS[0]))


@pytest.mark.parametrize("chunk", [1, 5, None])
def test_dropout_on_the_head(chunk: int | None):
    """One mask for all tokens, the one that `apply` draws, however small the pieces."""
    base = ft.quantize_base_model(llama())
    config = ft.LinearAdapterConfig(r=3, alpha=2.0, dropout=0.5)
    tuned = finetunes(base, N, adapt_layers={"lm_head", "q_proj"}, plain_layers=set(), linear_config=config)
    stacked, key = ft.stack(tuned), ft.random.key(3)
    options: dict[str, Any] = dict(train=True, rng=key)
    found = gradients(ft.causal_lm_loss, base, stacked, IDS, chunk_tokens=chunk, **options)
    expected = gradients(plain, base, stacked, IDS, **options)
    unlike = gradients(plain, base, stacked, IDS, train=True, rng=ft.random.key(4))
    assert_gradients(found, expected, FP32, unlike=unlike)
    found = gradients(ft.causal_lm_loss, base, tuned[0], IDS[0], chunk_tokens=chunk, **options)
    expected = gradients(plain, base, tuned[0], IDS[0], **options)
    unlike = gradients(plain, base, tuned[0], IDS[0])
    assert_gradients(found, expected, FP32, unlike=unlike)


def test_a_model_without_a_body():
    """T5 computes its logits as a whole."""
    from models import t5

    base = ft.quantize_base_model(t5())
    assert base.skeleton.body is None
    tuned = finetunes(base, 2)
    decoder = IDS[1]
    found = gradients(ft.causal_lm_loss, base, tuned[0], IDS[0], decoder_input_ids=decoder)
    expected = gradients(plain, base, tuned[0], IDS[0], decoder_input_ids=decoder)
    unlike = gradients(plain, base, tuned[1], IDS[0], decoder_input_ids=decoder)
    assert_gradients(found, expected, 2e-5, unlike=unlike)  # T5's own tolerance


# --- labels, masks, reductions, pieces


@pytest.fixture(scope="module")
def base() -> ft.Base:
    return ft.quantize_base_model(llama())


@pytest.fixture(scope="module")
def exact() -> ft.Base:
    """GPT-2, all in float64 (Llama's norm computes in float32), with attention that has second derivatives."""
    model = gpt2().double()
    model.set_attn_implementation("eager")
    return ft.quantize_base_model(model)


@pytest.mark.parametrize("chunk", [1, 3, 7, 2 * T, 1000, None])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_pieces_and_reductions(exact: ft.Base, reduction: str, chunk: int | None):
    tuned = finetunes(exact, N)
    stacked = ft.stack(tuned)
    options: dict[str, Any] = dict(reduction=reduction)
    shape = {"mean": (), "sum": (), "none": (B, T - 1)}[reduction]
    found = ft.causal_lm_loss(exact, stacked, IDS, chunk_tokens=chunk, **options)
    assert found.dtype == torch.float64
    assert found.shape == (N, *shape)
    expected = plain(exact, stacked, IDS, **options)
    assert_close(found, expected, EXACT, unlike=expected.roll(1, 0))
    single = ft.causal_lm_loss(exact, tuned[0], IDS[0], chunk_tokens=chunk, **options)
    assert single.shape == shape
    assert_close(single, expected[0], EXACT, unlike=expected[1])


@pytest.mark.parametrize("ignore_index", [-100, 5, -1])
def test_labels_that_do_not_count(exact: ft.Base, ignore_index: int):
    """Some, and of one finetune all: then its loss and its gradient are zero."""
    stacked = ft.stack(finetunes(exact, N))
    labels = IDS.roll(1, 0).clone()
    labels[0, 0, 2:5] = ignore_index
    labels[1] = ignore_index
    options: dict[str, Any] = dict(ignore_index=ignore_index)
    found = gradients(ft.causal_lm_loss, exact, stacked, IDS, labels, chunk_tokens=4, **options)
    expected = gradients(plain, exact, stacked, IDS, labels, **options)
    unlike = gradients(plain, exact, stacked, IDS, IDS.roll(1, 0))
    assert_gradients(found, expected, EXACT, unlike=unlike)
    assert found[0][1] == 0
    assert all(not leaf[1].any() for leaf in found[1].values())
    assert any(leaf[0].any() for leaf in found[1].values())


@pytest.mark.parametrize("mask", [LEFT, RIGHT, LEFT * RIGHT, MASK], ids=["left", "right", "both", "none"])
def test_labels_by_default(exact: ft.Base, mask: Tensor):
    """The ids, without those that are hidden and without those that follow on a hidden one."""
    stacked = ft.stack(finetunes(exact, N))
    labels = torch.where(mask.bool(), IDS, -100)
    labels[..., 1:] = torch.where(mask[..., :-1].bool(), labels[..., 1:], -100)
    found = ft.causal_lm_loss(exact, stacked, IDS, attention_mask=mask, chunk_tokens=4)
    expected = plain(exact, stacked, IDS, labels, attention_mask=mask)
    assert_close(found, expected, EXACT, unlike=plain(exact, stacked, IDS.flip(-1), labels))
    for i, tuned in enumerate(ft.unstack(stacked)):
        one = ft.causal_lm_loss(exact, tuned, IDS[i], attention_mask=mask[i].bool())
        assert_close(one, expected[i], EXACT, unlike=expected[i - 1])
    if not mask.all():
        assert not torch.allclose(expected, ft.causal_lm_loss(exact, stacked, IDS), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_integers_of_other_widths(base: ft.Base, dtype: torch.dtype):
    tuned = finetunes(base, 1)[0]
    labels = IDS[1]
    expected = ft.causal_lm_loss(base, tuned, IDS[0], labels)
    assert torch.equal(ft.causal_lm_loss(base, tuned, IDS[0], labels.to(dtype)), expected)
    assert not torch.equal(ft.causal_lm_loss(base, tuned, IDS[0]), expected)
    if dtype == torch.int32:  # nn.Embedding takes this one beside int64
        assert torch.equal(ft.causal_lm_loss(base, tuned, IDS[0].to(dtype)), ft.causal_lm_loss(base, tuned, IDS[0]))


def test_one_token(base: ft.Base):
    """Nothing to predict."""
    stacked = ft.stack(finetunes(base, N))
    loss, grads = gradients(ft.causal_lm_loss, base, stacked, IDS[..., :1])
    assert not loss.any()
    assert not any(leaf.any() for leaf in grads.values())
    assert ft.causal_lm_loss(base, stacked, IDS[..., :1], reduction="none").shape == (N, B, 0)


def test_other_inputs_of_the_model(base: ft.Base):
    tuned = finetunes(base, 1)[0]
    positions = torch.arange(T).flip(0).expand(B, T)
    found = ft.causal_lm_loss(base, tuned, IDS[0], position_ids=positions, return_dict=False, output_hidden_states=True)
    expected = plain(base, tuned, IDS[0], position_ids=positions)
    assert_close(found, expected, FP32, unlike=plain(base, tuned, IDS[0]))


def test_bf16():
    """The body's rounding errors are the same; the head rounds its logits either way, and the loss is float32."""
    base = ft.quantize_base_model(llama().bfloat16())
    stacked = ft.stack(finetunes(base, N))
    found = gradients(ft.causal_lm_loss, base, stacked, IDS, chunk_tokens=4)
    assert found[0].dtype == torch.float32
    expected = gradients(plain, base, stacked, IDS)
    # Sums of other lengths, rounded to 8 bits: two roundings of 2**-9 in the values, some in the gradients
    unlike = torch_pytree.tree_map(lambda leaf: leaf.roll(1, 0), expected)
    assert_close(found[0], expected[0], 2**-8, unlike=2 * expected[0])
    scale = max(float(leaf.abs().max()) for leaf in expected[1].values())
    assert max(float((found[1][n] - e).abs().max()) for n, e in expected[1].items()) <= 2**-5 * scale
    assert max(float((found[1][n] - u).abs().max()) for n, u in unlike[1].items()) > 4 * 2**-5 * scale


# --- derivatives of every kind


def of_params(base: ft.Base, tuned: ft.Finetuned, loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return lambda params, ids: loss(base, tuned.replace(params=params), ids, **options)


TRANSFORMS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "vmap": lambda f, one, many: vmap(f)(many, IDS),
    "vmap grad": lambda f, one, many: vmap(grad(f))(many, IDS),
    "per sample": lambda f, one, many: vmap(grad(f), in_dims=(None, 0))(one, IDS[0].unsqueeze(1)),
    "jvp": lambda f, one, many: jvp(lambda p: f(p, IDS[0]), (one,), (one,)),
    "hvp": lambda f, one, many: jvp(lambda p: grad(f)(p, IDS[0]), (one,), (one,))[1],
    "grad of grad": lambda f, one, many: grad(
        lambda p: torch.stack([g.square().sum() for g in grad(f)(p, IDS[0]).values()]).sum()
    )(one),
    "vmap grad of grad": lambda f, one, many: vmap(
        grad(lambda p, x: torch.stack([g.square().sum() for g in grad(f)(p, x).values()]).sum())
    )(many, IDS),
}


@pytest.mark.parametrize("remat", [pytest.param(None, marks=pytest.mark.slow), "blocks"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(exact: ft.Base, transform: str, remat: Any):
    tuned = finetunes(exact, N)
    many = dict(ft.stack(tuned).params)
    run = TRANSFORMS[transform]
    found = run(of_params(exact, tuned[0], ft.causal_lm_loss, chunk_tokens=4, remat=remat), dict(tuned[0].params), many)
    expected = run(of_params(exact, tuned[0], plain), dict(tuned[0].params), many)
    others = {name: leaf.roll(1, 0) for name, leaf in many.items()}
    unlike = run(of_params(exact, tuned[0], plain), dict(tuned[1].params), others)
    found, expected, unlike = (torch_pytree.tree_leaves(tree) for tree in (found, expected, unlike))
    scale = max(float(leaf.abs().max()) for leaf in expected)
    assert max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) <= EXACT * scale
    assert max(float((f - u).abs().max()) for f, u in zip(found, unlike, strict=True)) > 1e3 * EXACT * scale


def test_many_cotangents_at_once(exact: ft.Base):
    """Several backward passes by one, as for a Jacobian, are those one after another."""
    stacked = ft.stack(finetunes(exact, N))
    params = {name: leaf.detach().requires_grad_() for name, leaf in stacked.params.items()}
    losses = ft.causal_lm_loss(exact, stacked.replace(params=params), IDS, chunk_tokens=4)
    cotangents = torch.randn(4, N, dtype=losses.dtype, generator=torch.Generator().manual_seed(0))

    def pulled_back(cotangents: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(losses, list(params.values()), cotangents, retain_graph=True, **options)

    found = pulled_back(cotangents, is_grads_batched=True)
    one_by_one = [torch.stack(own) for own in zip(*map(pulled_back, cotangents), strict=True)]
    scale = max(float(own.abs().max()) for own in one_by_one)
    assert max(float((f - own).abs().max()) for f, own in zip(found, one_by_one, strict=True)) <= EXACT * scale
    assert max(float((f - own.roll(1, 0)).abs().max()) for f, own in zip(found, one_by_one, strict=True)) > 0.1 * scale


def test_gradcheck():
    """Against finite differences; second derivatives too."""
    base = ft.quantize_base_model(SmallLm().double())
    tuned = finetunes(base, 1, adapt_layers={"top.0", "fc"}, plain_layers=set())[0]
    names = ["inner.blocks.0.fc.lora_a", "top.0.lora_b"]
    leaves = [tuned.params[name].detach().clone().requires_grad_() for name in names]

    def loss(*leaves: Tensor, remat: Any = None) -> Tensor:
        params = {**tuned.params, **dict(zip(names, leaves, strict=True))}
        return ft.causal_lm_loss(base, tuned.replace(params=params), IDS[0, :, :4], chunk_tokens=3, remat=remat)

    def wrong(*leaves: Tensor) -> Tensor:
        return loss(leaves[0].detach(), *leaves[1:]) + 0 * leaves[0].sum()

    options: dict[str, Any] = dict(fast_mode=True, check_undefined_grad=False)
    for function in (loss, functools.partial(loss, remat="blocks")):
        assert gradcheck(function, leaves, **options)
        assert gradgradcheck(function, leaves, **options)
    assert not gradcheck(wrong, leaves, raise_exception=False, **options)


# --- memory


@pytest.mark.parametrize("route", ["single", "stacked", "vmap grad"])
@pytest.mark.parametrize("head", ["frozen", "adapted"])
def test_logits_never_exist_as_a_whole(head: str, route: str):
    """256 tokens and 1024 words: 1 MiB of logits. In pieces of 32 tokens nothing as large as a quarter is made."""
    base = ft.quantize_base_model(llama(vocab_size=1024), modules_not_to_quantize=None)
    tuned = finetunes(
        base, 2, **HEADS[head] | {"adapt_layers": {"q_proj"} | ({"lm_head"} if head == "adapted" else set())}
    )
    ids = torch.randint(4, 1024, (2, 4, 32), generator=torch.Generator().manual_seed(0))
    stacked = ft.stack(tuned)
    logits = ids.numel() * 1024 * 4 // (2 if route == "single" else 1)

    def run(loss: Callable[..., Tensor], **options: Any) -> Any:
        if route == "single":
            return gradients(loss, base, tuned[0], ids[0], **options)
        if route == "stacked":
            return gradients(loss, base, stacked, ids, **options)
        one = of_params(base, tuned[0], loss, **options)
        return vmap(grad(one))(dict(stacked.params), ids)

    watched = {}
    options: dict[str, Any] = dict(chunk_tokens=16 if route == "vmap grad" else 32)
    for loss, own in ((plain, {}), (ft.causal_lm_loss, options)):
        run(loss, **own)
        with Live() as watched[loss]:
            run(loss, **own)
    assert watched[plain].largest >= logits
    assert watched[ft.causal_lm_loss].largest <= logits / 4
    assert watched[ft.causal_lm_loss].peak < 0.6 * watched[plain].peak


def test_the_size_of_a_piece_by_default(base: ft.Base, monkeypatch: pytest.MonkeyPatch):
    """As many tokens as have 256 MiB of fp32 logits (32 on a CPU), but 128 at least."""
    for device, nbytes in (("cuda", 2**28), ("meta", 2**28), ("cpu", 2**25)):
        where = torch.device(device)
        assert _losses.piece_tokens(32_000, None, where) == nbytes // 128_000
        assert _losses.piece_tokens(32_000, None, where, 2) == nbytes // 64_000
        assert _losses.piece_tokens(10_000_000, None, where) == 128
        assert _losses.piece_tokens(32_000, 7, where) == 7
    seen: list[int] = []
    original = _losses._head_losses

    def noting(module: Any, call: Any, hidden: Tensor, *rest: Any) -> Tensor:
        seen.append(hidden[..., 0].numel())
        return original(module, call, hidden, *rest)

    monkeypatch.setattr(_losses, "_head_losses", noting)
    stacked = ft.stack(finetunes(base, N))
    ft.causal_lm_loss(base, stacked, IDS, chunk_tokens=10)  # three tokens of each at most, and two divide the fourteen
    assert seen == [6] * 7
    seen.clear()
    ft.causal_lm_loss(base, stacked, IDS.reshape(N, 1, -1)[..., :13], chunk_tokens=12)  # nothing divides thirteen
    assert seen == [12, 12, 12, 3]


# --- compiled


def test_compiled(monkeypatch: pytest.MonkeyPatch):
    """The head too; the compiler's limit of eight graphs is not reached by as many lengths and odd last pieces."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    base = ft.quantize_base_model(SmallLm())
    stacked = ft.stack(finetunes(base, N))
    ids = torch.randint(4, 32, (N, B, 20), generator=torch.Generator().manual_seed(0))
    for length in range(7, 18):
        found = gradients(ft.causal_lm_loss, base, stacked, ids[..., :length], chunk_tokens=24, compile="blocks")
        expected = gradients(whole, base, stacked, ids[..., :length])
        assert_gradients(found, expected, FP32, unlike=gradients(whole, base, stacked, ids[..., -length:]))
    torch.compiler.reset()


def test_a_compiled_head_is_one_graph_with_its_gradients(monkeypatch: pytest.MonkeyPatch):
    base, asked, formed = ft.quantize_base_model(SmallLm()), [], []

    def noted(module: torch.nn.Module, function: Any, *, remat: bool = False) -> Any:
        def run(*args: Any) -> Any:
            out = function(*args)
            if function is _losses._head_gradients:
                formed.append(out[2])
            return out

        asked.append(function.__name__)
        return run

    monkeypatch.setattr(_losses, "compiled", noted)
    stacked = ft.stack(finetunes(base, N))
    ids = torch.arange(N * B * 8).view(N, B, 8) % 32
    options = {"chunk_tokens": 24, "compile": "blocks"}
    found = gradients(ft.causal_lm_loss, base, stacked, ids, **options)
    assert set(asked) == {"_head_gradients"}
    expected = gradients(whole, base, stacked, ids)
    assert_gradients(found, expected, FP32, unlike=gradients(whole, base, stacked, (ids + 1) % 32))
    asked.clear()
    assert formed[-1] is not None
    head = ft.stack([ft.new_finetuned(base, adapt_layers=(), plain_layers=("top.0",))] * N)
    found = gradients(ft.causal_lm_loss, base, head, ids, **options)  # none for hidden states
    assert set(asked) == {"_head_gradients"} and formed[-1] is None
    expected = gradients(whole, base, head, ids)
    assert_gradients(found, expected, FP32, unlike=gradients(whole, base, head, (ids + 1) % 32))
    asked.clear()
    with torch.no_grad():
        ft.causal_lm_loss(base, stacked, ids, **options)
    assert set(asked) == {"_head_losses"}
    asked.clear()
    gradients(ft.causal_lm_loss, base, stacked, ids, chunk_tokens=24)
    assert not asked


def test_pieces_of_a_frozen_head_share_a_graph(monkeypatch: pytest.MonkeyPatch):
    """On a GPU. Of one that is trained, the compiler would keep the logits of each for its gradient."""
    base, given = ft.quantize_base_model(SmallLm()), []
    original = _losses._head_gradients

    def noting(module: Any, call: Any, hidden: Tensor, *rest: Any) -> Any:
        given.append((hidden.shape[-2], rest[3]))
        return original(module, call, hidden, *rest)

    monkeypatch.setattr(_losses, "_head_gradients", noting)
    monkeypatch.setattr(_losses, "compiled", lambda module, function, remat=False: function)
    monkeypatch.setattr(_losses.kernels, "available", lambda device: True)  # which takes no logits on a CPU
    frozen = ft.stack(finetunes(base, N, adapt_layers={"fc"}, plain_layers=set()))
    trained = ft.stack([ft.new_finetuned(base, adapt_layers=(), plain_layers=("top.0",))] * N)
    ids = torch.arange(N * B * 10).view(N, B, 10) % 32
    for stack, expected in ((frozen, [(16, 4), (4, 4)]), (trained, [(4, 4)] * 5)):
        given.clear()
        found = gradients(ft.causal_lm_loss, base, stack, ids, chunk_tokens=4 * N, compile="blocks")
        assert given == expected
        unlike = gradients(whole, base, stack, (ids + 1) % 32)
        assert_gradients(found, gradients(whole, base, stack, ids), FP32, unlike=unlike)


# --- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(input_ids=IDS), ValueError, r"shape \(3, 2, 7\); expected \(B, T\) for one finetune"),
        (dict(input_ids=IDS[0, 0]), ValueError, r"expected \(B, T\) for one finetune"),
        (dict(input_ids=IDS[0, :0]), ValueError, "hold no tokens"),
        (dict(input_ids=IDS[0].tolist()), TypeError, "input_ids is a list; expected a tensor"),
        (dict(input_ids=IDS[0].float()), TypeError, "input_ids are torch.float32; expected token ids"),
        (dict(labels=IDS[0, :, 1:]), ValueError, r"labels have shape \(2, 6\); expected .* \(2, 7\), not shifted"),
        (dict(labels=IDS[0].float()), TypeError, "labels are torch.float32; expected token ids, torch.long"),
        (dict(labels=IDS[0] > 3), TypeError, "labels are torch.bool"),
        (dict(labels=IDS[0].tolist()), TypeError, "labels is a list; expected a tensor"),
        (dict(attention_mask=MASK), ValueError, r"attention_mask have shape \(3, 2, 7\)"),
        (dict(reduction="max"), ValueError, r"reduction='max'\): expected 'mean', 'sum' or 'none'"),
        (dict(chunk_tokens=0), ValueError, r"chunk_tokens=0\): expected a positive number of tokens"),
        (dict(chunk_tokens=1.5), ValueError, "chunk_tokens=1.5"),
        (dict(chunk_tokens=True), ValueError, "chunk_tokens=True"),
        (dict(remat="all"), ValueError, r"causal_lm_loss\(remat='all'\): expected 'blocks' or None"),
        (dict(compile=True), ValueError, r"causal_lm_loss\(compile=True\): expected 'blocks' or None"),
        (dict(rng=3), TypeError, "rng is a int"),
    ],
)
def test_refusals(base: ft.Base, change: dict[str, Any], error: type[Exception], message: str):
    inputs: dict[str, Any] = {"input_ids": IDS[0], **change}
    with pytest.raises(error, match=message):
        ft.causal_lm_loss(base, finetunes(base, 1)[0], **inputs)


def test_refusals_of_stacks_and_bases(base: ft.Base):
    stacked = ft.stack(finetunes(base, N))
    with pytest.raises(ValueError, match=r"expected \(3, B, T\) for a stack of 3 finetunes"):
        ft.causal_lm_loss(base, stacked, IDS[:2])
    with pytest.raises(ValueError, match=r"rng has shape \(2,\); expected \(\) or \(3,\)"):
        ft.causal_lm_loss(base, stacked, IDS, train=True, rng=ft.random.split(ft.random.key(0), 2))
    with pytest.raises(ValueError, match="belongs to base"):
        ft.causal_lm_loss(ft.quantize_base_model(gpt2()), ft.index(stacked, 0), IDS[0])
    with pytest.raises(TypeError, match="expected a Base first"):
        ft.causal_lm_loss(llama(), None, IDS[0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'input_ids'"):
        ft.causal_lm_loss(ft.quantize_base_model(Tiny()), None, IDS[0])


def test_nothing_is_left_behind(base: ft.Base):
    """After an exception in the head, calls go on as before."""
    tuned = finetunes(base, 1)[0]
    expected = ft.apply(base, tuned, IDS[0]).logits
    with pytest.raises(IndexError):
        ft.causal_lm_loss(base, tuned, IDS[0], IDS[0] + 1000)
    assert torch.equal(ft.apply(base, tuned, IDS[0]).logits, expected)
    assert not torch.equal(ft.apply(base, None, IDS[0]).logits, expected)


def test_a_backward_pass_after_other_calls(base: ft.Base):
    tuned = finetunes(base, N)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in tuned[0].params.items()}
    loss = ft.causal_lm_loss(base, tuned[0].replace(params=leaves), IDS[0], chunk_tokens=3)
    ft.causal_lm_loss(base, ft.stack(tuned), IDS)
    with torch.no_grad():
        ft.apply(base, tuned[1], IDS[1])
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    expected = gradients(plain, base, tuned[0], IDS[0])
    assert_gradients((loss, found), expected, FP32, unlike=gradients(plain, base, tuned[1], IDS[0]))


def test_a_head_by_another_name():
    """Below a module of the model's own, with a bias, a scale and a cap."""
    base = ft.quantize_base_model(SmallLm(), modules_not_to_quantize={"top.0"})
    assert (base.skeleton.body, base.skeleton.head) == ("inner", "top.0")
    tuned = finetunes(base, 2, plain_layers={"top.0"})
    found = gradients(ft.causal_lm_loss, base, tuned[0], IDS[0], chunk_tokens=3)
    expected = gradients(whole, base, tuned[0], IDS[0])
    assert_gradients(found, expected, FP32, unlike=gradients(whole, base, tuned[1], IDS[0]))


def whole(base: ft.Base, tuned: ft.Finetuned, ids: Tensor) -> Tensor:
    """The formula for a model that returns its logits alone."""
    apply = ft.apply if tuned.stack_size is None else ft.apply_stacked
    return formula(apply(base, tuned, ids), ids)


def test_cross_entropy_is_the_formula():
    """The reference above is torch's own loss."""
    logits = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(10).reshape(2, 5) % 9
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(formula(logits, labels), expected, EXACT, unlike=formula(logits.roll(1, 0), labels))
