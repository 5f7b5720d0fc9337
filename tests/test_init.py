"""First values of the factors: Gaussian, PiSSA, OLoRA, LoftQ and DoRA's magnitude, against PEFT and by hand."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from models import (
    Everything,
    TiedLm,
    Tiny,
    assert_close,
    assert_same_finetune,
    assert_trees_equal,
    assert_unchanged,
    gpt2,
    llama,
    randomized,
    relative_error,
    snapshot,
    twin,
)
from torch import Tensor, nn

import finetuna_func as ft
from finetuna_func import LinearAdapterConfig

FROM_THE_WEIGHT = ("pissa", "olora")
# A float32 decomposition: some tens of roundings of 6e-8, over the gaps between singular values (a tenth).
DECOMPOSED = 5e-5


class Layers(nn.Module):
    """Linear layers of every shape: wide, tall, square, in float; and GPT-2's transposed one."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(12, 10)
        self.tall = nn.Linear(10, 24)
        self.conv = Conv1D(20, 24)
        self.wide = nn.Linear(20, 8, bias=False)
        self.square = nn.Linear(8, 8)
        self.floating = nn.Linear(8, 6)
        nn.init.normal_(self.conv.weight)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv(torch.tanh(self.tall(self.embed(ids)))))
        return self.floating(torch.tanh(self.square(torch.tanh(self.wide(x)))))


LINEAR = ("tall", "conv", "wide", "square", "floating")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Layers()


@pytest.fixture(scope="module")
def base(model):
    return ft.quantize_base_model(model, modules_not_to_quantize={"floating"})


def ids() -> Tensor:
    return torch.randint(0, 12, (2, 5), generator=torch.Generator().manual_seed(0))


def matrix(module: nn.Module, path: str) -> Tensor:
    """The weight of a float module as ``(out, in)``, in float64."""
    layer = module.get_submodule(path)
    weight = layer.weight.detach().double()
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def dequantized(model: nn.Module, base: ft.Base, path: str) -> Tensor:
    """The matrix that an int8 base computes with, by hand."""
    weight = base.params[f"{path}.weight"]
    if weight.is_floating_point():
        return matrix(model, path)
    return weight.double() * base.params[f"{path}.weight_scale"].double().unsqueeze(1)


def fresh(base: ft.Base, *, model: nn.Module | None = None, **settings) -> ft.Finetuned:
    """A finetune of all linear layers; for LoftQ of those that are quantized."""
    config = LinearAdapterConfig(**{"r": 3, "alpha": 2.0} | settings)
    paths = [p for p in LINEAR if config.init != "loftq" or f"{p}.weight_scale" in base.params]
    return ft.new_finetuned(base, paths, (), linear_config=config, float_model=model)


def factors(tuned: ft.Finetuned, path: str) -> tuple[Tensor, Tensor]:
    return tuned.params[f"{path}.lora_a"].double(), tuned.params[f"{path}.lora_b"].double()


def best_of_rank(weight: Tensor, r: int) -> Tensor:
    """The nearest matrix of rank r (Eckart-Young)."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :r] @ torch.diag(s[:r]) @ vh[:r]


# --- every start: what it leaves alone, what it draws


@pytest.mark.parametrize("init", ["default", "gaussian", *FROM_THE_WEIGHT, "loftq"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_start_changes_nothing_and_shares_nothing(model, base, init, dora):
    before = snapshot(model), snapshot(base)
    tuned = fresh(base, model=model, init=init, dora=dora)
    assert_unchanged(model, before[0])
    assert_unchanged(base, before[1])
    leaves = {**tuned.params, **tuned.consts}
    # The first factors are kept beside the trained ones: a step in place on the ones must not move the others.
    assert len({leaf.data_ptr() for leaf in leaves.values()}) == len(leaves)
    assert not {leaf.data_ptr() for leaf in leaves.values()} & {leaf.data_ptr() for leaf in base.params.values()}
    for name, leaf in leaves.items():
        assert leaf.is_contiguous() and not leaf.requires_grad and leaf.isfinite().all(), name
        assert leaf.untyped_storage().nbytes() == leaf.nbytes, name  # not a view into a whole decomposition


@pytest.mark.parametrize(
    ("settings", "params", "consts"),
    [
        ({}, set(), set()),
        ({"init": "gaussian"}, set(), set()),
        ({"init": "loftq"}, set(), set()),
        ({"init": "pissa"}, set(), {"lora_a0", "lora_b0"}),
        ({"init": "olora"}, set(), {"lora_a0", "lora_b0"}),
        ({"dora": True}, {"lora_magnitude"}, {"lora_weight_norm"}),
        ({"dora": True, "init": "pissa"}, {"lora_magnitude"}, {"lora_a0", "lora_b0", "lora_weight_norm"}),
        ({"bias": True, "init": "olora"}, {"lora_bias"}, {"lora_a0", "lora_b0"}),
    ],
)
def test_names_and_shapes(model, base, settings, params, consts):
    tuned = fresh(base, model=model, **settings)
    shapes = {"lora_a": (3, 24), "lora_b": (20, 3), "lora_a0": (3, 24), "lora_b0": (20, 3), "lora_scale": ()}
    shapes |= dict.fromkeys(("lora_bias", "lora_magnitude", "lora_weight_norm"), (20,))
    own = {n.removeprefix("conv."): t for n, t in {**tuned.params, **tuned.consts}.items() if n.startswith("conv.")}
    assert {n.removeprefix("conv.") for n in tuned.params if n.startswith("conv.")} == {"lora_a", "lora_b"} | params
    assert {n.removeprefix("conv.") for n in tuned.consts if n.startswith("conv.")} == {"lora_scale"} | consts
    assert {name: tuple(leaf.shape) for name, leaf in own.items()} == {name: shapes[name] for name in own}


@pytest.mark.parametrize("init", [*FROM_THE_WEIGHT, "loftq"])
def test_starts_from_the_weight_draw_nothing(model, base, init):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = ft.new_finetuned(
        base, set(LINEAR[:4]), (), linear_config=LinearAdapterConfig(r=3, init=init), float_model=model
    )
    assert torch.equal(torch.get_rng_state(), state)
    again = ft.new_finetuned(
        base,
        set(LINEAR[:4]),
        (),
        linear_config=LinearAdapterConfig(r=3, init=init),
        float_model=model,
        generator=torch.Generator().manual_seed(5),
    )
    assert_same_finetune(again, one)


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_random_starts_are_drawn(base, init):
    def drawn(seed: int) -> ft.Finetuned:
        config = LinearAdapterConfig(init=init)
        return ft.new_finetuned(base, linear_config=config, generator=torch.Generator().manual_seed(seed))

    assert_same_finetune(drawn(1), drawn(1))
    assert not torch.equal(drawn(1).params["tall.lora_a"], drawn(2).params["tall.lora_a"])


def test_gaussian_is_normal_with_deviation_one_over_r():
    torch.manual_seed(0)
    wide = ft.quantize_base_model(nn.ModuleDict({"fc": nn.Linear(500, 80)}))
    for r in (4, 50):
        params = ft.new_finetuned(wide, linear_config=LinearAdapterConfig(r=r, init="gaussian", dora=True)).params
        a = params["fc.lora_a"].double() * r
        n = a.numel()
        # Five standard errors of the mean, the deviation and the kurtosis of n normal numbers.
        assert abs(a.mean()) < 5 / math.sqrt(n)
        assert abs(a.std() - 1) < 5 / math.sqrt(2 * n)
        assert abs(a.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)  # of a uniform one: 1.8
        assert not params["fc.lora_b"].any()
    default = ft.new_finetuned(wide, linear_config=LinearAdapterConfig(r=50)).params["fc.lora_a"]
    assert default.abs().max() <= 1 / math.sqrt(500) < a.abs().max() / 50


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", "loftq"])
def test_tables_start_as_ever(model, base, init):
    """An embedding has no such choice: A zero, B normal."""
    config = LinearAdapterConfig(init=init)
    tuned = ft.new_finetuned(base, {"embed", "tall"}, (), linear_config=config, float_model=model)
    assert not tuned.params["embed.lora_a"].any() and tuned.params["embed.lora_b"].all()
    assert "embed.lora_a0" not in tuned.consts


# --- a fresh finetune is the base


@pytest.mark.parametrize("scheme", ["int8", "blockwise8", "nf4"])
@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", ["default", "gaussian", *FROM_THE_WEIGHT])
@pytest.mark.parametrize("alpha", [2.0, -1.5])
def test_a_fresh_finetune_is_the_base(model, scheme, rank_stabilized, dora, init, alpha):
    base = ft.quantize_base_model(model, scheme=scheme, modules_not_to_quantize={"floating"})
    tuned = fresh(base, init=init, dora=dora, rank_stabilized=rank_stabilized, alpha=alpha)
    expected = ft.apply(base, None, ids())
    out = ft.apply(base, tuned, ids())
    if init in FROM_THE_WEIGHT:  # W + BA - BA: one product added and taken away
        assert_close(out, expected, 2e-6, unlike=ft.apply(base, randomized(tuned), ids()))
    elif dora:  # |W| / |W|, where one of the norms is a root of a square
        assert_close(out, expected, 1e-6, unlike=ft.apply(base, randomized(tuned), ids()))
    else:
        assert torch.equal(out, expected)


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{"init": "pissa"}, {"init": "olora"}, {"dora": True}], ids=str)
def test_a_fresh_finetune_of_a_real_architecture_is_the_base(make, settings):
    base = ft.quantize_base_model(make())
    tuned = ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=5, alpha=7.0, **settings))
    expected = ft.apply(base, None, ids()).logits
    assert_close(
        ft.apply(base, tuned, ids()).logits, expected, 2e-6, unlike=ft.apply(base, randomized(tuned), ids()).logits
    )


# --- PiSSA


@pytest.mark.parametrize("scheme", ["int8", "blockwise8", "nf4"])
@pytest.mark.parametrize("settings", [{}, {"rank_stabilized": True, "alpha": 0.7}, {"alpha": -3.0}], ids=str)
def test_pissa_is_the_best_matrix_of_that_rank(model, scheme, settings):
    base = ft.quantize_base_model(model, scheme=scheme, modules_not_to_quantize={"floating"})
    tuned = fresh(base, init="pissa", **settings)
    state = ft.merge(base, None, dtype=torch.float64)
    for adapter in tuned.spec.adapters:
        path, r, scale = adapter.path, adapter.config.r, adapter.config.scale
        weight = state[f"{path}.weight"].T if path == "conv" else state[f"{path}.weight"]
        a, b = factors(tuned, path)
        assert_close(scale * b @ a, best_of_rank(weight, r), DECOMPOSED, unlike=best_of_rank(weight, r - 1))
        # The singular values are shared evenly, and the rows of A are orthogonal in order of size.
        roots = (torch.linalg.svdvals(weight)[:r] / abs(scale)).sqrt()
        assert_close(a.norm(dim=1), roots, DECOMPOSED, unlike=roots.flip(0))
        assert_close(b.norm(dim=0), roots, DECOMPOSED, unlike=roots.flip(0))
        for gram in (a @ a.T, b.T @ b):
            assert_close(gram, torch.diag(roots.square()), DECOMPOSED, unlike=torch.diag(roots.square().flip(0)))
        assert torch.equal(tuned.consts[f"{path}.lora_a0"], tuned.params[f"{path}.lora_a"])
        assert torch.equal(tuned.consts[f"{path}.lora_b0"], tuned.params[f"{path}.lora_b"])


def test_pissa_of_the_whole_rank_holds_the_whole_weight(model, base):
    tuned = ft.new_finetuned(base, {"square"}, (), linear_config=LinearAdapterConfig(r=8, init="pissa"))
    a, b = factors(tuned, "square")
    weight = dequantized(model, base, "square")
    assert_close(b @ a / 8, weight, DECOMPOSED, unlike=best_of_rank(weight, 7))
    assert_close(ft.apply(base, tuned, ids()), ft.apply(base, None, ids()), 2e-6, unlike=model(ids()))


# --- OLoRA


@pytest.mark.parametrize("settings", [{}, {"rank_stabilized": True, "alpha": 0.7}, {"alpha": -3.0}], ids=str)
def test_olora_is_the_first_columns_of_qr(model, base, settings):
    tuned = fresh(base, init="olora", **settings)
    for adapter in tuned.spec.adapters:
        path, r = adapter.path, adapter.config.r
        weight = dequantized(model, base, path)
        a, b = factors(tuned, path)
        assert_close(b.T @ b, torch.eye(r).double(), DECOMPOSED, unlike=b.T.abs() @ b.abs())
        assert not a.tril(-1).any() and a.triu().any()
        # Q spans the first columns of the weight, which it and R reproduce, whatever the signs.
        assert_close((b @ a)[:, :r], weight[:, :r], DECOMPOSED, unlike=weight[:, 1 : r + 1])
        q, upper = torch.linalg.qr(weight)
        assert_close(b @ a, q[:, :r] @ upper[:r], DECOMPOSED, unlike=q[:, : r - 1] @ upper[: r - 1])
        assert torch.equal(tuned.consts[f"{path}.lora_a0"], tuned.params[f"{path}.lora_a"])


# --- against PEFT


def peft_starting_from(model: nn.Module, init: str, targets: list[str], **settings):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=targets, init_lora_weights=init, **settings)
    return get_peft_model(model, config).base_model.model


TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


# PEFT decomposes a Conv1D's weight as it is stored for OLoRA, whose factors then do not fit the layer.
@pytest.mark.parametrize(("init", "name"), [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama")])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_factors_and_logits_of_peft(init, name, rslora):
    """The same factors; and from there on the same function: PEFT subtracts them from the frozen weight, we do not."""
    make = {"llama": llama, "gpt2": gpt2}[name]
    base = ft.quantize_base_model(make())
    tuned = ft.new_finetuned(
        base,
        set(TARGETS[name]),
        (),
        linear_config=LinearAdapterConfig(r=5, alpha=6.0, init=init, rank_stabilized=rslora),
    )
    floating = twin(make(), base)
    peft = peft_starting_from(floating, init, TARGETS[name], r=5, lora_alpha=6.0, use_rslora=rslora).eval()
    assert len(tuned.spec.adapters) == len([m for m in peft.modules() if hasattr(m, "lora_A")])
    for adapter in tuned.spec.adapters:
        theirs = peft.get_submodule(adapter.path)
        assert theirs.scaling["default"] == pytest.approx(adapter.config.scale)
        for own, factor in (("lora_a", theirs.lora_A), ("lora_b", theirs.lora_B)):
            mine, other = tuned.params[f"{adapter.path}.{own}"], factor["default"].weight.detach()
            # A direction has no sign, and is known to a rounding over the gap to the next (0.2 % at the least).
            assert_close(mine.abs(), other.abs(), 1e-3, unlike=other.abs().flip(0))
        a, b = factors(tuned, adapter.path)
        a0, b0 = theirs.lora_A["default"].weight.detach().double(), theirs.lora_B["default"].weight.detach().double()
        assert_close(b @ a, b0 @ a0, DECOMPOSED, unlike=b0[:, 1:] @ a0[1:])
    changed = randomized(tuned, scale=0.05)
    with torch.no_grad():
        for adapter in tuned.spec.adapters:
            theirs = peft.get_submodule(adapter.path)
            theirs.lora_A["default"].weight.copy_(changed.params[f"{adapter.path}.lora_a"])
            theirs.lora_B["default"].weight.copy_(changed.params[f"{adapter.path}.lora_b"])
        expected = peft(ids()).logits
    assert_close(ft.apply(base, changed, ids()).logits, expected, 1e-5, unlike=ft.apply(base, None, ids()).logits)
    # Were the start not subtracted, the same numbers would mean another function.
    plain = ft.new_finetuned(
        base, set(TARGETS[name]), (), linear_config=LinearAdapterConfig(r=5, alpha=6.0, rank_stabilized=rslora)
    ).replace(params=changed.params)
    assert relative_error(ft.apply(base, plain, ids()).logits, expected) > 1e-2


def test_gaussian_is_drawn_as_in_peft():
    peft = peft_starting_from(llama(), "gaussian", ["q_proj"], r=8)
    theirs = torch.cat([m.lora_A["default"].weight.flatten() for m in peft.modules() if hasattr(m, "lora_A")])
    base = ft.quantize_base_model(llama())
    tuned = ft.new_finetuned(base, {"q_proj"}, (), linear_config=LinearAdapterConfig(r=8, init="gaussian"))
    mine = torch.cat([leaf.flatten() for name, leaf in tuned.params.items() if name.endswith("lora_a")])
    assert mine.numel() == theirs.numel() == 256
    assert abs(mine.std() / theirs.std() - 1) < 0.35  # five standard errors of a ratio of two of 256 numbers
    assert not any(m.lora_B["default"].weight.any() for m in peft.modules() if hasattr(m, "lora_B"))


# --- LoftQ


@pytest.mark.parametrize("scheme", ["int8", "blockwise8", "nf4"])
@pytest.mark.parametrize("settings", [{}, {"rank_stabilized": True, "alpha": 0.7}, {"alpha": -3.0}], ids=str)
def test_loftq_is_pefts_decomposition_of_what_was_lost(model, scheme, settings):
    from peft.utils.loftq_utils import _low_rank_decomposition

    base = ft.quantize_base_model(model, scheme=scheme, modules_not_to_quantize={"floating"})
    tuned = ft.new_finetuned(
        base,
        set(LINEAR[:4]),
        (),
        linear_config=LinearAdapterConfig(**({"r": 3, "alpha": 2.0} | settings), init="loftq"),
        float_model=model,
    )
    state = ft.merge(base, None, dtype=torch.float64)
    for adapter in tuned.spec.adapters:
        path = adapter.path
        frozen = state[f"{path}.weight"].T if path == "conv" else state[f"{path}.weight"]
        lost = (matrix(model, path) - frozen).float()
        theirs = _low_rank_decomposition(lost, adapter.config.r)
        a, b = factors(tuned, path)
        product = adapter.config.scale * b @ a
        # The residue is a difference of float32 numbers a hundred times its size.
        expected = (theirs["L"] @ theirs["R"]).double()
        assert_close(product, expected, 1e-4, unlike=best_of_rank(lost.double(), 2))


@pytest.mark.parametrize("scheme", ["int8", "blockwise8", "nf4"])
@pytest.mark.parametrize("alpha", [2.0, -0.5])
def test_loftq_recovers_more_with_every_rank(model, scheme, alpha):
    base = ft.quantize_base_model(model, modules_not_to_quantize=(), scheme=scheme)
    state = ft.merge(base, None, dtype=torch.float64)
    errors: dict[str, list[float]] = {path: [] for path in LINEAR}
    for r in range(1, 7):
        tuned = fresh(base, model=model, init="loftq", r=r, alpha=alpha)
        merged = ft.merge(base, tuned, dtype=torch.float64)
        for path in LINEAR:
            weight = merged[f"{path}.weight"].T if path == "conv" else merged[f"{path}.weight"]
            errors[path].append(float((matrix(model, path) - weight).norm()))
    for path, found in errors.items():
        frozen = state[f"{path}.weight"].T if path == "conv" else state[f"{path}.weight"]
        lost = matrix(model, path) - frozen
        own = float(lost.norm())
        assert own > 1e-3
        assert all(later < earlier for earlier, later in zip([own, *found], found, strict=False)), path
        tail = torch.linalg.svdvals(lost)
        for r, error in enumerate(found, 1):
            assert abs(error - float(tail[r:].norm())) < 1e-4 * own, (path, r)
    assert errors["floating"][-1] < 1e-4 * errors["floating"][0]  # of six rows, six directions are all


@pytest.mark.parametrize("scheme", ["int8", "blockwise8", "nf4"])
def test_loftq_is_nearer_to_the_float_model(scheme):
    """The one start that is not the base: at the whole rank it is the float model."""
    torch.manual_seed(0)
    model = Layers().eval()
    base = ft.quantize_base_model(model, scheme=scheme, modules_not_to_quantize={"embed"})
    exact = model(ids()).detach()

    def distance(tuned: ft.Finetuned | None) -> float:
        return relative_error(ft.apply(base, tuned, ids()), exact)

    whole = ft.new_finetuned(
        base,
        set(LINEAR),
        (),
        linear_config=LinearAdapterConfig(
            r=8, init="loftq", rank_pattern={"tall": 10, "conv": 20, "floating": 6}, alpha=3.0
        ),
        float_model=model,
    )
    half = fresh(base, model=model, init="loftq", r=4)
    assert distance(None) > 1e-3
    assert distance(half) < distance(None)
    assert distance(whole) < 1e-6 < distance(half)


def test_loftq_on_a_real_architecture():
    model = llama()
    base = ft.quantize_base_model(model, modules_not_to_quantize={"embed_tokens", "lm_head"})
    with torch.no_grad():
        exact = model(ids()).logits
    distances = [relative_error(ft.apply(base, None, ids()).logits, exact)]
    for r in (4, 8):
        config = LinearAdapterConfig(r=r, alpha=3, init="loftq")
        tuned = ft.new_finetuned(base, {r".*_proj"}, (), linear_config=config, float_model=model)
        distances.append(relative_error(ft.apply(base, tuned, ids()).logits, exact))
    assert distances[0] > 1e-3 and distances[2] < distances[1] < distances[0]


def test_loftq_from_a_module_takes_that_module():
    torch.manual_seed(0)
    model = Tiny()
    config = LinearAdapterConfig(r=2, init="loftq")
    base, tuned = ft.new_finetuned(model, {"fc"}, linear_config=config)
    assert_same_finetune(tuned, ft.new_finetuned(base, {"fc"}, linear_config=config, float_model=model))
    assert tuned.params["fc.lora_b"].any()


def test_loftq_of_a_16_bit_model():
    """What was lost is found in float32, from weights that are exact there."""
    torch.manual_seed(0)
    model = Tiny().bfloat16()
    base = ft.quantize_base_model(model)
    tuned = ft.new_finetuned(base, {"fc"}, (), linear_config=LinearAdapterConfig(r=8, init="loftq"), float_model=model)
    merged = ft.merge(base, tuned, dtype=torch.float64)["fc.weight"]
    weight = model.fc.weight.detach().double()
    assert_close(merged, weight, 1e-6, unlike=ft.merge(base, None, dtype=torch.float64)["fc.weight"])


def test_loftq_where_the_base_lost_nothing(model, base):
    """A layer in float has no residue, and two zero factors would never train: it starts like any other."""
    config = LinearAdapterConfig(r=3, init="loftq")
    tuned = ft.new_finetuned(base, set(LINEAR), (), linear_config=config, float_model=model)
    for path in LINEAR:
        assert tuned.params[f"{path}.lora_a"].any() and tuned.params[f"{path}.lora_b"].any() == (path != "floating")
    generator = torch.Generator().manual_seed(0)
    alone = ft.new_finetuned(base, {"floating"}, (), linear_config=config, float_model=model, generator=generator)
    default = ft.new_finetuned(
        base,
        {"floating"},
        (),
        linear_config=LinearAdapterConfig(r=3),
        generator=torch.Generator().manual_seed(0),
    )
    assert_trees_equal(alone.params, default.params)
    grads = ft.value_and_grad(lambda t: ft.apply(base, t, ids()).square().sum())(alone)[1]
    assert grads["floating.lora_b"].any()


def test_loftq_of_a_layer_quantized_later():
    torch.manual_seed(0)
    model = Tiny()
    base = ft.quantize_base_model(model, modules_not_to_quantize={"fc", "lm_head"})
    eager = ft.quantize_base_model(model, modules_not_to_quantize=())
    config = LinearAdapterConfig(r=8, init="loftq")
    later = ft.new_finetuned(base, {"fc"}, (), linear_config=config, modules_not_to_quantize=(), float_model=model)
    at_once = ft.new_finetuned(eager, {"fc"}, (), linear_config=config, float_model=model)
    assert_trees_equal(later.params, at_once.params)
    assert later.params["fc.lora_b"].any()


# --- DoRA's magnitude


@pytest.mark.parametrize("init", ["default", "gaussian", *FROM_THE_WEIGHT])
def test_the_magnitude_is_the_norm_of_the_frozen_rows(model, base, init):
    tuned = fresh(base, init=init, dora=True)
    for path in LINEAR:
        norm = dequantized(model, base, path).norm(dim=1)
        for leaf in (tuned.params[f"{path}.lora_magnitude"], tuned.consts[f"{path}.lora_weight_norm"]):
            assert_close(leaf, norm, 1e-6, unlike=norm.flip(0))
            assert_close(leaf, norm, 1e-6, unlike=norm.roll(1))


def test_the_magnitude_beside_loftq_is_that_of_the_sum(model):
    """So that a fresh finetune is what LoftQ meant it to be."""
    base = ft.quantize_base_model(model, modules_not_to_quantize=())
    dora, plain = (fresh(base, model=model, init="loftq", dora=dora) for dora in (True, False))
    merged = ft.merge(base, plain, dtype=torch.float64)
    for path in LINEAR:
        norm = dequantized(model, base, path).norm(dim=1)
        weight = merged[f"{path}.weight"].T if path == "conv" else merged[f"{path}.weight"]
        assert_close(dora.params[f"{path}.lora_magnitude"], weight.norm(dim=1), 1e-6, unlike=norm)
        assert_close(dora.consts[f"{path}.lora_weight_norm"], norm, 1e-6, unlike=weight.norm(dim=1))
    out = ft.apply(base, plain, ids())
    assert_close(ft.apply(base, dora, ids()), out, 2e-6, unlike=ft.apply(base, None, ids()))


def test_the_magnitude_of_peft():
    from peft import LoraConfig, get_peft_model

    base = ft.quantize_base_model(gpt2())
    tuned = ft.new_finetuned(base, set(TARGETS["gpt2"]), (), linear_config=LinearAdapterConfig(r=2, dora=True))
    config = LoraConfig(r=2, target_modules=TARGETS["gpt2"], use_dora=True, fan_in_fan_out=True)
    peft = get_peft_model(twin(gpt2(), base), config).base_model.model
    for adapter in tuned.spec.adapters:
        theirs = peft.get_submodule(adapter.path).lora_magnitude_vector["default"].weight.detach()
        assert_close(tuned.params[f"{adapter.path}.lora_magnitude"], theirs, 1e-6, unlike=theirs.flip(0))


# --- dtypes and ties


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", ["default", "gaussian", *FROM_THE_WEIGHT, "loftq"])
def test_factors_are_float32_at_least(dtype, init):
    torch.manual_seed(0)
    model = Everything().to(dtype).eval()
    base = ft.quantize_base_model(model)
    config = LinearAdapterConfig(r=3, init=init, dora=True)
    tuned = ft.new_finetuned(base, {"embed", "fc1", "fc2"}, (), linear_config=config, float_model=model)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {leaf.dtype for leaf in (*tuned.params.values(), *tuned.consts.values())} == {wide}
    if init == "pissa":  # and found in that precision: not to 8 or 11 bits
        weight = dequantized(model, base, "fc1")
        a, b = factors(tuned, "fc1")
        tolerance = 1e-13 if dtype == torch.float64 else 1e-5
        assert_close(tuned.spec.adapters[1].config.scale * b @ a, best_of_rank(weight, 3), tolerance,
                     unlike=best_of_rank(weight, 2))  # fmt: skip


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("settings", [{"init": "pissa"}, {"init": "olora"}, {"dora": True}, {"init": "loftq"}], ids=str)
def test_a_head_that_is_the_table(head_first, settings):
    """Its weight is found under the table's name."""
    torch.manual_seed(0)
    model = TiedLm(head_first=head_first)
    base = ft.quantize_base_model(model, modules_not_to_quantize=())
    config = LinearAdapterConfig(r=6, **settings)
    tuned = ft.new_finetuned(base, {"lm_head"}, (), linear_config=config, float_model=model)
    frozen = dequantized(model, base, "embed")
    a, b = factors(tuned, "lm_head")
    if settings == {"dora": True}:
        assert_close(
            tuned.params["lm_head.lora_magnitude"], frozen.norm(dim=1), 1e-6, unlike=frozen.norm(dim=1).flip(0)
        )
    else:
        expected = matrix(model, "embed") - frozen if settings == {"init": "loftq"} else frozen
        assert_close(config.scale * b @ a if "olora" not in settings.values() else b @ a, expected, 1e-4,
                     unlike=expected.flip(0))  # fmt: skip
    changed = randomized(tuned)
    assert relative_error(ft.apply(base, changed, ids()), ft.apply(base, None, ids())) > 1e-2


# --- mistakes


def error_of(*args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        ft.new_finetuned(*args, **kwargs)
    return str(error.value)


def test_loftq_needs_the_float_weights(model, base):
    config = LinearAdapterConfig(init="loftq")
    assert error_of(base, linear_config=config) == (
        'LinearAdapterConfig(init="loftq") starts from what quantization lost, so it needs the float weights: pass '
        "new_finetuned(base, ..., float_model=model)."
    )
    for dora in (False, True):
        other = {"tall": dataclasses.replace(config, dora=dora), ".*": LinearAdapterConfig()}
        config_of = {"tall": other["tall"], "conv": other[".*"], "wide": other[".*"], "square": other[".*"]}
        assert "float_model=model" in error_of(base, set(LINEAR[:4]), (), linear_config=config_of)


def test_loftq_with_the_weights_of_another_model(base):
    config = LinearAdapterConfig(r=2, init="loftq")
    torch.manual_seed(0)
    lacking = nn.ModuleDict({"tall": nn.Linear(10, 24)})
    assert re.fullmatch(
        r"float_model: 'conv' has a weight of shape \(0,\), expected \(20, 24\); pass the model that the base was made "
        r"from\.",
        error_of(base, {"conv"}, (), linear_config=config, float_model=lacking),
    )
    shaped = nn.ModuleDict({"tall": nn.Linear(10, 25)})
    assert error_of(base, {"tall"}, (), linear_config=config, float_model=shaped) == (
        "float_model: 'tall' has a weight of shape (25, 10), expected (24, 10); pass the model that the base was made "
        "from."
    )


@pytest.mark.parametrize("scheme", ["int8", "blockwise8", "nf4"])
def test_loftq_with_a_model_of_the_same_shapes(model, scheme):
    """No rounding is that large: it is another model."""
    base = ft.quantize_base_model(model, scheme=scheme)
    torch.manual_seed(1)
    message = error_of(base, {"tall"}, (), linear_config=LinearAdapterConfig(init="loftq"), float_model=Layers())
    assert message == (
        "float_model: the weight of 'tall' is not the one that the base was quantized from; pass the model that the "
        "base was made from."
    )


@pytest.mark.parametrize("scheme", ["int8", "blockwise8", "nf4"])
def test_loftq_of_rows_with_an_outlier(scheme):
    """The worst that a row can lose: all but its largest number. It is still the right model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 3))
    with torch.no_grad():
        model[0].weight.uniform_(-1 / 255, 1 / 255)
        model[0].weight[:, 0] = 1.0
    base = ft.quantize_base_model(model, scheme=scheme)
    tuned = ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=3, init="loftq"), float_model=model)
    merged = ft.merge(base, tuned)["0.weight"]
    assert_close(merged, model[0].weight, 1e-6, unlike=ft.merge(base, None)["0.weight"])


@pytest.mark.parametrize("init", [*FROM_THE_WEIGHT, "loftq"])
def test_a_scale_of_zero_has_no_such_start(model, base, init):
    """No factors times zero are the weight."""
    with pytest.raises(ValueError) as error:
        LinearAdapterConfig(init=init, alpha=0.0)
    assert str(error.value) == f"LinearAdapterConfig(init={init!r}, alpha=0): factors of the weight need a scale."
    # A pattern cannot bring it in either.
    with pytest.raises(ValueError, match=r"alpha=0\): factors of the weight need a scale"):
        fresh(base, model=model, init=init, alpha_pattern={"tall": 0.0})


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_a_scale_of_zero_is_the_base(base, init):
    tuned = randomized(fresh(base, init=init, alpha=0.0))
    assert torch.equal(ft.apply(base, tuned, ids()), ft.apply(base, None, ids()))


@pytest.mark.parametrize("init", [*FROM_THE_WEIGHT, "loftq"])
def test_a_rank_beyond_the_layer(model, base, init):
    message = error_of(base, {"wide"}, (), linear_config=LinearAdapterConfig(r=9, init=init), float_model=model)
    assert message.startswith("linear_config: rank r=9 is larger than layer 'wide' of shape (8, 20); use r <= 8")


def test_a_weight_of_zeros():
    """Nothing to start from is no reason to fail: a fresh finetune is the base."""
    torch.manual_seed(0)
    model = Tiny()
    nn.init.zeros_(model.fc.weight)
    base = ft.quantize_base_model(model)
    for init in FROM_THE_WEIGHT:
        tuned = ft.new_finetuned(base, {"fc"}, (), linear_config=LinearAdapterConfig(r=2, init=init))
        out = ft.apply(base, tuned, ids())
        assert torch.equal(out, ft.apply(base, None, ids())) and out.isfinite().all()
