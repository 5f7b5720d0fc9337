"""Every float dtype of a model, and autocast: all results are the exact ones, to the roundings of the dtype."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    Everything,
    Mlp,
    Tiny,
    assert_close,
    assert_same_finetune,
    assert_trees_equal,
    assert_unchanged,
    finetunes,
    llama,
    opt,
    randomized,
    relative_error,
    snapshot,
    twin,
)
from torch import Tensor, nn
from torch.func import vmap

import finetuna_func as ft
from finetuna_func import LinearAdapterConfig

# Half the distance from 1 to the next number: what one rounding does.
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# The models below round some 25 (the small one) to 60 times (two blocks of attention) between ids and logits. These
# roundings are independent, so beside the largest logit they are about the root of that many: 8 units.
FORWARD = 8
# Where a product is added and taken away again, or divided by a norm, there are some more.
OPTIONS = 12
# Backward as many again, and what is summed up for a leaf's gradient may be some times larger than the sum.
BACKWARD = 32


@dataclasses.dataclass(frozen=True)
class Precision:
    """A model's dtype, and whether autocast to bfloat16 is on."""

    dtype: torch.dtype
    autocast: bool = False

    def __str__(self) -> str:
        return "autocast" if self.autocast else str(self.dtype).removeprefix("torch.")

    @property
    def computed(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.dtype

    @property
    def wide(self) -> torch.dtype:
        """Of adapters and constants."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def unit(self, name: str) -> float:
        # Hugging Face's norms and softmaxes are computed in float32, whatever the model's dtype.
        coarser = torch.float32 if self.dtype == torch.float64 and name != "mlp" else self.computed
        return UNIT[coarser]

    def on(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else contextlib.nullcontext()


PRECISIONS = [
    Precision(torch.float64),
    Precision(torch.float32),
    Precision(torch.bfloat16),
    Precision(torch.float16),
    Precision(torch.float32, autocast=True),
]
SHORT = [p for p in PRECISIONS if UNIT[p.computed] > 1e-6]  # 16 bits


def smooth_opt() -> Any:
    """OPT without ReLU: at its kink a rounding switches a unit on or off, and the gradient jumps."""
    model = opt()
    for layer in model.model.decoder.layers:
        layer.activation_fn = nn.GELU()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": Everything, "llama": llama, "opt": smooth_opt}
PLAIN = {"mlp": {"lm_head", "norm"}, "llama": {"lm_head", "norm"}, "opt": {"lm_head", "final_layer_norm"}}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    precision: Precision
    model: nn.Module
    base: ft.Base
    tuned: list[ft.Finetuned]
    ids: Tensor

    @property
    def unit(self) -> float:
        return self.precision.unit(self.name)

    def apply(self, tuned: ft.Finetuned | None, ids: Tensor) -> Tensor:
        with self.precision.on():
            return logits_of(ft.apply(self.base, tuned, ids))

    @functools.cached_property
    def outputs(self) -> Tensor:
        return torch.stack([self.apply(t, ids) for t, ids in zip(self.tuned, self.ids, strict=True)])

    @functools.cached_property
    def references(self) -> list[nn.Module]:
        """The model in float64, on the dequantized weights plus the adapters, by hand."""
        exact = copy.deepcopy(self.model).double()
        return [twin(exact, dequantized(self.base), t) for t in self.tuned]


def logits_of(out: Any) -> Tensor:
    return out.logits if hasattr(out, "logits") else out


def dequantized(base: ft.Base) -> ft.Base:
    """The base with its matrices in float64, codes times scales by hand."""
    params: dict[str, Tensor] = {}
    for name, leaf in base.params.items():
        if name + "_scale_code" in base.params:
            numbers = base.params[name + "_code"].double()[nibbles(leaf)]
            params[name] = numbers * nested_absmax(base, name).repeat_interleave(64, 1)[:, : numbers.shape[1]]
        elif name + "_code" in base.params and "_scale" not in name:
            numbers = base.params[name + "_code"].double()[leaf.long()].flatten()
            scale = base.params[name + "_scale"].double().repeat_interleave(256)[: numbers.numel()]
            params[name] = (numbers * scale).reshape(leaf.shape)
        elif name + "_scale" in base.params:
            params[name] = leaf.double() * base.params[name + "_scale"].double().unsqueeze(1)
        elif "weight_" not in name:
            params[name] = leaf.double()
    return dataclasses.replace(base, params=params)


def nibbles(codes: Tensor) -> Tensor:
    """The 4-bit codes ``(out, in)`` as indices; int8 codes are those of odd widths, one a byte."""
    if codes.dtype == torch.int8:
        return codes.long()
    return torch.stack([codes.long() // 16, codes.long() % 16], -1).flatten(1)


def nested_absmax(base: ft.Base, name: str) -> Tensor:
    """The absmax of each block of nf4, ``(out, blocks)``."""
    quantized, code = base.params[name + "_scale"], base.params[name + "_scale_code"]
    scale = base.params[name + "_scale_scale"].repeat_interleave(256)[: quantized.numel()].reshape(quantized.shape)
    return (code[quantized.long()] * scale + base.params[name + "_scale_offset"]).double()


@functools.cache
def case_of(name: str, precision: Precision, scheme: str) -> Case:
    torch.manual_seed(0)
    model = MODELS[name]().to(precision.dtype).eval()
    base = ft.quantize_base_model(model, scheme=scheme)
    tuned = finetunes(base, 3, linear_config=LinearAdapterConfig(r=2), plain_layers=PLAIN[name])
    ids = torch.randint(0, 20, (3, 2, 6), generator=torch.Generator().manual_seed(0))
    return Case(name, precision, model, base, tuned, ids)


@pytest.fixture(params=[(n, s) for n in MODELS for s in ("int8", "blockwise8", "nf4")], ids=lambda p: f"{p[0]}-{p[1]}")
def kind(request) -> tuple[str, str]:
    return request.param


@pytest.fixture(params=PRECISIONS, ids=str)
def case(request, kind) -> Case:
    return case_of(kind[0], request.param, kind[1])


# --- forward


def test_the_forward_is_the_exact_one_to_the_roundings_of_the_dtype(case):
    with torch.no_grad():
        expected = torch.stack([logits_of(m(ids)) for m, ids in zip(case.references, case.ids, strict=True)])
    assert expected.dtype == torch.float64
    assert case.outputs.dtype == case.precision.computed
    frozen = torch.stack([case.apply(None, ids) for ids in case.ids])
    assert_close(case.outputs, expected, FORWARD * case.unit, unlike=frozen)
    assert_close(case.outputs, expected, FORWARD * case.unit, unlike=expected.roll(1, 0))
    if case.precision in SHORT:  # and it was computed in that dtype: wider arithmetic is nearer
        assert relative_error(case.outputs, expected) > case.unit / 8


def test_the_base_alone(case):
    with torch.no_grad():
        exact = twin(copy.deepcopy(case.model).double(), dequantized(case.base))
        expected = torch.stack([logits_of(exact(ids)) for ids in case.ids])
    out = torch.stack([case.apply(None, ids) for ids in case.ids])
    assert out.dtype == case.precision.computed
    assert_close(out, expected, FORWARD * case.unit, unlike=expected.roll(1, 0))


def test_vmap_is_the_loop_is_apply_stacked(case):
    """To the roundings of the dtype: sums run in other orders, attention through other kernels."""
    stacked = ft.stack(case.tuned)
    with case.precision.on():
        both = (
            logits_of(ft.apply_stacked(case.base, stacked, case.ids)),
            vmap(lambda t, ids: logits_of(ft.apply(case.base, t, ids)))(stacked, case.ids),
        )
    for out in both:
        assert out.dtype == case.outputs.dtype
        assert_close(out, case.outputs, FORWARD * case.unit, unlike=case.outputs.roll(1, 0))


def test_merged_and_as_a_module(case):
    tuned, ids = case.tuned[0], case.ids[0]
    with case.precision.on(), torch.no_grad():
        module = logits_of(ft.to_module(case.base, tuned)(ids))
        assert_close(module, case.outputs[0], FORWARD * case.unit, unlike=case.apply(None, ids))
        merged = copy.deepcopy(case.model)
        if case.name == "opt":
            merged.lm_head.weight = nn.Parameter(merged.lm_head.weight.detach().clone())  # it has its own copy
        merged.load_state_dict(ft.merge(case.base, tuned))
        out = logits_of(merged(ids))
    # The merged weights are rounded once to the model's dtype, which counts like one more rounding a layer.
    assert_close(out, case.outputs[0], FORWARD * case.unit, unlike=case.apply(None, ids))


def test_a_merged_weight_is_rounded_once(case):
    """Not first dequantized to 16 bits and then added to."""
    exact = ft.merge(case.base, case.tuned[0], dtype=torch.float64)
    rounded = ft.merge(case.base, case.tuned[0])
    assert {leaf.dtype for leaf in rounded.values() if leaf.is_floating_point()} == {case.precision.dtype}
    for name, leaf in rounded.items():
        # Float32 arithmetic, then half a step of the dtype (of fp16's smallest steps where numbers are tiny).
        allowed = (UNIT[case.precision.dtype] + 4 * UNIT[case.precision.wide]) * exact[name].abs() + 2.0**-25
        slack = 4 * UNIT[case.precision.wide] * float(exact[name].abs().max())
        assert ((leaf.double() - exact[name]).abs() <= allowed + slack).all(), name


# --- gradients


def weights_like(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Of two gradients, as vectors."""
    assert actual.shape == expected.shape and actual.isfinite().all()
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def exact_gradients(case: Case, i: int) -> dict[str, Tensor]:
    """From the gradients of the whole weights in float64: for ``W + s B A`` they are ``s B.T G`` and ``s G A.T``.

    Of a table's padding row A gets no gradient, but B does, as in PEFT.
    """
    model, tuned = case.references[i], case.tuned[i]
    paddings = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and paddings.setdefault(path, module.padding_idx) is not None:
            module.padding_idx = None
    out = logits_of(model(case.ids[i]))
    weights = dict(model.named_parameters(remove_duplicate=False))
    found_all = torch.autograd.grad((out.square() * weights_like(out)).sum(), list(weights.values()), allow_unused=True)
    grads = dict(zip(weights, found_all, strict=True))
    found = {name: grads[name] for name in tuned.spec.plain}
    for adapter in tuned.spec.adapters:
        path, scale = adapter.path, adapter.config.scale
        a, b = tuned.params[f"{path}.lora_a"].double(), tuned.params[f"{path}.lora_b"].double()
        whole = grads[f"{path}.weight"]
        whole = whole.T if adapter.kind == "embedding" else whole
        found[f"{path}.lora_a"], found[f"{path}.lora_b"] = scale * b.T @ whole, scale * whole @ a.T
        if paddings.get(path) is not None:
            found[f"{path}.lora_a"][:, paddings[path]] = 0
            model.get_submodule(path).padding_idx = paddings[path]
    return found


def test_gradients_have_the_dtype_of_what_they_are_gradients_of(case):
    """Adapters are float32 on 16 bits; what is trained directly is in the model's dtype."""
    tuned, ids = case.tuned[0], case.ids[0]

    def loss_fn(t: ft.Finetuned) -> Tensor:
        out = logits_of(ft.apply(case.base, t, ids))
        return (out.double().square() * weights_like(out)).sum()

    with case.precision.on():
        loss, grads = ft.value_and_grad(loss_fn)(tuned)
    assert loss.dtype == torch.float64 and grads.keys() == tuned.params.keys()
    expected, other = exact_gradients(case, 0), exact_gradients(case, 1)
    largest = max(float(grad.norm()) for grad in expected.values())
    for name, grad in grads.items():
        leaf = tuned.params[name]
        assert leaf.dtype == (case.precision.dtype if name in tuned.spec.plain else case.precision.wide), name
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape and grad.any(), name
        if expected[name].norm() < 1e-3 * largest:
            continue  # what flows back cancels (a key's bias before a softmax): roundings are all there is
        assert distance(grad, expected[name]) < BACKWARD * case.unit, name
        assert distance(grad, other[name]) > 0.2, name


def test_gradients_of_a_stack_are_those_of_each(case):
    weights = weights_like(case.outputs[0]).to(case.precision.wide)

    def loss_fn(t: ft.Finetuned, ids: Tensor) -> Tensor:
        return (logits_of(ft.apply(case.base, t, ids)).to(weights.dtype).square() * weights).sum()

    def whole(t: ft.Finetuned, ids: Tensor) -> Tensor:
        return (logits_of(ft.apply_stacked(case.base, t, ids)).to(weights.dtype).square() * weights).flatten(1).sum(1)

    stacked = ft.stack(case.tuned)
    with case.precision.on():
        each = [ft.value_and_grad(loss_fn)(t, ids)[1] for t, ids in zip(case.tuned, case.ids, strict=True)]
        routes = [
            ft.stacked_value_and_grad(whole)(stacked, case.ids)[1],
            vmap(ft.value_and_grad(loss_fn))(stacked, case.ids)[1],
        ]
    largest = max(float(grad.norm()) for grad in each[0].values())
    for name in each[0]:
        expected = torch.stack([grads[name] for grads in each])
        for found in routes:
            assert found[name].dtype == expected.dtype == stacked.params[name].dtype, name
            if expected.norm() > 1e-3 * largest:
                assert distance(found[name], expected) < BACKWARD * case.unit, name
                assert distance(found[name], expected.roll(1, 0)) > 0.2, name


# --- training and disk


def test_a_step_keeps_the_dtypes(case):
    """Of parameters and of the optimizer's state, one finetune or a stack; the base and the old values stay."""
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(0.02, weight_decay=0.1))
    before = snapshot(case.base), snapshot(case.tuned[0])

    def loss_fn(t: ft.Finetuned, ids: Tensor) -> Tensor:
        return logits_of(ft.apply(case.base, t, ids)).float().square().mean()

    def two_steps(t: ft.Finetuned, grads_of: Callable[[ft.Finetuned], Any]) -> tuple[ft.Finetuned, Any]:
        state = tx.init(t)
        kinds = [leaf.dtype for leaf in torch.utils._pytree.tree_leaves(state)]
        for _ in range(2):
            with case.precision.on():
                grads = grads_of(t)
            updates, state = tx.update(grads, state, t)
            t = ft.optim.apply_updates(t, updates)
            assert [leaf.dtype for leaf in torch.utils._pytree.tree_leaves(state)] == kinds
        assert torch.bfloat16 not in kinds and torch.float16 not in kinds
        return t, state

    tuned, _ = two_steps(case.tuned[0], lambda t: ft.value_and_grad(loss_fn)(t, case.ids[0])[1])
    stacked, _ = two_steps(
        ft.stack(case.tuned), lambda t: ft.stacked_value_and_grad(loss_fn, in_dims=0)(t, case.ids)[1]
    )
    for name, leaf in tuned.params.items():
        old = case.tuned[0].params[name]
        assert leaf.dtype == old.dtype == stacked.params[name].dtype and leaf.isfinite().all(), name
        # Each step is about 0.02, beside the decay, for most numbers; a stack's is the same but where a gradient is
        # about zero, whose sign then is a rounding's.
        moved = (leaf.double() - old.double()).abs()
        assert moved.max() < 0.06 and moved.mean() > 1e-3, name
        apart = (ft.index(stacked, 0).params[name].double() - leaf.double()).abs()
        assert apart.mean() < 0.25 * moved.mean(), name
    assert_trees_equal(tuned.consts, case.tuned[0].consts)
    assert loss_fn(tuned, case.ids[0]) < loss_fn(case.tuned[0], case.ids[0])
    assert_unchanged(case.base, before[0])
    assert_unchanged(case.tuned[0], before[1])


def test_on_disk(case, tmp_path):
    for i, tuned in enumerate(case.tuned):
        again = ft.load(ft.save(tmp_path / str(i), tuned), case.base)
        assert_same_finetune(again, tuned)
        assert torch.equal(case.apply(again, case.ids[i]), case.outputs[i])
        state = {name: leaf.clone() for name, leaf in ft.state_dict(tuned, base=case.base).items()}
        assert_same_finetune(ft.load_state_dict(case.base, case.tuned[0], state), tuned)
    kinds = {leaf.dtype for leaf in case.tuned[0].params.values()}
    assert kinds == {case.precision.dtype, case.precision.wide}


# --- the options, layer by layer


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize(
    "settings",
    [{"dora": True}, {"init": "pissa"}, {"init": "olora"}, {"dora": True, "init": "pissa"}, {"bias": True}],
    ids=lambda s: "-".join(map(str, s)) + str(s.get("init", "")),
)
def test_options(precision, settings):
    """What PiSSA adds and takes away, and DoRA divides by, is not lost in 16 bits."""
    torch.manual_seed(0)
    model = Mlp(24, 32, 16).to(precision.dtype)
    base = ft.quantize_base_model(model, modules_not_to_quantize={"lm_head"})
    config = LinearAdapterConfig(r=4, alpha=2.0, **settings)
    paths = {"fc1", "lm_head"} if "bias" in settings else {"fc1", "fc2", "lm_head"}
    fresh = [ft.new_finetuned(base, paths, (), linear_config=config) for _ in range(2)]
    tuned = [randomized(t, i, scale=0.4) for i, t in enumerate(fresh)]
    x = torch.randn(2, 5, 24).to(precision.dtype)
    exact = copy.deepcopy(model).double()
    unit = UNIT[precision.computed]
    with precision.on():
        frozen = ft.apply(base, None, x[0])
        outs = torch.stack([ft.apply(base, t, inputs) for t, inputs in zip(tuned, x, strict=True)])
        assert outs.dtype == precision.computed
        # Fresh: each of three layers may round what it adds and takes away again.
        start = ft.apply(base, fresh[0], x[0])
        assert_close(start, frozen, 6 * unit, unlike=outs[0])
        for i, t in enumerate(tuned):
            exact.load_state_dict(ft.merge(base, t, dtype=torch.float64))
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                expected = exact(x[i].double())
            assert_close(outs[i], expected, OPTIONS * unit, unlike=frozen)
        stacked = ft.apply_stacked(base, ft.stack(tuned), x)
        mapped = vmap(ft.apply, in_dims=(None, 0, 0))(base, ft.stack(tuned), x)
        for out in (stacked, mapped):
            assert out.dtype == outs.dtype
            assert_close(out, outs, OPTIONS * unit, unlike=outs.roll(1, 0))
        grads = ft.value_and_grad(lambda t: ft.apply(base, t, x[0]).float().square().sum())(tuned[0])[1]
    assert all(grad.dtype == precision.wide and grad.isfinite().all() and grad.any() for grad in grads.values())


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_dropout(precision, seed):
    """The same masks in every dtype, for a finetune alone and in a stack."""
    torch.manual_seed(0)
    model = Mlp(24, 32, 16).to(precision.dtype)
    base, wide_base = ft.quantize_base_model(model), ft.quantize_base_model(copy.deepcopy(model).double())
    config = LinearAdapterConfig(r=4, dropout=0.5)
    tuned = finetunes(base, 2, linear_config=config)
    x, keys = torch.randn(2, 5, 24).to(precision.dtype), ft.random.split(ft.random.key(seed), 2)
    wide = [
        ft.new_finetuned(wide_base, linear_config=config).replace(
            params={name: leaf.double() for name, leaf in t.params.items()}
        )
        for t in tuned
    ]

    def outputs(base: ft.Base, tuned: list[ft.Finetuned], x: Tensor, train: bool) -> Tensor:
        each = zip(tuned, x, keys, strict=True)
        return torch.stack([ft.apply(base, t, inputs, train=train, rng=key) for t, inputs, key in each])

    with precision.on():
        outs = outputs(base, tuned, x, True)
        stacked = ft.apply_stacked(base, ft.stack(tuned), x, train=True, rng=keys)
    expected, without = outputs(wide_base, wide, x.double(), True), outputs(wide_base, wide, x.double(), False)
    for out in (outs, stacked):
        assert out.dtype == precision.computed
        assert relative_error(out, expected) < OPTIONS * UNIT[precision.computed]
        assert relative_error(out, without) > 0.1


# --- what is in which dtype


@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_the_base_in_its_dtype(dtype):
    """Codes and scales are the same format in all; the rest is in the model's own dtype."""
    torch.manual_seed(0)
    model = Tiny().to(dtype)
    base = ft.quantize_base_model(model)
    assert {name: leaf.dtype for name, leaf in base.params.items()} == {
        "embed.weight": torch.int8,
        "embed.weight_scale": torch.float32,
        "fc.weight": torch.int8,
        "fc.weight_scale": torch.float32,
        "norm.weight": dtype,
        "norm.bias": dtype,
        "lm_head.weight": dtype,
        "lm_head.bias": dtype,
    }
    tuned = ft.new_finetuned(base)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {name: leaf.dtype for name, leaf in {**tuned.params, **tuned.consts}.items()} == {
        "embed.lora_a": wide,
        "embed.lora_b": wide,
        "embed.lora_scale": wide,
        "fc.lora_a": wide,
        "fc.lora_b": wide,
        "fc.lora_scale": wide,
        "lm_head.weight": dtype,
        "lm_head.bias": dtype,
    }
    # What was 8 bits and is trained directly is in the model's dtype as well.
    with pytest.warns(UserWarning, match="quantized in the base"):
        plain = ft.new_finetuned(base, (), {"fc"})
    assert plain.params["fc.weight"].dtype == dtype
    exact = base.params["fc.weight"].double() * base.params["fc.weight_scale"].double().unsqueeze(1)
    assert ((plain.params["fc.weight"].double() - exact).abs() <= (UNIT[dtype] + 2**-24) * exact.abs()).all()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_torchs_default_dtype_decides_nothing(default):
    torch.manual_seed(0)
    model, ids = Tiny(), torch.randint(0, 16, (2, 3, 4))
    made = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            base = ft.quantize_base_model(model)
            config = LinearAdapterConfig(r=2, dropout=0.3, dora=True, init="pissa")
            tuned = finetunes(base, 2, linear_config=config)
            out = ft.apply_stacked(base, ft.stack(tuned), ids, train=True, rng=ft.random.key(0))
            made.append((base, tuned, out))
        finally:
            torch.set_default_dtype(torch.float32)
    (base, tuned, out), (other_base, other_tuned, other_out) = made
    assert other_base.fingerprint == base.fingerprint
    assert_trees_equal(other_base.params, base.params)
    for mine, other in zip(tuned, other_tuned, strict=True):
        assert_same_finetune(other, mine)
    assert torch.equal(other_out, out) and out.dtype == torch.float32


def test_autocast_is_that_of_the_call():
    """On inside, off outside; it leaves float64 alone; a disabled region inside it is exact again."""
    torch.manual_seed(0)
    model = Mlp()
    base = ft.quantize_base_model(model)
    tuned = finetunes(base, 1, plain_layers=())[0]
    x = torch.randn(3, 6)
    outside = ft.apply(base, tuned, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ft.apply(base, tuned, x)
        with torch.autocast("cpu", enabled=False):
            again = ft.apply(base, tuned, x)
    assert outside.dtype == torch.float32 and inside.dtype == torch.bfloat16
    assert torch.equal(again, outside) and torch.equal(ft.apply(base, tuned, x), outside)
    assert 1e-4 < relative_error(inside, outside) < FORWARD * UNIT[torch.bfloat16]
    double_base = ft.quantize_base_model(copy.deepcopy(model).double())
    double = finetunes(double_base, 1, plain_layers=())[0]
    exact = ft.apply(double_base, double, x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ft.apply(double_base, double, x.double())
    assert out.dtype == torch.float64 and torch.equal(out, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_may_be_kept_in_16_bits(dtype):
    """A finetune cast by hand is used as it is, and its gradients come in its dtype."""
    torch.manual_seed(0)
    base = ft.quantize_base_model(Tiny())
    tuned = finetunes(base, 2, plain_layers=())
    cast = [t.replace(params={name: leaf.to(dtype) for name, leaf in t.params.items()}) for t in tuned]
    widened = [t.replace(params={name: leaf.float() for name, leaf in t.params.items()}) for t in cast]
    ids = torch.randint(0, 16, (2, 3, 4))
    for short, wide, uncut, x in zip(cast, widened, tuned, ids, strict=True):
        # Its numbers are rounded once; all arithmetic stays in the model's dtype.
        out = ft.apply(base, short, x)
        assert torch.equal(out, ft.apply(base, wide, x)) and out.dtype == torch.float32
        assert relative_error(out, ft.apply(base, uncut, x)) > UNIT[torch.float32] * 100
        grads = ft.value_and_grad(lambda t, x=x: ft.apply(base, t, x).square().sum())(short)[1]
        exact = ft.value_and_grad(lambda t, x=x: ft.apply(base, t, x).square().sum())(wide)[1]
        assert {grad.dtype for grad in grads.values()} == {dtype}
        assert all(relative_error(grads[name], exact[name]) <= 2 * UNIT[dtype] for name in grads)
    stacked = ft.apply_stacked(base, ft.stack(cast), ids)
    assert_close(stacked, torch.stack([ft.apply(base, t, x) for t, x in zip(cast, ids, strict=True)]), 1e-5,
                 unlike=stacked.roll(1, 0))  # fmt: skip
