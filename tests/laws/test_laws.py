"""The laws of the library, over random models, shapes, ranks, dtypes and trees."""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import (
    assert_same_base,
    assert_same_finetune,
    assert_trees_equal,
    assert_unchanged,
    bert,
    gpt2,
    gradients_by_autograd,
    randomized,
    relative_error,
    snapshot,
    twin,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

import finetuna_func as ft
from finetuna_func import EmbeddingAdapterConfig, Finetuned, LinearAdapterConfig
from finetuna_func._quant import Int8, check_quantizable

few = settings(max_examples=25)
some = settings(max_examples=50)

# Chains of at most six layers of at most nine terms a sum: the roundings of each, with room for cancellation.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.1}


class Chain(nn.Module):
    """Layers in a row: a table perhaps, linear layers, norms, a head that may be the table."""

    def __init__(self, widths: list[int], vocab: int, *, ids: bool, bias: bool, norm: bool, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, widths[0]) if ids else None
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(widths))
        # A large epsilon, so that a norm of two or three almost equal numbers does not blow roundings up.
        self.norms = nn.ModuleList(nn.LayerNorm(b, eps=1.0) for b in widths[1:]) if norm else None
        self.lm_head = nn.Linear(widths[-1], vocab, bias=bias)
        if tied and ids:
            self.lm_head = nn.Linear(widths[-1], vocab, bias=False)
            self.lm_head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            x = x if self.norms is None else self.norms[i](x)
        return self.lm_head(x)


@dataclass
class Case:
    """A model, its base, finetunes of it and a batch for each."""

    model: Chain
    base: ft.Base
    tuned: list[Finetuned]
    x: Tensor
    dtype: torch.dtype

    @property
    def stacked(self) -> Finetuned:
        return ft.stack(self.tuned)

    def loop(self) -> Tensor:
        return torch.stack([ft.apply(self.base, t, x) for t, x in zip(self.tuned, self.x, strict=True)])

    def vmap(self) -> Tensor:
        return vmap(ft.apply, in_dims=(None, 0, 0))(self.base, self.stacked, self.x)


DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@st.composite
def cases(
    draw, dtypes=tuple(DTYPES), schemes=("int8", "blockwise8", "nf4"), dropout=False, bias_adapters=True, dora=True
) -> Case:
    dtype = draw(st.sampled_from(list(dtypes)))
    tied, ids = draw(st.booleans()), draw(st.booleans())
    widths = draw(st.lists(st.integers(2, 9), min_size=2, max_size=4))
    if tied and ids:
        widths[-1] = widths[0]
    vocab = draw(st.integers(3, 12))
    seed = draw(st.integers(0, 2**31 - 1))
    torch.manual_seed(seed)
    bias, norm = draw(st.booleans()), draw(st.booleans())
    model = Chain(widths, vocab, ids=ids, bias=bias, norm=norm, tied=tied).to(dtype).eval()
    floating = draw(st.sampled_from([(), ("lm_head",), ("layers.0",), ("lm_head", "layers")]))
    base = ft.quantize_base_model(model, modules_not_to_quantize=floating, scheme=draw(st.sampled_from(schemes)))
    plain = draw(st.sampled_from([(), ("lm_head",), ("norms",), ("lm_head", "norms")]))
    plain = [p for p in plain if (p != "norms" or norm) and (p != "lm_head" or "lm_head" in floating)]
    n = draw(st.integers(1, 4))
    adapter_bias = bias_adapters and bias and not (tied and ids) and draw(st.booleans())
    with_dora = dora and not adapter_bias and dtype != torch.bfloat16 and draw(st.integers(0, 3)) == 0
    tuned = []
    largest = min(*widths, vocab)
    for i in range(n):
        r = draw(st.integers(1, largest))
        alpha = draw(st.sampled_from([-2.0, 0.5, 1.0, 3.0]))
        p = draw(st.sampled_from([0.0, 0.3])) if dropout else 0.0
        made = ft.new_finetuned(
            base,
            plain_layers=plain,
            linear_config=LinearAdapterConfig(
                r=r,
                alpha=alpha,
                dropout=p,
                bias=adapter_bias,
                dora=with_dora,
                rank_stabilized=draw(st.booleans()),
                init=draw(st.sampled_from(["default", "default", "gaussian", "pissa", "olora", "loftq"])),
            ),
            embedding_config=EmbeddingAdapterConfig(r=r, alpha=alpha, rank_stabilized=draw(st.booleans())),
            float_model=model,
        )
        tuned.append(randomized(made, seed + i))
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    x = torch.randint(0, vocab, (n, batch, length)) if ids else torch.randn(n, batch, length, widths[0]).to(dtype)
    return Case(model, base, tuned, x, dtype)


def close(case: Case, actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    error = relative_error(actual, expected)
    # A result may be far smaller than what it was computed from, numbers of size 1: half a rounding of one is allowed.
    if case.dtype == torch.bfloat16 and (actual.double() - expected.double()).abs().max() <= 2.0**-9:
        return
    assert error <= factor * TOLERANCE[case.dtype], error


# --- trees


@st.composite
def trees(draw) -> dict[str, Tensor]:
    names = draw(
        st.lists(st.from_regex(r"[a-c](\.[a-c]){0,2}\.(weight|lora_a|lora_b)", fullmatch=True), unique=True, max_size=8)
    )
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64])
    shapes = st.lists(st.integers(0, 4), max_size=3)
    return {name: torch.zeros(draw(shapes), dtype=draw(dtypes)) for name in names}


@st.composite
def filters(draw, tree: dict[str, Tensor]):
    return draw(
        st.one_of(
            st.booleans(),
            st.sampled_from([torch.float32, torch.int8, torch.float16]),
            st.sets(st.sampled_from(sorted(tree) or ["x"])).map(lambda names: lambda name, leaf: name in names),
            st.integers(0, 3).map(lambda n: lambda name, leaf: leaf.ndim == n),
            st.lists(st.booleans(), max_size=3),
        )
    )


@given(st.data())
def test_combine_inverts_partition(data):
    tree = data.draw(trees())
    filter = data.draw(filters(tree))
    first, second = ft.partition(tree, filter)
    assert not first.keys() & second.keys()
    for combined in (ft.combine(first, second), ft.combine(second, first)):
        assert combined.keys() == tree.keys()
        assert all(combined[name] is leaf for name, leaf in tree.items())


@few
@given(cases(dtypes=[torch.float32], schemes=["int8"]), st.data())
def test_combine_inverts_partition_of_finetunes(case, data):
    for value in (case.tuned[0], case.stacked):
        first, second = ft.partition(value, data.draw(filters(dict(value.params))))
        assert_same_finetune(ft.combine(first, second), value)
        assert_same_finetune(ft.combine(second, first), value)


@some
@given(cases(schemes=["int8"], dropout=True))
def test_unstack_inverts_stack(case):
    again = ft.unstack(case.stacked)
    assert len(again) == len(case.tuned)
    for one, other in zip(again, case.tuned, strict=True):
        assert_same_finetune(one, other)
    restacked = ft.stack(again)
    assert restacked.spec == case.stacked.spec
    assert_trees_equal(restacked.params, case.stacked.params)
    assert_trees_equal(restacked.consts, case.stacked.consts)


# --- forwards


@some
@given(cases())
def test_a_fresh_adapter_is_the_base(case):
    fresh = ft.new_finetuned(
        case.base, plain_layers=(), linear_config=LinearAdapterConfig(r=1), embedding_config=EmbeddingAdapterConfig(r=1)
    )
    assert torch.equal(ft.apply(case.base, fresh, case.x[0]), ft.apply(case.base, None, case.x[0]))
    assert not torch.equal(ft.apply(case.base, case.tuned[0], case.x[0]), ft.apply(case.base, None, case.x[0]))


@some
@given(cases())
def test_vmap_is_the_loop_is_apply_stacked(case):
    expected = case.loop()
    close(case, case.vmap(), expected)
    close(case, ft.apply_stacked(case.base, case.stacked, case.x), expected)
    if len(case.tuned) > 1 and case.dtype != torch.bfloat16:
        assert relative_error(case.loop().roll(1, 0), expected) > TOLERANCE[case.dtype]


@few
@given(cases(dropout=True, schemes=["int8"]), st.integers(-(2**63), 2**63 - 1))
def test_and_with_dropout(case, seed):
    keys = ft.random.split(ft.random.key(seed), len(case.tuned))
    expected = torch.stack(
        [ft.apply(case.base, t, x, train=True, rng=k) for t, x, k in zip(case.tuned, case.x, keys, strict=True)]
    )
    mapped = vmap(lambda t, x, k: ft.apply(case.base, t, x, train=True, rng=k))(case.stacked, case.x, keys)
    close(case, mapped, expected)
    for rng in (keys, ft.random.key(seed)):
        close(case, ft.apply_stacked(case.base, case.stacked, case.x, train=True, rng=rng), expected)


@few
@given(cases(schemes=["int8"]), st.randoms())
def test_permuting_adapters_permutes_outputs(case, random):
    order = list(range(len(case.tuned)))
    random.shuffle(order)
    permuted = ft.stack([case.tuned[i] for i in order])
    out = ft.apply_stacked(case.base, case.stacked, case.x)
    close(case, ft.apply_stacked(case.base, permuted, case.x[order]), out[order])


@few
@given(cases())
def test_rank_padding_changes_nothing(case):
    """Stacked beside a finetune of full rank, or alone: the same output."""
    full = min(min(layer.shape) for layer in case.base.skeleton.layers.values())
    first = case.tuned[0]
    bias = any(name.endswith("lora_bias") for name in first.params)
    dora = any(name.endswith("lora_magnitude") for name in first.params)
    plain = sorted({name.rpartition(".")[0] for name in first.spec.plain})
    wide = ft.new_finetuned(
        case.base,
        plain_layers=plain,
        linear_config=LinearAdapterConfig(r=full, bias=bias, dora=dora),
        embedding_config=EmbeddingAdapterConfig(r=full),
    )
    alone = ft.apply_stacked(case.base, ft.stack([first]), case.x[:1])
    x = case.x[:1].expand(2, *case.x.shape[1:])
    beside = ft.apply_stacked(case.base, ft.stack([first, randomized(wide, 1)]), x)
    close(case, beside[:1], alone)
    assert_same_finetune(ft.index(ft.stack([first, wide]), 0), first)


@some
@given(cases(schemes=["int8"]))
def test_apply_is_the_float_model_with_those_weights(case):
    tuned = case.tuned[0]
    with torch.no_grad():
        expected = twin(copy.deepcopy(case.model).double(), case.base, tuned)(
            case.x[0].double() if case.x.is_floating_point() else case.x[0]
        )
    error = relative_error(ft.apply(case.base, tuned, case.x[0]), expected)
    assert error <= TOLERANCE[case.dtype], error


@some
@given(cases())
def test_merge_then_plain_forward_is_the_adapter_forward(case):
    tuned = case.tuned[0]
    model = copy.deepcopy(case.model)
    merged = ft.merge(case.base, tuned)
    if model.embed is not None and model.lm_head.weight is model.embed.weight and "lm_head.weight" in tuned.params:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert merged.keys() == model.state_dict().keys()
    model.load_state_dict(merged)
    with torch.no_grad():
        close(case, model(case.x[0]), ft.apply(case.base, tuned, case.x[0]))
        close(case, ft.to_module(case.base, tuned)(case.x[0]), ft.apply(case.base, tuned, case.x[0]))


# --- quantization


@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 40)),
    exponents=st.tuples(st.integers(-29, 36), st.integers(-29, 36)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_the_error_of_quantization_is_at_most_half_a_scale(shape, exponents, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    low, high = sorted(exponents)
    powers = torch.rand(shape[0], 1, generator=generator, dtype=torch.float64) * (high - low) + low
    weight = ((torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * 10**powers).to(dtype)
    assume((weight.abs().amax(1) > 1e-30).all())
    check_quantizable("weight", weight)
    codes, scale = Int8().quantize(weight).values()
    error = (weight.double() - codes.double() * scale.double().unsqueeze(1)).abs()
    slack = 3 * 127 * 2.0**-24  # three float32 roundings of a number up to 127 (see test_quant.py)
    assert (error <= (0.5 + slack) * scale.double().unsqueeze(1)).all()
    assert codes.abs().max() == 127


# --- disk


@some
@given(cases(dropout=True, schemes=["int8"]))
def test_save_then_load_is_the_identity(case):
    with tempfile.TemporaryDirectory() as folder:
        for i, tuned in enumerate(case.tuned):
            before = snapshot(tuned)
            again = ft.load(ft.save(Path(folder, str(i)), tuned), case.base)
            assert_same_finetune(again, tuned)
            assert_unchanged(tuned, before)


@some
@given(cases(), st.integers(1, 500))
def test_save_then_load_of_a_base_is_the_identity(case, shard):
    with tempfile.TemporaryDirectory() as folder:
        before = snapshot(case.base)
        saved = ft.save_base(Path(folder, "base"), case.base, max_shard_bytes=shard)
        again = ft.load_base(saved, model=copy.deepcopy(case.model).to("meta"), verify=True)
        assert_same_base(again, case.base)
        assert_unchanged(case.base, before)
        close(case, ft.apply(again, case.tuned[0], case.x[0]), ft.apply(case.base, case.tuned[0], case.x[0]))


@some
@given(cases(), st.sampled_from(["int8", "blockwise8", "nf4"]))
def test_load_from_a_checkpoint_is_quantize(case, scheme):
    with tempfile.TemporaryDirectory() as folder:
        stored = {name: leaf for name, leaf in case.model.state_dict().items() if name not in case.base.skeleton.ties}
        save_file(stored, Path(folder, "model.safetensors"))
        loaded = ft.load_base(folder, model=copy.deepcopy(case.model), scheme=scheme)
        assert_same_base(loaded, ft.quantize_base_model(case.model, scheme=scheme))


@settings(max_examples=8)
@given(cases(dtypes=[torch.float32], schemes=["int8"], bias_adapters=False))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_there_and_back_is_the_identity(case):
    """What PEFT writes after reading our folder is what we wrote; and it computes what we compute."""
    from peft import PeftModel

    tuned = case.tuned[0]
    model = copy.deepcopy(case.model)
    if model.embed is not None:
        # PEFT adapts a table, but a head tied to it does not follow: untie, and adapt or train the head as we do
        assume(model.lm_head.weight is not model.embed.weight)
    model.load_state_dict(ft.merge(case.base, None))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ours = ft.save(Path(folder, "ours"), tuned)
        assume((ours / "adapter_config.json").exists())  # PEFT cannot say DoRA on some layers only
        peft = PeftModel.from_pretrained(model, str(ours)).eval()
        close(case, peft(case.x[0]), ft.apply(case.base, tuned, case.x[0]))
        peft.save_pretrained(str(Path(folder, "theirs")), save_embedding_layers=False)
        written, read = (load_file(Path(folder, who, "adapter_model.safetensors")) for who in ("ours", "theirs"))
        assert_trees_equal(dict(sorted(read.items())), dict(sorted(written.items())))
        back = {name: read[name] for name in written}
        for file_name, leaf in back.items():
            assert torch.equal(leaf, written[file_name])


# --- training


def mean_square(case: Case):
    def loss_fn(tuned: Finetuned, x: Tensor) -> Tensor:
        return ft.apply(case.base, tuned, x).square().mean()

    return loss_fn


@few
@given(cases(dtypes=[torch.float64], dora=False))  # DoRA's gradient leaves its norms out, on purpose
def test_lean_gradients_are_torch_func_gradients_are_finite_differences(case):
    loss_fn, tuned, x = mean_square(case), case.tuned[0], case.x[0]
    value, grads = ft.value_and_grad(loss_fn)(tuned, x)
    func_grads, func_value = grad_and_value(lambda p: loss_fn(tuned.replace(params=p), x))(dict(tuned.params))
    plain = gradients_by_autograd(lambda p: loss_fn(tuned.replace(params=p), x), tuned.params)
    nested_value, nested = vmap(ft.value_and_grad(loss_fn), in_dims=(0, 0))(ft.stack([tuned]), x[None])
    size = max(float(g.abs().max()) for g in plain.values())
    assume(size > 1e-3)
    for name in plain:
        for other in (grads[name], func_grads[name], nested[name][0]):
            assert (other - plain[name]).abs().max() <= 1e-11 * size, name
    assert abs(value - func_value) <= 1e-12 * value and abs(value - nested_value[0]) <= 1e-12 * value
    torch.manual_seed(0)
    direction = {name: torch.randn_like(leaf) for name, leaf in tuned.params.items()}
    step = 1e-6
    up, down = (
        loss_fn(tuned.replace(params={n: p + sign * step * direction[n] for n, p in tuned.params.items()}), x)
        for sign in (1, -1)
    )
    slope = sum(float((g * direction[name]).sum()) for name, g in grads.items())
    length = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
    # Central differences: rounding of the loss, 1e-16 / 1e-6, and a third derivative times 1e-12.
    assert abs(float(up - down) / (2 * step) - slope) <= 1e-5 * length + 1e-9 * float(value)


@few
@given(cases(dtypes=[torch.float64]))
def test_stacked_gradients_are_those_of_each(case):
    loss_fn = mean_square(case)

    def whole(tuned: Finetuned, x: Tensor) -> Tensor:
        return ft.apply_stacked(case.base, tuned, x).square().flatten(1).mean(1)

    routes = (
        ft.stacked_value_and_grad(whole)(case.stacked, case.x),
        ft.stacked_value_and_grad(loss_fn, in_dims=0)(case.stacked, case.x),
        vmap(ft.value_and_grad(loss_fn))(case.stacked, case.x),
    )
    for i, tuned in enumerate(case.tuned):
        value, grads = ft.value_and_grad(loss_fn)(tuned, case.x[i])
        size = max(float(g.abs().max()) for g in grads.values())
        for losses, stacked in routes:
            assert abs(losses[i] - value) <= 1e-11 * value
            for name, g in grads.items():
                mine = stacked[name][i]
                if name.endswith("lora_a"):
                    mine, rest = mine[: g.shape[0]], mine[g.shape[0] :]
                    assert not rest.any()
                elif name.endswith("lora_b"):
                    mine, rest = mine[:, : g.shape[1]], mine[:, g.shape[1] :]
                    assert not rest.any()
                assert (mine - g).abs().max() <= 1e-10 * size, name


@few
@given(cases(dtypes=[torch.float64], schemes=["int8"], dropout=True), st.integers(1, 5), st.booleans(), st.data())
def test_chunks_and_micro_batches_change_nothing(case, chunk_size, mapped, data):
    """Some finetunes at a time, some examples at a time, or both: the gradients of all at once."""
    batch = case.x.shape[1]
    parts = data.draw(st.integers(1, batch))
    keys = ft.random.split(ft.random.key(0), len(case.tuned))

    def single(tuned: Finetuned, x: Tensor, key: Tensor) -> Tensor:
        return ft.apply(case.base, tuned, x, train=True, rng=key).square().mean()

    def whole(tuned: Finetuned, x: Tensor, keys: Tensor) -> Tensor:
        return ft.apply_stacked(case.base, tuned, x, train=True, rng=keys).square().flatten(1).mean(1)

    loss_fn, in_dims = (single, 0) if mapped else (whole, None)
    losses, grads = ft.stacked_value_and_grad(loss_fn, in_dims)(case.stacked, case.x, keys)
    chunked = ft.stacked_value_and_grad(loss_fn, in_dims, chunk_size=chunk_size)
    routes = [chunked(case.stacked, case.x, keys)]
    if not any(name.endswith("lora_dropout") for name in case.stacked.consts):  # a mask depends on the batch's shape
        in_parts = ft.accumulate_gradients(chunked, parts, in_dims=(None, 1, None))
        routes.append(in_parts(case.stacked, case.x, keys))
    size = max(float(g.abs().max()) for g in grads.values())
    for found, found_grads in routes:
        assert (found - losses).abs().max() <= 1e-11 * losses.abs().max()
        assert list(found_grads) == list(grads)
        for name, g in grads.items():
            assert (found_grads[name] - g).abs().max() <= 1e-10 * size, name


@settings(max_examples=12)
@given(
    cases(dtypes=[torch.float64], schemes=["int8"]), st.integers(1, 4), st.sampled_from(["adamw", "adamw8bit", "sgd"])
)
def test_k_stacked_steps_are_k_separate_steps(case, steps, kind):
    n = len(case.tuned)
    rates = torch.linspace(0.01, 0.03, n, dtype=torch.float64)

    def optimizer(rate):
        step = {
            "adamw": lambda: ft.optim.adamw(rate, weight_decay=0.01, eps=1e-3),
            "adamw8bit": lambda: ft.optim.adamw8bit(rate, weight_decay=0.01, eps=1e-3, min_size=1),
            "sgd": lambda: ft.optim.sgd(rate, momentum=0.9),
        }[kind]()
        return ft.optim.chain(ft.optim.clip_by_global_norm(0.5), step)

    if kind == "adamw8bit":  # padding to a larger rank would move the blocks
        assume(len({tuple(a.config.r for a in tuned.spec.adapters) for tuned in case.tuned}) == 1)
    loss_fn = mean_square(case)
    stacked, together = case.stacked, optimizer(rates)
    state = together.init(stacked)
    for _ in range(steps):
        _, grads = ft.stacked_value_and_grad(loss_fn, in_dims=0)(stacked, case.x)
        updates, state = together.update(grads, state, stacked)
        stacked = ft.optim.apply_updates(stacked, updates)
    for i, tuned in enumerate(case.tuned):
        alone = optimizer(float(rates[i]))
        one_state = alone.init(tuned)
        one = tuned
        for _ in range(steps):
            _, grads = ft.value_and_grad(loss_fn)(one, case.x[i])
            updates, one_state = alone.update(grads, one_state, one)
            one = ft.optim.apply_updates(one, updates)
        mine = ft.index(stacked, i)
        assert mine.spec == one.spec
        for name, leaf in one.params.items():
            assert (mine.params[name] - leaf).abs().max() <= 1e-8, name
            a = stacked.params[name]
            if name.endswith("lora_a"):
                assert not a[i, leaf.shape[0] :].any()  # the padding is still exactly zero
        assert any(not torch.equal(leaf, tuned.params[name]) for name, leaf in one.params.items())


# --- folding


@functools.cache
def language_model(family: str) -> ft.Base:
    return ft.quantize_base_model({"gpt2": gpt2, "bert": bert}[family]().double())


@st.composite
def finetuned_language_models(draw) -> tuple[ft.Base, list[Finetuned], Tensor, dict[str, Tensor], Tensor]:
    """A base, finetunes of several kinds, ids ``(N, B, T)``, perhaps masks like them, and a key each."""
    base = language_model(draw(st.sampled_from(["gpt2", "bert"])))
    n, batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 8))
    seed = draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    dora = draw(st.booleans())
    adapted = draw(st.sampled_from([None, {"c_attn", "c_fc"} if base.skeleton.name.startswith("GPT2") else {"query"}]))
    tuned = [
        ft.new_finetuned(
            base,
            adapt_layers=adapted,
            linear_config=LinearAdapterConfig(
                r=draw(st.integers(1, 4)), dropout=draw(st.sampled_from([0, 0.3])), dora=dora
            ),
        )
        for _ in range(n)
    ]
    ids = torch.randint(0, 32, (n, batch, length), generator=generator)
    hidden = torch.randint(0, length, (n, batch, 1), generator=generator)
    mask = (torch.arange(length) >= hidden).long() if draw(st.booleans()) else None
    inputs = {} if mask is None else {"attention_mask": mask}
    keys = ft.random.split(ft.random.key(seed), n)
    return base, [randomized(t, seed + i) for i, t in enumerate(tuned)], ids, inputs, keys


@few
@given(finetuned_language_models())
def test_a_mapped_language_model_is_the_loop_is_the_stacked_one(case):
    """Values and gradients, by every route; of positions that are not padding, whose numbers nobody promises."""
    base, tuned, ids, inputs, keys = case
    stacked = ft.stack(tuned)
    real = inputs.get("attention_mask", torch.ones_like(ids))

    def loss(tuned: Finetuned, ids: Tensor, inputs: dict[str, Tensor], real: Tensor, key: Tensor) -> Tensor:
        run = ft.apply if key.ndim == 0 else ft.apply_stacked
        out = run(base, tuned, input_ids=ids, **inputs, train=True, rng=key)["logits"]
        return (out.sin() * real.unsqueeze(-1)).sum((-3, -2, -1))

    given = (ids, inputs, real, keys)
    routes = (
        ft.stacked_value_and_grad(loss)(stacked, *given),
        ft.stacked_value_and_grad(loss, in_dims=(0, 0, 0, 0, 0))(stacked, *given),
        vmap(ft.value_and_grad(loss))(stacked, *given),
    )
    assert base.skeleton.rows_apart and not base.skeleton.unfolded
    for i, one in enumerate(tuned):
        own = torch_pytree.tree_map(lambda leaf: leaf[i], given)  # noqa: B023
        value, grads = ft.value_and_grad(loss)(one, *own)
        size = max(float(g.abs().max()) for g in grads.values())
        for values, found in routes:
            assert abs(values[i] - value) <= 1e-9
            for name, g in grads.items():
                mine = found[name][i]
                if g.shape != mine.shape:  # of a lower rank than another's
                    mine = mine[: g.shape[0]] if name.endswith("lora_a") else mine[:, : g.shape[1]]
                # All gradients can be zero but for rounding: of keys, say, over a single position.
                assert (mine - g).abs().max() <= 1e-9 * size + 1e-15
        if ids.numel() > len(tuned):
            assert abs(value - ft.value_and_grad(loss)(one, own[0], *own[1:3], own[3] + 1)[0]) > 1e-9 or not dropped(
                one
            )


def dropped(tuned: Finetuned) -> bool:
    return any(float(leaf) > 0 for name, leaf in tuned.consts.items() if name.endswith("lora_dropout"))


# --- purity


@few
@given(cases(dropout=True))
def test_inputs_are_never_mutated(case):
    values = [case.model, case.base, *case.tuned]
    stacked = case.stacked
    values.append(stacked)
    before = [snapshot(value) for value in values]
    x, version = case.x.clone(), case.x._version
    key = ft.random.key(1)
    case.loop()
    case.vmap()
    ft.apply_stacked(case.base, stacked, case.x, train=True, rng=key)
    loss_fn = mean_square(case)
    _, grads = ft.value_and_grad(loss_fn)(case.tuned[0], case.x[0])
    optimizer = ft.optim.adamw(0.1)
    updates, _ = optimizer.update(grads, optimizer.init(case.tuned[0]), case.tuned[0])
    ft.optim.apply_updates(case.tuned[0], updates)
    ft.stacked_value_and_grad(loss_fn, in_dims=0)(stacked, case.x)
    for leaf in ft.merge(case.base, case.tuned[0]).values():
        leaf.zero_()
    ft.to_module(case.base, case.tuned[0])(case.x[0])
    ft.unstack(stacked)
    ft.partition(stacked, True)
    ft.tree_at(".*", stacked, lambda leaf: leaf + 1)
    for value, old in zip(values, before, strict=True):
        assert_unchanged(value, old)
    assert torch.equal(case.x, x) and case.x._version == version and key == ft.random.key(1)
