"""Models that others have prepared: layers already in 8 bits by bitsandbytes, and accelerate's placement."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from models import assert_close, llama, randomized
from torch import Tensor, nn

import finetuna_func as ft

IDS = torch.arange(12).reshape(2, 6)


def linear8bit(layer: nn.Linear) -> Any:
    made: Any = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False, threshold=0.0
    )
    made.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to("cpu")  # which quantizes it


class Words(nn.Module):
    """A table, a layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.fc = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 16, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.fc(self.table(ids))))


@pytest.fixture
def floats() -> Words:
    torch.manual_seed(0)
    return Words().eval()


@pytest.fixture
def taken(floats: Words) -> Words:
    """The same model with its layer and its table in bitsandbytes' 8 bits."""
    model = copy.deepcopy(floats)
    model.fc = linear8bit(floats.fc)
    table = bnb.nn.Embedding8bit(16, 8)
    table.weight = bnb.nn.Int8Params(floats.table.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    model.table = table.to("cpu")
    return model


def test_the_codes_are_taken_over_without_a_rounding(floats, taken):
    codes = {"fc": taken.fc.weight.data.clone(), "table": taken.table.weight.data.clone()}
    base = ft.quantize_base_model(taken)
    for path, own in codes.items():
        assert base.params[f"{path}.weight"].dtype == torch.int8
        assert torch.equal(base.params[f"{path}.weight"], own)
        scale = getattr(taken, path).weight.SCB
        assert torch.equal(base.params[f"{path}.weight_scale"], scale.float() / 127)
        # Copies: bitsandbytes' module goes on living, and is what it was.
        assert base.params[f"{path}.weight"].data_ptr() != getattr(taken, path).weight.data_ptr()
        assert torch.equal(getattr(taken, path).weight.data, own) and type(getattr(taken, path)) is not nn.Linear
    # As from the float model, but that bitsandbytes rounds the weights to float16 before: 2**-11, and a code by one.
    again = ft.quantize_base_model(floats)
    for path in codes:
        name = f"{path}.weight"
        scales = [each.params[f"{name}_scale"] for each in (base, again)]
        assert ((scales[0] / scales[1] - 1).abs() <= 2**-11 * (1 + 1e-3)).all()
        assert (base.params[name].int() - again.params[name].int()).abs().max() <= 1
        assert (base.params[name].int() - again.params[name].int().roll(1, 0)).abs().max() > 20


def test_the_base_computes_with_the_dequantized_weights(floats, taken):
    base = ft.quantize_base_model(taken)
    weights = {
        path: getattr(taken, path).weight.data.float() * getattr(taken, path).weight.SCB.unsqueeze(-1) / 127
        for path in ("fc", "table")
    }
    hidden = torch.tanh(F.linear(weights["table"][IDS], weights["fc"], floats.fc.bias))
    assert_close(ft.apply(base, None, IDS), floats.lm_head(hidden), 1e-6, unlike=floats(IDS))


def test_finetunes_train_on_it_under_every_route(taken):
    base = ft.quantize_base_model(taken)
    one, two = (randomized(ft.new_finetuned(base, plain_layers=()), seed) for seed in (0, 1))
    assert {a.path for a in one.spec.adapters} == {"fc", "table", "lm_head"}
    ids = torch.stack([IDS, IDS + 2])
    losses, grads = ft.stacked_value_and_grad(lambda s, i: ft.apply_stacked(base, s, i).square().mean((1, 2, 3)))(
        ft.stack([one, two]), ids
    )
    for k, tuned in enumerate((one, two)):
        loss, own = ft.value_and_grad(lambda t, i: ft.apply(base, t, i).square().mean())(tuned, ids[k])
        assert_close(losses[k : k + 1], loss.reshape(1), 1e-6, unlike=losses[1 - k : 2 - k])
        for name, leaf in own.items():
            assert_close(grads[name][k], leaf, 1e-5, unlike=grads[name][1 - k])
            assert leaf.abs().max() > 0


def test_the_skeleton_holds_no_numbers(taken):
    base = ft.quantize_base_model(taken)
    for module in base.skeleton.module().modules():
        for value in vars(module).values():
            assert not isinstance(value, dict) or not any(
                isinstance(leaf, Tensor) and not leaf.is_meta for leaf in value.values()
            )


def test_layers_in_8_bits_cannot_be_kept_in_float(taken):
    with pytest.raises(ValueError, match=r"\['fc'\] are in 8 bits already"):
        ft.quantize_base_model(taken, modules_not_to_quantize={"fc"})
    fresh = nn.Sequential(bnb.nn.Linear8bitLt(4, 4, has_fp16_weights=False))
    with pytest.raises(ValueError, match="is not quantized yet"):
        ft.quantize_base_model(fresh)


def test_transformers_own_8_bit_models(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    float_model = llama()
    float_model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    base = ft.quantize_base_model(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert base.params[name].dtype == torch.int8
    assert torch.equal(base.params[name], model.get_parameter(name).data)
    ours = ft.apply(ft.quantize_base_model(float_model), None, IDS).logits
    # Norms and embeddings of the loaded model are in float16 or bfloat16: 2**-8, and some roundings of it.
    error = (ft.apply(base, None, IDS).logits.float() - ours).abs().max() / ours.abs().max()
    assert error < 0.05 < (ours - ours.roll(1, -1)).abs().max() / ours.abs().max()


def test_a_model_placed_on_one_device_by_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="transformers' device_map needs it")
    plain, placed = llama(), llama()
    accelerate.dispatch_model(placed, device_map={"": "cpu"}, force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in placed.modules())
    base, expected = ft.quantize_base_model(placed), ft.quantize_base_model(plain)
    assert base.fingerprint == expected.fingerprint and base.params.keys() == expected.params.keys()
    assert any(hasattr(module, "_hf_hook") for module in placed.modules())  # the user's model keeps its hooks
    tuned = randomized(ft.new_finetuned(base))
    out = ft.apply(base, tuned, IDS).logits
    assert torch.equal(out, ft.apply(expected, tuned, IDS).logits)
    assert not torch.equal(out, ft.apply(base, None, IDS).logits)
    assert torch.equal(placed(IDS).logits, plain(IDS).logits)


def test_a_model_loaded_with_a_device_map(tmp_path):
    pytest.importorskip("accelerate", reason="transformers' device_map needs it")
    from transformers import AutoModelForCausalLM

    model = llama()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert ft.quantize_base_model(loaded).fingerprint == ft.quantize_base_model(model).fingerprint
    other = llama(seed=1)
    assert ft.quantize_base_model(other).fingerprint != ft.quantize_base_model(model).fingerprint
