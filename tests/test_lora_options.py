"""The options of the adapters: the numbers of PEFT, the laws for each of them, and what a mistake says."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    Everything,
    Tiny,
    assert_close,
    assert_same_finetune,
    assert_trees_equal,
    assert_unchanged,
    gpt2,
    gradients_by_autograd,
    llama,
    randomized,
    relative_error,
    snapshot,
    t5,
    twin,
)
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.func import jvp, vjp, vmap

import finetuna_func as ft
from finetuna_func import EmbeddingAdapterConfig, LinearAdapterConfig

PROJECTIONS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "gpt2": gpt2}


@pytest.fixture(scope="module")
def bases() -> dict[str, ft.Base]:
    return {name: ft.quantize_base_model(make()) for name, make in MODELS.items()}


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(seed))


def tuned_on(base: ft.Base, targets: Any, config: Any, tables: Any = None, seed: int = 0) -> ft.Finetuned:
    made = ft.new_finetuned(
        base,
        targets,
        (),
        linear_config=config,
        embedding_config=tables or EmbeddingAdapterConfig(),
        generator=torch.Generator().manual_seed(seed),
    )
    return randomized(made, seed)


def with_params_of(other: ft.Finetuned, tuned: ft.Finetuned) -> ft.Finetuned:
    """``tuned`` with the numbers of ``other`` under the names that it has."""
    return tuned.replace(params={name: other.params[name] for name in tuned.params})


# --- the numbers of PEFT


def peft_layers(model: nn.Module) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")}


def peft_twin(make: Callable[[], Any], base: ft.Base, targets: Any, **settings: Any) -> Any:
    """PEFT's model on the dequantized weights, made by its own config."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(twin(make(), base), LoraConfig(target_modules=targets, **settings)).base_model.model.eval()


def peft_parameters(model: Any, tuned: ft.Finetuned) -> dict[str, nn.Parameter]:
    """PEFT's trained parameters under our names."""
    found: dict[str, nn.Parameter] = {}
    for path, layer in peft_layers(model).items():
        if "default" in layer.lora_embedding_A:
            found[f"{path}.lora_a"] = layer.lora_embedding_A["default"]
            found[f"{path}.lora_b"] = layer.lora_embedding_B["default"]
            continue
        found[f"{path}.lora_a"] = layer.lora_A["default"].weight
        found[f"{path}.lora_b"] = layer.lora_B["default"].weight
        if layer.lora_B["default"].bias is not None:
            found[f"{path}.lora_bias"] = layer.lora_B["default"].bias
        if "default" in layer.lora_magnitude_vector:
            found[f"{path}.lora_magnitude"] = layer.lora_magnitude_vector["default"].weight
    assert found.keys() == tuned.params.keys()
    return found


def copy_into_peft(model: Any, tuned: ft.Finetuned) -> dict[str, nn.Parameter]:
    parameters = peft_parameters(model, tuned)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tuned.params[name])
    return parameters


def loss_on(logits: Tensor) -> Tensor:
    """Weighs every logit by itself, so that no gradient is a sum in which an error cancels."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (logits * weights.to(logits)).sum()


def gradients(base: ft.Base, tuned: ft.Finetuned, ids: Tensor) -> dict[str, Tensor]:
    return dict(ft.value_and_grad(lambda t: loss_on(ft.apply(base, t, ids).logits))(tuned)[1])


def check_against_peft(
    name: str, base: ft.Base, tuned: ft.Finetuned, other: ft.Finetuned, targets: Any, **settings: Any
) -> None:
    """Equal logits and gradients; ``other`` is the same numbers under other options, and differs in both."""
    model = peft_twin(MODELS[name], base, targets, **settings)
    parameters = copy_into_peft(model, tuned)
    logits = model(tokens()).logits
    theirs = dict(
        zip(parameters, torch.autograd.grad(loss_on(logits), list(parameters.values()), allow_unused=True), strict=True)
    )
    assert_close(
        ft.apply(base, tuned, tokens()).logits, logits.detach(), 2e-5, unlike=ft.apply(base, other, tokens()).logits
    )
    mine, others, elsewhere = (
        gradients(base, t, ids) for t, ids in ((tuned, tokens()), (other, tokens()), (tuned, tokens(1)))
    )
    for leaf, gradient in theirs.items():
        assert gradient is not None and gradient.any(), leaf
        # What only this option trains differs from its gradient for other inputs instead.
        unlike = others[leaf] if leaf in others and others[leaf].shape == gradient.shape else elsewhere[leaf]
        assert_close(mine[leaf], gradient, 1e-4, unlike=unlike)


PLAIN = LinearAdapterConfig(r=3, alpha=2.0)
# Ours, PEFT's, and the config with which the same numbers mean something else.
OPTIONS: dict[str, tuple[LinearAdapterConfig, dict[str, Any], LinearAdapterConfig]] = {
    "none": (PLAIN, {}, LinearAdapterConfig(r=3, alpha=3.0)),
    "rslora": (dataclasses.replace(PLAIN, rank_stabilized=True), {"use_rslora": True}, PLAIN),
    "dora": (dataclasses.replace(PLAIN, dora=True), {"use_dora": True}, PLAIN),
    "dora rslora": (
        dataclasses.replace(PLAIN, dora=True, rank_stabilized=True),
        {"use_dora": True, "use_rslora": True},
        dataclasses.replace(PLAIN, dora=True),
    ),
    "bias": (dataclasses.replace(PLAIN, bias=True), {"lora_bias": True}, PLAIN),
    "bias rslora": (
        dataclasses.replace(PLAIN, bias=True, rank_stabilized=True),
        {"lora_bias": True, "use_rslora": True},
        dataclasses.replace(PLAIN, bias=True),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_logits_and_gradients_of_peft(bases, name, option):
    config, settings, another = OPTIONS[option]
    base, targets = bases[name], PROJECTIONS[name]
    tuned = tuned_on(base, targets, config)
    other = with_params_of(tuned, tuned_on(base, targets, another))
    check_against_peft(name, base, tuned, other, targets, r=3, lora_alpha=2.0, **settings)


@pytest.mark.parametrize("option", ["none", "rslora", "dora"])
def test_the_head_as_in_peft(bases, option):
    """A layer that the base holds in float."""
    config, settings, another = OPTIONS[option]
    tuned = tuned_on(bases["llama"], ["lm_head"], config)
    other = with_params_of(tuned, tuned_on(bases["llama"], ["lm_head"], another))
    check_against_peft("llama", bases["llama"], tuned, other, ["lm_head"], r=3, lora_alpha=2.0, **settings)


@pytest.mark.parametrize("stabilized", [False, True])
def test_tables_as_in_peft(bases, stabilized):
    tables = EmbeddingAdapterConfig(r=3, alpha=2.0, rank_stabilized=stabilized)
    targets = ["embed_tokens", "q_proj"]
    config = dataclasses.replace(PLAIN, rank_stabilized=stabilized)
    tuned = tuned_on(bases["llama"], targets, config, tables)
    another = dataclasses.replace(tables, rank_stabilized=not stabilized)
    other = tuned_on(bases["llama"], targets, dataclasses.replace(config, rank_stabilized=not stabilized), another)
    check_against_peft(
        "llama",
        bases["llama"],
        tuned,
        with_params_of(tuned, other),
        targets,
        r=3,
        lora_alpha=2.0,
        use_rslora=stabilized,
    )


RANKS = {"q_proj": 1, r"model\.layers\.1\.mlp\..*_proj": 4, "layers.0.mlp.gate_proj": 2}
ALPHAS = {"k_proj": 5.0, r".*\.1\..*\.(q|up)_proj": 0.5}


@pytest.mark.parametrize("settings", [{}, {"rank_stabilized": True}, {"dora": True}], ids=str)
def test_patterns_as_in_peft(bases, settings):
    base, targets = bases["llama"], PROJECTIONS["llama"]
    theirs = {{"rank_stabilized": "use_rslora", "dora": "use_dora"}[k]: v for k, v in settings.items()}
    config = dataclasses.replace(PLAIN, **settings)
    tuned = tuned_on(base, targets, dataclasses.replace(config, rank_pattern=RANKS, alpha_pattern=ALPHAS))
    layers = peft_layers(peft_twin(llama, base, targets, r=3, lora_alpha=2.0, rank_pattern=RANKS, **theirs))
    assert {a.path: a.config.r for a in tuned.spec.adapters} == {p: m.r["default"] for p, m in layers.items()}
    assert {a.config.r for a in tuned.spec.adapters} == {1, 2, 3, 4}
    other = tuned_on(base, targets, dataclasses.replace(config, rank_pattern=RANKS, alpha=3.0))
    check_against_peft(
        "llama",
        base,
        tuned,
        with_params_of(tuned, other),
        targets,
        r=3,
        lora_alpha=2.0,
        rank_pattern=RANKS,
        alpha_pattern=ALPHAS,
        **theirs,
    )


def test_patterns_of_tables(bases):
    tables = EmbeddingAdapterConfig(r=2, alpha=1.0, rank_pattern={"wpe": 5}, alpha_pattern={"wte": 3.0})
    tuned = tuned_on(bases["gpt2"], ["wte", "wpe"], PLAIN, tables)
    assert {a.path: (a.config.r, a.config.alpha) for a in tuned.spec.adapters} == {
        "transformer.wte": (2, 3.0),
        "transformer.wpe": (5, 1.0),
    }
    assert tuned.consts["transformer.wte.lora_scale"] == 1.5
    assert tuned.consts["transformer.wpe.lora_scale"] == pytest.approx(0.2)
    assert tuned.params["transformer.wpe.lora_b"].shape == (16, 5)


def test_a_pattern_is_the_same_as_a_config_of_its_own(bases):
    """Patterns are for choosing: what they chose is the same value as one that was written out."""
    pattern = LinearAdapterConfig(r=3, rank_pattern={"q_proj": 1}, alpha_pattern={"v_proj": 4.0}, exclude="k_proj")
    targets = ["q_proj", "k_proj", "v_proj"]
    written = {"q_proj": LinearAdapterConfig(r=1), "v_proj": LinearAdapterConfig(r=3, alpha=4.0)}
    one = tuned_on(bases["llama"], targets, pattern)
    assert_same_finetune(one, tuned_on(bases["llama"], ["q_proj", "v_proj"], written))
    assert hash(one.spec) == hash(dataclasses.replace(one.spec))
    both = ft.stack([one, tuned_on(bases["llama"], ["q_proj", "v_proj"], written, seed=1)])
    assert both.stack_size == 2


def test_an_exact_path_beats_a_regex(bases):
    paths = "model.layers.0.self_attn.q_proj"
    config = LinearAdapterConfig(r=2, rank_pattern={".*_proj": 3, paths: 1})
    ranks = {a.path: a.config.r for a in tuned_on(bases["llama"], ["q_proj"], config).spec.adapters}
    assert ranks == {paths: 1, paths.replace("0", "1"): 3}


# --- layers_to_transform and exclude


class Experts(nn.Module):
    """Numbers inside numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.core = nn.ModuleDict(
            {"blocks": nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([Pair(), Pair()])}) for _ in range(3))}
        )


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.down = nn.Linear(4, 4)


CHOICES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "llama": (llama, PROJECTIONS["llama"]),
    "gpt2": (gpt2, PROJECTIONS["gpt2"]),
    "t5": (t5, ["q", "v", "wi", "wo"]),
    "experts": (Experts, ["up", "down"]),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("chosen", [[0], [1], [0, 1], (1,), {0}, range(1)], ids=str)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_layers_to_transform_as_in_peft(name, chosen):
    from peft import LoraConfig, get_peft_model

    make, targets = CHOICES[name]
    model = make()
    base = ft.quantize_base_model(model)
    tuned = ft.new_finetuned(base, targets, (), linear_config=LinearAdapterConfig(r=2, layers_to_transform=chosen))
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=targets, layers_to_transform=list(chosen)))
    mine = {a.path for a in tuned.spec.adapters}
    assert mine == peft_layers(peft.base_model.model).keys()
    everywhere = {a.path for a in ft.new_finetuned(base, targets, ()).spec.adapters}
    assert mine < everywhere or (set(chosen) == {0, 1} and name != "experts" and mine == everywhere)


def test_layers_outside_the_blocks_are_not_transformed():
    base = ft.quantize_base_model(Experts())
    config = LinearAdapterConfig(r=2, layers_to_transform=[0])
    paths = {a.path for a in ft.new_finetuned(base, linear_config=config).spec.adapters}
    assert paths == {f"core.blocks.0.experts.{e}.{own}" for e in (0, 1) for own in ("up", "down")}
    # Of each kind by its own config: the tables have theirs.
    hf = ft.quantize_base_model(llama())
    chosen = {a.path for a in ft.new_finetuned(hf, linear_config=config).spec.adapters}
    assert "model.embed_tokens" in chosen and not any(".layers.1." in path for path in chosen)


def test_layers_to_transform_changes_those_layers_alone(bases):
    base = bases["llama"]
    chosen = LinearAdapterConfig(r=2, layers_to_transform=[1])
    tuned = tuned_on(base, PROJECTIONS["llama"], chosen)
    everywhere = tuned_on(base, PROJECTIONS["llama"], LinearAdapterConfig(r=2))
    expected = everywhere.replace(
        params={
            name: leaf if name in tuned.params else torch.zeros_like(leaf) for name, leaf in everywhere.params.items()
        }
        | dict(tuned.params)
    )
    logits = ft.apply(base, expected, tokens()).logits
    assert_close(
        ft.apply(base, tuned, tokens()).logits, logits, 1e-6, unlike=ft.apply(base, everywhere, tokens()).logits
    )


@pytest.mark.parametrize("excluded", ["k_proj", ["k_proj", "up_proj"], r".*\.0\..*", "layers.1.mlp.up_proj"], ids=str)
def test_exclude_as_in_peft(bases, excluded):
    tuned = tuned_on(bases["llama"], PROJECTIONS["llama"], LinearAdapterConfig(r=2, exclude=excluded))
    theirs = [excluded] if excluded == "k_proj" or "layers.1" in excluded else excluded
    peft = peft_twin(llama, bases["llama"], PROJECTIONS["llama"], r=2, exclude_modules=theirs)
    assert {a.path for a in tuned.spec.adapters} == peft_layers(peft).keys()
    assert len(tuned.spec.adapters) < 14


def test_exclude_a_container_and_a_table(bases):
    linear = LinearAdapterConfig(exclude={"layers.0", "mlp"})
    tuned = ft.new_finetuned(
        bases["llama"], plain_layers=(), linear_config=linear, embedding_config=EmbeddingAdapterConfig(exclude=())
    )
    own = {a.path.removeprefix("model.layers.1.self_attn.") for a in tuned.spec.adapters}
    assert own == {"model.embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}
    gpt = ft.new_finetuned(bases["gpt2"], embedding_config=EmbeddingAdapterConfig(exclude="wpe"))
    assert "transformer.wpe" not in {a.path for a in gpt.spec.adapters}
    assert "transformer.wpe" in {a.path for a in ft.new_finetuned(bases["gpt2"]).spec.adapters}


def test_exclude_beside_a_dict_of_configs(bases):
    """Each config excludes for the layers that are its own."""
    configs = {
        "q_proj": LinearAdapterConfig(r=2, exclude="layers.0"),
        "v_proj": LinearAdapterConfig(r=1, layers_to_transform=[0]),
    }
    tuned = ft.new_finetuned(bases["llama"], ["q_proj", "v_proj"], (), linear_config=configs)
    assert {a.path: a.config.r for a in tuned.spec.adapters} == {
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.0.self_attn.v_proj": 1,
    }


# --- DoRA by hand


def dora_by_hand(weight: Tensor, bias: Tensor | None, params: dict[str, Tensor], scale: float, x: Tensor) -> Tensor:
    """``m / ||W + sBA|| * (W + sBA) x``, the norm without a derivative."""
    updated = weight + scale * params["lora_b"] @ params["lora_a"]
    ratio = params["lora_magnitude"] / updated.detach().norm(dim=1)
    y = x @ (ratio.unsqueeze(1) * updated).T
    return y if bias is None else y + bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("r", [1, 3, 6])
def test_dora_by_hand(bias, quantized, r):
    torch.manual_seed(r)
    model = nn.Sequential(nn.Linear(6, 7, bias=bias)).double()
    base = ft.quantize_base_model(model, modules_not_to_quantize=() if quantized else {"0"})
    tuned = randomized(ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=r, alpha=3.0, dora=True)))
    weight = base.params["0.weight"].double()
    weight = weight * base.params["0.weight_scale"].double().unsqueeze(1) if quantized else weight
    x, own_bias = torch.randn(4, 6).double(), base.params.get("0.bias")
    weights = torch.randn(4, 7).double()

    def by_hand(params: dict[str, Tensor]) -> Tensor:
        return dora_by_hand(weight, own_bias, {n.removeprefix("0."): p for n, p in params.items()}, 3.0 / r, x)

    out = ft.apply(base, tuned, x)
    assert_close(out, by_hand(dict(tuned.params)), 1e-12, unlike=ft.apply(base, None, x))
    mine = ft.value_and_grad(lambda t: (ft.apply(base, t, x) * weights).sum())(tuned)[1]
    expected = gradients_by_autograd(lambda p: (by_hand(p) * weights).sum(), tuned.params)

    def differentiated(params: dict[str, Tensor]) -> Tensor:
        updated = weight + 3.0 / r * params["0.lora_b"] @ params["0.lora_a"]
        y = x @ (params["0.lora_magnitude"] / updated.norm(dim=1)).unsqueeze(1).mul(updated).T
        return ((y if own_bias is None else y + own_bias) * weights).sum()

    # Were the norm differentiated as well, A and B would get other gradients, and the magnitude the same.
    whole = gradients_by_autograd(differentiated, tuned.params)
    other = ft.value_and_grad(lambda t: (ft.apply(base, t, 2 * x) * weights).sum())(tuned)[1]
    for name in expected:
        unlike = other[name] if name.endswith("magnitude") else whole[name]
        assert_close(mine[name], expected[name], 1e-11, unlike=unlike)


def test_dora_scales_rows_by_the_magnitude(bases):
    """Twice the magnitude is twice the output of the layer, without its bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4))
    base = ft.quantize_base_model(model)
    tuned = randomized(ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=2, dora=True)))
    factor = torch.tensor([2.0, 1.0, -1.0, 0.0])
    scaled = tuned.replace(params={**tuned.params, "0.lora_magnitude": tuned.params["0.lora_magnitude"] * factor})
    x, bias = torch.randn(3, 5), base.params["0.bias"]
    once = ft.apply(base, tuned, x) - bias
    assert_close(ft.apply(base, scaled, x) - bias, once * factor, 1e-6, unlike=once)


def test_dora_with_dropout(seed):
    """The frozen part sees the whole input, the low-rank part the dropped one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5)).double()
    base = ft.quantize_base_model(model)
    tuned = randomized(ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=2, dora=True, dropout=0.5)))
    weight = ft.merge(base, None)["0.weight"]
    a, b, magnitude = (tuned.params[f"0.lora_{own}"] for own in ("a", "b", "magnitude"))
    ratio = magnitude / (weight + 0.5 * b @ a).norm(dim=1)
    x, key = torch.randn(6, 8).double(), ft.random.key(seed)
    out = ft.apply(base, tuned, x, train=True, rng=key)
    # The mask, from an adapter that does nothing but show its input: without DoRA, one unit vector of A at a time.
    plain = ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=1, alpha=1.0, dropout=0.5))
    dropped = torch.zeros_like(x)
    for i in range(8):
        unit = {"0.lora_a": torch.eye(8).double()[i : i + 1], "0.lora_b": torch.ones(5, 1).double()}
        shown = ft.apply(base, plain.replace(params=unit), x, train=True, rng=key) - ft.apply(base, None, x)
        dropped[:, i] = shown[:, 0]
    assert ((dropped - 2 * x).abs() < 1e-12).logical_or(dropped.abs() < 1e-12).all() and (dropped.abs() < 1e-12).any()
    expected = ratio * (x @ weight.T + 0.5 * dropped @ a.T @ b.T) + base.params["0.bias"]
    assert_close(out, expected, 1e-12, unlike=ft.apply(base, tuned, x))


@pytest.mark.parametrize("settings", [{"init": "pissa"}, {"init": "olora"}, {"dora": True}], ids=str)
def test_a_fresh_finetune_with_dropout_is_the_base(settings, seed):
    """The start is added and taken away under one mask."""
    model = Tiny()
    base = ft.quantize_base_model(model)
    tuned = ft.new_finetuned(base, linear_config=LinearAdapterConfig(dropout=0.5, **settings), plain_layers=())
    x = torch.randint(0, 16, (3, 4))
    out = ft.apply(base, tuned, x, train=True, rng=ft.random.key(seed))
    changed = ft.apply(base, randomized(tuned), x, train=True, rng=ft.random.key(seed))
    assert_close(out, ft.apply(base, None, x), 2e-6, unlike=changed)


def test_a_row_of_zeros_under_dora():
    """Padding rows of a head, pruned rows: zero times any magnitude over no norm is zero, not NaN."""
    torch.manual_seed(0)
    model = Tiny()
    with torch.no_grad():
        model.fc.weight[2] = 0
    base = ft.quantize_base_model(model)
    tuned = ft.new_finetuned(base, plain_layers=(), linear_config=LinearAdapterConfig(dora=True))
    x = torch.randint(0, 16, (3, 4))
    out = ft.apply(base, tuned, x)
    assert out.isfinite().all()
    assert_close(out, ft.apply(base, None, x), 1e-6, unlike=ft.apply(base, randomized(tuned), x))
    assert all(leaf.isfinite().all() for leaf in ft.merge(base, tuned).values())
    grads = ft.value_and_grad(lambda t: ft.apply(base, t, x).square().sum())(tuned)[1]
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("left", [1e-1, 1e-2])
def test_an_update_that_nearly_undoes_the_weight(left):
    """The norm of what is left is a root of a difference of squares, of numbers that are rounded to float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    base = ft.quantize_base_model(model)
    tuned = ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=16, alpha=16.0, dora=True))
    weight = ft.merge(base, None)["0.weight"]
    factors = {"0.lora_a": torch.eye(16), "0.lora_b": -(1 - left) * weight}
    tuned = tuned.replace(params={**tuned.params, **factors})
    x = torch.randn(4, 16)
    exact = x @ weight.T  # any multiple of W, brought back to the norms of W
    assert_close(ft.apply(base, tuned, x), exact, 8 * 2.0**-24 / left**2, unlike=-exact)


def test_dora_on_a_layer_that_is_trained_too():
    """The norm is kept, so it would be that of a weight long gone."""
    torch.manual_seed(0)
    model = Tiny()
    base = ft.quantize_base_model(model, modules_not_to_quantize={"fc", "lm_head"})
    arguments = {"adapt_layers": {"fc"}, "plain_layers": (), "modules_not_to_freeze": {"fc"}}
    message = error_of(base, linear_config=LinearAdapterConfig(dora=True), **arguments)
    assert message == (
        "linear_config: 'fc' has dora=True and is in modules_not_to_freeze; DoRA's norm is of a frozen weight. Choose "
        "one of them."
    )
    x = torch.randint(0, 16, (3, 4))
    for init in ("default", "pissa", "olora"):  # what these subtract is theirs, whatever becomes of the weight
        tuned = ft.new_finetuned(base, linear_config=LinearAdapterConfig(init=init), **arguments)
        check_merge(model, base, randomized(tuned), x, 1e-5)


@pytest.mark.parametrize("settings", [{"dora": True}, {"init": "pissa"}, {"init": "olora"}], ids=str)
def test_on_a_layer_quantized_later(settings):
    """What the adapter keeps of the weight is that of the 8-bit one, with which it computes."""
    torch.manual_seed(0)
    model = Tiny()
    base = ft.quantize_base_model(model, modules_not_to_quantize={"fc", "lm_head"})
    eager = ft.quantize_base_model(model, modules_not_to_quantize={"lm_head"})
    config = LinearAdapterConfig(r=2, **settings)
    later = ft.new_finetuned(base, {"fc"}, linear_config=config, modules_not_to_quantize=(), plain_layers={"lm_head"},
                             generator=torch.Generator().manual_seed(1))  # fmt: skip
    at_once = ft.new_finetuned(eager, {"fc"}, linear_config=config, generator=torch.Generator().manual_seed(1))
    assert later.spec.quantized == ("fc",) and at_once.spec.quantized == ()
    assert_trees_equal(later.params, at_once.params)
    assert_trees_equal(later.consts, at_once.consts)
    check_merge(model, base, randomized(later), torch.randint(0, 16, (3, 4)), 1e-6)


# --- laws

P = LinearAdapterConfig
STACKS: dict[str, list[LinearAdapterConfig]] = {
    "rslora": [P(r=1, rank_stabilized=True), P(r=4, rank_stabilized=True, alpha=3), P(r=2)],
    "dora": [P(r=1, dora=True), P(r=4, alpha=3, dora=True), P(r=2, dora=True, rank_stabilized=True)],
    "dora dropout": [P(r=2, dora=True, dropout=0.4), P(r=3, dora=True), P(r=1, dora=True, dropout=0.2)],
    "gaussian": [P(r=3, init="gaussian"), P(r=1), P(r=2, init="gaussian", bias=False)],
    "pissa": [P(r=2, init="pissa"), P(r=4, init="pissa", alpha=-2), P(r=1, init="pissa")],
    "pissa beside default": [P(r=2, init="pissa"), P(r=3), P(r=1, init="pissa", rank_stabilized=True)],
    "default beside olora": [P(r=2), P(r=3, init="olora"), P(r=1, init="gaussian")],
    "pissa, olora, loftq": [P(r=2, init="pissa"), P(r=3, init="olora"), P(r=1, init="loftq")],
    "pissa dropout": [P(r=2, init="pissa", dropout=0.4), P(r=1), P(r=2, init="olora", dropout=0.2)],
    "bias": [P(r=2, bias=True, init="pissa"), P(r=3, bias=True), P(r=1, bias=True, rank_stabilized=True)],
    "dora beside dora pissa": [P(r=3, dora=True), P(r=2, dora=True, init="pissa"), P(r=1, dora=True, init="olora")],
    "patterns": [
        P(r=2, rank_pattern={"fc1": 4, "fc2": 1}),
        P(r=3, alpha_pattern={"fc2": 4.0}),
        P(r=1, init="pissa", rank_pattern={"fc1": 3}, alpha_pattern={"fc1": -1.0}),
    ],
}
TABLES = [
    EmbeddingAdapterConfig(r=2, rank_stabilized=True),
    EmbeddingAdapterConfig(r=1, rank_pattern={"pos": 3}),
    EmbeddingAdapterConfig(r=3, alpha_pattern={"embed": 2.0}),
]


@dataclasses.dataclass(frozen=True)
class Case:
    model: nn.Module
    base: ft.Base
    fresh: list[ft.Finetuned]
    tuned: list[ft.Finetuned]
    x: Tensor

    @property
    def stacked(self) -> ft.Finetuned:
        return ft.stack(self.tuned)

    def loop(self) -> Tensor:
        return torch.stack([ft.apply(self.base, t, x) for t, x in zip(self.tuned, self.x, strict=True)])


def make_case(option: str, dtype: torch.dtype = torch.float32, scheme: str = "int8") -> Case:
    torch.manual_seed(0)
    model = Everything().to(dtype).eval()
    base = ft.quantize_base_model(model, scheme=scheme)
    generator = torch.Generator().manual_seed(0)
    fresh = [
        ft.new_finetuned(
            base, ("embed", "pos", "fc1", "fc2"), linear_config=config, embedding_config=table, generator=generator,
            float_model=model,
        )
        for config, table in zip(STACKS[option], TABLES, strict=True)
    ]  # fmt: skip
    tuned = [randomized(t, i) for i, t in enumerate(fresh)]
    x = torch.randint(0, 20, (3, 4, 5), generator=torch.Generator().manual_seed(1))
    return Case(model, base, fresh, tuned, x)


@pytest.fixture(scope="module", params=STACKS)
def case(request) -> Case:
    return make_case(request.param)


def check_merge(model: nn.Module, base: ft.Base, tuned: ft.Finetuned, x: Tensor, tolerance: float) -> None:
    merged = copy.deepcopy(model)
    merged.load_state_dict(ft.merge(base, tuned))
    with torch.no_grad():
        assert_close(ft.apply(base, tuned, x), merged(x), tolerance, unlike=ft.apply(base, None, x))


def test_vmap_is_the_loop_is_apply_stacked(case):
    expected = case.loop()
    for out in (
        vmap(ft.apply, in_dims=(None, 0, 0))(case.base, case.stacked, case.x),
        ft.apply_stacked(case.base, case.stacked, case.x),
    ):
        assert_close(out, expected, 1e-5, unlike=expected.roll(1, 0))


@pytest.mark.parametrize("option", ["dora dropout", "pissa dropout"])
def test_and_with_dropout(option, seed):
    case = make_case(option)
    keys = ft.random.split(ft.random.key(seed), 3)
    expected = torch.stack(
        [
            ft.apply(case.base, t, x, train=True, rng=key)
            for t, x, key in zip(case.tuned, case.x, keys, strict=True)
        ]
    )  # fmt: skip
    mapped = vmap(lambda t, x, key: ft.apply(case.base, t, x, train=True, rng=key))(case.stacked, case.x, keys)
    assert_close(mapped, expected, 1e-5, unlike=case.loop())
    stacked = ft.apply_stacked(case.base, case.stacked, case.x, train=True, rng=keys)
    assert_close(stacked, expected, 1e-5, unlike=case.loop())


def test_permuting_adapters_permutes_outputs(case):
    out = ft.apply_stacked(case.base, case.stacked, case.x)
    for order in itertools.permutations(range(3)):
        permuted = ft.stack([case.tuned[i] for i in order])
        again = ft.apply_stacked(case.base, permuted, case.x[list(order)])
        assert relative_error(again, out[list(order)]) < 1e-6
        if order != (0, 1, 2):
            assert relative_error(again, out) > 1e-2


def test_unstack_inverts_stack(case):
    before = [snapshot(t) for t in case.tuned]
    for finetunes in (case.tuned, case.fresh):
        again = ft.unstack(ft.stack(finetunes))
        for one, other in zip(again, finetunes, strict=True):
            assert_same_finetune(one, other)
        assert_trees_equal(ft.stack(again).consts, ft.stack(finetunes).consts)
        assert_same_finetune(ft.index(ft.stack(finetunes), -1), finetunes[-1])
    for tuned, snap in zip(case.tuned, before, strict=True):
        assert_unchanged(tuned, snap)
    assert not torch.equal(case.tuned[0].params["fc1.lora_a"][0], case.tuned[1].params["fc1.lora_a"][0])


def test_merge_then_plain_forward_is_the_adapter_forward(case):
    for tuned, x in zip(case.tuned, case.x, strict=True):
        if any(a.path == "fc2" and getattr(a.config, "bias", False) for a in tuned.spec.adapters):
            with pytest.raises(ValueError, match="the adapter of 'fc2' has a bias"):
                ft.merge(case.base, tuned)
            continue
        check_merge(case.model, case.base, tuned, x, 1e-5)


def test_to_module_is_the_adapter_forward(case):
    for tuned, x in zip(case.tuned, case.x, strict=True):
        out = ft.to_module(case.base, tuned)(x)
        assert torch.equal(out, ft.apply(case.base, tuned, x))
        assert relative_error(out, ft.apply(case.base, None, x)) > 1e-2


def test_save_then_load_is_the_identity(case, tmp_path):
    for i, finetunes in enumerate((case.tuned, case.fresh, ft.unstack(case.stacked))):
        for j, tuned in enumerate(finetunes):
            again = ft.load(ft.save(tmp_path / f"{i}{j}", tuned), case.base)
            assert_same_finetune(again, tuned)
            assert torch.equal(ft.apply(case.base, again, case.x[j]), ft.apply(case.base, tuned, case.x[j]))


def test_loading_on_an_equal_base_elsewhere(case, tmp_path):
    """Nothing of the frozen weight that is found again differs: another process quantizes the same model."""
    base = ft.quantize_base_model(case.model)
    assert_same_finetune(ft.load(ft.save(tmp_path / "a", case.tuned[0]), base), case.tuned[0])


def test_state_dicts_hold_the_constants(case):
    for fresh, tuned in zip(case.fresh, case.tuned, strict=True):
        state = ft.state_dict(tuned)
        assert state.keys() == tuned.params.keys() | tuned.consts.keys()
        assert_same_finetune(ft.load_state_dict(case.base, fresh, state), tuned)
        full = ft.state_dict(tuned, base=case.base)
        assert_same_finetune(ft.load_state_dict(case.base, fresh, full), tuned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("option", ["dora beside dora pissa", "pissa, olora, loftq"])
def test_saving_parameters_of_another_dtype(option, dtype, tmp_path):
    """Trained in another precision than the start is kept in: each comes back as it was."""
    case = make_case(option)
    for i, tuned in enumerate(case.tuned):
        cast = tuned.replace(params={name: leaf.to(dtype) for name, leaf in tuned.params.items()})
        assert_same_finetune(ft.load(ft.save(tmp_path / f"p{i}", cast), case.base), cast)
        both = cast.replace(consts={name: leaf.to(dtype) for name, leaf in tuned.consts.items()})
        assert_same_finetune(ft.load(ft.save(tmp_path / f"c{i}", both), case.base), both)


def loss_of(base: ft.Base) -> Callable[[ft.Finetuned, Tensor], Tensor]:
    return lambda tuned, x: ft.apply(base, tuned, x).square().mean()


def test_stacked_gradients_are_those_of_each(case):
    """By each route; and what is padded gets none."""

    def whole(tuned: ft.Finetuned, x: Tensor) -> Tensor:
        return ft.apply_stacked(case.base, tuned, x).square().flatten(1).mean(1)

    loss_fn = loss_of(case.base)
    routes = {
        "stacked": ft.stacked_value_and_grad(whole)(case.stacked, case.x),
        "stacked by vmap": ft.stacked_value_and_grad(loss_fn, in_dims=0)(case.stacked, case.x),
        "vmap": vmap(ft.value_and_grad(loss_fn))(case.stacked, case.x),
    }
    for i, tuned in enumerate(case.tuned):
        value, grads = ft.value_and_grad(loss_fn)(tuned, case.x[i])
        for losses, stacked in routes.values():
            assert abs(losses[i] - value) <= 1e-5 * value
            mine = ft.index(case.stacked.replace(params=stacked), i).params
            for name, grad in grads.items():
                assert grad.any()
                assert relative_error(mine[name], grad) < 1e-4, name
                padded = stacked[name][i].clone()
                padded[tuple(slice(0, size) for size in grad.shape)] = 0
                assert not padded.any(), name
    others = routes["stacked"][1]["fc1.lora_b"]
    assert relative_error(others[0, :, :1], others[1, :, :1]) > 1e-2


def test_stacked_steps_are_separate_steps(case):
    """Three steps of Adam with weight decay; paddings stay exactly zero, constants are not touched."""
    tx = ft.optim.adamw(1e-2, weight_decay=0.1)
    loss_fn = loss_of(case.base)

    def train(tuned: ft.Finetuned, step: Callable[[ft.Finetuned], Any]) -> ft.Finetuned:
        state = tx.init(tuned)
        for _ in range(3):
            updates, state = tx.update(step(tuned), state, tuned)
            tuned = ft.optim.apply_updates(tuned, updates)
        return tuned

    stacked = train(
        case.stacked, lambda t: ft.stacked_value_and_grad(loss_fn, in_dims=0)(t, case.x)[1]
    )  # fmt: skip
    for i, tuned in enumerate(case.tuned):
        alone = train(tuned, lambda t, i=i: ft.value_and_grad(loss_fn)(t, case.x[i])[1])
        one = ft.index(stacked, i)
        assert one.spec == alone.spec
        assert_trees_equal(one.consts, tuned.consts)
        assert_trees_equal(alone.consts, tuned.consts)
        for name, leaf in alone.params.items():
            # Adam divides by the size of a gradient: where that is about zero, roundings count. A step is 1e-2.
            assert (one.params[name] - leaf).abs().max() < 2e-3, name
            assert (one.params[name] - leaf).abs().mean() < 1e-5, name
            assert (leaf - tuned.params[name]).abs().mean() > 5e-3, name
        rank = alone.params["fc1.lora_a"].shape[0]
        assert not stacked.params["fc1.lora_a"][i, rank:].any() and not stacked.params["fc1.lora_b"][i, :, rank:].any()


@pytest.mark.parametrize("option", ["dora", "pissa beside default", "dora beside dora pissa", "bias", "rslora"])
def test_jvp_is_vjp(option):
    case = make_case(option, torch.float64)
    torch.manual_seed(2)
    for tuned, x in zip(case.tuned, case.x, strict=True):

        def f(params: dict[str, Tensor], tuned=tuned, x=x) -> Tensor:
            return ft.apply(case.base, tuned.replace(params=params), x)

        params = dict(tuned.params)
        direction = {name: torch.randn_like(leaf) for name, leaf in params.items()}
        out, along = jvp(f, (params,), (direction,))
        cotangent = torch.randn_like(out)
        (grads,) = vjp(f, params)[1](cotangent)
        forward = float((along * cotangent).sum())
        backward = sum(float((grads[name] * direction[name]).sum()) for name in params)
        assert abs(forward) > 1e-2
        assert abs(forward - backward) < 1e-11 * abs(forward) + 1e-11
        # and the lean gradients are those of torch.func
        lean = ft.value_and_grad(lambda t, x=x, c=cotangent: (ft.apply(case.base, t, x) * c).sum())(tuned)[1]
        assert all(relative_error(lean[name], grads[name]) < 1e-12 for name in params)


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize(
    "config",
    [
        P(r=2, init="pissa", alpha=3),
        P(r=2, init="olora"),
        P(r=2, rank_stabilized=True),
        P(r=2, bias=True, init="pissa"),
        P(r=2, dora=True),
        P(r=2, dora=True, init="pissa", alpha=3),
    ],
    ids=["pissa", "olora", "rslora", "pissa bias", "dora", "dora pissa"],
)
def test_gradcheck(config):
    """Finite differences in float64: first derivatives forward, reverse and batched, and second ones.

    The norm in DoRA counts as a constant, which a finite difference does not know. So the magnitude is
    given in units of the norm, itself cut off from the derivative: then it cancels for both.
    """
    torch.manual_seed(0)
    base = ft.quantize_base_model(OneLayer().double())
    tuned = randomized(ft.new_finetuned(base, linear_config=config), scale=0.2)
    names = list(tuned.params)
    weight = ft.merge(base, None)["fc.weight"]

    def f(x: Tensor, *leaves: Tensor) -> Tensor:
        params = dict(zip(names, leaves, strict=True))
        if config.dora:
            a, b = params["fc.lora_a"].detach(), params["fc.lora_b"].detach()
            update = b @ a
            if config.init == "pissa":
                update = update - tuned.consts["fc.lora_b0"] @ tuned.consts["fc.lora_a0"]
            norm = (weight + config.scale * update).norm(dim=1)
            params["fc.lora_magnitude"] = params["fc.lora_magnitude"] * norm
        return ft.apply(base, tuned.replace(params=params), x)

    inputs = [torch.randn(2, 3).double(), *tuned.params.values()]
    inputs = [leaf.detach().clone().requires_grad_() for leaf in inputs]
    assert torch.autograd.gradcheck(
        f,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=False,
    )
    assert torch.autograd.gradgradcheck(f, inputs, check_undefined_grad=False)
    if config.dora:  # the check can tell: the norm's own derivative is not what is computed
        with pytest.raises(GradcheckError):
            torch.autograd.gradcheck(
                lambda *leaves: ft.apply(base, tuned.replace(params=dict(zip(names, leaves, strict=True))), inputs[0]),
                inputs[1:],
            )


@pytest.mark.parametrize("scheme", ["blockwise8", "nf4"])
@pytest.mark.parametrize("option", ["dora", "pissa beside default"])
def test_other_schemes(option, scheme):
    """The options know the weight through its scheme alone."""
    case = make_case(option, scheme=scheme)
    expected = case.loop()
    stacked = ft.apply_stacked(case.base, case.stacked, case.x)
    assert_close(stacked, expected, 1e-5, unlike=expected.roll(1, 0))
    for tuned, x in zip(case.tuned, case.x, strict=True):
        check_merge(case.model, case.base, tuned, x, 1e-5)


def test_dora_with_quantized_activations():
    """W8A8 rounds what flows through the layer. A is no activation: the norm is exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12, bias=False))
    bases = [ft.quantize_base_model(model, matmul=m) for m in ("w8a16", "w8a8")]
    tuned = [randomized(ft.new_finetuned(b, linear_config=P(r=4, alpha=8, dora=True))) for b in bases]
    merged = ft.merge(bases[1], tuned[1], dtype=torch.float64)["0.weight"]
    assert_close(merged.norm(dim=1), tuned[1].params["0.lora_magnitude"].abs().double(), 1e-6,
                 unlike=ft.merge(bases[1], None)["0.weight"].norm(dim=1))  # fmt: skip
    # Rows of zeros and ones, which int8 holds exactly: the activations lose nothing.
    x = torch.eye(16)
    outs = [ft.apply(b, dataclasses.replace(tuned[0], spec=t.spec), x) for b, t in zip(bases, tuned, strict=True)]
    assert_close(outs[1], outs[0], 1e-5, unlike=ft.apply(bases[0], None, x))


def test_in_generation(bases):
    """An ordinary Hugging Face model again, whatever the adapter is."""
    for config in (P(r=2, dora=True), P(r=2, init="pissa")):
        tuned = tuned_on(bases["llama"], PROJECTIONS["llama"], config)
        module = ft.to_module(bases["llama"], tuned)
        new = module.generate(
            tokens(), attention_mask=torch.ones_like(tokens()), max_new_tokens=3, do_sample=False, pad_token_id=0
        )[:, 6]
        assert torch.equal(new, ft.apply(bases["llama"], tuned, tokens()).logits[:, -1].argmax(-1))


# --- layers that are not plain matrices


class Attending(nn.Module):
    """Torch's packed attention: three layers in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lm_head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.lm_head(self.attention(x, x, x, need_weights=False)[0])


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.lm_head = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.conv(self.embed(ids).mT).mT))


def mixtral() -> Any:
    """Experts packed into parameters of three axes."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)
    return MixtralForCausalLM(MixtralConfig(**sizes)).eval()


PACKED: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "attention": (Attending, {"attention"}),
    "experts": (mixtral, {r".*\.experts\..*"}),
    "convolution": (Convolving, {"conv"}),
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize(
    "settings",
    [{"rank_stabilized": True}, {"dora": True}, {"init": "pissa"}, {"init": "olora"}, {"init": "loftq"}],
    ids=str,
)
def test_on_packed_and_convolving_modules(kind, settings, tmp_path):
    make, paths = PACKED[kind]
    torch.manual_seed(0)
    model = make().eval()
    base = ft.quantize_base_model(model)
    arguments = {"linear_config": P(r=2, alpha=3.0, **settings), "float_model": model}
    if kind == "convolution" and "dora" in settings:
        assert "takes no dora" in error_of(base, paths, (), **arguments)
        return
    fresh = [ft.new_finetuned(base, paths, (), **arguments) for _ in range(2)]
    tuned = [randomized(t, i) for i, t in enumerate(fresh)]
    ids = torch.randint(0, 20, (2, 3, 4))

    def outputs(finetunes: list[Any]) -> Tensor:
        outs = [ft.apply(base, t, x) for t, x in zip(finetunes, ids, strict=True)]
        return torch.stack([getattr(out, "logits", out) for out in outs])

    loop, frozen = outputs(tuned), outputs([None, None])
    if settings == {"init": "loftq"} and kind != "convolution":
        with torch.no_grad():
            exact = torch.stack([getattr(out, "logits", out) for out in map(model, ids)])
        # The adapted layers are nearer to the float ones; the others round as before.
        assert 0 < relative_error(outputs(fresh), frozen) < 0.05
        assert (outputs(fresh) - exact).norm() < 1.2 * (frozen - exact).norm()
        assert all(leaf.any() for leaf in fresh[0].params.values())
    else:
        assert_close(outputs(fresh), frozen, 2e-6, unlike=loop)
    stacked = ft.apply_stacked(base, ft.stack(tuned), ids)
    assert_close(getattr(stacked, "logits", stacked), loop, 1e-5, unlike=loop.roll(1, 0))
    merged = make()
    merged.load_state_dict(ft.merge(base, tuned[0]))
    with torch.no_grad():
        out = merged.eval()(ids[0])
    assert_close(getattr(out, "logits", out), loop[0], 1e-5, unlike=frozen[0])
    assert_same_finetune(ft.load(ft.save(tmp_path / "a", tuned[0]), base), tuned[0])


# --- what PEFT reads


def peft_reads(name: str, base: ft.Base, tuned: ft.Finetuned, folder: Any) -> Tensor:
    from peft import PeftModel

    with torch.no_grad():
        return PeftModel.from_pretrained(twin(MODELS[name](), base), str(folder)).eval()(tokens()).logits


SAVED: dict[str, LinearAdapterConfig] = {
    "rslora": P(r=3, alpha=2, rank_stabilized=True),
    "dora": P(r=3, alpha=2, dora=True),
    "dora rslora": P(r=3, alpha=2, dora=True, rank_stabilized=True),
    "gaussian": P(r=3, alpha=2, init="gaussian"),
    "pissa": P(r=3, alpha=2, init="pissa"),
    "pissa rslora": P(r=3, alpha=-2, init="pissa", rank_stabilized=True),
    "olora": P(r=3, alpha=2, init="olora"),
    "dora olora": P(r=3, alpha=2, init="olora", dora=True),
    "bias": P(r=3, alpha=2, bias=True),
    "patterns": P(r=3, alpha=2, rank_pattern={r".*\.0\..*": 1}, alpha_pattern={r".*c_proj|.*o_proj": 7.0}),
    "pissa patterns": P(r=3, init="pissa", rank_pattern={r".*\.0\..*": 1}, alpha_pattern={r".*\.1\..*": 7.0}),
    "one block": P(r=3, alpha=2, layers_to_transform=[1]),
    "excluded": P(r=3, alpha=2, exclude={"mlp"}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("option", SAVED)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_peft_reads_a_save(bases, name, option, tmp_path):
    tuned = tuned_on(bases[name], PROJECTIONS[name], SAVED[option])
    logits = peft_reads(name, bases[name], tuned, ft.save(tmp_path / "a", tuned))
    mine = ft.apply(bases[name], tuned, tokens()).logits
    assert_close(logits, mine, 2e-5, unlike=ft.apply(bases[name], None, tokens()).logits)
    if tuned.consts.keys() != {f"{a.path}.lora_scale" for a in tuned.spec.adapters}:
        # What DoRA and PiSSA add is in the file: without it, the same A and B are something else.
        plain = tuned_on(bases[name], PROJECTIONS[name], P(r=3, alpha=2))
        if (
            plain.params["lm_head.lora_a" if False else next(iter(plain.params))].shape
            == next(iter(tuned.params.values())).shape
        ):
            other = ft.apply(bases[name], with_params_of(tuned, plain), tokens()).logits
            assert relative_error(logits, other) > 1e-2


MIXED: dict[str, tuple[list[str], Any]] = {
    "scales": (["q_proj", "v_proj"], {"q_proj": P(r=2, rank_stabilized=True), "v_proj": P(r=3, alpha=5)}),
    "starts": (["q_proj", "v_proj"], {"q_proj": P(r=2, init="pissa"), "v_proj": P(r=2)}),
    "tables": (["embed_tokens", "q_proj"], P(r=3, rank_stabilized=True)),
    "tables and pissa": (["embed_tokens", "q_proj"], P(r=3, init="pissa")),
    "biases": (["q_proj", "v_proj"], {"q_proj": P(r=2, bias=True), "v_proj": P(r=2)}),
    "dora on some": (["q_proj", "v_proj"], {"q_proj": P(r=2, dora=True), "v_proj": P(r=2)}),
    "tables and dora": (["embed_tokens", "q_proj"], P(r=2, dora=True)),
    "tables and bias": (["embed_tokens", "q_proj"], P(r=2, bias=True)),
}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_reads_a_finetune_of_several_kinds(bases, kind, tmp_path, caplog):
    """Its config has one switch for all layers. What it would read as something else is not given to it."""
    targets, config = MIXED[kind]
    tuned = tuned_on(bases["llama"], targets, config)
    folder = ft.save(tmp_path / "a", tuned)
    assert_same_finetune(ft.load(folder, bases["llama"]), tuned)
    if "dora" in kind:
        (record,) = caplog.records
        assert record.getMessage() == (
            f"{folder}: no adapter_config.json is written, since PEFT cannot express DoRA on some of the adapted "
            "layers only."
        )
        assert not (folder / "adapter_config.json").exists()
        return
    assert not caplog.records
    if kind == "tables and bias":  # which PEFT itself refuses, in words
        with pytest.raises(ValueError, match="lora_bias=True is not supported for Embedding"):
            peft_reads("llama", bases["llama"], tuned, folder)
        return
    logits = peft_reads("llama", bases["llama"], tuned, folder)
    mine = ft.apply(bases["llama"], tuned, tokens()).logits
    assert_close(logits, mine, 1e-5, unlike=ft.apply(bases["llama"], None, tokens()).logits)


def test_a_save_for_peft_is_replaced_by_one_that_is_not(bases, tmp_path):
    """Nothing of the earlier save stays behind for PEFT to read."""
    plain, mixed = (tuned_on(bases["llama"], *MIXED[kind]) for kind in ("scales", "dora on some"))
    ft.save(tmp_path / "a", plain)
    ft.save(tmp_path / "a", mixed)
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    assert_same_finetune(ft.load(tmp_path / "a", bases["llama"]), mixed)


# --- configs and mistakes


def test_the_scale_of_rslora():
    for r, alpha in ((1, 1.0), (4, 2.0), (9, -3.0)):
        for config in (LinearAdapterConfig, EmbeddingAdapterConfig):
            assert config(r=r, alpha=alpha, rank_stabilized=True).scale == alpha / math.sqrt(r)
            assert config(r=r, alpha=alpha).scale == alpha / r
    base = ft.quantize_base_model(Tiny())
    tables = EmbeddingAdapterConfig(r=4, alpha=6, rank_stabilized=True)
    tuned = ft.new_finetuned(base, plain_layers=(), embedding_config=tables, linear_config=P(r=4, alpha=6))
    assert tuned.consts["embed.lora_scale"] == 3.0 and tuned.consts["fc.lora_scale"] == 1.5


def config_error(config: type, **settings: Any) -> str:
    with pytest.raises(ValueError) as error:
        config(**settings)
    return str(error.value)


def test_a_start_that_there_is_not():
    choices = "('default', 'gaussian', 'pissa', 'olora', 'loftq')"
    for init in ("svd", "PiSSA", None, 3, ["pissa"], True):
        message = f"LinearAdapterConfig(init={init!r}): expected one of {choices}."
        assert config_error(LinearAdapterConfig, init=init) == message


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (LinearAdapterConfig, "dora"),
        (LinearAdapterConfig, "bias"),
        (LinearAdapterConfig, "rank_stabilized"),
        (EmbeddingAdapterConfig, "rank_stabilized"),
    ],
)
def test_switches_are_true_or_false(config, setting):
    for value in ("yes", 1, None):
        message = f"{config.__name__}({setting}={value!r}): expected True or False."
        assert config_error(config, **{setting: value}) == message


def test_dora_has_no_bias():
    message = "LinearAdapterConfig(dora=True, bias=True): DoRA has no adapter bias; choose one of them."
    assert config_error(LinearAdapterConfig, dora=True, bias=True) == message


def error_of(base: ft.Base, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ValueError) as error:
        ft.new_finetuned(base, *args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing(bases, pattern):
    targets = ["q_proj", "v_proj", "embed_tokens"]
    message = error_of(bases["llama"], targets, (), linear_config=P(**{pattern: {"q_porj": 2}}))
    assert message == (
        f"linear_config.{pattern}: 'q_porj' matches no adapted linear layer. Did you mean 'q_proj', 'v_proj'?"
    )
    for name in ("embed_tokens", "k_proj", "norm"):  # a table, a layer that is not adapted, one that cannot be
        message = error_of(bases["llama"], targets, (), linear_config=P(**{pattern: {name: 2}}))
        assert message.startswith(f"linear_config.{pattern}: {name!r} matches no adapted linear layer. ")
    tables = EmbeddingAdapterConfig(**{pattern: {"q_proj": 2}})
    message = error_of(bases["llama"], targets, (), embedding_config=tables)
    assert message.startswith(f"embedding_config.{pattern}: 'q_proj' matches no adapted embedding layer. ")
    message = error_of(bases["llama"], targets, (), linear_config=P(exclude="layers.0", **{pattern: {"layers.0": 2}}))
    assert message.startswith(f"linear_config.{pattern}: 'layers.0' matches no adapted linear layer. ")


def test_a_pattern_for_the_layers_of_another_config(bases):
    """In a dict of configs a pattern is for the layers of its own config; for others it would do nothing."""
    configs = {"q_proj": P(rank_pattern={"v_proj": 8}), "v_proj": P()}
    message = error_of(bases["llama"], ["q_proj", "v_proj"], (), linear_config=configs)
    assert message.startswith("linear_config.rank_pattern: 'v_proj' matches no adapted linear layer. ")
    configs["q_proj"] = P(rank_pattern={"layers.1": 8})
    tuned = ft.new_finetuned(bases["llama"], ["q_proj", "v_proj"], (), linear_config=configs)
    assert [a.config.r for a in tuned.spec.adapters] == [4, 4, 8, 4]


def test_patterns_that_contradict(bases):
    message = error_of(bases["llama"], ["q_proj"], (), linear_config=P(rank_pattern={"q_proj": 2, ".*_proj": 3}))
    assert message == (
        "linear_config.rank_pattern: the keys ['.*_proj', 'q_proj'] all name 'model.layers.0.self_attn.q_proj' but "
        "with different values; keep one, or use the exact path, which takes precedence."
    )
    same = P(rank_pattern={"q_proj": 2, ".*_proj": 2})
    assert all(
        a.config.r == 2 for a in ft.new_finetuned(bases["llama"], ["q_proj"], (), linear_config=same).spec.adapters
    )


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"rank_pattern": {"q_proj": 0}}, r"LinearAdapterConfig\(r=0\): the rank must be an integer"),
        ({"rank_pattern": {"q_proj": 2.0}}, r"LinearAdapterConfig\(r=2\.0\): the rank must be an integer"),
        ({"rank_pattern": {"q_proj": 17}}, r"linear_config: rank r=17 is larger than layer .* of shape \(16, 16\)"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"LinearAdapterConfig\(alpha='x'\): expected a finite number"),
        ({"alpha_pattern": {"q_proj": math.nan}}, r"LinearAdapterConfig\(alpha=nan\): expected a finite number"),
    ],
)  # fmt: skip
def test_values_in_a_pattern(bases, pattern, message):
    with pytest.raises(ValueError, match=message):
        ft.new_finetuned(bases["llama"], ["q_proj"], (), linear_config=P(**pattern))


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern", "layers_to_transform", "exclude"])
@pytest.mark.parametrize("config", [LinearAdapterConfig, EmbeddingAdapterConfig])
@pytest.mark.parametrize("targets", [None, ["embed_tokens", "q_proj"]])
def test_settings_of_a_wrong_type_are_named(bases, setting, config, targets):
    """As soon as may be: in the config, or when it is used."""
    argument = "linear_config" if config is LinearAdapterConfig else "embedding_config"
    for value in (3.5, [1.5]):
        with pytest.raises((TypeError, ValueError), match=f"{argument}.{setting}: expected "):
            ft.new_finetuned(bases["llama"], targets, (), **{argument: config(**{setting: value})})


def test_a_single_block(bases):
    """A number is that one block, as in PEFT; a text is no number."""
    one, several = (
        ft.new_finetuned(bases["llama"], ["q_proj"], (), linear_config=P(layers_to_transform=blocks),
                         generator=torch.Generator().manual_seed(0))
        for blocks in (1, [1])
    )  # fmt: skip
    assert_same_finetune(one, several)
    for value in ("1", ["1"], [True], 1.0):
        with pytest.raises(TypeError, match=r"linear_config\.layers_to_transform: expected numbers of blocks, got "):
            ft.new_finetuned(bases["llama"], ["q_proj"], (), linear_config=P(layers_to_transform=value))


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude": "q_porj"},
        {"exclude": ("q_proj", "nothing")},
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": [-1]},
    ],
    ids=str,
)
def test_a_choice_that_matches_nothing(bases, settings):
    """A selector with a slip of the pen is an error, as everywhere."""
    (setting,) = settings
    message = error_of(bases["llama"], PROJECTIONS["llama"], (), linear_config=P(**settings))
    assert message.startswith(f"linear_config.{setting}")


@pytest.mark.parametrize(
    "settings",
    [{"exclude": ".*"}, {"exclude": ("q_proj",)}, {"layers_to_transform": [7]}, {"layers_to_transform": []}],
    ids=str,
)
def test_excluding_everything(bases, settings):
    """A finetune without an adapter, where adapters were asked for, is a mistake."""
    (setting,) = settings
    assert setting in error_of(bases["llama"], {"q_proj"}, (), linear_config=P(r=2, **settings))


def test_stacking_dora_beside_none(bases):
    made = [ft.new_finetuned(bases["llama"], ["q_proj"], (), linear_config=P(dora=dora)) for dora in (False, True)]
    with pytest.raises(ValueError) as error:
        ft.stack(made)
    message = str(error.value)
    assert message.startswith(
        "stack: element 1 has other parameters than element 0: ['model.layers.0.self_attn.q_proj."
    )
    assert "lora_magnitude" in message and "dora" in message


# --- dropout on convolutions


class Pointwise(nn.Module):
    """A convolution of one number, so that each output tells whether its input was dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"conv": nn.Conv1d(1, 1, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["conv"](x)


def test_dropout_on_a_convolution():
    """As in PEFT: the adapter sees the dropped input, the frozen kernel the whole one."""
    base = ft.quantize_base_model(Pointwise())
    tuned = randomized(ft.new_finetuned(base, {"conv"}, (), linear_config=P(r=1, alpha=2, dropout=0.3)))
    x = torch.rand(1, 1, 4000) + 1
    frozen, whole = ft.apply(base, None, x), ft.apply(base, tuned, x) - ft.apply(base, None, x)
    update = ft.apply(base, tuned, x, train=True, rng=ft.random.key(0)) - frozen
    dropped = update.abs() < 1e-5
    assert_close(update[~dropped], (whole / 0.7)[~dropped], 1e-5, unlike=whole[~dropped])
    assert abs(dropped.float().mean() - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5
    again = ft.apply(base, tuned, x, train=True, rng=ft.random.key(0)) - frozen
    assert torch.equal(again, update)
    assert not torch.equal(ft.apply(base, tuned, x, train=True, rng=ft.random.key(1)) - frozen, update)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 3, 5, 9)])
def test_dropout_on_convolutions_in_a_stack_and_under_vmap(shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(2), nn.AdaptiveAvgPool1d(4))
    base = ft.quantize_base_model(model)
    configs = [P(r=2, alpha=3, dropout=rate) for rate in (0.5, 0.0, 0.2)]
    tuned = [randomized(ft.new_finetuned(base, {"0"}, (), linear_config=c), i) for i, c in enumerate(configs)]
    x, keys = torch.randn(3, *shape), ft.random.split(ft.random.key(3), 3)
    loop = torch.stack([ft.apply(base, t, x[i], train=True, rng=keys[i]) for i, t in enumerate(tuned)])
    stacked = ft.stack(tuned)
    other = torch.stack([ft.apply(base, t, x[i], train=True, rng=keys[i - 1]) for i, t in enumerate(tuned)])
    assert_close(ft.apply_stacked(base, stacked, x, train=True, rng=keys), loop, 1e-5, unlike=other)
    mapped = torch.func.vmap(lambda t, x, key: ft.apply(base, t, x, train=True, rng=key))(stacked, x, keys)
    assert_close(mapped, loop, 1e-5, unlike=other)
