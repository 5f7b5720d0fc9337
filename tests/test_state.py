"""State dicts, merging into float weights, and ordinary modules on the same storage."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from models import (
    HF_MODELS,
    Everything,
    Mlp,
    TiedLm,
    Tiny,
    assert_close,
    assert_same_finetune,
    assert_trees_equal,
    assert_unchanged,
    finetunes,
    hf_inputs,
    llama,
    randomized,
    snapshot,
    twin,
)
from torch import nn

import finetuna_func as ft
from finetuna_func import LinearAdapterConfig

FP32 = 1e-5


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Everything().eval()


@pytest.fixture(scope="module")
def base(model):
    return ft.quantize_base_model(model)


@pytest.fixture(scope="module")
def tuned(base):
    return finetunes(base, 1, linear_config=LinearAdapterConfig(r=2, dropout=0.1))[0]


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 12, shape or (2, 5), generator=torch.Generator().manual_seed(0))


# --- state_dict and load_state_dict


def test_state_dict_is_what_changed(base, tuned):
    state = ft.state_dict(tuned)
    assert state.keys() == tuned.params.keys() | tuned.consts.keys()
    assert all(state[name] is leaf for name, leaf in {**tuned.params, **tuned.consts}.items())
    assert not any(name in state for name in ("fc1.weight", "norm.weight", "fc1.weight_scale"))


def test_the_full_state(base, tuned):
    full = ft.state_dict(tuned, base=base)
    assert full.keys() == base.params.keys() | ft.state_dict(tuned).keys()
    assert full["fc1.weight"] is base.params["fc1.weight"]
    assert full["lm_head.weight"] is tuned.params["lm_head.weight"]  # the trained copy, not the base's


def test_round_trips(base, tuned):
    fresh = ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=2, dropout=0.1))
    for state in (ft.state_dict(tuned), ft.state_dict(tuned, base=base)):
        loaded = ft.load_state_dict(base, fresh, state)
        assert_same_finetune(loaded, tuned)
        assert not torch.equal(fresh.params["fc1.lora_a"], tuned.params["fc1.lora_a"])
    stacked = ft.stack(finetunes(base, 2))
    assert_same_finetune(
        ft.load_state_dict(base, ft.stack(finetunes(base, 2, scale=1.0)), ft.state_dict(stacked)), stacked
    )


def test_round_trip_through_torch_save(base, tuned, tmp_path):
    torch.save(ft.state_dict(tuned), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert_same_finetune(ft.load_state_dict(base, tuned, state), tuned)


def test_loading_changes_nothing(base, tuned):
    fresh = ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=2, dropout=0.1))
    before = snapshot(fresh), snapshot(tuned), snapshot(base)
    ft.load_state_dict(base, fresh, ft.state_dict(tuned, base=base))
    for value, old in zip((fresh, tuned, base), before, strict=True):
        assert_unchanged(value, old)


def test_parameters_of_a_state_dict_are_detached(base, tuned):
    state = {name: nn.Parameter(leaf) for name, leaf in ft.state_dict(tuned).items()}
    assert not any(leaf.requires_grad for leaf in ft.load_state_dict(base, tuned, state).params.values())


def message_of(kind, *args, **kwargs) -> str:
    with pytest.raises(kind) as error:
        ft.load_state_dict(*args, **kwargs)
    return str(error.value)


def test_strict(base, tuned):
    state = ft.state_dict(tuned)
    some = {name: leaf for name, leaf in state.items() if "fc1" not in name}
    assert message_of(ValueError, base, tuned, some) == (
        "load_state_dict: 4 names missing ['fc1.lora_a', 'fc1.lora_b', 'fc1.lora_dropout', 'fc1.lora_scale'], "
        "0 unknown []. Pass strict=False to load what fits."
    )
    more = {**state, "fc1.lora_c": torch.ones(1), "x": torch.ones(1)}
    message = message_of(ValueError, base, tuned, more)
    assert message.startswith(
        "load_state_dict: 0 names missing [], 2 unknown ['fc1.lora_c', 'x']. Did you mean 'fc1.lora_"
    )
    assert message.endswith("Pass strict=False to load what fits.")
    fresh = ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=2, dropout=0.1))
    loaded = ft.load_state_dict(base, fresh, {**some, "x": torch.ones(1)}, strict=False)
    for name, leaf in loaded.params.items():
        source = fresh if "fc1" in name else tuned
        assert torch.equal(leaf, source.params[name]), name
    assert_same_finetune(ft.load_state_dict(base, fresh, {}, strict=False), fresh)


def test_shapes_and_dtypes(base, tuned):
    state = ft.state_dict(tuned)
    for strict in (True, False):
        wide = {**state, "fc1.lora_a": torch.zeros(3, 8)}
        assert message_of(ValueError, base, tuned, wide, strict=strict) == (
            "load_state_dict: fc1.lora_a has shape (3, 8), expected (2, 8); was it saved with another rank or layer?"
        )
        low = {**state, "fc1.lora_a": state["fc1.lora_a"].bfloat16()}
        assert message_of(TypeError, base, tuned, low, strict=strict) == (
            "load_state_dict: fc1.lora_a is torch.bfloat16, expected torch.float32; convert it with .to(torch.float32)."
        )


def test_a_wrong_base(base, tuned):
    torch.manual_seed(9)
    other = ft.quantize_base_model(Everything())
    with pytest.raises(ValueError, match=re.escape(f"belongs to base {base.fingerprint!r}")):
        ft.state_dict(tuned, base=other)
    with pytest.raises(ValueError, match=re.escape(f"belongs to base {base.fingerprint!r}")):
        ft.load_state_dict(other, tuned, ft.state_dict(tuned))
    theirs = ft.new_finetuned(other, linear_config=LinearAdapterConfig(r=2, dropout=0.1))
    full = ft.state_dict(tuned, base=base)
    assert message_of(ValueError, other, theirs, full) == (
        f"load_state_dict: conv.bias differs from that of base {other.fingerprint!r}; this full state was saved on "
        "another base."
    )
    changed = {**full, "norm.weight": full["norm.weight"][:-1]}
    assert "norm.weight differs from that of base" in message_of(ValueError, base, tuned, changed)


# --- merge


def load_merged(model: nn.Module, merged: dict[str, torch.Tensor], *, untie: bool = False) -> nn.Module:
    other = copy.deepcopy(model).eval()
    if untie:
        other.lm_head.weight = nn.Parameter(other.lm_head.weight.detach().clone())
    other.load_state_dict(merged)
    return other


@pytest.mark.parametrize("model_class", [Everything, Tiny, Mlp])
@pytest.mark.parametrize("scheme", ["int8", "blockwise8", "nf4"])
def test_merged_computes_what_the_finetune_computes(model_class, scheme, seed):
    model = model_class().eval()
    base = ft.quantize_base_model(model, scheme=scheme)
    tuned = finetunes(base, 1)[0]
    x = torch.randn(3, 6) if model_class is Mlp else ids()
    merged = ft.merge(base, tuned)
    assert merged.keys() == model.state_dict().keys()
    for name, leaf in model.state_dict().items():
        assert merged[name].dtype == leaf.dtype and merged[name].shape == leaf.shape, name
    other = load_merged(model, merged)
    assert_close(other(x), ft.apply(base, tuned, x), FP32, unlike=ft.apply(base, None, x))
    plain = load_merged(model, ft.merge(base, None))
    assert_close(plain(x), ft.apply(base, None, x), FP32, unlike=model(x))


@pytest.mark.parametrize("name", HF_MODELS)
def test_hugging_face_models(name):
    model = HF_MODELS[name]()
    base = ft.quantize_base_model(model)
    head = {} if name in ("llama", "t5") else {"plain_layers": ()}
    tuned = finetunes(base, 1, **head)[0]
    inputs = hf_inputs(name, ids())
    merged = ft.merge(base, tuned)
    assert all(leaf.is_contiguous() for leaf in merged.values())
    with torch.no_grad():
        other = load_merged(model, merged, untie=name == "t5")
        mine = ft.apply(base, tuned, **inputs).logits
        assert_close(other(**inputs).logits, mine, FP32, unlike=ft.apply(base, None, **inputs).logits)


def test_adapter_biases_merge(model, base):
    tuned = finetunes(base, 1, adapt_layers={"fc1"}, linear_config=LinearAdapterConfig(bias=True))[0]
    other = load_merged(model, ft.merge(base, tuned))
    without = tuned.replace(params={**tuned.params, "fc1.lora_bias": torch.zeros(16)})
    unlike = ft.apply(base, without, ids())
    assert_close(other(ids()), ft.apply(base, tuned, ids()), FP32, unlike=unlike)
    nowhere = finetunes(base, 1, adapt_layers={"fc2"}, linear_config=LinearAdapterConfig(bias=True))[0]
    with pytest.raises(ValueError) as error:
        ft.merge(base, nowhere)
    assert str(error.value) == (
        "merge: the adapter of 'fc2' has a bias (LinearAdapterConfig(bias=True)) but the layer has none to merge it "
        "into; keep the adapter separate, or train with bias=False."
    )


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.filterwarnings("ignore:plain_layers")
def test_tied_weights(head_first, seed):
    model = TiedLm(head_first=head_first).eval()
    base = ft.quantize_base_model(model, modules_not_to_quantize=())
    # The table is adapted and the head follows: still one matrix
    tuned = finetunes(base, 1, plain_layers=())[0]
    merged = ft.merge(base, tuned)
    assert merged["embed.weight"].data_ptr() == merged["lm_head.weight"].data_ptr()
    out = ft.apply(base, tuned, ids())
    assert_close(load_merged(model, merged)(ids()), out, FP32, unlike=ft.apply(base, None, ids()))
    # Nothing is adapted: one matrix too
    frozen = ft.merge(base, None)
    assert frozen["embed.weight"].data_ptr() == frozen["lm_head.weight"].data_ptr()
    # The head is plain, or adapted on its own: two matrices
    for arguments in ({"plain_layers": {"lm_head"}}, {"adapt_layers": {"lm_head"}, "plain_layers": ()}):
        tuned = finetunes(base, 1, **arguments)[0]
        merged = ft.merge(base, tuned)
        assert not torch.equal(merged["embed.weight"], merged["lm_head.weight"])
        out = ft.apply(base, tuned, ids())
        mine = load_merged(model, merged, untie=True)(ids())
        assert_close(mine, out, FP32, unlike=ft.apply(base, None, ids()))


def test_quantized_later(model):
    base = ft.quantize_base_model(model, modules_not_to_quantize={"fc1", "lm_head"})
    tuned = finetunes(base, 1, plain_layers=(), modules_not_to_quantize=())[0]
    assert tuned.spec.quantized == ("fc1", "lm_head")
    merged = ft.merge(base, tuned)
    out = ft.apply(base, tuned, ids())
    assert_close(load_merged(model, merged)(ids()), out, FP32, unlike=ft.apply(base, None, ids()))
    assert_close(ft.to_module(base, tuned)(ids()), out, 1e-6, unlike=ft.apply(base, None, ids()))


def test_trained_beside_an_adapter(model):
    base = ft.quantize_base_model(model, modules_not_to_quantize={"fc1"})
    tuned = finetunes(base, 1, modules_not_to_freeze={"fc1", "norm"})[0]
    out = ft.apply(base, tuned, ids())
    assert_close(load_merged(model, ft.merge(base, tuned))(ids()), out, FP32, unlike=ft.apply(base, None, ids()))


def test_a_module_under_two_names(seed):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = nn.Sequential(self.a)
            self.norm = self.norm2 = nn.LayerNorm(6)

        def forward(self, x):
            return self.norm2(self.b(torch.tanh(self.norm(self.a(x)))))

    model = Shared()
    base = ft.quantize_base_model(model)
    tuned = finetunes(base, 1, adapt_layers={"a"}, plain_layers={"norm"})[0]
    x = torch.randn(4, 6)
    merged = ft.merge(base, tuned)
    assert merged.keys() == model.state_dict().keys()
    out = ft.apply(base, tuned, x)
    assert_close(load_merged(model, merged)(x), out, FP32, unlike=ft.apply(base, None, x))
    assert_close(ft.to_module(base, tuned)(x), out, 1e-6, unlike=ft.apply(base, None, x))


def test_a_model_that_is_one_layer(seed):
    model = nn.Linear(6, 4)
    base = ft.quantize_base_model(model)
    tuned = finetunes(base, 1)[0]
    x = torch.randn(3, 6)
    out = ft.apply(base, tuned, x)
    assert_close(load_merged(model, ft.merge(base, tuned))(x), out, FP32, unlike=model(x))
    assert_close(ft.to_module(base, tuned)(x), out, 1e-6, unlike=model(x))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # One rounding of every weight (2**-8, 2**-11) beside those of the forward, about ten layers deep.
    [(torch.float64, 1e-12), (torch.bfloat16, 0.06), (torch.float16, 0.01)],
)
def test_dtypes(dtype, tolerance, seed):
    model = Everything().eval().to(dtype)
    base = ft.quantize_base_model(model)
    tuned = finetunes(base, 1)[0]
    merged = ft.merge(base, tuned)
    assert all(leaf.dtype == dtype for leaf in merged.values())
    out = ft.apply(base, tuned, ids())
    assert_close(load_merged(model, merged)(ids()), out, tolerance, unlike=-ft.apply(base, None, ids()))
    # Rounded once: the merged weight is the float64 one, rounded
    exact = twin(copy.deepcopy(model).double(), base, tuned).fc1.weight
    unit = {torch.float64: 2.0**-50, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert ((merged["fc1.weight"].double() - exact).abs() <= 1.01 * unit * exact.abs() + 1e-6 * exact.abs().max()).all()


def test_another_dtype_on_request(model, base, tuned):
    merged = ft.merge(base, tuned, dtype=torch.bfloat16)
    assert all(leaf.dtype == torch.bfloat16 for leaf in merged.values() if leaf.is_floating_point())
    exact = ft.merge(base, tuned)
    assert_trees_equal({n: leaf.bfloat16() for n, leaf in exact.items()}, merged)
    double = ft.merge(base, tuned, dtype=torch.float64)
    assert double["fc1.weight"].dtype == torch.float64


def test_integer_buffers_keep_their_dtype():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.bn(self.fc(x))

    model = Counted().eval()
    base = ft.quantize_base_model(model)
    merged = ft.merge(base, None, dtype=torch.bfloat16)
    assert merged["bn.num_batches_tracked"].dtype == torch.int64 and merged["bn.running_var"].dtype == torch.bfloat16


def test_merge_gives_copies(model, base, tuned):
    before = snapshot(base), snapshot(tuned)
    merged = ft.merge(base, tuned)
    pointers = {leaf.data_ptr() for leaf in (*base.params.values(), *tuned.params.values())}
    assert not pointers & {leaf.data_ptr() for leaf in merged.values()}
    for leaf in merged.values():
        leaf.zero_()
    assert_unchanged(base, before[0])
    assert_unchanged(tuned, before[1])


def test_errors_of_merge_and_to_module(base, tuned):
    stacked = ft.stack([tuned, tuned])
    for name, function in (("merge", ft.merge), ("to_module", ft.to_module)):
        with pytest.raises(ValueError) as error:
            function(base, stacked)
        assert str(error.value) == f"{name}: expected one finetune, got a stack; pass ft.index(stacked, i)."
        torch.manual_seed(5)
        other = ft.quantize_base_model(Everything())
        with pytest.raises(ValueError, match=re.escape(f"belongs to base {base.fingerprint!r}")):
            function(other, tuned)
    assert ft.merge(base, ft.index(stacked, 1)).keys() == ft.merge(base, tuned).keys()


def test_ranks_of_a_stack_merge_alike(base):
    tuned = [randomized(ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=r)), r) for r in (1, 4)]
    for one, again in zip(tuned, ft.unstack(ft.stack(tuned)), strict=True):
        assert_trees_equal(ft.merge(base, again), ft.merge(base, one))


# --- to_module


def test_to_module_computes_the_same_on_the_same_storage(model, base, tuned):
    module = ft.to_module(base, tuned)
    assert isinstance(module, Everything) and not module.training
    out = ft.apply(base, tuned, ids())
    assert_close(module(ids()), out, 1e-6, unlike=ft.apply(base, None, ids()))
    pointers = {leaf.data_ptr() for leaf in (*base.params.values(), *tuned.params.values(), *tuned.consts.values())}
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert {leaf.data_ptr() for leaf in tensors.values()} <= pointers
    assert not any(leaf.requires_grad for leaf in tensors.values())
    assert tensors["fc1.weight"].data_ptr() == base.params["fc1.weight"].data_ptr()
    assert tensors["lm_head.weight"].data_ptr() == tuned.params["lm_head.weight"].data_ptr()
    assert_close(ft.to_module(base, None)(ids()), ft.apply(base, None, ids()), 1e-6, unlike=out)


def test_modules_are_independent(base):
    one, two = finetunes(base, 2)
    modules = [ft.to_module(base, t) for t in (one, two, None)]
    outs = [m(ids()) for m in modules]
    for t, out in zip((one, two, None), outs, strict=True):
        assert torch.equal(out, ft.apply(base, t, ids()))
    assert not torch.equal(outs[0], outs[1])
    assert torch.equal(modules[0](ids()), outs[0])


def test_to_module_keeps_ties():
    base = ft.quantize_base_model(TiedLm(), modules_not_to_quantize=())
    tuned = finetunes(base, 1, plain_layers=())[0]
    module = ft.to_module(base, tuned)
    named = dict(module.named_parameters(remove_duplicate=False))
    assert named["lm_head.weight"] is named["embed.weight"] and named["embed.weight"].dtype == torch.int8
    assert torch.equal(module(ids()), ft.apply(base, tuned, ids()))


def test_generate():
    model = llama()
    base = ft.quantize_base_model(model)
    tuned = finetunes(base, 2)
    prompt = ids(1, 4) + 1  # 0 is padding
    texts = []
    for t in (*tuned, None):
        module = ft.to_module(base, t)
        assert module.config.use_cache is True
        with torch.no_grad():
            out = module.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
            slow = module.generate(
                prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=False
            )
        x = prompt
        for _ in range(6):
            x = torch.cat([x, ft.apply(base, t, x).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(out, x) and torch.equal(slow, x)
        texts.append(out)
    assert not torch.equal(texts[0], texts[1])


def test_the_modules_state_dict_is_the_full_state(base, tuned):
    module = ft.to_module(base, tuned)
    state = module.state_dict()
    full = ft.state_dict(tuned, base=base)
    assert {name: leaf.data_ptr() for name, leaf in state.items()} == {
        name: leaf.data_ptr() for name, leaf in full.items() if name != "temperature"
    }
    assert_same_finetune(ft.load_state_dict(base, tuned, state), tuned)


def test_a_copy_of_the_module_may_be_changed(base, tuned):
    before = snapshot(base)
    module = copy.deepcopy(ft.to_module(base, tuned))
    with torch.no_grad():
        for leaf in [*module.parameters(), *module.buffers()]:
            leaf.zero_()
    assert_unchanged(base, before)
    assert not module(ids()).any() or module(ids()).isnan().any()
