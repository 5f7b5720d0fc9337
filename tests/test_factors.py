"""Factors made ready together: bit by bit what each layer makes of its own, derivatives as well."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from models import Tiny, finetunes, gpt2, llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import finetuna_func as ft
from finetuna_func import _functional
from finetuna_func._factors import ready_factors

PROJECTIONS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(0))


def assert_equal(found: Any, expected: Any) -> None:
    """Bit by bit, leaf by leaf."""
    (own, spec), (others, other_spec) = (torch_pytree.tree_flatten(tree) for tree in (found, expected))
    assert spec == other_spec and all(torch.equal(a, b) for a, b in zip(own, others, strict=True))


def each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_functional, "ready_factors", lambda skeleton, leaves: leaves)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def base(request: pytest.FixtureRequest) -> ft.Base:
    return ft.quantize_base_model(llama().to(request.param))


CONFIGS: dict[str, dict[str, Any]] = {
    "one scale": {},
    "ranks and scales by layer": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1": 5.0}},
    "biases": {"bias": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stacked", [False, True])
def test_values_and_gradients_are_those_of_each_layer(
    base: ft.Base, config: str, stacked: bool, monkeypatch: pytest.MonkeyPatch
):
    linear = ft.LinearAdapterConfig(r=2, alpha=3.0, **CONFIGS[config])
    all_of_them = finetunes(base, 3, adapt_layers=PROJECTIONS, plain_layers=(), linear_config=linear)
    tuned = ft.stack(all_of_them) if stacked else all_of_them[0]
    batch = ids(3, 2, 5) if stacked else ids(2, 5)

    def loss(tuned: ft.Finetuned) -> Tensor:
        return ft.causal_lm_loss(base, tuned, batch)

    differentiate = ft.stacked_value_and_grad(loss) if stacked else ft.value_and_grad(loss)
    found = differentiate(tuned)
    with monkeypatch.context() as patch:
        each_by_itself(patch)
        expected = differentiate(tuned)
    assert_equal(found, expected)
    halved = tuned.replace(params={name: leaf / 2 for name, leaf in tuned.params.items()})
    assert not torch.equal(differentiate(halved)[0], expected[0])


@pytest.mark.parametrize("transform", ["hessian-vector product", "per-sample gradients", "forward mode"])
def test_in_transforms(base: ft.Base, transform: str, monkeypatch: pytest.MonkeyPatch):
    tuned = finetunes(base, 1, adapt_layers=PROJECTIONS, plain_layers=())[0]
    batch, params = ids(3, 1, 5), dict(tuned.params)

    def loss(params: dict[str, Tensor], one: Tensor) -> Tensor:
        return ft.apply(base, tuned.replace(params=params), one).logits.float().square().mean()

    def run() -> Any:
        if transform == "per-sample gradients":
            return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, batch)
        function: Callable[..., Any] = lambda params: loss(params, batch[0])  # noqa: E731
        if transform == "forward mode":
            return torch.func.jvp(function, (params,), (params,))
        return torch.func.jvp(torch.func.grad(function), (params,), (params,))

    found = run()
    each_by_itself(monkeypatch)
    expected = run()
    assert_equal(found, expected)
    assert any(leaf.abs().max() > 0 for leaf in torch_pytree.tree_leaves(expected))


def leaves_of(base: ft.Base, tuned: ft.Finetuned) -> dict[str, Tensor]:
    return {**base.params, **tuned.params, **tuned.consts}


def test_what_is_made_ready():
    """Factors within blocks, in the model's dtype and scaled; not the head's, nor those whose scale has another use."""
    base = ft.quantize_base_model(llama().bfloat16(), modules_not_to_quantize=())
    plain = ft.LinearAdapterConfig(r=2, alpha=3.0)
    config = {"q_proj": plain, "v_proj": ft.LinearAdapterConfig(r=2, bias=True), "lm_head": plain}
    tuned = finetunes(base, 1, adapt_layers=["q_proj", "v_proj", "lm_head"], plain_layers=(), linear_config=config)[0]
    leaves = leaves_of(base, tuned)
    ready = ready_factors(base.skeleton, leaves)
    changed = {name for name in leaves if ready.get(name) is not leaves[name]}
    assert changed == {name for name in leaves if "q_proj.lora" in name} and len(changed) == 6  # in two layers
    for name in changed:
        if name.endswith("lora_scale"):
            assert name not in ready
        else:
            scale = leaves[name.replace("lora_b", "lora_scale")] if name.endswith("lora_b") else 1.0
            assert torch.equal(ready[name], (leaves[name] * scale).bfloat16())
    again = ready_factors(base.skeleton, ready)
    assert again.keys() == ready.keys() and all(again[name] is ready[name] for name in ready)


def test_not_under_autocast_nor_in_a_model_without_blocks():
    base = ft.quantize_base_model(llama())
    leaves = leaves_of(base, finetunes(base, 1)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert all(leaf is leaves[name] for name, leaf in ready_factors(base.skeleton, leaves).items())
    tiny = ft.quantize_base_model(Tiny())
    leaves = leaves_of(tiny, finetunes(tiny, 1)[0])
    assert any(name.endswith("lora_scale") for name in leaves) and not tiny.skeleton.blocks
    assert ready_factors(tiny.skeleton, leaves).keys() == leaves.keys()


def test_gpt2s_transposed_layers(monkeypatch: pytest.MonkeyPatch):
    base = ft.quantize_base_model(gpt2())
    tuned = finetunes(base, 1)[0]
    found = ft.apply(base, tuned, ids(2, 5)).logits
    assert not any(name.endswith("c_attn.lora_scale") for name in ready_factors(base.skeleton, leaves_of(base, tuned)))
    each_by_itself(monkeypatch)
    assert torch.equal(found, ft.apply(base, tuned, ids(2, 5)).logits)


def test_fewer_kernels():
    """One product with a scale for all B's of a shape, and one cast for all factors of a shape."""
    base = ft.quantize_base_model(llama(num_hidden_layers=4).bfloat16())
    tuned = finetunes(base, 1, adapt_layers=["q_proj"], plain_layers=())[0]
    ft.apply(base, tuned, ids(2, 5))  # the first call of a kind is watched
    factors = {tuple(leaf.shape) for leaf in tuned.params.values()}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            of_factors = bool(args) and isinstance(args[0], Tensor) and tuple(args[0].shape[-2:]) in factors
            counts[func.overloadpacket.__name__] += of_factors and args[0].dtype == torch.float32
            return func(*args, **(kwargs or {}))

    found = []
    for ready in (True, False):
        counts: collections.Counter[str] = collections.Counter()
        with pytest.MonkeyPatch.context() as patch, Counting():
            if not ready:
                each_by_itself(patch)
            ft.apply(base, tuned, ids(2, 5))
        found.append((counts["mul"], counts["_to_copy"]))
    assert found == [(1, 2), (4, 8)]
