"""What layers share in a call, and what attention is told."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from models import assert_close, llama, randomized
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MistralConfig

import finetuna_func as ft
from finetuna_func import _functional, _hf, _layers

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


@pytest.fixture(scope="module")
def base() -> ft.Base:
    torch.manual_seed(0)
    return ft.quantize_base_model(llama())


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(0))


def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many A's each first product of an adapter has taken together, in order."""
    counts: list[int] = []
    real = _layers._on_top

    def counted(factors: list[Tensor]) -> Any:
        counts.append(len(factors))
        return real(factors)

    monkeypatch.setattr(_layers, "_on_top", counted)
    return counts


@pytest.mark.parametrize("stacked", [False, True])
def test_layers_with_one_input_share_a_product(base, monkeypatch, stacked):
    ranks = {"k_proj": 3, "up_proj": 5}  # parts of different width
    config = ft.LinearAdapterConfig(r=2, alpha=3, rank_pattern=ranks)
    one, two = (randomized(ft.new_finetuned(base, PROJECTIONS, (), linear_config=config), seed) for seed in (0, 1))
    tuned: Any = ft.stack([one, two]) if stacked else one
    ids = tokens(2, 1, 5) if stacked else tokens(1, 5)
    run = ft.apply_stacked if stacked else ft.apply

    def loss(tuned: ft.Finetuned) -> Tensor:
        return run(base, tuned, ids).logits.square().mean((1, 2, 3) if stacked else None)

    differentiate = ft.stacked_value_and_grad if stacked else ft.value_and_grad
    run(base, tuned, ids)  # the first call of a kind is watched
    counts = products(monkeypatch)
    shared = differentiate(loss)(tuned)
    assert sorted(set(counts)) == [2, 3] and len(counts) == 2 * len(base.skeleton.blocks)
    counts.clear()
    monkeypatch.setattr(_layers, "_stack_up", lambda *_: False)
    alone = differentiate(loss)(tuned)
    assert set(counts) == {1} and len(counts) == 5 * len(base.skeleton.blocks)
    assert_close(shared[0], alone[0], 1e-6, unlike=alone[0] * 1.01)
    for name, expected in alone[1].items():
        assert_close(shared[1][name], expected, 1e-5, unlike=expected.roll(1, -1) + expected.abs().max())


def test_a_sibling_with_another_input_or_dropout_computes_its_own(monkeypatch):
    class Cross(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.q_proj(x) + 2 * self.k_proj(memory) + 3 * self.v_proj(memory)

    torch.manual_seed(0)
    model = Cross()
    base = ft.quantize_base_model(model)
    tuned = randomized(ft.new_finetuned(base, plain_layers=()))
    x, memory = torch.randn(4, 6), torch.randn(4, 6)
    merged = ft.merge(base, tuned)
    expected = torch.func.functional_call(model, dict(merged), (x, memory))
    assert_close(ft.apply(base, tuned, x, memory), expected, 1e-5, unlike=ft.apply(base, tuned, x, x))
    dropping = ft.new_finetuned(base, plain_layers=(), linear_config=ft.LinearAdapterConfig(dropout=0.5))
    counts = products(monkeypatch)
    ft.apply(base, dropping, x, x, train=True, rng=ft.random.key(0))
    assert counts == [1, 1, 1]


FAMILIES = sorted({name.split(".")[2] for name in _hf._CAUSAL_BODIES})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_causal_mask_changes_nothing(family, monkeypatch):
    from transformers import AutoConfig

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    if getattr(config, "sliding_window", None):
        config.sliding_window = None
    torch.manual_seed(0)
    base = ft.quantize_base_model(AutoModelForCausalLM.from_config(config).eval())
    ids = tokens(2, 7)
    given: list[bool] = []
    real = _hf.causal_mask

    def spy(*args: Any) -> Tensor | None:
        mask = real(*args)
        given.append(mask is not None)
        return mask

    monkeypatch.setattr(_functional, "causal_mask", spy)
    with_it = ft.apply(base, None, ids).logits
    assert given and all(given)
    monkeypatch.setattr(_functional, "causal_mask", lambda *_: None)
    without = ft.apply(base, None, ids).logits
    assert torch.equal(with_it, without)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 16
    later = ft.apply(base, None, changed).logits
    assert_close(later[:, :-1], without[:, :-1], 1e-5, unlike=later[:, 1:])  # experts get other rows together
    assert (later[:, -1] - without[:, -1]).abs().max() > 1e-2 * without.abs().max()


def test_the_causal_mask_is_for_plain_causal_attention_alone(base):
    module = base.skeleton.module()
    ids = tokens(2, 5)
    assert _hf.causal_mask(module, (ids,), {}) is not None
    assert _hf.causal_mask(module, (), {"input_ids": ids, "attention_mask": None}) is not None
    for inputs in (
        {"attention_mask": torch.ones_like(ids)},
        {"position_ids": ids},
        {"past_key_values": object()},
        {"use_cache": True},
        {"inputs_embeds": torch.zeros(2, 5, 4)},
    ):
        assert _hf.causal_mask(module, (ids,), inputs) is None
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    windowed = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=3)
    model = AutoModelForCausalLM.from_config(windowed).eval()
    windows = ft.quantize_base_model(model)
    assert _hf.causal_mask(windows.skeleton.module(), (ids,), {}) is None


# --- how many kernels a layer starts


class Kernels(TorchDispatchMode):
    """Counts operators that compute something."""

    VIEWS = frozenset(
        {"view", "_unsafe_view", "transpose", "t", "split_with_sizes", "detach", "alias", "permute", "unsqueeze"}
        | {"expand", "empty_like"}
    )

    def __enter__(self) -> collections.Counter[str]:  # type: ignore[override]
        super().__enter__()
        self.found: collections.Counter[str] = collections.Counter()
        return self.found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.found[name] += name not in self.VIEWS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", [None, 3])
def test_kernels_of_layers_that_share_their_input(n: int | None):
    """In bfloat16: the factors are cast once each, the A's of all layers together, and the last sum is in a product.

    A single finetune has fewer rows here than the weights have columns: the codes are cast and the result is scaled.
    With more, of three finetunes, the weights are dequantized at once.
    """

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q_proj(x), self.k_proj(x)], -1)

    torch.manual_seed(0)
    base = ft.quantize_base_model(Two().bfloat16())
    tuned = [randomized(ft.new_finetuned(base), seed=i) for i in range(n or 1)]
    x = torch.randn(*(() if n is None else (n,)), 5, 8).bfloat16()

    def run() -> Tensor:
        return ft.apply(base, tuned[0], x) if n is None else ft.apply_stacked(base, ft.stack(tuned), x)

    with torch.no_grad():
        run()
        with Kernels() as all_kernels:
            run()
        if n is not None:
            with Kernels() as stacking:
                ft.stack(tuned)
            all_kernels -= stacking
    single = {"_to_copy": 2 + 1 + 2, "mul": 2, "mul_": 2, "mm": 3, "addmm_": 2, "cat": 2}
    stacked = {"_to_copy": 1 + 2, "mul": 2 + 2, "mm": 2, "bmm": 1, "baddbmm_": 2, "cat": 2}
    assert +all_kernels == collections.Counter(single if n is None else stacked)


def test_a_scale_is_applied_before_rounding():
    """To B in float32: a scale of 1/3 costs no rounding of its own."""
    torch.manual_seed(0)
    base = ft.quantize_base_model(nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16())
    config = ft.LinearAdapterConfig(r=3, alpha=1.0)
    tuned = randomized(ft.new_finetuned(base, linear_config=config), seed=0, scale=1.0)
    folded = tuned.replace(
        params={name: leaf / 3 if name.endswith("lora_b") else leaf for name, leaf in tuned.params.items()},
        consts={name: torch.ones_like(leaf) for name, leaf in tuned.consts.items()},
    )
    x = torch.randn(7, 64).bfloat16()
    assert (ft.apply(base, tuned, x) - ft.apply(base, folded, x)).abs().max() <= 2**-8 * ft.apply(
        base, folded, x
    ).abs().max()
    assert not torch.equal(ft.apply(base, tuned, x), ft.apply(base, None, x))
