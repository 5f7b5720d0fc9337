"""What is particular to Hugging Face models, beside what the conformance suite sees."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from models import assert_close, assert_trees_equal, finetunes, randomized
from torch import Tensor, nn
from torch.func import grad, vmap

import finetuna_func as ft
from finetuna_func._hf import UnaskedMask, with_mappable_mask


def of_family(name: str) -> nn.Module:
    return next(family for family in FAMILIES if family.name == name).make()


# --- masks


def test_a_mask_that_is_not_asked() -> None:
    mask = torch.ones(2, 4, dtype=torch.long)
    unasked = UnaskedMask(mask)
    assert unasked.ndim == 2 and unasked.shape == mask.shape and unasked.device == mask.device
    assert not torch.all(unasked == 1)  # as transformers asks
    assert torch.equal(unasked[:, -2:].contiguous(), mask[:, -2:])
    assert torch.equal(unasked.to(dtype=torch.bool), mask.bool())


@pytest.mark.parametrize("family", ["Mamba 2", "Jamba", "Qwen3-Next", "ModernBERT"])
def test_masks_without_padding_map(family: str) -> None:
    """All ones: a model may leave such a mask out, and under `vmap` it is there and does nothing."""
    base = ft.quantize_base_model(of_family(family))
    tuned = finetunes(base, 2)
    ids = torch.randint(4, 60, (2, 2, 6), generator=torch.Generator().manual_seed(0))

    def logits(tuned: ft.Finetuned, ids: Tensor, **mask: Tensor) -> Tensor:
        return ft.apply(base, tuned, input_ids=ids, **mask).logits

    expected = torch.stack([logits(t, x) for t, x in zip(tuned, ids, strict=True)])
    mapped = vmap(lambda t, x: logits(t, x, attention_mask=torch.ones_like(x)))(ft.stack(tuned), ids)
    assert_close(mapped, expected, 1e-5, unlike=expected.roll(1, 0))


def test_a_window_is_what_the_model_makes_of_it() -> None:
    module = of_family("ModernBERT")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    made = with_mappable_mask(module, {"attention_mask": mask}, torch.float32)["attention_mask"]
    assert made.keys() == {"full_attention", "sliding_attention"}
    near, far = made["sliding_attention"][0, 0], made["full_attention"][0, 0]
    window = module.config.sliding_window
    for q in range(7):
        for k in range(7):
            assert (far[..., k].max() == 0) == bool(mask[0, k])
            assert (near[q, k] == 0) == (bool(mask[0, k]) and abs(q - k) <= window)


def test_other_kinds_of_layers_are_refused_under_vmap() -> None:
    module = of_family("ModernBERT")
    module.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(NotImplementedError, match=r"has layers of types \['chunked_attention', 'full_attention'\]"):
        with_mappable_mask(module, {"attention_mask": torch.ones(1, 4)}, torch.float32)


# --- attention with a cap on its scores


def test_scores_are_capped() -> None:
    """Some versions of transformers pass by the cap in their fused attention, and the mapped call would not."""
    model: Any = of_family("Gemma 2")
    model.config.attn_logit_softcapping = 0.5
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = 0.5
    fused = copy.deepcopy(model)
    fused.config._attn_implementation = "sdpa"
    base, of_fused = ft.quantize_base_model(model), ft.quantize_base_model(fused)
    ids = torch.arange(12).reshape(2, 6)
    expected, uncapped = (
        ft.apply(base, None, ids).logits,
        ft.apply(ft.quantize_base_model(of_family("Gemma 2")), None, ids),
    )
    assert_close(ft.apply(of_fused, None, ids).logits, expected, 1e-5, unlike=uncapped.logits)
    assert fused.config._attn_implementation == "sdpa"


# --- RWKV


@pytest.mark.parametrize("has_run", [False, True])
def test_rwkv(has_run: bool) -> None:
    """It divides its own weights in place at its first call; a base is never written to."""
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=3, rescale_every=1)
    model = RwkvForCausalLM(RwkvConfig(**sizes)).eval()
    for block in model.rwkv.blocks:
        block.attention.output.weight.data.mul_(50)  # so that the division can be seen
        block.feed_forward.value.weight.data.mul_(50)
    ids = torch.randint(0, 64, (3, 2, 6))
    with torch.no_grad():
        expected = copy.deepcopy(model)(ids[0]).logits
        if has_run:
            model(ids[0])
    base = ft.quantize_base_model(model, modules_not_to_quantize={r".*\.\w+", "head"})
    before = {name: leaf.clone() for name, leaf in base.params.items()}
    tuned = finetunes(base, 3)
    loop = torch.stack([ft.apply(base, t, x).logits for t, x in zip(tuned, ids, strict=True)])
    # The division cancels out but for the norms' epsilon, 1e-5.
    assert_close(ft.apply(base, None, ids[0]).logits, expected, 2e-4, unlike=loop[0])
    assert_close(
        vmap(lambda t, x: ft.apply(base, t, x).logits)(ft.stack(tuned), ids), loop, 1e-5, unlike=loop.roll(1, 0)
    )
    assert_close(ft.apply_stacked(base, ft.stack(tuned), ids).logits, loop, 1e-5, unlike=loop.roll(1, 0))

    def loss(t: ft.Finetuned) -> Tensor:
        return ft.apply(base, t, ids[0]).logits.square().mean()

    lean = ft.value_and_grad(loss)(tuned[0])[1]
    mapped = grad(lambda params: loss(tuned[0].replace(params=params)))(dict(tuned[0].params))
    name = max(lean, key=lambda name: float(lean[name].abs().max()))
    assert_close(mapped[name], lean[name], 1e-5, unlike=torch.zeros_like(lean[name]))
    assert_trees_equal(dict(base.params), before)
    in_8_bits = ft.quantize_base_model(model, modules_not_to_quantize={"head"})
    assert_close(ft.apply(in_8_bits, None, ids[0]).logits, expected, 0.04, unlike=loop[0])


# --- positions that all rows share


class Positions(nn.Module):
    """Positions as a list ``(T,)``, added to every row, as in many small models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pos, self.lm_head = nn.Embedding(20, 8), nn.Embedding(16, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor, label: Tensor | None = None) -> Tensor:
        x = self.embed(ids) + self.pos(torch.arange(ids.shape[1]))
        return self.lm_head(torch.tanh(x if label is None else x + self.embed(label).unsqueeze(1)))


@pytest.mark.parametrize("plain", [(), {"pos"}], ids=["adapted", "plain"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("length", [1, 4, 6, 12])
def test_a_list_of_positions_in_a_stack(plain: Any, labelled: bool, length: int) -> None:
    """Lengths of the batch and of all rows among them; also beside inputs of one number per row."""
    torch.manual_seed(0)
    base = ft.quantize_base_model(Positions())
    chosen = {"plain_layers": plain} if plain else {}
    with pytest.warns(UserWarning, match="dequantized") if plain else torch.no_grad():
        tuned = [randomized(ft.new_finetuned(base, **chosen), i) for i in range(3)]
    ids = torch.randint(0, 20, (3, 2, length))
    extra = (torch.randint(0, 20, (3, 2)),) if labelled else ()
    loop = torch.stack([ft.apply(base, t, ids[i], *(e[i] for e in extra)) for i, t in enumerate(tuned)])
    assert_close(ft.apply_stacked(base, ft.stack(tuned), ids, *extra), loop, 1e-5, unlike=loop.roll(1, 0))


def test_a_list_for_a_linear_layer_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(x + self.fc(torch.ones(8)))

    base = ft.quantize_base_model(Shared())
    with pytest.raises(ValueError, match="the model shares it"):
        ft.apply_stacked(base, ft.stack(finetunes(base, 3)), torch.randn(3, 2, 8))


def test_t5_has_a_bias_per_finetune_in_a_stack() -> None:
    """Only the table of relative positions is adapted, plain or left alone, and rows do not mix."""
    base = ft.quantize_base_model(of_family("T5"))
    ids = torch.randint(4, 60, (3, 2, 6), generator=torch.Generator().manual_seed(0))
    for arguments in (
        dict(adapt_layers={"relative_attention_bias"}, plain_layers=()),
        dict(adapt_layers={"q"}, plain_layers=()),
    ):
        tuned = finetunes(base, 3, **arguments)
        loop = torch.stack(
            [ft.apply(base, t, input_ids=x, decoder_input_ids=x).logits for t, x in zip(tuned, ids, strict=True)]
        )
        out = ft.apply_stacked(base, ft.stack(tuned), input_ids=ids, decoder_input_ids=ids).logits
        assert_close(out, loop, 2e-5, unlike=loop.roll(1, 0))
