"""Mixtures of experts: fused 3-D parameters taken apart into a layer per expert and matrix.

    experts.gate_up_proj (E, out, in)  ->  experts.gate_up_proj.0.weight ... experts.gate_up_proj.E-1.weight

Classes are named, not imported. Those listed share one forward, up to how their weights lie and how gate
and up are combined; a test compares it with the sources of the installed transformers. Experts of other classes
stay in float.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetuna_func._layers import Binding, inside_vmap, layer_type
from finetuna_func._types import WeightForm
from finetuna_func._unpack import Packing, Unpacked, linear_on, register_unpacker


@dataclass(frozen=True)
class ExpertsLayout:
    """How a class of experts keeps its weights.

    Attributes:
        first: Name of the parameter before the gate; ``down_proj`` comes after it.
        transposed: Whether the matrices are stored as ``(in, out)``.
        sorted: Whether the inputs come expert by expert, ``(E * tokens, d)``, all tokens to each.
    """

    first: str = "gate_up_proj"
    transposed: bool = False
    sorted: bool = False


class UnpackedExperts(nn.Module):
    """Experts, each matrix a layer of its own."""

    def __init__(self, experts: nn.Module, layout: ExpertsLayout) -> None:
        super().__init__()
        # The settings and modules that its gate reads: an activation, limits, a norm.
        own = vars(experts)
        vars(self).update({name: own[name] for name in own.keys() - vars(self).keys() - {"config"}})
        self._modules.update(experts._modules)
        gated = layout.first == "gate_up_proj"
        self._gate: Callable[[Any, Tensor], Tensor] = (
            getattr(type(experts), "_apply_gate", _gated) if gated else _activated
        )
        self._first = layout.first
        inverted = layout.transposed and not getattr(experts, "is_transposed", False)
        for name in (layout.first, "down_proj"):
            stored: Tensor = getattr(experts, name)
            weights = stored.mT if layout.transposed else stored
            biases = getattr(experts, f"{name}_bias", None)
            parts = [linear_on(w, None if biases is None else biases[e]) for e, w in enumerate(weights)]
            for e, part in enumerate(parts):
                part._ft_form = WeightForm(expert=e, experts=len(parts), inverted=inverted)  # type: ignore[assignment]
            setattr(self, name, nn.ModuleList(parts))
        self.number = len(stored)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns ``(tokens, d)``: every token through its experts, weighted.

        Tokens are sent to their experts where that is possible. Under ``vmap``, in a stacked call and
        under the compiler, which tokens go where may not be branched on: every expert sees every token.
        """
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        out = torch.zeros_like(hidden_states, dtype=dtype)
        if self._sees_all_tokens():
            # One column more: some routers send a token nowhere by the index after the last.
            shape = (*hidden_states.shape[:-1], self.number + 1)
            weights = torch.zeros(shape, dtype=top_k_weights.dtype, device=hidden_states.device)
            weights = weights.scatter_add(-1, top_k_index, top_k_weights)
            for e in range(self.number):
                out = out + self._expert(e, hidden_states) * weights[..., e : e + 1]
            return out.to(hidden_states.dtype)
        for e in top_k_index.unique().tolist():
            if e < self.number:
                token, place = torch.where(top_k_index == e)
                part = self._expert(e, hidden_states[token]) * top_k_weights[token, place, None]
                out = out.index_add(0, token, part.to(dtype))
        return out.to(hidden_states.dtype)

    def _expert(self, e: int, x: Tensor) -> Tensor:
        first: Any = getattr(self, self._first)
        second: Any = self.down_proj
        norm = self._modules.get("post_expert_norm")
        x = second[e](self._gate(self, first[e](x)))
        return x if norm is None else norm(x)

    def _sees_all_tokens(self) -> bool:
        binding: Binding | None = getattr(self.get_submodule("down_proj.0"), "_ft", None)  # type: ignore[assignment]
        stacked = binding is not None and binding.call.stack is not None
        return stacked or inside_vmap() or torch.compiler.is_compiling()


class UnpackedSortedExperts(UnpackedExperts):
    """Experts that all see all tokens, each its own copy of them."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Returns ``(E * tokens, d)``, expert by expert, as the inputs are."""
        each = hidden_states.reshape(self.number, -1, hidden_states.shape[-1])
        return torch.cat([self._expert(e, each[e]) for e in range(self.number)])


def experts_left_whole(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Yields path and parameters of modules that hold several matrices in one parameter, and stay in float."""
    for path, module in model.named_modules():
        if layer_type(module) is None and not isinstance(module, nn.modules.conv._ConvNd):
            own = module._parameters.items()
            fused = [name for name, leaf in own if leaf is not None and leaf.ndim == 3 and min(leaf.shape) > 1]
            if fused:
                yield path, fused


def _gated(experts: Any, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def _activated(experts: Any, x: Tensor) -> Tensor:
    return experts.act_fn(x)


def _unpack(experts: nn.Module, layout: ExpertsLayout) -> Unpacked | None:
    if not {layout.first, "down_proj"} <= experts._parameters.keys():
        return None  # of another version of transformers
    stand_in = (UnpackedSortedExperts if layout.sorted else UnpackedExperts)(experts, layout)
    join = _stack_transposed if layout.transposed else torch.stack
    packings: dict[str, Packing] = {}
    for name in (layout.first, "down_proj"):
        packings[name] = Packing(tuple(f"{name}.{e}.weight" for e in range(stand_in.number)), join)
        if getattr(experts, f"{name}_bias", None) is not None:
            packings[f"{name}_bias"] = Packing(tuple(f"{name}.{e}.bias" for e in range(stand_in.number)), torch.stack)
    return stand_in, packings


def _stack_transposed(matrices: list[Tensor]) -> Tensor:
    return torch.stack([matrix.mT for matrix in matrices])


# Mixtral's layout; the forward is the same, word for word.
_LIKE_MIXTRAL = """
    afmoe.Afmoe axk1.AXK1 axk2.AXK2 bailing_hybrid.BailingHybrid cohere2_moe.Cohere2Moe deepseek_ocr2.DeepseekOcr2Text
    deepseek_v2.DeepseekV2 deepseek_v3.DeepseekV3 deepseek_v32.DeepseekV32 diffusion_gemma.DiffusionGemmaText
    dots1.Dots1 dots3_note.Dots3Note ernie4_5_moe.Ernie4_5_Moe ernie4_5_vl_moe.Ernie4_5_VLMoeMoe exaone_moe.ExaoneMoe
    flex_olmo.FlexOlmo flint.Flint gemma4.Gemma4Text glm4_moe.Glm4Moe glm4_moe_lite.Glm4MoeLite
    glm4v_moe.Glm4vMoeText glm_moe_dsa.GlmMoeDsa granitemoe.GraniteMoe granitemoe_swa.GraniteMoeSWA
    granitemoehybrid.GraniteMoeHybrid granitemoeshared.GraniteMoeShared hunyuan_v1_moe.HunYuanMoEV1 hy_v3.HYV3
    inkling.Inkling jamba.Jamba kimi_linear.KimiLinear kolibri1.Kolibri1 laguna.Laguna lfm2_moe.Lfm2Moe
    mellum.Mellum mimo_v2_flash.MiMoV2Flash minimax.MiniMax minimax_m2.MiniMaxM2 mistral4.Mistral4
    mistral_large4.MistralLarge4Text mixtral.Mixtral olmoe.Olmoe phimoe.Phimoe qwen2_moe.Qwen2Moe
    qwen3_5_moe.Qwen3_5Moe qwen3_moe.Qwen3Moe qwen3_next.Qwen3Next qwen3_omni_moe.Qwen3OmniMoeTalkerText
    qwen3_omni_moe.Qwen3OmniMoeThinkerText qwen3_vl_moe.Qwen3VLMoeText qwen4_exp.Qwen4ExpText solar_open.SolarOpen
    unlimited_ocr.UnlimitedOcrText zaya.Zaya
"""
# Those with a gate, a layout or a norm of their own.
_OTHERS = {
    "aria.Aria": ExpertsLayout(transposed=True),
    "beam.Beam": ExpertsLayout(),
    "deepseek_v4.DeepseekV4": ExpertsLayout(),
    "glm5_next.Glm5NextText": ExpertsLayout(),
    "gpt_oss.GptOss": ExpertsLayout(transposed=True),
    "hy_v4.HYV4": ExpertsLayout(),
    "inkling2.Inkling2": ExpertsLayout(),
    "llama4.Llama4Text": ExpertsLayout(transposed=True, sorted=True),
    "minimax_m3_vl.MiniMaxM3VL": ExpertsLayout(),
    "muse_spark.MuseSpark": ExpertsLayout(),
    "nemotron_h.NemotronH": ExpertsLayout(first="up_proj"),
    "step3p7.Step3p7": ExpertsLayout(),
}
LAYOUTS: dict[str, ExpertsLayout] = dict.fromkeys(_LIKE_MIXTRAL.split(), ExpertsLayout()) | _OTHERS
for _name, _layout in LAYOUTS.items():
    _family, _, _stem = _name.partition(".")
    register_unpacker(
        f"transformers.models.{_family}.modeling_{_family}.{_stem}Experts", functools.partial(_unpack, layout=_layout)
    )
