"""The model families of the conformance suite, and the table of `docs/models.md` that they make.

    python tests/families.py --write    # writes the table from what is declared here

`tests/test_models.py` runs every check on every family; a gap that is declared here must fail there with its error,
so what the table says is what was seen.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from models import Mlp
from torch import Generator, Tensor, nn
from transformers.models.wav2vec2 import modeling_wav2vec2

import finetuna_func as ft

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
VOCAB, LENGTH, DECODED, CLASSES, SAMPLES = 64, 7, 5, 5, 40

Lead = tuple[int, ...]  # the leading axes of inputs: (batch,) or (finetunes, batch)
Inputs = Mapping[str, Tensor]
InputsMaker = Callable[[Lead, Generator], dict[str, Tensor]]

CHECKS: dict[str, tuple[str, str]] = {
    "quantize": ("8 bits", "every matrix is quantized but `lm_head` and what is tied to it; the model is unchanged"),
    "forward": ("base", "the base computes what the float model does with the dequantized weights"),
    "default": ("default", "so does a default finetune, its updates added to the weights"),
    "custom": ("custom", "so does a finetune with chosen layers, ranks, adapter biases and a norm trained directly"),
    "bf16": ("bf16", "a bfloat16 base is as near to float32 as the bfloat16 model itself, alone and under `vmap`"),
    "grad": ("grad", "`value_and_grad` and `torch.func.grad` equal autograd of the float model"),
    "jvp": ("jvp", "forward mode gives the same directional derivative, alone and under `vmap`"),
    "vmap": ("vmap", "`vmap(apply)` over 3 finetunes, default and custom, equals the loop"),
    "vmap_grad": ("vmap grad", "`vmap(grad)` and `stacked_value_and_grad(in_dims=0)` equal the loop"),
    "per_sample": ("per sample", "`vmap(grad)` over the samples of one finetune equals the loop"),
    "stacked": ("stacked", "`apply_stacked` equals the loop, default finetunes"),
    "stacked_custom": ("stacked custom", "`apply_stacked` equals the loop, custom finetunes"),
    "stacked_grad": (
        "stacked grad",
        "`stacked_value_and_grad` through `apply_stacked` equals the loop, custom finetunes",
    ),
    "mask": ("mask", "with left-padded 2-D masks: `apply` equals the float model"),
    "mask_vmap": (
        "mask vmap",
        "with a left-padded 2-D mask per finetune: `vmap(apply)` and `vmap(grad)` equal the loop",
    ),
    "mask_stacked": ("mask stacked", "likewise `apply_stacked`, custom finetunes"),
    "labels": ("labels", "`labels=` gives the float model's loss and gradient"),
    "labels_vmap": ("labels vmap", "likewise under `vmap`, the labels batched too"),
    "labels_stacked": (
        "labels stacked",
        "`apply_stacked` refuses the averaged loss in clear words; its logits are right",
    ),
    "generate": ("generate", "`to_module(...).generate` with its cache gives the logits of `apply` without one"),
    "save": ("save", "`save` and `load` on a base made again give the same finetune, bit by bit"),
}

NOTES = (
    "Equal means: in float32, the largest difference is at most 1e-5 of the largest number (T5: 2e-5, since it does",
    "not scale attention scores; Qwen3-Next: 1e-4, since it normalises the keys of padding, which are zeros); for",
    "gradients twice that, leaf by leaf, where no leaf counts as smaller than 1/100 of the largest. In bfloat16 the",
    "root mean square error is at most twice that of the bfloat16 model, plus 2**-7; with experts that of the median",
    "token, since a rounding may send a token to others.",
    "Every comparison also tells another finetune, the base or the unmasked output apart: it is at least 20 times",
    "as far away (4 times in bfloat16).",
    "",
    "Positions of padding are not compared: models put anything there, which depends on the attention kernel. That",
    "matters with left padding and `labels=`: a model predicts the first real token from the padding before it, so",
    "leave that token out of the labels (-100), as the checks do.",
    "",
    "Bf16, per sample and labels vmap run with masks too, except where mask vmap is a gap.",
)


@dataclasses.dataclass(frozen=True)
class Gap:
    """A check that fails: the reason for the table, and what the error says (a regex)."""

    reason: str
    error: str


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        name: For the table.
        build: Makes the tiny model; `make` calls it with a seed.
        inputs: Makes keyword inputs with given leading axes.
        custom: Arguments of `new_finetuned` for the custom finetune.
        outputs: Outputs to compare: name -> the mask that says which positions count, if any.
        masks: Names of the 2-D masks: name -> length.
        labels: Makes labels from inputs; ``None`` where the model takes none.
        generates: Whether the model has ``generate``.
        gaps: Check -> why and how it fails.
        tolerance: Largest difference relative to the largest number, in float32.
        routes: Whether a router sends each token to some of several experts.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: InputsMaker
    custom: Mapping[str, Any]
    outputs: Mapping[str, str | None]
    masks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    labels: Callable[[Inputs], Tensor] | None = None
    generates: bool = False
    gaps: Mapping[str, Gap] = dataclasses.field(default_factory=dict)
    tolerance: float = 1e-5
    routes: bool = False

    def make(self) -> nn.Module:
        """Returns the model: float32, eval mode, the same numbers each time, none of them zero or equal."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    def lacks(self, check: str) -> str | None:
        """Returns why a check does not apply, or ``None`` if it does."""
        if check.startswith("mask") and not self.masks:
            return "takes no padding mask"
        if check.startswith("labels") and self.labels is None:
            return "takes no labels"
        if check == "generate" and not self.generates:
            return "does not generate"
        return None


# --- inputs


def tokens(lead: Lead, generator: Generator) -> dict[str, Tensor]:
    return {"input_ids": _ids(lead, LENGTH, generator)}


def two_texts(lead: Lead, generator: Generator) -> dict[str, Tensor]:
    return {**tokens(lead, generator), "decoder_input_ids": _ids(lead, DECODED, generator)}


def speech(lead: Lead, generator: Generator) -> dict[str, Tensor]:
    features = torch.randn(*lead, 6, 16, generator=generator)
    return {"input_features": features, "decoder_input_ids": _ids(lead, DECODED, generator)}


def sound(lead: Lead, generator: Generator) -> dict[str, Tensor]:
    return {"input_values": torch.randn(*lead, SAMPLES, generator=generator)}


def image(lead: Lead, generator: Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(*lead, 3, 8, 8, generator=generator)}


def text_and_image(lead: Lead, generator: Generator) -> dict[str, Tensor]:
    ids = _ids(lead, LENGTH, generator)
    ids[..., -1] = 3  # the end of the text, where CLIP reads it
    return {"input_ids": ids, **image(lead, generator)}


def vectors(lead: Lead, generator: Generator) -> dict[str, Tensor]:
    return {"x": torch.randn(*lead, LENGTH, 16, generator=generator)}


def _ids(lead: Lead, length: int, generator: Generator) -> Tensor:
    return torch.randint(4, VOCAB, (*lead, length), generator=generator)  # 0 to 3 are special tokens


def same_ids(inputs: Inputs) -> Tensor:
    return inputs["input_ids"]


def decoder_ids(inputs: Inputs) -> Tensor:
    return inputs["decoder_input_ids"]


def classes(inputs: Inputs) -> Tensor:
    return (inputs["pixel_values"].sum((-1, -2, -3)) * 100).long() % CLASSES


# --- modules of torch itself


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 16)
        self.lm_head = nn.Linear(16, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(pixel_values))).mean((-1, -2))
        return self.lm_head(torch.relu(self.fc(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.fc(x)
        hidden = None if attention_mask is None else attention_mask == 0
        x = x + self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        return self.lm_head(self.norm(x))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.lm_head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = None if attention_mask is None else attention_mask == 0
        return self.lm_head(self.encoder(x, src_key_padding_mask=hidden))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCAB, 16, mode="mean")
        self.fc = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(torch.relu(self.fc(self.bag(input_ids))))


# --- the families


def _hf(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2) if "vocab_size" in settings else {}
        built = getattr(transformers, model)(getattr(transformers, config)(**settings, **special))
        if built.can_generate():
            built.generation_config.eos_token_id = None  # so that texts are equally long
            built.generation_config.forced_eos_token_id = None
        return built

    return build


def _layers(*adapted: str, norm: str) -> dict[str, Any]:
    """A custom finetune: chosen layers, each with its own rank and bias, and a norm trained directly."""
    configs = {name: ft.LinearAdapterConfig(r=2 + i, alpha=3.0, bias=i % 2 == 0) for i, name in enumerate(adapted)}
    return dict(adapt_layers=set(adapted), plain_layers={norm}, linear_config=configs)


_SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
)
_IMAGES = {name: size for name, size in _SMALL.items() if name != "vocab_size"} | dict(image_size=8, patch_size=4)
_SMALL["max_position_embeddings"] = 32
_GROUPED = _SMALL | dict(num_key_value_heads=2)
_HEADS = _GROUPED | dict(head_dim=4)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
_D_MODEL = dict(vocab_size=VOCAB, d_model=16)
_N_EMBD = dict(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=32)
_TWO_SIDES = _D_MODEL | dict(
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    decoder_start_token_id=3,
)
_NARROW = dict(moe_intermediate_size=8)
_WINDOW_THEN_ALL = ["sliding_attention", "full_attention"]
_GPT_NEO = dict(attention_types=[[["global", "local"], 1]], window_size=4)
_BLOOM = dict(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=4)
_FALCON_40B = dict(new_decoder_architecture=True, num_kv_heads=2)
_MPT = _D_MODEL | dict(n_layers=2, n_heads=4, max_seq_len=32, expansion_ratio=2)
_XGLM = _D_MODEL | dict(num_layers=2, attention_heads=4, ffn_dim=24, max_position_embeddings=32)
_DEEPSEEK = (
    _SMALL
    | _NARROW
    | dict(
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        first_k_dense_replace=1,
    )
)
_LLAMA_4 = _HEADS | dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=24, attention_chunk_size=4)
_JAMBA = _GROUPED | _EXPERTS | dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_offset=0)
_JAMBA |= dict(mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False)
_QWEN_NEXT = _HEADS | _EXPERTS | _NARROW | dict(linear_num_key_heads=2, linear_num_value_heads=4)
_QWEN_NEXT |= dict(linear_key_head_dim=4, linear_value_head_dim=4, shared_expert_intermediate_size=8)
_QWEN_NEXT |= dict(layer_types=["linear_attention", "full_attention"])
_NEMOTRON = {name: size for name, size in (_HEADS | _NARROW).items() if name != "num_hidden_layers"}
_NEMOTRON |= dict(layers_block_type=["mamba", "moe", "attention"], n_routed_experts=4, num_experts_per_tok=2)
_NEMOTRON |= dict(moe_shared_expert_intermediate_size=8, ssm_state_size=4, mamba_num_heads=4, mamba_head_dim=8)
_NEMOTRON |= dict(n_groups=1, chunk_size=4)
_MAMBA = dict(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2)
_MAMBA_2 = dict(num_heads=4, head_dim=8, n_groups=1, chunk_size=4)
_RECURRENT_GEMMA = _GROUPED | dict(num_key_value_heads=1, lru_width=16, attention_window_size=8, num_hidden_layers=3)
_WAV2VEC = {name: size for name, size in _SMALL.items() if name != "max_position_embeddings"}
_WAV2VEC |= dict(conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3), num_feat_extract_layers=2)
_WAV2VEC |= dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
_DISTILBERT = dict(vocab_size=VOCAB, dim=16, hidden_dim=24, n_layers=2, n_heads=4, max_position_embeddings=32)
_DEBERTA = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=8, type_vocab_size=0)
_MODERNBERT = dict(local_attention=4, layer_types=_WINDOW_THEN_ALL, cls_token_id=1, sep_token_id=2)
_SWIN = dict(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=8, patch_size=2)
_CONVNEXT = dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2)


def _decoder(name: str, stem: str, custom: Mapping[str, Any], config: str = "", **settings: Any) -> Family:
    declared = {key: settings.pop(key) for key in ("gaps", "tolerance") if key in settings}
    declared["routes"] = any("experts_per_tok" in key for key in settings)
    model = stem if stem.endswith("Model") else f"{stem}ForCausalLM"
    return Family(
        name,
        _hf(model, config or f"{stem.removesuffix('LMHeadModel')}Config", **settings),
        tokens,
        custom,
        outputs={"logits": "attention_mask"},
        masks={"attention_mask": LENGTH},
        labels=same_ids,
        generates=True,
        **declared,
    )


def _encoder(name: str, stem: str, custom: Mapping[str, Any], **settings: Any) -> Family:
    declared = {key: settings.pop(key) for key in ("gaps", "tolerance") if key in settings}
    return Family(
        name,
        _hf(f"{stem}ForMaskedLM", f"{stem}Config", **settings),
        tokens,
        custom,
        outputs={"logits": "attention_mask"},
        masks={"attention_mask": LENGTH},
        labels=same_ids,
        **declared,
    )


def _translator(name: str, model: str, config: str, custom: Mapping[str, Any], **settings: Any) -> Family:
    declared = {key: settings.pop(key) for key in ("gaps", "tolerance") if key in settings}
    return Family(
        name,
        _hf(model, config, **settings),
        two_texts,
        custom,
        outputs={"logits": "decoder_attention_mask", "encoder_last_hidden_state": "attention_mask"},
        masks={"attention_mask": LENGTH, "decoder_attention_mask": DECODED},
        labels=decoder_ids,
        generates=True,
        **declared,
    )


def _classifier(name: str, stem: str, custom: Mapping[str, Any], **settings: Any) -> Family:
    declared = {key: settings.pop(key) for key in ("gaps", "tolerance") if key in settings}
    build = _hf(f"{stem}ForImageClassification", f"{stem}Config", **settings, num_labels=CLASSES)
    return Family(name, build, image, custom, outputs={"logits": None}, labels=classes, **declared)


def _in_float(what: str, *last_names: str) -> dict[str, Gap]:
    """The gap of matrices that are not quantized: exactly those with these last names."""
    names = "|".join(re.escape(name) for name in last_names)
    return {"quantize": Gap(f"in float: {what}", rf"in float: \[('[^']*({names})'(, )?)+\]")}


def _fails(reason: str, error: str, *checks: str) -> dict[str, Gap]:
    return {check: Gap(reason, error) for check in checks}


_ROUTERS = ("gate.weight", "router.weight")
_ROUTER = _in_float("the router, whose rounding would send tokens to other experts", *_ROUTERS)
_NO_FORWARD_MODE = "torch has no forward mode for {}"
_STACKED = ("stacked", "stacked_custom", "stacked_grad")
_QV = _layers("q_proj", "v_proj", norm="norm")
_LAST_NORM = r".*\.1\..*\.LayerNorm"

FAMILIES: tuple[Family, ...] = (
    _decoder(
        "OPT",
        "OPT",
        _layers("q_proj", "fc1", norm="final_layer_norm"),
        **_SMALL,
        ffn_dim=24,
        word_embed_proj_dim=16,
    ),
    _decoder("GPT-2", "GPT2LMHeadModel", _layers("c_attn", "c_fc", norm="ln_f"), **_N_EMBD),
    _decoder("GPT-J", "GPTJ", _layers("q_proj", "fc_in", norm="ln_f"), **_N_EMBD, rotary_dim=4),
    _decoder("GPT-Neo", "GPTNeo", _layers("q_proj", "c_fc", norm="ln_f"), **_SMALL, **_GPT_NEO),
    _decoder("GPT-NeoX", "GPTNeoX", _layers("query_key_value", "dense_h_to_4h", norm="final_layer_norm"), **_SMALL),
    _decoder("BLOOM", "Bloom", _layers("query_key_value", "dense_h_to_4h", norm="ln_f"), **_BLOOM),
    _decoder("Falcon 7B", "Falcon", _layers("query_key_value", "dense_h_to_4h", norm="ln_f"), **_SMALL),
    _decoder("Falcon 40B", "Falcon", _layers("query_key_value", norm="ln_f"), **_SMALL, **_FALCON_40B),
    _decoder("MPT", "Mpt", _layers("Wqkv", "up_proj", norm="norm_f"), **_MPT),
    _decoder("StarCoder", "GPTBigCode", _layers("c_attn", "c_fc", norm="ln_f"), **_N_EMBD),
    _decoder("StarCoder 2", "Starcoder2", _QV, **_GROUPED),
    _decoder("XGLM", "XGLM", _layers("q_proj", "fc1", norm="layer_norm"), **_XGLM),
    _decoder("Llama", "Llama", _QV, **_GROUPED),
    _decoder("Mistral", "Mistral", _QV, **_GROUPED, sliding_window=4),
    _decoder("Mixtral", "Mixtral", _QV, **_GROUPED, num_local_experts=4, num_experts_per_tok=2, gaps=_ROUTER),
    _decoder("Qwen2", "Qwen2", _QV, **_GROUPED),
    _decoder(
        "Qwen2-MoE", "Qwen2Moe", _QV, **_GROUPED, **_EXPERTS, **_NARROW, shared_expert_intermediate_size=8, gaps=_ROUTER
    ),
    _decoder("Qwen3", "Qwen3", _QV, **_HEADS),
    _decoder(
        "Qwen3-MoE",
        "Qwen3Moe",
        _QV,
        **_HEADS,
        **_EXPERTS,
        **_NARROW,
        gaps=_ROUTER,
        tolerance=2e-5,  # many rows and few round differently, and it normalises queries of four numbers
    ),
    _decoder("OLMo 2", "Olmo2", _QV, **_GROUPED),
    _decoder("OLMoE", "Olmoe", _QV, **_GROUPED, **_EXPERTS, gaps=_ROUTER),
    _decoder(
        "GPT-OSS",
        "GptOss",
        _QV,
        **_HEADS,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        gaps=_ROUTER,
    ),
    _decoder(
        "DeepSeek-V3",
        "DeepseekV3",
        _layers("q_b_proj", "kv_b_proj", norm="norm"),
        **_DEEPSEEK,
        gaps=_ROUTER,
    ),
    _decoder("Phi-MoE", "Phimoe", _QV, **_GROUPED, num_local_experts=4, num_experts_per_tok=2, gaps=_ROUTER),
    _decoder(
        "GLM-4-MoE",
        "Glm4Moe",
        _QV,
        **_HEADS,
        **_NARROW,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        gaps=_ROUTER,
    ),
    _decoder("Granite-MoE", "GraniteMoe", _QV, **_GROUPED, num_local_experts=4, num_experts_per_tok=2, gaps=_ROUTER),
    _decoder("Llama 4", "Llama4", _QV, "Llama4TextConfig", **_LLAMA_4, gaps=_ROUTER),
    _decoder(
        "Qwen3-Next",
        "Qwen3Next",
        _layers("q_proj", "in_proj_qkvz", norm=r"model\.norm"),
        **_QWEN_NEXT,
        gaps=_in_float("convolutions and the router", "conv1d.weight", *_ROUTERS),
        tolerance=1e-4,  # it normalises the keys of padding, which are zeros
    ),
    _decoder(
        "Jamba",
        "Jamba",
        _layers("in_proj", "q_proj", norm="final_layernorm"),
        **_JAMBA,
        gaps=_in_float(
            "convolutions, A_log, dt_proj, with whose weight the mixer computes itself, and the router",
            "A_log",
            "conv1d.weight",
            "dt_proj.weight",
            *_ROUTERS,
        ),
    ),
    _decoder(
        "Nemotron-H",
        "NemotronH",
        _layers("in_proj", "q_proj", norm="norm_f"),
        **_NEMOTRON,
        gaps=_in_float("convolutions and the router", "conv1d.weight", *_ROUTERS),
    ),
    _decoder("Gemma", "Gemma", _QV, **_HEADS),
    _decoder("Gemma 2", "Gemma2", _QV, **_HEADS, sliding_window=4, attn_implementation="eager"),
    _decoder("Gemma 3", "Gemma3", _QV, "Gemma3TextConfig", **_HEADS, sliding_window=4, layer_types=_WINDOW_THEN_ALL),
    _decoder("Phi", "Phi", _layers("q_proj", "fc1", norm="final_layernorm"), **_SMALL),
    _decoder("Phi-3", "Phi3", _layers("qkv_proj", "gate_up_proj", norm="norm"), **_GROUPED),
    _decoder("Granite", "Granite", _QV, **_GROUPED),
    _decoder("Cohere", "Cohere", _QV, **_GROUPED),
    _decoder(
        "Mamba",
        "Mamba",
        _layers("in_proj", "x_proj", norm="norm_f"),
        **_MAMBA,
        time_step_rank=4,
        gaps=_in_float(
            "the convolution, A_log, and dt_proj, with whose weight the mixer computes itself",
            "A_log",
            "conv1d.weight",
            "dt_proj.weight",
        ),
    ),
    _decoder(
        "Mamba 2",
        "Mamba2",
        _layers("in_proj", "out_proj", norm="norm_f"),
        **_MAMBA,
        **_MAMBA_2,
        gaps=_in_float("convolutions", "conv1d.weight"),
    ),
    _decoder(
        "RecurrentGemma",
        "RecurrentGemma",
        _layers("linear_x", "q_proj", norm="final_norm"),
        **_RECURRENT_GEMMA,
        gaps=_in_float(
            "convolutions and the gates of the recurrence",
            "conv_1d.weight",
            "gate_bias",
            "gate_weight",
        ),
    ),
    _encoder("BERT", "Bert", _layers("query", "value", norm=_LAST_NORM), **_SMALL),
    _encoder("RoBERTa", "Roberta", _layers("query", "value", norm=_LAST_NORM), **_SMALL),
    _encoder("DistilBERT", "DistilBert", _layers("q_lin", "v_lin", norm="vocab_layer_norm"), **_DISTILBERT),
    _encoder("ALBERT", "Albert", _layers("query", "value", norm="full_layer_layer_norm"), **_SMALL, embedding_size=16),
    _encoder("ELECTRA", "Electra", _layers("query", "value", norm=_LAST_NORM), **_SMALL, embedding_size=16),
    _encoder(
        "DeBERTa-v2",
        "DebertaV2",
        _layers("query_proj", "value_proj", norm=_LAST_NORM),
        **_SMALL,
        **_DEBERTA,
        gaps=_in_float("the table of relative positions", "rel_embeddings.weight")
        | _fails(
            "positions are shared by all rows, so their projections have no row per finetune",
            "Expected size for first two dimensions of batch2 tensor to be",
            "stacked",
        ),
    ),
    _encoder(
        "ModernBERT",
        "ModernBert",
        _layers("Wqkv", "Wi", norm="final_norm"),
        **_SMALL,
        **_MODERNBERT,
    ),
    _encoder(
        "Longformer",
        "Longformer",
        _layers("query", "value", norm=_LAST_NORM),
        **_SMALL,
        attention_window=4,
        gaps=_fails(
            "transformers indexes by the values of its mask; use a loop", "indexing with a boolean mask", "mask_vmap"
        )
        | _fails(
            "attention puts the tokens before the rows, which are no longer those of the call; use `vmap`",
            "got an input of shape .* the model shares it",
            *_STACKED,
            "mask_stacked",
            "labels_stacked",
        ),
    ),
    _translator(
        "T5",
        "T5ForConditionalGeneration",
        "T5Config",
        _layers("q", "wi", norm="final_layer_norm"),
        **_D_MODEL,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=3,
        tolerance=2e-5,  # it does not scale attention scores, so softmax multiplies errors
    ),
    _translator(
        "BART",
        "BartForConditionalGeneration",
        "BartConfig",
        _layers("q_proj", "fc1", norm="layernorm_embedding"),
        **_TWO_SIDES,
        max_position_embeddings=32,
    ),
    _translator(
        "M2M100, NLLB",
        "M2M100ForConditionalGeneration",
        "M2M100Config",
        _layers("q_proj", "fc1", norm="layer_norm"),
        **_TWO_SIDES,
        max_position_embeddings=32,
    ),
    _translator(
        "Marian",
        "MarianMTModel",
        "MarianConfig",
        _layers("q_proj", "fc1", norm="final_layer_norm"),
        **_TWO_SIDES,
        max_position_embeddings=32,
        gaps=_in_float("sinusoidal positions, a class of its own", "embed_positions.weight"),
    ),
    Family(
        "Whisper",
        _hf(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **_TWO_SIDES,
            num_mel_bins=6,
            max_source_positions=8,
            max_target_positions=32,
        ),
        speech,
        _layers("q_proj", "fc1", norm="layer_norm"),
        outputs={"logits": "decoder_attention_mask", "encoder_last_hidden_state": None},
        masks={"decoder_attention_mask": DECODED},
        labels=decoder_ids,
        generates=True,
        gaps=_in_float("convolutions", "conv1.weight", "conv2.weight"),
    ),
    Family(
        "Wav2Vec2",
        _hf("Wav2Vec2Model", "Wav2Vec2Config", **_WAV2VEC),
        sound,
        _layers("q_proj", "v_proj", norm="encoder.layer_norm"),
        outputs={"last_hidden_state": None},
        masks={"attention_mask": SAMPLES},
        gaps=_in_float("convolutions", "conv.weight", "original0", "original1")
        | _fails(
            "transformers writes the ends of the inputs into a mask in place; use `apply_stacked`",
            "index_put_.* is not possible",
            "mask_vmap",
        )
        | (
            _fails(
                "transformers draws a random number for each layer, also in evaluation",
                "called random operation",
                *("vmap", "vmap_grad", "per_sample", "jvp", "bf16"),
            )
            if re.search(r"^ {12}dropout_probability = torch.rand", inspect.getsource(modeling_wav2vec2), re.MULTILINE)
            else {}
        ),
    ),
    _classifier(
        "ViT",
        "ViT",
        _layers("q_proj", "v_proj", norm="layernorm"),
        **_IMAGES,
        gaps=_in_float(
            "the patch convolution, class token and position table",
            "cls_token",
            "projection.weight",
            "position_embeddings",
        ),
    ),
    _classifier(
        "DINOv2",
        "Dinov2",
        _layers(r".*\.(q_proj|query)", r".*\.(v_proj|value)", norm="layernorm"),
        **_IMAGES,
        gaps=_in_float(
            "the patch convolution, class and mask tokens and position table",
            "cls_token",
            "mask_token",
            "projection.weight",
            "position_embeddings",
        ),
    ),
    _classifier(
        "Swin",
        "Swin",
        _layers("q_proj", "v_proj", norm=r".*\.layernorm"),
        **_SWIN,
        gaps=_in_float(
            "the patch convolution and the tables of relative positions",
            "projection.weight",
            "relative_position_bias_table",
        ),
    ),
    _classifier(
        "ConvNeXt",
        "ConvNext",
        _layers("pwconv1", "pwconv2", norm=r".*\.layernorm"),
        **_CONVNEXT,
        gaps=_in_float("convolutions", "patch_embeddings.weight", "dwconv.weight", "downsampling_layer.1.weight"),
    ),
    Family(
        "CLIP",
        _hf(
            "CLIPModel",
            "CLIPConfig",
            text_config=_SMALL | dict(eos_token_id=3),
            vision_config=_IMAGES,
            projection_dim=8,
        ),
        text_and_image,
        _layers("q_proj", "fc1", norm="post_layernorm"),
        outputs={"text_embeds": "attention_mask", "image_embeds": None, "logits_per_text": "attention_mask"},
        masks={"attention_mask": LENGTH},
        gaps=_in_float("convolutions", "patch_embedding.weight")
        | _fails(
            "its logits compare all texts and images of a call, those of other finetunes too; use `vmap`",
            "compares the rows of the call with one another",
            *_STACKED,
            "mask_stacked",
        ),
    ),
    Family("MLP", lambda: Mlp(16, 20, CLASSES), vectors, _layers("fc1", "fc2", norm="lm_head"), outputs={"": None}),
    Family(
        "CNN and Linear",
        Cnn,
        image,
        _layers("fc", norm="norm"),
        outputs={"": None},
        gaps=_in_float("convolutions", "conv.weight"),
    ),
    Family(
        "nn.MultiheadAttention",
        Attention,
        vectors,
        _layers("fc", norm="norm"),
        outputs={"": "attention_mask"},
        masks={"attention_mask": LENGTH},
    ),
    Family(
        "nn.TransformerEncoder",
        Encoder,
        vectors,
        _layers("linear1", "linear2", norm=r".*\.1\.norm2"),
        outputs={"": "attention_mask"},
        masks={"attention_mask": LENGTH},
    ),
    Family(
        "nn.EmbeddingBag",
        Bag,
        tokens,
        _layers("fc", norm="bag"),
        outputs={"": None},
        gaps=_in_float("nn.EmbeddingBag", "bag.weight")
        | _fails(
            _NO_FORWARD_MODE.format("nn.EmbeddingBag, trained here; left alone it is no obstacle"),
            "forward AD with _embedding_bag",
            "jvp",
        ),
    ),
)


# --- the table


def applicable(check: str) -> list[Family]:
    """Returns the families that a check is run on."""
    return [family for family in FAMILIES if family.lacks(check) is None]


def versions() -> str:
    """Returns the versions that the suite runs with."""
    import transformers

    return f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


def render(ran_with: str) -> str:
    """Returns the document for what is declared here."""
    reasons: list[str] = []

    def cell(family: Family, check: str) -> str:
        lacking = family.lacks(check)
        gap = family.gaps.get(check)
        if lacking is None and gap is None:
            return "✓"
        reason = lacking or gap.reason
        if reason not in reasons:
            reasons.append(reason)
        return f"{'–' if lacking else '✗'} {reasons.index(reason) + 1}"

    rows = [[family.name, *(cell(family, check) for check in CHECKS)] for family in FAMILIES]
    cells = [text[0] for row in rows for text in row[1:]]
    header = ["", *(title for title, _ in CHECKS.values())]
    table = [f"| {' | '.join(row)} |" for row in (header, [":--", *([":-:"] * len(CHECKS))], *rows)]
    return "\n".join(
        [
            "# Models",
            "",
            f"{len(FAMILIES)} families, {len(CHECKS)} checks: of {len(cells)} cells {cells.count('✓')} pass, "
            f"{cells.count('✗')} are known gaps, {cells.count('–')} do not apply.",
            f"Last run with {ran_with}.",
            "",
            "Written by `python tests/families.py --write` from what `tests/families.py` declares.",
            "`tests/test_models.py` runs every cell on tiny random models: a pass must pass, and a gap must fail with",
            "its error, so a gap that closes is noticed.",
            "",
            *table,
            "",
            "## Reasons",
            "",
            *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1)),
            "",
            "## What is checked",
            "",
            *(f"- **{title}**: {what}." for title, what in CHECKS.values()),
            "",
            *NOTES,
            "",
        ]
    )


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/families.py --write")
    DOCUMENT.write_text(render(versions()), "utf-8")
