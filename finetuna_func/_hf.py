"""What is particular to Hugging Face models: their layer classes and their attention masks.

Classes are named, not imported, so that transformers is loaded only by those who use it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetuna_func._layers import Leaves, embedding, linear, register_layer, register_subclass

_MODELS = "transformers.models"

# Embeddings whose forward computes positions or scales by a Python number, and leaves the lookup to nn.Embedding.
_EXTENDING = {
    "bart": ("BartLearnedPositionalEmbedding", "BartScaledWordEmbedding"),
    "bigbird_pegasus": ("BigBirdPegasusLearnedPositionalEmbedding", "BigBirdPegasusScaledWordEmbedding"),
    "biogpt": ("BioGptLearnedPositionalEmbedding", "BioGptScaledWordEmbedding"),
    "blenderbot": ("BlenderbotLearnedPositionalEmbedding", "BlenderbotScaledWordEmbedding"),
    "blenderbot_small": ("BlenderbotSmallLearnedPositionalEmbedding",),
    "m2m_100": ("M2M100ScaledWordEmbedding",),
    "mbart": ("MBartLearnedPositionalEmbedding", "MBartScaledWordEmbedding"),
    "mvp": ("MvpLearnedPositionalEmbedding",),
    "opt": ("OPTLearnedPositionalEmbedding",),
    "pegasus_x": ("PegasusXScaledWordEmbedding",),
    "plbart": ("PLBartLearnedPositionalEmbedding", "PLBartScaledWordEmbedding"),
    "trocr": ("TrOCRLearnedPositionalEmbedding", "TrOCRScaledWordEmbedding"),
    "xglm": ("XGLMScaledWordEmbedding",),
}
for _family, _names in _EXTENDING.items():
    for _name in _names:
        register_subclass(f"{_MODELS}.{_family}.modeling_{_family}.{_name}", of=nn.Embedding)


def _scaled_embedding(layer: nn.Module, leaves: Leaves, ids: Tensor) -> Tensor:
    """Gemma's embedding, times a buffer rounded to the model's dtype (the class reads it off ``weight``)."""
    return embedding(layer, leaves, ids) * leaves["embed_scale"].to(layer._ft.dtype)  # type: ignore[union-attr, arg-type]


for _family, _name in (
    ("gemma", "GemmaTextScaledWordEmbedding"),
    ("gemma2", "Gemma2TextScaledWordEmbedding"),
    ("gemma3", "Gemma3TextScaledWordEmbedding"),
    ("gemma3n", "Gemma3nTextScaledWordEmbedding"),
    ("t5gemma2", "T5Gemma2TextScaledWordEmbedding"),
):
    register_layer(f"{_MODELS}.{_family}.modeling_{_family}.{_name}", adapter="embedding")(_scaled_embedding)


@register_layer(f"{_MODELS}.whisper.modeling_whisper.WhisperPositionalEmbedding", adapter="embedding")
def whisper_positions(
    layer: nn.Module,
    leaves: Leaves,
    input_ids: Tensor,
    past_key_values_length: int = 0,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Whisper's positions: rows of the table by place, or by ``position_ids``."""
    if position_ids is None:
        start = past_key_values_length
        position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        return embedding(layer, leaves, position_ids.unsqueeze(0)).squeeze(0)
    return embedding(layer, leaves, position_ids)


register_layer(f"{_MODELS}.falcon.modeling_falcon.FalconLinear", adapter="linear")(linear)
register_layer(f"{_MODELS}.esm.modeling_esmfold.EsmFoldLinear", adapter="linear")(linear)


@register_layer(f"{_MODELS}.bloom.modeling_bloom.BloomGelu")
def bloom_gelu(layer: nn.Module, leaves: Leaves, x: Tensor) -> Tensor:
    """BLOOM's GELU; its own autograd Function predates torch.func."""
    return F.gelu(x, approximate="tanh")


# Modules that compute with the weight of a child themselves, and so would pass by what its layer does.
_READING_PARENTS: dict[str, tuple[str, ...]] = {
    f"{_MODELS}.deberta_v2.modeling_deberta_v2.DebertaV2Encoder": ("rel_embeddings",),
} | {
    f"{_MODELS}.{family}.modeling_{family}.{name}": ("dt_proj",)
    for family, name in (
        ("falcon_mamba", "FalconMambaMixer"),
        ("jamba", "JambaMambaMixer"),
        ("mamba", "MambaMixer"),
    )
}


def weights_read_by_parent(model: nn.Module) -> set[str]:
    """Returns the paths of layers whose parent computes with their weight instead of calling them."""
    return {
        f"{path}.{child}" if path else child
        for path, module in model.named_modules()
        for child in _READING_PARENTS.get(f"{type(module).__module__}.{type(module).__qualname__}", ())
    }


def switch_off_warnings(skeleton: nn.Module) -> None:
    """Silences a check of Hugging Face models that reads the values of the ids, which ``vmap`` forbids."""
    for module in skeleton.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _no_warning  # type: ignore[assignment]


def _no_warning(*args: Any, **kwargs: Any) -> None:
    return None


# Bodies whose blocks get the causal mask that the body makes, and nothing else reads it.
_CAUSAL_BODIES = frozenset(
    f"{_MODELS}.{family}.modeling_{family}.{name}"
    for family, name in (
        ("cohere", "CohereModel"),
        ("gemma", "GemmaModel"),
        ("glm", "GlmModel"),
        ("glm4", "Glm4Model"),
        ("granite", "GraniteModel"),
        ("helium", "HeliumModel"),
        ("llama", "LlamaModel"),
        ("mistral", "MistralModel"),
        ("mixtral", "MixtralModel"),
        ("olmo", "OlmoModel"),
        ("olmo2", "Olmo2Model"),
        ("olmoe", "OlmoeModel"),
        ("phi", "PhiModel"),
        ("phi3", "Phi3Model"),
        ("qwen2", "Qwen2Model"),
        ("qwen2_moe", "Qwen2MoeModel"),
        ("qwen3", "Qwen3Model"),
        ("qwen3_moe", "Qwen3MoeModel"),
        ("smollm3", "SmolLM3Model"),
        ("stablelm", "StableLmModel"),
        ("starcoder2", "Starcoder2Model"),
    )
)


def causal_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Returns the mask ``(1, 1, T, T)`` of plain causal attention, if that is what the inputs ask for.

    Without a mask among its inputs, a Hugging Face model asks whether a batch is packed, which waits for the GPU, and
    where it cannot ask (in a CUDA graph, under the compiler) forms a mask that keeps attention from its fastest
    kernels. Given this mask it asks nothing, and its blocks are then called without one, which means the same.
    """
    body = getattr(module, getattr(module, "base_model_prefix", ""), module)
    kinds = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(body).__mro__[:3]]
    config = getattr(module, "config", None)
    if not _CAUSAL_BODIES.intersection(kinds) or getattr(config, "_attn_implementation", None) != "sdpa":
        return None
    if any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")):
        return None
    if any(value is not None for name, value in kwargs.items() if name not in ("input_ids", "use_cache")):
        return None
    ids = kwargs.get("input_ids", args[0] if len(args) == 1 else None)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 2 or kwargs.get("use_cache"):
        return None
    length = ids.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()[None, None]


def has_mask(inputs: dict[str, Any]) -> bool:
    """Returns whether an attention mask is among the keyword inputs."""
    return any(name.endswith("attention_mask") and isinstance(mask, Tensor) for name, mask in inputs.items())


def with_additive_mask(module: nn.Module, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Returns the inputs with a bidirectional model's 2-D padding mask as a 4-D additive one.

    Under ``vmap``, transformers' preparation of a bidirectional mask asks whether it is all ones, a
    branch on a value that differs between samples. A 4-D mask it takes as it is. Causal masks do not
    ask with eager attention, so a causal model's mask is left alone.

    Args:
        module: The model (its skeleton).
        inputs: Keyword inputs; ``attention_mask`` is ``(batch, length)``, 1 where a token is real.
        dtype: Of the model's activations.

    Raises:
        NotImplementedError: A bidirectional model with windows of attention.
    """
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not _is_bidirectional(module):
        return inputs
    config = getattr(module, "config", None)
    if any(getattr(config, name, None) for name in ("sliding_window", "local_attention")):
        raise NotImplementedError(
            f"{type(module).__name__} attends within windows in some layers, which a mask made outside of it cannot "
            "say under torch.func.vmap; use ft.apply_stacked, or a loop over ft.apply."
        )
    hidden = (mask == 0)[:, None, None, :]
    additive = torch.zeros((), dtype=dtype, device=mask.device).masked_fill(hidden, torch.finfo(dtype).min)
    return {**inputs, "attention_mask": additive}


def _is_bidirectional(module: nn.Module) -> bool:
    """Whether ``attention_mask`` is for attention in both directions: encoders, and those with a decoder."""
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return True
    of_the_family = [vars(sys.modules.get(cls.__module__, object)) for cls in type(module).__mro__]
    makes_bidirectional = any("create_bidirectional_mask" in names for names in of_the_family)
    return makes_bidirectional and not any(
        getattr(child, "is_causal", False) is True or getattr(child, "is_decoder", False) is True
        for child in module.modules()
    )
