"""The pure forward: apply, vmap and apply_stacked agree with float models, and touch nothing."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import (
    HF_MODELS,
    Everything,
    Gain,
    Mlp,
    TiedLm,
    Tiny,
    assert_close,
    assert_unchanged,
    finetunes,
    hf_inputs,
    llama,
    randomized,
    relative_error,
    snapshot,
    twin,
)
from torch import Tensor, nn
from torch.func import vmap

import finetuna_func as ft
from finetuna_func import EmbeddingAdapterConfig, LinearAdapterConfig

FP32 = 1e-5  # float32 sums of at most 32 terms, ten layers deep: 320 * 2**-24 = 2e-5 in the worst case


@pytest.fixture(scope="module")
def everything():
    torch.manual_seed(0)
    return Everything().eval()


@pytest.fixture(scope="module")
def base(everything):
    return ft.quantize_base_model(everything)


def ids_for(*shape: int, vocab: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, vocab, shape, generator=generator)


def loop(base: ft.Base, tuned: list[ft.Finetuned], x: Tensor) -> Tensor:
    return torch.stack([ft.apply(base, t, x[i]) for i, t in enumerate(tuned)])


def expect_all_ways_equal(base: ft.Base, tuned: list[ft.Finetuned], x: Tensor, tolerance: float = FP32) -> Tensor:
    """Loop, vmap and apply_stacked agree; and would not if the finetunes were in another order."""
    expected = loop(base, tuned, x)
    unlike = loop(base, [*tuned[1:], tuned[0]], x)
    stacked = ft.stack(tuned)
    mapped = vmap(ft.apply, in_dims=(None, 0, 0))(base, stacked, x)
    assert_close(mapped, expected, tolerance, unlike=unlike)
    together = ft.apply_stacked(base, stacked, x)
    assert_close(together, expected, tolerance, unlike=unlike)
    assert mapped.dtype == together.dtype == expected.dtype
    return expected


def expect_equal_or_refused(base: ft.Base, tuned: list[ft.Finetuned], x: Tensor, tolerance: float = FP32) -> bool:
    """Whether apply_stacked gave what vmap gives; otherwise it must say that it cannot, never give another number."""
    expected = vmap(ft.apply, in_dims=(None, 0, 0))(base, ft.stack(tuned), x)
    try:
        together = ft.apply_stacked(base, ft.stack(tuned), x)
    except (ValueError, NotImplementedError) as error:
        assert "apply_stacked" in str(error) and "vmap" in str(error)
        return False
    assert relative_error(together, expected) <= tolerance
    return True


# --- against float models


@pytest.mark.parametrize("model_class", [Everything, Tiny, Mlp, TiedLm])
def test_apply_is_the_float_model_with_those_weights(model_class, seed):
    model = model_class().eval()
    base = ft.quantize_base_model(model, modules_not_to_quantize=())
    x = torch.randn(4, 6) if model_class is Mlp else ids_for(4, 5, vocab=12)
    mine = ft.apply(base, None, x)
    assert_close(mine, twin(model, base)(x), FP32, unlike=model(x))
    fresh = ft.new_finetuned(base, plain_layers=())
    assert torch.equal(ft.apply(base, fresh, x), mine)
    tuned = randomized(ft.new_finetuned(base, plain_layers=(), linear_config=LinearAdapterConfig(bias=True)))
    assert_close(ft.apply(base, tuned, x), twin(model, base, tuned)(x), FP32, unlike=mine)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Of bfloat16 and float16 each of about ten layers rounds its result (2**-8, 2**-11) a few times.
    [(torch.float64, 1e-12), (torch.bfloat16, 0.06), (torch.float16, 0.01)],
)
def test_other_dtypes(dtype, tolerance, seed):
    model = Everything().eval().to(dtype)
    base = ft.quantize_base_model(model)
    tuned = randomized(ft.new_finetuned(base, linear_config=LinearAdapterConfig(bias=True)))
    ids = ids_for(3, 5)
    mine = ft.apply(base, tuned, ids)
    assert mine.dtype == dtype
    assert_close(mine, twin(model.double(), base, tuned)(ids), tolerance, unlike=-ft.apply(base, None, ids))
    expected_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert tuned.params["fc1.lora_a"].dtype == expected_dtype and tuned.params["lm_head.weight"].dtype == dtype
    expect_all_ways_equal(base, finetunes(base, 2), ids_for(2, 3, 5), tolerance / 2)


@pytest.mark.parametrize("scheme", ["int8", "blockwise8", "nf4"])
def test_schemes_only_round(everything, scheme):
    base = ft.quantize_base_model(everything, scheme=scheme)
    ids = ids_for(3, 5)
    exact = everything(ids)
    error = relative_error(ft.apply(base, None, ids), exact)
    least, most = (0.05, 0.3) if scheme == "nf4" else (1e-5, 0.05)
    assert least < error < most
    expect_all_ways_equal(base, finetunes(base), ids_for(3, 2, 5))


def test_w8a8_all_ways(everything):
    base = ft.quantize_base_model(everything, matmul="w8a8")
    ids = ids_for(3, 5)
    error = relative_error(ft.apply(base, None, ids), ft.apply(ft.quantize_base_model(everything), None, ids))
    assert 1e-4 < error < 0.05
    # A float32 rounding may move an activation over the edge between two codes: one step of 1/127 of one activation.
    expect_all_ways_equal(base, finetunes(base, scale=2.0), ids_for(3, 2, 5), 0.01)


@pytest.mark.parametrize("name", HF_MODELS)
def test_hugging_face_models(name):
    model = HF_MODELS[name]()
    before = snapshot(model)
    base = ft.quantize_base_model(model)
    tuned = finetunes(base)
    ids = ids_for(2, 5, vocab=32)
    inputs = hf_inputs(name, ids)
    assert_close(
        ft.apply(base, None, **inputs).logits, twin(model, base)(**inputs).logits, FP32, unlike=model(**inputs).logits
    )
    mine = [ft.apply(base, t, **inputs).logits for t in tuned]
    with torch.no_grad():
        expected = [twin(model, base, t)(**inputs).logits for t in tuned]
    for i in range(3):
        assert_close(mine[i], expected[i], FP32, unlike=expected[i - 1])
    mapped = vmap(lambda t, ids: ft.apply(base, t, **hf_inputs(name, ids)).logits, in_dims=(0, None))
    assert_close(mapped(ft.stack(tuned), ids), torch.stack(expected), FP32, unlike=torch.stack(expected).roll(1, 0))
    assert "past_key_values" not in ft.apply(base, None, **inputs)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", HF_MODELS)
@pytest.mark.parametrize("length", [5, 6])  # 6 is also the number of rows
@pytest.mark.parametrize("masked", [False, True])
def test_hugging_face_models_stacked(name, length, masked):
    base = ft.quantize_base_model(HF_MODELS[name]())
    tuned = finetunes(base)
    ids = ids_for(3, 2, length, vocab=32)
    extra = {"attention_mask": torch.tensor([[1] * length, [1] * 3 + [0] * (length - 3)])} if masked else {}
    expected = torch.stack([ft.apply(base, t, **hf_inputs(name, ids[i]), **extra).logits for i, t in enumerate(tuned)])
    extra = {key: mask.expand(3, 2, length) for key, mask in extra.items()}
    try:
        mine = ft.apply_stacked(base, ft.stack(tuned), **hf_inputs(name, ids), **extra).logits
    except ValueError as error:
        assert name == "t5" and "'encoder.block.0.layer.0.SelfAttention.relative_attention_bias'" in str(error)
        rest = {"adapt_layers": {"q", "v", "shared"}}  # the relative positions are shared by all rows
        tuned = finetunes(base, **rest)
        expected = torch.stack(
            [
                ft.apply(base, t, **hf_inputs(name, ids[i]), **{k: v[i] for k, v in extra.items()}).logits
                for i, t in enumerate(tuned)
            ]
        )
        mine = ft.apply_stacked(base, ft.stack(tuned), **hf_inputs(name, ids), **extra).logits
    assert_close(mine, expected, FP32, unlike=expected.roll(1, 0))


@pytest.mark.parametrize("name", HF_MODELS)
@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_hugging_face_masks_under_vmap(name, padding):
    """A mask per finetune, one for all, and their gradients: as in the loop."""
    base = ft.quantize_base_model(HF_MODELS[name]())
    tuned = finetunes(base, 2)
    ids = ids_for(2, 3, 6, vocab=32)
    lengths = torch.tensor([[6, 4, 2], [3, 6, 5]]) if padding != "none" else torch.full((2, 3), 6)
    mask = (torch.arange(6) < lengths.unsqueeze(-1)).long()
    mask = mask.flip(-1) if padding == "left" else mask

    def forward(t: ft.Finetuned, x: Tensor, m: Tensor) -> Tensor:
        return ft.apply(base, t, **hf_inputs(name, x), attention_mask=m).logits * m.unsqueeze(-1)

    expected = torch.stack([forward(t, x, m) for t, x, m in zip(tuned, ids, mask, strict=True)])
    mapped = vmap(forward)(ft.stack(tuned), ids, mask)
    assert_close(mapped, expected, FP32, unlike=expected.flip(0))
    shared = vmap(forward, in_dims=(0, None, None))(ft.stack(tuned), ids[0], mask[0])
    expected = torch.stack([forward(t, ids[0], mask[0]) for t in tuned])
    assert_close(shared, expected, FP32, unlike=expected.flip(0))
    if padding != "none":
        unmasked = torch.stack([forward(t, ids[0], torch.ones_like(mask[0])) for t in tuned])
        assert relative_error(shared, unmasked) > 100 * FP32  # the mask matters

    def loss_fn(t: ft.Finetuned, x: Tensor, m: Tensor) -> Tensor:
        return forward(t, x, m).square().mean()

    losses, grads = ft.stacked_value_and_grad(loss_fn, in_dims=0)(ft.stack(tuned), ids, mask)
    for i, t in enumerate(tuned):
        value, each = ft.value_and_grad(loss_fn)(t, ids[i], mask[i])
        assert abs(losses[i] - value) <= FP32 * value
        size = max(g.abs().max() for g in each.values())
        for leaf, g in each.items():
            assert (grads[leaf][i] - g).abs().max() <= 10 * FP32 * size, leaf
        assert size > 0


# --- vmap, loop and apply_stacked


@pytest.mark.parametrize(
    "shape", [(3, 2, 5), (3, 1, 5), (3, 4, 1), (3, 1, 1), (3, 2, 6), (3, 2, 3), (3, 2, 2), (3, 3, 9)]
)
def test_all_ways_equal(base, shape):
    expect_all_ways_equal(base, finetunes(base), ids_for(*shape))


def test_one_finetune_and_one_sample(base):
    tuned = finetunes(base, 1)
    for shape in ((1, 1, 1), (1, 1, 4), (1, 4, 4)):
        ids = ids_for(*shape)
        expected = ft.apply(base, tuned[0], ids[0])
        unlike = ft.apply(base, None, ids[0])
        assert_close(ft.apply_stacked(base, ft.stack(tuned), ids)[0], expected, FP32, unlike=unlike)


def test_a_shared_batch(base):
    tuned, ids = finetunes(base), ids_for(2, 5)
    expected = torch.stack([ft.apply(base, t, ids) for t in tuned])
    mapped = vmap(ft.apply, in_dims=(None, 0, None))(base, ft.stack(tuned), ids)
    assert_close(mapped, expected, FP32, unlike=expected.roll(1, 0))
    together = ft.apply_stacked(base, ft.stack(tuned), ids.expand(3, 2, 5))
    assert_close(together, expected, FP32, unlike=expected.roll(1, 0))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_batch_of_finetunes_anywhere(base, dim):
    tuned, ids = finetunes(base), ids_for(3, 2, 5)
    mapped = vmap(ft.apply, in_dims=(None, 0, dim))(base, ft.stack(tuned), ids.movedim(0, dim))
    expected = loop(base, tuned, ids)
    assert_close(mapped, expected, FP32, unlike=expected.roll(1, 0))


def test_permuting_finetunes_permutes_outputs(base):
    tuned, ids = finetunes(base, 4), ids_for(4, 2, 5)
    order = [2, 0, 3, 1]
    out = ft.apply_stacked(base, ft.stack(tuned), ids)
    permuted = ft.apply_stacked(base, ft.stack([tuned[i] for i in order]), ids[order])
    assert_close(permuted, out[order], FP32, unlike=out)


def test_ranks_and_scales_may_differ(base):
    configs = [(1, 3.0, 0.0), (4, 1.0, 0.0), (2, -2.0, 0.3)]
    tuned = [
        randomized(
            ft.new_finetuned(
                base,
                linear_config=LinearAdapterConfig(r=r, alpha=alpha, dropout=p, bias=True),
                embedding_config=EmbeddingAdapterConfig(r=r, alpha=alpha),
            ),
            seed=r,
        )
        for r, alpha, p in configs
    ]
    expect_all_ways_equal(base, tuned, ids_for(3, 2, 5))


def test_nested_vmap(base):
    """Adapters by samples: every finetune on every sample."""
    tuned, ids = finetunes(base), ids_for(4, 1, 5)
    both = vmap(vmap(ft.apply, in_dims=(None, None, 0)), in_dims=(None, 0, None))(base, ft.stack(tuned), ids)
    expected = torch.stack([torch.stack([ft.apply(base, t, one) for one in ids]) for t in tuned])
    assert_close(both, expected, FP32, unlike=expected.roll(1, 0))
    other = vmap(vmap(ft.apply, in_dims=(None, 0, None)), in_dims=(None, None, 0), out_dims=1)(
        base, ft.stack(tuned), ids
    )
    assert_close(other, expected, FP32, unlike=expected.roll(1, 1))


def test_several_bases(everything):
    """vmap over bases too: every leaf of the base has an axis."""
    models = [copy.deepcopy(everything) for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.add_(0.1)
    bases = [ft.quantize_base_model(m) for m in models]
    one = bases[0]
    stacked = torch.utils._pytree.tree_unflatten(
        [torch.stack(leaves) for leaves in zip(*(b.params.values() for b in bases), strict=True)],
        torch.utils._pytree.tree_structure(one),
    )
    ids = ids_for(2, 5)
    tuned = finetunes(one, 1, plain_layers=())[0]
    mapped = vmap(ft.apply, in_dims=(0, None, None))(stacked, tuned, ids)
    spec = torch.utils._pytree.tree_structure(one)
    expected = torch.stack(
        [ft.apply(torch.utils._pytree.tree_unflatten(list(b.params.values()), spec), tuned, ids) for b in bases]
    )
    assert_close(mapped, expected, FP32, unlike=expected.roll(1, 0))


# --- plain layers in a stack

PLAIN = ["norm", "embed", "pos", "conv", "gain", "fc1", "fc2", "lm_head"]


@pytest.mark.parametrize(
    "plain", [*[{name} for name in PLAIN], set(PLAIN), {"norm", "gain", "fc1"}], ids=lambda p: "+".join(sorted(p))
)
@pytest.mark.parametrize("shape", [(3, 2, 5), (3, 2, 6), (3, 1, 3), (3, 3, 9)])
@pytest.mark.filterwarnings("ignore:plain_layers")
def test_plain_layers_stack(base, plain, shape):
    tuned = finetunes(base, plain_layers=plain)
    expect_all_ways_equal(base, tuned, ids_for(*shape))


def test_plain_layers_alone(everything):
    base = ft.quantize_base_model(everything, modules_not_to_quantize=PLAIN)
    tuned = finetunes(base, adapt_layers=(), plain_layers=set(PLAIN))
    assert not tuned[0].spec.adapters
    ids = ids_for(3, 2, 5)
    expect_all_ways_equal(base, tuned, ids)
    assert_close(
        ft.apply(base, tuned[0], ids[0]), twin(everything, base, tuned[0])(ids[0]), FP32, unlike=everything(ids[0])
    )


class Odd(nn.Module):
    """Layers on inputs of two, three and four axes, a batch norm, and a module with two inputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.bn = nn.BatchNorm2d(2)
        self.bilinear = nn.Bilinear(6, 6, 5)
        self.norm = nn.LayerNorm(5)
        self.prelu = nn.PReLU(5)

    def forward(self, x):  # (B, 4, 6)
        image = self.bn(self.conv(self.fc(x).unsqueeze(1)))
        return self.prelu(self.norm(self.bilinear(image[:, 0].mean(1), image[:, 1].amax(1))))


@pytest.mark.parametrize("plain", [{"conv"}, {"bn"}, {"bilinear"}, {"norm", "prelu"}, {"fc"}, {"conv", "bn", "fc"}])
@pytest.mark.filterwarnings("ignore:plain_layers")
def test_unregistered_modules_stack(plain, seed):
    model = Odd().eval()
    model.bn.running_mean.uniform_()
    base = ft.quantize_base_model(model)
    expect_all_ways_equal(base, finetunes(base, plain_layers=plain), torch.randn(3, 2, 4, 6))


# --- inputs that are not (N * B, ...) inside the model: equal, or refused


class Positions(nn.Module):
    """Learned positions as in nanoGPT: ``(T,)`` ids, or ``(1, T)``; or one more for a first token."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(20, 6)
        self.pos = nn.Embedding(16, 6)
        self.first = nn.Embedding(2, 6)
        self.fc = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, ids):
        x = self.embed(ids)
        if self.kind == "first":
            x = torch.cat([self.first(torch.zeros(len(ids), 1, dtype=torch.long)), x], 1)
        places = torch.arange(x.shape[1])
        x = x + self.pos(places.unsqueeze(0) if self.kind == "(1, T)" else places)
        return self.norm(self.fc(x))


@pytest.mark.parametrize("kind", ["(1, T)", "(T,)", "first"])
@pytest.mark.parametrize(
    "shape", [(2, 2, t) for t in range(1, 10)] + [(2, 1, t) for t in range(1, 6)] + [(1, 3, 3), (3, 1, 3)]
)
def test_positions_stacked(kind, shape, seed):
    base = ft.quantize_base_model(Positions(kind))
    low = {"embedding_config": EmbeddingAdapterConfig(r=1)}
    given = expect_equal_or_refused(base, finetunes(base, shape[0], **low), ids_for(*shape))
    if kind == "(1, T)":
        assert given
    low["adapt_layers"] = {"embed", "fc"}
    given = expect_equal_or_refused(base, finetunes(base, shape[0], **low), ids_for(*shape))
    assert given  # the positions have no adapter, so nothing stands in the way


class SequenceFirst(nn.Module):
    """(T, B, D) inside."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.gain = Gain(6)

    def forward(self, x):
        return self.gain(self.norm(self.fc(x.transpose(0, 1)))).transpose(0, 1)


@pytest.mark.parametrize("shape", [(2, 2, t, 6) for t in range(1, 9)] + [(2, 1, 2, 6), (2, 3, 6, 6), (3, 1, 3, 6)])
@pytest.mark.parametrize("trained", ["fc", "norm", "gain"])
def test_sequence_first_stacked(shape, trained, seed):
    base = ft.quantize_base_model(SequenceFirst())
    arguments = {"plain_layers": ()} if trained == "fc" else {"adapt_layers": (), "plain_layers": {trained}}
    expect_equal_or_refused(base, finetunes(base, shape[0], **arguments), torch.randn(shape))


class Tokens(nn.Module):
    """Tokens as rows, as in mixtures of experts."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.fc(x.reshape(-1, 6))).reshape(x.shape)


@pytest.mark.parametrize("shape", [(2, 2, 3, 6), (2, 2, 4, 6), (3, 1, 3, 6), (2, 2, 1, 6)])
def test_flattened_tokens_stacked(shape, seed):
    base = ft.quantize_base_model(Tokens())
    tuned = finetunes(base, shape[0], plain_layers={"norm"})
    assert expect_equal_or_refused(base, tuned, torch.randn(shape))


class ReadsParameters(nn.Module):
    """Parameters that a parent reads, so that their owner's forward never runs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.listed = nn.ParameterList([torch.ones(6)])
        self.named = nn.ParameterDict({"shift": torch.zeros(6)})
        self.gain = Gain(6)

    def forward(self, x):
        return self.fc(x) * self.listed[0] + self.named["shift"] + self.gain.gain


@pytest.mark.parametrize("plain", ["listed", "named", "gain"])
@pytest.mark.parametrize("shape", [(2, 3, 2, 6), (2, 1, 6), (2, 2, 6)])
def test_parameters_read_by_a_parent_stacked(plain, shape, seed):
    base = ft.quantize_base_model(ReadsParameters())
    tuned = finetunes(base, shape[0], adapt_layers=(), plain_layers={plain})
    x = torch.randn(shape)
    with contextlib.suppress(RuntimeError):  # the model's own arithmetic may fail on the shapes before anything else
        expect_equal_or_refused(base, tuned, x)
    expected = loop(base, tuned, x)
    mapped = vmap(ft.apply, in_dims=(None, 0, 0))(base, ft.stack(tuned), x)
    assert_close(mapped, expected, FP32, unlike=expected.roll(1, 0))


class RootParameter(nn.Module):
    """A parameter of the model itself, beside layers, as a class token is."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(6))
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(x + self.token)


def test_parameters_of_the_model_itself(seed):
    model = RootParameter()
    base = ft.quantize_base_model(model)
    x = torch.randn(2, 3, 6)
    assert_close(ft.apply(base, None, x[0]), twin(model, base)(x[0]), FP32, unlike=model(x[0]))
    expect_all_ways_equal(base, finetunes(base, 2, plain_layers=()), x)


def test_a_stacked_parameter_beside_layers_is_refused(seed):
    """As of a class token: it is trained by vmap, and apply_stacked says so."""
    base = ft.quantize_base_model(nn.Sequential(RootParameter(), nn.Linear(6, 6)), modules_not_to_quantize={"0.fc"})
    tuned = finetunes(base, 2, adapt_layers={"1"}, plain_layers={"0"})
    assert "0.token" in tuned[0].params
    x = torch.randn(2, 3, 6)
    expected = loop(base, tuned, x)
    mapped = vmap(ft.apply, in_dims=(None, 0, 0))(base, ft.stack(tuned), x)
    assert_close(mapped, expected, FP32, unlike=expected.flip(0))
    with pytest.raises(NotImplementedError) as error:
        ft.apply_stacked(base, ft.stack(tuned), x)
    assert str(error.value) == (
        "apply_stacked: RootParameter owns trained parameters ['token'] beside layers below it; use torch.func.vmap "
        "over ft.apply for this model."
    )


# --- shared modules, ties, and layers whose parent reads them


class SharedModule(nn.Module):
    """One layer under two names, and run twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a
        self.norm = nn.LayerNorm(6)
        self.again = nn.Sequential(self.norm, nn.Linear(6, 6))

    def forward(self, x):
        return self.again(self.b(torch.tanh(self.a(x)))) + self.norm(x)


@pytest.mark.parametrize(
    "arguments", [{}, {"plain_layers": {"norm"}}, {"adapt_layers": {"a"}}, {"adapt_layers": {"b"}}]
)
def test_a_module_under_two_names(arguments, seed):
    model = SharedModule()
    base = ft.quantize_base_model(model)
    x = torch.randn(3, 2, 6)
    before = ft.apply(base, None, x[0])
    assert_close(before, twin(model, base)(x[0]), FP32, unlike=model(x[0]))
    tuned = finetunes(base, **arguments)
    assert_close(ft.apply(base, tuned[0], x[0]), twin(model, base, tuned[0])(x[0]), FP32, unlike=before)
    expect_all_ways_equal(base, tuned, x)
    assert torch.equal(ft.apply(base, None, x[0]), before)  # nothing of the finetunes stayed behind
    everything_on_meta(base)


@pytest.mark.parametrize("head_first", [False, True])
class TestTied:
    """The three cases of tied weights, in either order of registration."""

    ids = ids_for(2, 5, vocab=12)

    def made(self, head_first: bool, quantized: bool) -> tuple[nn.Module, ft.Base]:
        torch.manual_seed(1)
        model = TiedLm(head_first=head_first).eval()
        kept = () if quantized else {"lm_head"}
        return model, ft.quantize_base_model(model, modules_not_to_quantize=kept)

    @pytest.mark.parametrize("quantized", [True, False])
    def test_both_frozen(self, head_first, quantized):
        model, base = self.made(head_first, quantized)
        assert base.params["embed.weight"].dtype == (torch.int8 if quantized else torch.float32)
        assert not any(name.startswith("lm_head") for name in base.params)  # one matrix
        tuned = finetunes(base, adapt_layers={"fc"}, plain_layers=())
        assert tuned[0].params.keys() == {"fc.lora_a", "fc.lora_b"}
        out = ft.apply(base, tuned[0], self.ids)
        assert_close(out, twin(model, base, tuned[0])(self.ids), FP32, unlike=ft.apply(base, None, self.ids))
        expect_all_ways_equal(base, tuned, self.ids.expand(3, 2, 5))

    @pytest.mark.parametrize("quantized", [True, False])
    @pytest.mark.filterwarnings("ignore:plain_layers")
    def test_head_plain(self, head_first, quantized):
        """Untied: the head is trained in its own copy, the table stays, or is adapted by itself."""
        model, base = self.made(head_first, quantized)
        tuned = finetunes(base, plain_layers={"lm_head"})
        assert tuned[0].params.keys() == {
            "embed.lora_a",
            "embed.lora_b",
            "fc.lora_a",
            "fc.lora_b",
            "lm_head.weight",
        }
        out = ft.apply(base, tuned[0], self.ids)
        assert_close(out, twin(model, base, tuned[0])(self.ids), FP32, unlike=ft.apply(base, None, self.ids))
        frozen = finetunes(base, adapt_layers=(), plain_layers={"lm_head"})
        hidden = ft.apply(base, None, self.ids)
        table = twin(model, base).embed.weight
        inner = torch.tanh(twin(model, base).fc(F.embedding(self.ids, table)))
        expected = F.linear(inner, frozen[0].params["lm_head.weight"])
        assert_close(ft.apply(base, frozen[0], self.ids), expected, FP32, unlike=hidden)
        expect_all_ways_equal(base, tuned, self.ids.expand(3, 2, 5))
        expect_all_ways_equal(base, frozen, self.ids.expand(3, 2, 5))

    @pytest.mark.parametrize("quantized", [True, False])
    def test_table_adapted_and_the_head_follows(self, head_first, quantized):
        model, base = self.made(head_first, quantized)
        tuned = finetunes(base, plain_layers=())  # by default the table is adapted, the head follows
        assert tuned[0].params.keys() == {"embed.lora_a", "embed.lora_b", "fc.lora_a", "fc.lora_b"}
        t = tuned[0]
        delta = t.spec.adapters[0].config.scale * (t.params["embed.lora_b"] @ t.params["embed.lora_a"]).T
        table = twin(model, base).embed.weight + delta
        inner = torch.tanh(twin(model, base, t).fc(F.embedding(self.ids, table)))
        expected = F.linear(inner, table)
        unlike = F.linear(inner, table - delta)
        assert_close(ft.apply(base, t, self.ids), expected, FP32, unlike=unlike)
        assert_close(twin(model, base, t)(self.ids), expected, FP32, unlike=unlike)
        expect_all_ways_equal(base, tuned, self.ids.expand(3, 2, 5))

    @pytest.mark.parametrize("quantized", [True, False])
    def test_head_adapted_on_its_own(self, head_first, quantized):
        model, base = self.made(head_first, quantized)
        for layers in ({"lm_head"}, {"lm_head", "embed"}):
            tuned = finetunes(base, adapt_layers=layers, plain_layers=())
            t = tuned[0]
            assert {a.path: a.kind for a in t.spec.adapters}["lm_head"] == "linear"
            reference = twin(model, base, t)
            head = t.params["lm_head.lora_b"] @ t.params["lm_head.lora_a"] / 4
            assert torch.allclose(reference.lm_head.weight, twin(model, base).lm_head.weight + head)
            out = ft.apply(base, t, self.ids)
            assert_close(out, reference(self.ids), FP32, unlike=ft.apply(base, None, self.ids))
            expect_all_ways_equal(base, tuned, self.ids.expand(3, 2, 5))

    def test_table_plain_and_the_head_follows(self, head_first):
        model, base = self.made(head_first, False)
        tuned = finetunes(base, adapt_layers=(), plain_layers={"embed"})
        table = tuned[0].params["embed.weight"]
        inner = torch.tanh(twin(model, base).fc(F.embedding(self.ids, table)))
        unlike = F.linear(inner, base.params["embed.weight"])
        assert_close(ft.apply(base, tuned[0], self.ids), F.linear(inner, table), FP32, unlike=unlike)

    def test_quantized_later_as_one(self, head_first):
        _, base = self.made(head_first, False)
        tuned = finetunes(base, adapt_layers={"embed"}, plain_layers=(), modules_not_to_quantize=())
        assert tuned[0].spec.quantized == ("embed",)
        _, eager = self.made(head_first, True)
        same = finetunes(eager, adapt_layers={"embed"}, plain_layers=())[0]
        assert torch.equal(ft.apply(base, tuned[0], self.ids), ft.apply(eager, same, self.ids))
        assert not torch.equal(ft.apply(base, tuned[0], self.ids), ft.apply(base, None, self.ids))
        expect_all_ways_equal(base, tuned, self.ids.expand(3, 2, 5))


class Casting(nn.Linear):
    """A subclass that nobody registered, which would even swallow int8 codes."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class TiedToUnregistered(TiedLm):
    def __init__(self):
        super().__init__()
        self.lm_head = Casting(6, 12, bias=False)
        self.lm_head.weight = self.embed.weight


@pytest.mark.parametrize(
    "arguments", [{}, {"modules_not_to_quantize": ()}, {"plain_layers": ()}, {"adapt_layers": "fc"}]
)
def test_a_tie_to_an_unregistered_class(arguments, seed):
    """It stays in float; an adapter of the table cannot be followed by a class that nobody knows."""
    model = TiedToUnregistered()
    base = ft.quantize_base_model(model, modules_not_to_quantize=())
    assert base.params["embed.weight"].is_floating_point()
    ids = ids_for(2, 5, vocab=12)
    assert_close(ft.apply(base, None, ids), twin(model, base)(ids), FP32, unlike=model(ids))
    try:
        tuned = randomized(ft.new_finetuned(base, **arguments))
        out = ft.apply(base, tuned, ids)
    except ValueError as error:
        assert "lm_head" in str(error) and "embed" in str(error)
        return
    assert tuned.spec.quantized == () or relative_error(out, twin(model, base, tuned)(ids)) < 0.05
    if not tuned.spec.quantized:
        assert_close(out, twin(model, base, tuned)(ids), FP32, unlike=ft.apply(base, None, ids))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kept", [(), {"linear1", "linear2"}])
def test_torchs_transformer_layers_run_their_children(nested, kept, seed):
    """Their fused path reads the weights of its children, and would see codes, or no adapter."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if nested else layer
    model = nn.Sequential(nn.Linear(8, 8), model).eval()
    base = ft.quantize_base_model(model, modules_not_to_quantize=kept)
    tuned = finetunes(base, plain_layers=())
    x = torch.randn(3, 2, 5, 8)
    with torch.no_grad():
        assert_close(ft.apply(base, None, x[0]), twin(model, base)(x[0]), FP32, unlike=model(x[0]))
        expected = twin(model, base, tuned[0])(x[0])
        assert_close(ft.apply(base, tuned[0], x[0]), expected, FP32, unlike=ft.apply(base, None, x[0]))
    expect_all_ways_equal(base, tuned, x)
    _, grads = ft.value_and_grad(lambda t: ft.apply(base, t, x[0]).square().mean())(tuned[0])
    assert all(grad.abs().max() > 0 for grad in grads.values())


ATTENTION = {
    "plain": ({}, {}),
    "sequence first": ({"batch_first": False}, {}),
    "no bias": ({"bias": False}, {}),
    "weights": ({}, {"need_weights": True}),
    "weights of each head": ({}, {"need_weights": True, "average_attn_weights": False}),
    "padding": ({}, {"key_padding_mask": torch.tensor([[False] * 5, [False, False, True, True, True]])}),
    "float padding": ({}, {"key_padding_mask": torch.tensor([[0.0] * 5, [0.0, -1.0, 0.5, float("-inf"), 0.0]])}),
    "causal mask": ({}, {"attn_mask": torch.ones(5, 5).triu(1).bool()}),
    "float mask": ({}, {"attn_mask": torch.linspace(-1, 1, 25).reshape(5, 5), "need_weights": True}),
    "mask of each head": ({}, {"attn_mask": torch.arange(100).reshape(4, 5, 5) % 3 == 1}),
    "both masks": (
        {},
        {
            "attn_mask": torch.ones(5, 5).triu(1).bool(),
            "key_padding_mask": torch.tensor([[False] * 5, [False, False, False, False, True]]),
        },
    ),
    "causal": ({}, {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True}),
    "other widths": ({"kdim": 6, "vdim": 10}, {}),
    "bias of keys": ({"add_bias_kv": True}, {"need_weights": True}),
    "zero attention": ({"add_zero_attn": True}, {"need_weights": True}),
}


class Attention(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **{"batch_first": True, **arguments})

    def forward(self, q, k, v, **arguments):
        return self.attention(q, k, v, **{"need_weights": False, **arguments})


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_torchs_attention(kind, dropout, seed):
    """Taken apart into its projections, it computes what it did, whatever it is asked."""
    arguments, inputs = ATTENTION[kind]
    model = Attention(dropout=dropout, **arguments).eval()
    base = ft.quantize_base_model(model, modules_not_to_quantize={".*"})
    q, k, v = (torch.randn(2, 5, width) for width in (8, arguments.get("kdim", 8), arguments.get("vdim", 8)))
    if not arguments.get("batch_first", True):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    with torch.no_grad():
        out, weights = ft.apply(base, None, q, k, v, **inputs)
        expected, expected_weights = model(q, k, v, **inputs)
        other = model(q, k, v.flip(0, 1), **inputs)[0]
    assert_close(out, expected, FP32, unlike=other)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        assert_close(weights, expected_weights, FP32, unlike=expected_weights.flip(-1))
    tuned = ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=2))
    with torch.no_grad():
        assert relative_error(ft.apply(base, tuned, q, k, v, **inputs)[0], expected) < FP32
        changed = ft.apply(base, randomized(tuned), q, k, v, **inputs)[0]
        merged = copy.deepcopy(model)
        merged.load_state_dict(ft.merge(base, randomized(tuned)))
        if tuned.params:
            assert_close(changed, merged(q, k, v, **inputs)[0], FP32, unlike=expected)


def test_a_model_that_is_taken_apart_is_not_changed(seed):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).train()
    before = snapshot(model)
    base = ft.quantize_base_model(model)
    tuned = finetunes(base, 2)
    values = [snapshot(base), *map(snapshot, tuned)]
    x = torch.randn(2, 3, 5, 8)
    key = ft.random.key(0)
    ft.apply_stacked(base, ft.stack(tuned), x, train=True, rng=key)
    ft.value_and_grad(lambda t: ft.apply(base, t, x[0], train=True, rng=key).square().mean())(tuned[0])
    ft.merge(base, tuned[0])
    ft.to_module(base, tuned[0])(x[0])
    assert_unchanged(model, before)
    for value, old in zip((base, *tuned), values, strict=True):
        assert_unchanged(value, old)
    everything_on_meta(base)


class ReadsWeight(nn.Module):
    """A head that is the table's weight, read by the parent."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.fc = nn.Linear(6, 6)

    def forward(self, ids):
        return F.linear(self.fc(self.embed(ids)), self.embed.weight)


def test_a_parent_that_reads_codes_fails_loudly(seed):
    base = ft.quantize_base_model(ReadsWeight())
    with pytest.raises(NotImplementedError, match=r"computes with the weight of \['embed'\] itself"):
        ft.apply(base, None, ids_for(2, 5, vocab=12))
    model = ReadsWeight()
    base = ft.quantize_base_model(model, modules_not_to_quantize={"embed"})
    ids = ids_for(2, 5, vocab=12)
    assert_close(ft.apply(base, None, ids), twin(model, base)(ids), FP32, unlike=model(ids))


def test_a_model_that_is_one_layer(seed):
    for model, x in ((nn.Linear(6, 4), torch.randn(2, 3, 6)), (nn.Embedding(9, 6), ids_for(2, 3, vocab=9))):
        base = ft.quantize_base_model(model)
        tuned = finetunes(base, 2)
        assert_close(ft.apply(base, tuned[0], x[0]), twin(model, base, tuned[0])(x[0]), FP32, unlike=model(x[0]))
        expect_all_ways_equal(base, tuned, x)


def test_subclasses_stay_as_they_are(seed, caplog):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(5, 5), Doubled(5, 5))
    base = ft.quantize_base_model(model)
    assert "1 is a Doubled, a subclass that may override forward; it stays in float" in caplog.text
    assert base.params["1.weight"].is_floating_point() and "1.weight_scale" not in base.params
    x = torch.randn(3, 5)
    assert_close(ft.apply(base, None, x), twin(model, base)(x), FP32, unlike=model(x))
    tuned = finetunes(base, 3, plain_layers={"1"})
    assert tuned[0].params.keys() == {"0.lora_a", "0.lora_b", "1.weight", "1.bias"}
    expect_all_ways_equal(base, tuned, torch.randn(3, 2, 5))


def test_negative_and_large_ids_are_errors(base):
    for bad in (-1, 20, -100):
        with pytest.raises(IndexError):
            ft.apply(base, None, torch.tensor([[1, bad]]))
        with pytest.raises(IndexError):
            ft.apply(base, finetunes(base, 1)[0], torch.tensor([[1, bad]]))


# --- dropout


@pytest.fixture(scope="module")
def with_dropout(base):
    return finetunes(base, linear_config=LinearAdapterConfig(r=3, dropout=0.3))


def test_dropout_is_off_unless_training(everything, base, with_dropout):
    ids = ids_for(2, 5)
    tuned = with_dropout[0]
    out = ft.apply(base, tuned, ids)
    assert torch.equal(out, ft.apply(base, tuned, ids, rng=ft.random.key(0)))
    assert_close(
        out,
        twin(everything, base, tuned)(ids),
        FP32,
        unlike=ft.apply(base, tuned, ids, train=True, rng=ft.random.key(0)),
    )


def test_dropout_is_a_function_of_the_key(base, with_dropout):
    ids, tuned = ids_for(2, 5), with_dropout[0]
    torch.manual_seed(0)
    one = ft.apply(base, tuned, ids, train=True, rng=ft.random.key(0))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(one, ft.apply(base, tuned, ids, train=True, rng=ft.random.key(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one, ft.apply(base, tuned, ids, train=True, rng=ft.random.key(1)))


@pytest.mark.parametrize("shape", [(3, 2, 5), (3, 2, 6), (3, 1, 3)])
def test_dropout_all_ways(base, with_dropout, shape):
    ids = ids_for(*shape)
    key = ft.random.key(7)
    keys = ft.random.split(key, 3)
    expected = torch.stack([ft.apply(base, t, ids[i], train=True, rng=keys[i]) for i, t in enumerate(with_dropout)])
    other = torch.stack([ft.apply(base, t, ids[i], train=True, rng=keys[i - 1]) for i, t in enumerate(with_dropout)])
    stacked = ft.stack(with_dropout)
    mapped = vmap(lambda t, k, x: ft.apply(base, t, x, train=True, rng=k))(stacked, keys, ids)
    assert_close(mapped, expected, FP32, unlike=other)
    for rng in (key, keys):
        together = ft.apply_stacked(base, stacked, ids, train=True, rng=rng)
        assert_close(together, expected, FP32, unlike=other)


def test_dropout_rates_that_differ(base):
    rates = (0.0, 0.5, 0.2)
    tuned = [
        randomized(ft.new_finetuned(base, linear_config=LinearAdapterConfig(dropout=p)), i) for i, p in enumerate(rates)
    ]
    ids, keys = ids_for(3, 2, 5), ft.random.split(ft.random.key(3), 3)
    expected = torch.stack([ft.apply(base, t, ids[i], train=True, rng=keys[i]) for i, t in enumerate(tuned)])
    together = ft.apply_stacked(base, ft.stack(tuned), ids, train=True, rng=keys)
    assert_close(together, expected, FP32, unlike=loop(base, tuned, ids))


def test_dropout_in_expectation(seed):
    """A linear model: the mean over keys is the output without dropout."""
    base = ft.quantize_base_model(nn.Sequential(nn.Linear(20, 4), nn.Dropout(0.4)))
    tuned = randomized(ft.new_finetuned(base, linear_config=LinearAdapterConfig(dropout=0.5)), scale=0.2)
    x = torch.randn(2, 20)
    keys = ft.random.split(ft.random.key(0), 20_000)
    drawn = vmap(lambda k: ft.apply(base, tuned, x, train=True, rng=k))(keys)
    deviation = drawn.std(0) / 20_000**0.5
    assert ((drawn.mean(0) - ft.apply(base, tuned, x)).abs() < 5 * deviation).all()
    assert (deviation > 0).all() and ((drawn == 0).float().mean() - 0.4).abs() < 0.01


def test_dropout_masks_differ_between_layers_and_calls(seed):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Dropout(0.5), nn.Dropout(0.5)

        def forward(self, x):
            return self.a(x), self.b(x), self.a(x)

    base = ft.quantize_base_model(Twice())
    masks = [m != 0 for m in ft.apply(base, None, torch.ones(10_000), train=True, rng=ft.random.key(0))]
    again = ft.apply(base, None, torch.ones(10_000), train=True, rng=ft.random.key(0))
    for i in range(3):
        assert torch.equal(masks[i], again[i] != 0)
        assert ((masks[i] == masks[i - 1]).float().mean() - 0.5).abs() < 0.05


MISSING_RNG = (
    "train=True with dropout needs rng, a key that decides the masks: pass rng=ft.random.key(seed), and "
    "ft.random.fold_in(key, step) at each step."
)


def test_missing_rng(base, with_dropout):
    ids = ids_for(3, 2, 5)
    for call in (
        lambda: ft.apply(base, with_dropout[0], ids[0], train=True),
        lambda: ft.apply(base, None, ids[0], train=True),
        lambda: ft.apply_stacked(base, ft.stack(with_dropout), ids, train=True),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == MISSING_RNG
    plain = ft.quantize_base_model(Tiny())
    tuned = ft.new_finetuned(plain)
    x = ids_for(2, 3, vocab=16)
    assert torch.equal(ft.apply(plain, tuned, x, train=True), ft.apply(plain, tuned, x))  # no dropout, no key


def test_keys_of_wrong_shapes(base, with_dropout):
    ids, stacked = ids_for(3, 2, 5), ft.stack(with_dropout)
    with pytest.raises(ValueError, match=r"apply: rng has shape \(3,\); one finetune takes one key, of shape \(\)\."):
        ft.apply(base, with_dropout[0], ids[0], train=True, rng=ft.random.split(ft.random.key(0), 3))
    with pytest.raises(ValueError, match=r"apply_stacked: rng has shape \(2,\); expected \(\) or \(3,\), a key each\."):
        ft.apply_stacked(base, stacked, ids, train=True, rng=ft.random.split(ft.random.key(0), 2))
    for call in (lambda: ft.apply(base, None, ids[0], rng=3), lambda: ft.apply_stacked(base, stacked, ids, rng=3)):
        with pytest.raises(TypeError, match=r"rng is a int; expected a key from ft\.random\.key"):
            call()


# --- errors


def text_of(kind: type[Exception], call) -> str:
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


def test_apply_error_texts(everything, base):
    tuned, ids = finetunes(base), ids_for(3, 2, 5)
    stacked = ft.stack(tuned)
    assert text_of(ValueError, lambda: ft.apply(base, stacked, ids[0])) == (
        "tuned: a stack of 3 finetunes was given to ft.apply; use ft.apply_stacked(base, stacked, ...), "
        "torch.func.vmap(ft.apply, in_dims=(None, 0, ...)), or ft.index(stacked, i)."
    )
    other = ft.quantize_base_model(Everything())
    message = (
        f"tuned: this finetune belongs to base '{base.fingerprint}', but the base given is '{other.fingerprint}' "
        "(Everything); pass the base it was made from."
    )
    assert text_of(ValueError, lambda: ft.apply(other, tuned[0], ids[0])) == message
    assert text_of(ValueError, lambda: ft.apply_stacked(other, stacked, ids)) == message
    assert text_of(TypeError, lambda: ft.apply(everything, tuned[0], ids[0])) == (
        "apply: expected a Base first, made by ft.quantize_base_model(model), got Everything."
    )
    assert text_of(TypeError, lambda: ft.apply(base, ids[0])) == (
        "apply: expected a Finetuned second, got Tensor; inputs come after it."
    )
    with pytest.raises(TypeError):
        ft.apply(base, tuned[0])


def test_a_stack_without_adapters_is_no_single_finetune(base):
    stacked = ft.stack(finetunes(base, 3, adapt_layers=(), plain_layers={"norm"}))
    assert "a stack of 3 finetunes was given to ft.apply" in text_of(
        ValueError, lambda: ft.apply(base, stacked, ids_for(2, 5))
    )


def test_apply_stacked_error_texts(base):
    tuned, ids = finetunes(base), ids_for(3, 2, 5)
    stacked = ft.stack(tuned)
    message = text_of(ValueError, lambda: ft.apply_stacked(base, tuned[0], ids))
    assert message == f"apply_stacked: expected a stack made by ft.stack([...]), got {tuned[0]!r}; use ft.apply."
    assert text_of(ValueError, lambda: ft.apply_stacked(base, None, ids)).startswith(
        "apply_stacked: expected a stack made by ft.stack([...]), got None"
    )
    assert text_of(ValueError, lambda: ft.apply_stacked(base, stacked, ids[:2])) == (
        "apply_stacked: input [0][0] has shape (2, 2, 5); expected (3, B, ...), one batch per finetune. "
        "Expand an input that all of them share."
    )
    assert "[0][0] has shape (3,); expected (3, B, ...)" in text_of(
        ValueError, lambda: ft.apply_stacked(base, stacked, ids[:, 0, 0])
    )
    assert "[1]['mask'] has shape (3, 4, 5); expected (3, 2, ...)" in text_of(
        ValueError, lambda: ft.apply_stacked(base, stacked, ids, mask=ids_for(3, 4, 5))
    )
    assert "nothing to divide" in text_of(ValueError, lambda: ft.apply_stacked(base, stacked, 3))
    assert "nothing to divide" in text_of(ValueError, lambda: ft.apply_stacked(base, stacked, ids[:, :0]))


def test_outputs_that_cannot_be_divided(seed):
    class Scalar(nn.Module):
        def __init__(self, reduce):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.reduce = reduce

        def forward(self, x):
            return {"hidden": self.fc(x), "loss": self.reduce(self.fc(x)), "note": "text", "none": None}

    for reduce, shape in ((lambda y: y.mean(), "()"), (lambda y: y.mean(0), "(4,)")):
        base = ft.quantize_base_model(Scalar(reduce))
        stacked = ft.stack(finetunes(base, 2))
        message = text_of(ValueError, lambda b=base, s=stacked: ft.apply_stacked(b, s, torch.randn(2, 3, 4)))
        assert message == (
            f"apply_stacked: output ['loss'] has shape {shape}, not a row for each of the 2 x 3 samples, so it cannot "
            "be divided among the finetunes. Compute losses per finetune from the outputs (leave out labels=), or use "
            "torch.func.vmap."
        )
    base = ft.quantize_base_model(Scalar(lambda y: y.mean(1)))
    out = ft.apply_stacked(base, ft.stack(finetunes(base, 2)), torch.randn(2, 3, 4))
    assert out["loss"].shape == (2, 3) and out["hidden"].shape == (2, 3, 4) and out["note"] == "text"


def test_llama_with_labels_is_refused_and_vmaps():
    base = ft.quantize_base_model(llama())
    tuned, ids = finetunes(base, 2), ids_for(2, 3, 5, vocab=32)
    with pytest.raises(ValueError, match=r"output \.?\[?'?loss'?\]? has shape \(\)"):
        ft.apply_stacked(base, ft.stack(tuned), ids, labels=ids)
    losses = vmap(lambda t, x: ft.apply(base, t, x, labels=x).loss)(ft.stack(tuned), ids)
    expected = torch.stack([ft.apply(base, t, x, labels=x).loss for t, x in zip(tuned, ids, strict=True)])
    assert_close(losses, expected, FP32, unlike=expected.flip(0))


def test_structured_inputs_and_outputs(seed):
    class Structured(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, batch, *, scale=1.0, extra=None):
            y = self.fc(batch["x"]) * scale
            return (y, [y + extra[0]]) if extra else (y, [])

    base = ft.quantize_base_model(Structured())
    tuned = finetunes(base, 2)
    x = torch.randn(2, 3, 4)
    y, (z,) = ft.apply_stacked(base, ft.stack(tuned), {"x": x}, scale=2.0, extra=[x])
    expected = torch.stack([ft.apply(base, t, {"x": x[i]}, scale=2.0)[0] for i, t in enumerate(tuned)])
    assert_close(y, expected, FP32, unlike=expected.flip(0))
    assert torch.equal(z, y + x)


# --- purity


def everything_on_meta(base: ft.Base) -> None:
    with base.skeleton.calling() as (used, _):
        modules = base.skeleton._module, used
    for module in modules:
        for name, leaf in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
            assert leaf.is_meta, name
        for path, layer in module.named_modules():
            tensors = [n for n, value in vars(layer).items() if isinstance(value, Tensor) and not value.is_meta]
            assert not tensors, (path, tensors)


@pytest.mark.parametrize("name", ["everything", "tied", *HF_MODELS])
def test_nothing_is_ever_changed(name):
    """The whole life of a finetune: the module, the base and the other finetunes keep every bit."""
    torch.manual_seed(3)
    model = {"everything": Everything, "tied": TiedLm, **HF_MODELS}[name]()
    model.train()
    first = next(model.parameters())
    first.requires_grad_(False)
    model.register_forward_hook(lambda *args: None)
    ids = ids_for(2, 5, vocab=12)
    kwargs = hf_inputs(name, ids) if name in HF_MODELS else {}
    args = () if kwargs else (ids,)
    of_model = snapshot(model)
    ids_before = ids.clone()

    base = ft.quantize_base_model(model)
    tuned = finetunes(base, 2, linear_config=LinearAdapterConfig(dropout=0.1, bias=True))
    values = [(model, of_model), (base, snapshot(base)), *[(t, snapshot(t)) for t in tuned]]

    def check() -> None:
        for value, before in values:
            assert_unchanged(value, before)
        assert torch.equal(ids, ids_before)
        everything_on_meta(base)

    def loss_fn(t: ft.Finetuned) -> Tensor:
        out = ft.apply(base, t, *args, train=True, rng=ft.random.key(0), **kwargs)
        return (out.logits if kwargs else out).square().mean()

    check()
    loss_fn(tuned[0])
    check()
    _, grads = ft.value_and_grad(loss_fn)(tuned[0])
    optimizer = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-2, weight_decay=0.1))
    state = optimizer.init(tuned[0])
    updates, state = optimizer.update(grads, state, tuned[0])
    stepped = ft.optim.apply_updates(tuned[0], updates)
    assert not torch.equal(loss_fn(stepped), loss_fn(tuned[0]))
    check()
    vmap(loss_fn)(ft.stack(tuned))
    vmap(torch.func.grad(lambda p: loss_fn(tuned[0].replace(params=p))))(dict(ft.stack(tuned).params))
    check()
    merged = (
        ft.merge(base, tuned[0].replace(params={n: p for n, p in tuned[0].params.items()})) if name == "gpt2" else {}
    )
    for leaf in merged.values():
        leaf.zero_() if leaf.is_floating_point() else None
    module = ft.to_module(base, tuned[0])
    with torch.no_grad():
        module(*args, **kwargs)
        if hasattr(module, "generate") and name != "t5":
            module.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    check()
    ft.unstack(ft.stack(tuned))
    ft.state_dict(tuned[0], base=base)
    check()
    with pytest.raises(IndexError):  # a failing forward must leave nothing behind either
        ft.apply(base, tuned[0], *(x + 1000 for x in args), **{key: x + 1000 for key, x in kwargs.items()})
    check()
    assert first.requires_grad is False and model.training


def test_purity_would_be_noticed(base):
    before = snapshot(base)
    leaf = base.params["norm.weight"]
    leaf.add_(0)
    with pytest.raises(AssertionError):
        assert_unchanged(base, before)


def test_gradients_reach_nothing_else(everything):
    model = copy.deepcopy(everything)
    base = ft.quantize_base_model(model)
    tuned = finetunes(base, 1)[0]
    ft.value_and_grad(lambda t: ft.apply(base, t, ids_for(2, 5)).sum())(tuned)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(leaf.requires_grad for leaf in [*base.params.values(), *tuned.params.values()])


def test_changing_the_module_afterwards_does_not_change_the_base(seed):
    model = Everything().eval()
    base = ft.quantize_base_model(model)
    ids = ids_for(2, 5)
    before = ft.apply(base, None, ids)
    with torch.no_grad():
        for leaf in [*model.parameters(), *model.buffers()]:
            leaf.fill_(7)
    model.drop.p = 0.9
    model.norm.eps = 1.0
    assert torch.equal(ft.apply(base, None, ids), before)
    pointers = {leaf.data_ptr() for leaf in [*model.parameters(), *model.buffers()]}
    assert not pointers & {leaf.data_ptr() for leaf in base.params.values()}


def test_a_missing_parameter_is_loud(base):
    import dataclasses

    ids = ids_for(2, 5)
    for missing in ("norm.weight", "fc1.weight", "fc1.bias", "shift", "temperature", "conv.weight", "pos.weight_scale"):
        params = {name: leaf for name, leaf in base.params.items() if name != missing}
        broken = dataclasses.replace(base, params=params)
        with pytest.raises((RuntimeError, KeyError, NotImplementedError)) as error:
            value = ft.apply(broken, None, ids)
            assert value.is_meta  # a result on the meta device holds no numbers either
            value.sum().item()
        assert "meta" in str(error.value) or "weight_scale" in str(error.value), missing
    assert ft.apply(base, None, ids).isfinite().all()


def test_a_failed_call_leaves_the_skeleton_usable(base):
    ids = ids_for(2, 5)
    before = ft.apply(base, None, ids)
    tuned = finetunes(base, 2)
    with pytest.raises(IndexError):
        ft.apply(base, tuned[0], ids + 100)
    with pytest.raises(IndexError):
        ft.apply_stacked(base, ft.stack(tuned), ids.expand(2, 2, 5) + 100)
    assert torch.equal(ft.apply(base, None, ids), before)
    everything_on_meta(base)


# --- threads


def test_four_threads_on_one_base(base):
    tuned, ids = finetunes(base, 4), ids_for(4, 2, 5)
    expected = loop(base, tuned, ids)
    wrong: list[str] = []
    start = threading.Barrier(4)

    def work(i: int) -> None:
        start.wait()
        for step in range(60):
            j = (i + step) % 4
            out = ft.apply(base, tuned[j], ids[j])
            if relative_error(out, expected[j]) > FP32:
                wrong.append(f"thread {i} step {step}")
            if step % 10 == 0:
                together = ft.apply_stacked(base, ft.stack(tuned), ids)
                _, grads = ft.value_and_grad(lambda t, j=j: ft.apply(base, t, ids[j]).sum())(tuned[j])
                if relative_error(together, expected) > FP32 or not grads["fc1.lora_a"].any():
                    wrong.append(f"thread {i} step {step} stacked")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert relative_error(expected[0], expected[1]) > 0.01


def test_threads_and_forward_mode_side_by_side():
    base = ft.quantize_base_model(llama())
    tuned, ids = finetunes(base, 2), ids_for(2, 5, vocab=32)
    tangents = {name: torch.ones_like(leaf) for name, leaf in tuned[0].params.items()}

    def derivative(t: ft.Finetuned) -> Tensor:
        return torch.func.jvp(
            lambda p: ft.apply(base, t.replace(params=p), ids).logits.square().mean(), (dict(t.params),), (tangents,)
        )[1]

    expected = [derivative(t) for t in tuned]
    logits = [ft.apply(base, t, ids).logits for t in tuned]
    wrong: list[int] = []

    def forward(i: int) -> None:
        for _ in range(8):
            if relative_error(ft.apply(base, tuned[i], ids).logits, logits[i]) > FP32:
                wrong.append(i)

    def tangent(i: int) -> None:
        for _ in range(4):
            if abs(derivative(tuned[i]) - expected[i]) > 1e-4 * abs(expected[i]):
                wrong.append(10 + i)

    # One of them: torch's forward-mode level is one number for the whole process.
    threads = [threading.Thread(target=forward, args=(i % 2,)) for i in range(3)]
    threads.append(threading.Thread(target=tangent, args=(0,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert abs(expected[0] - expected[1]) > 1e-3 * abs(expected[0])


# --- compile and grad modes


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("stacked", [False, True])
def test_compiled_apply(base, stacked, fresh_dynamo):
    tuned = finetunes(base, 3)
    ids = ids_for(3, 2, 5)
    value, x = (ft.stack(tuned), ids) if stacked else (tuned[0], ids[0])
    function = ft.apply_stacked if stacked else ft.apply
    expected = function(base, value, x)
    compiled = torch.compile(lambda t, x: function(base, t, x), backend="aot_eager")
    assert_close(compiled(value, x), expected, FP32, unlike=function(base, value, x.flip(-1)))
    everything_on_meta(base)


def test_no_grad_and_inference_mode(base):
    tuned, ids = finetunes(base, 2), ids_for(2, 2, 5)
    expected = ft.apply(base, tuned[0], ids[0])
    unlike = ft.apply(base, tuned[1], ids[0])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(ft.apply(base, tuned[0], ids[0]), expected, FP32, unlike=unlike)
            assert_close(ft.apply_stacked(base, ft.stack(tuned), ids)[0], expected, FP32, unlike=unlike)
    assert_close(ft.apply(base, tuned[0], ids[0]), expected, FP32, unlike=unlike)


def test_autocast(base):
    tuned, ids = finetunes(base, 2), ids_for(2, 2, 5)
    exact = loop(base, tuned, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        one = loop(base, tuned, ids)
        together = ft.apply_stacked(base, ft.stack(tuned), ids)
        mapped = vmap(ft.apply, in_dims=(None, 0, 0))(base, ft.stack(tuned), ids)
    for out in (one, together, mapped):
        assert out.dtype == torch.bfloat16
        assert_close(out, exact, 0.04, unlike=-exact)  # about ten roundings to 2**-8
