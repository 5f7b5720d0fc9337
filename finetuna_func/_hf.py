"""What is particular to Hugging Face models: their layer classes and their attention masks.

Classes are named, not imported, so that transformers is loaded only by those who use it.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Mapping
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


# Attention within windows of an image, which are folded into the rows: row by row, window by window.
_WINDOWED = {
    f"{_MODELS}.{family}.modeling_{family}.{stem}Attention"
    for family, stem in (
        ("clap", "ClapAudio"),
        ("donut", "DonutSwin"),
        ("maskformer", "MaskFormerSwin"),
        ("swin", "Swin"),
        ("swin2sr", "Swin2SR"),
        ("swinv2", "Swinv2"),
    )
}


def layers_with_folded_rows(model: nn.Module) -> set[str]:
    """Returns the paths of modules whose inputs have windows folded into their rows."""
    return {
        f"{path}.{below}" if below else path
        for path, module in model.named_modules()
        if f"{type(module).__module__}.{type(module).__qualname__}" in _WINDOWED
        for below, _ in module.named_modules()
    }


_BIASED = {
    f"{_MODELS}.{family}.modeling_{family}.{stem}Attention"
    for family, stem in (
        ("mt5", "MT5"),
        ("pop2piano", "Pop2Piano"),
        ("switch_transformers", "SwitchTransformers"),
        ("t5", "T5"),
        ("umt5", "UMT5"),
    )
}


def has_shared_bias(module: nn.Module) -> bool:
    """Whether a module adds a bias by relative position to its scores, one for all rows."""
    cls, table = type(module), getattr(module, "relative_attention_bias", None)
    return f"{cls.__module__}.{cls.__qualname__}" in _BIASED and type(table) is nn.Embedding


@functools.cache
def with_bias_per_row(cls: type[nn.Module]) -> type[nn.Module]:
    """Returns a subclass whose bias by position has a row for each of a stacked call, ``(rows, heads, q, k)``.

    In T5 the bias comes from a table, which an adapter makes another one for each finetune.
    """

    def compute_bias(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        table = self.relative_attention_bias
        if table._ft.call.stack is None:
            return cls.compute_bias(self, *args, **kwargs)  # type: ignore[attr-defined]
        asked = _Asked(self)
        cls.compute_bias(asked, *args, **kwargs)  # type: ignore[attr-defined]
        values = table(asked.places.flatten())  # (rows, q * k, heads), if it has parameters per finetune
        bias = values.unflatten(-2, asked.places.shape).movedim(-1, -3)
        return bias if bias.ndim == 4 else bias.unsqueeze(0)

    return type(cls.__name__, (cls,), {"compute_bias": compute_bias, "__module__": cls.__module__})


class _Asked:
    """A stand-in for an attention module that notes which places of its table are looked up."""

    def __init__(self, attention: Any) -> None:
        self._attention = attention
        self.places = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)

    def relative_attention_bias(self, places: Tensor) -> Tensor:
        self.places = places
        return torch.zeros(*places.shape, 1, device=places.device)


class _BoundedRoot(torch.autograd.Function):
    """RecurrentGemma's square root, whose derivative is at most 1000; its own predates torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] / (4.0 * x).clip(min=1e-6).sqrt()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangents[0] / (4.0 * x).clip(min=1e-6).sqrt()


def has_unmapped_root(module: nn.Module) -> bool:
    """Whether a module is RecurrentGemma's recurrence."""
    cls = type(module)
    name = f"{_MODELS}.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRglru"
    return f"{cls.__module__}.{cls.__qualname__}" == name


@functools.cache
def with_mapped_root(cls: type[nn.Module]) -> type[nn.Module]:
    """Returns a subclass with the same forward, word for word, in which that square root is ours."""
    own: Any = cls.forward
    names = {**own.__globals__, "SqrtBoundDerivative": _BoundedRoot}
    compute = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._ft_call.pure:
            return compute(self, *args, **kwargs)
        self.recurrent_states = None  # it keeps its last state, which a pure call neither takes nor leaves
        try:
            return compute(self, *args, **kwargs)
        finally:
            self.recurrent_states = None

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def leave_weights_alone(skeleton: nn.Module) -> None:
    """Switches off RWKV's division of its own weights, in place, at the first call in eval mode.

    It guards against overflow in 16 bits and cancels out. Of a model that has run before, the weights are divided
    already, and then it stays on.
    """
    for module in skeleton.modules():
        if getattr(module, "layers_are_rescaled", True) is False:
            module.config.rescale_every = 0  # type: ignore[union-attr]


def leave_ties_alone(module: nn.Module) -> None:
    """Empties the lists of weights that ``tie_weights`` ties, which evaluation harnesses call.

    What is tied is one tensor already, and a finetune may have untied its head.
    """
    for own in module.modules():
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            if getattr(own, name, None):
                setattr(own, name, {})


def cap_scores(skeleton: nn.Module) -> None:
    """Chooses eager attention for models that cap their scores, which torch's fused kernel does not.

    Older transformers called the kernel all the same, without the cap.
    """
    for module in skeleton.modules():
        config = getattr(module, "config", None)
        fused = getattr(config, "_attn_implementation", None) == "sdpa"
        if fused and getattr(config, "attn_logit_softcapping", None) is not None:
            config._attn_implementation = "eager"  # type: ignore[union-attr]


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
        ("gpt2", "GPT2Model"),
        ("gpt_neox", "GPTNeoXModel"),
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
    if any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "output_router_logits")):
        return None  # windows, or a loss of the router, which leaves out the tokens that a mask of two axes hides
    if any(value is not None for name, value in kwargs.items() if name not in ("input_ids", "use_cache")):
        return None
    ids = kwargs.get("input_ids", args[0] if len(args) == 1 else None)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 2 or kwargs.get("use_cache"):
        return None
    length = ids.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()[None, None]


# Families whose rows never meet: a row of a batch comes out the same whatever the others are. That is said of those
# that the conformance suite runs; a model may well send tokens where there is room (NLLB-MoE), clamp all rows if one
# has an infinite number (T5, BART, in float16), or ask of a mask how many rows there are (Mamba).
_ROWS_APART = """
    albert bert bloom cohere deepseek_v3 distilbert electra falcon gemma gemma2 gemma3 glm glm4 glm4_moe gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe helium llama llama4 mistral mixtral modernbert mpt
    olmo olmo2 olmoe opt phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe roberta smollm3 stablelm starcoder2 xglm
"""
_ROWS_OF_INPUTS: dict[str, tuple[int, ...]] = {
    "input_ids": (2,),
    "inputs_embeds": (3,),
    "attention_mask": (2, 4),
    "position_ids": (2,),
    "token_type_ids": (2,),
}
_HARMLESS = {"return_dict", "output_hidden_states", "logits_to_keep"}


def keeps_rows_apart(model: nn.Module) -> bool:
    """Returns whether a model surely computes each row of a batch by itself: a known one, with no code of others."""
    package, _, family = type(model).__module__.rpartition(".")[0].rpartition(".")
    if package != _MODELS or family not in _ROWS_APART.split():
        return False
    roots = {type(module).__module__.partition(".")[0] for module in model.modules()}
    first = list(inspect.signature(type(model).forward).parameters)[:2]
    return roots <= {"torch", "transformers", __package__} and first == ["self", "input_ids"]


def is_divided_by_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Returns whether all inputs of such a model surely have its rows as their first axis, and none is its state."""
    if len(args) > 1 or (args and "input_ids" in kwargs):
        return False
    inputs = {**dict(zip(("input_ids",), args, strict=False)), **kwargs}
    batches = set()
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if value.ndim not in _ROWS_OF_INPUTS.get(name, ()):
                return False
            batches.add(value.shape[0])
        elif value is not None and value is not False and not (name in _HARMLESS and isinstance(value, int)):
            return False
    return len(batches) == 1 and 0 not in batches


def records_inside_blocks() -> bool:
    """Returns whether a running model collects by hooks what is inside its blocks: attentions, router logits."""
    if torch.compiler.is_compiling():
        return False
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    return any("hidden_states" not in name for name in (collector and collector.get()) or ())


def has_mask(inputs: dict[str, Any]) -> bool:
    """Returns whether an attention mask is among the keyword inputs."""
    return any(name.endswith("attention_mask") and isinstance(mask, Tensor) for name, mask in inputs.items())


def with_mappable_mask(module: nn.Module, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Returns the inputs with the 2-D padding mask in a form that transformers takes under ``vmap``.

    There, transformers' preparation of a mask may ask whether it is all ones, a branch on a value that
    differs between samples. For attention in both directions it gets a 4-D additive mask, which it takes as
    it is (one per type of layer where some attend within windows). Recurrent layers take the mask itself,
    which then answers that it is not all ones. Causal attention does not ask, when it is eager.

    Args:
        module: The model (its skeleton).
        inputs: Keyword inputs; ``attention_mask`` is ``(batch, length)``, 1 where a token is real.
        dtype: Of the model's activations.

    Raises:
        NotImplementedError: A bidirectional model with other kinds of attention beside windows.
    """
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return inputs
    if _makes(module, "create_recurrent_attention_mask"):
        return {**inputs, "attention_mask": UnaskedMask(mask)}
    if not _is_bidirectional(module) or _makes(module, "LongformerModel"):  # which makes a 2-D mask of it again
        return inputs
    real = (mask != 0)[:, None, None, :]
    masks: dict[str, Tensor] = {"full_attention": _additive(real, dtype)}
    config: Any = getattr(module, "config", None)
    layer_types = [getattr(getattr(child, "config", None), "layer_types", None) or () for child in module.modules()]
    kinds = {kind for types in layer_types for kind in types} or set(masks)
    if kinds == masks.keys():
        return {**inputs, "attention_mask": masks["full_attention"]}
    window = getattr(config, "sliding_window", None)
    two_sided = getattr(config, "is_encoder_decoder", False)  # whose one mask serves two stacks of layers
    if two_sided or window is None or kinds - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(
            f"{type(module).__name__} has layers of types {sorted(kinds)}, whose masks cannot be made outside of it "
            "under torch.func.vmap; use ft.apply_stacked, or a loop over ft.apply."
        )
    place = torch.arange(mask.shape[1], device=mask.device)
    near = (place[:, None] - place).abs() <= window
    masks["sliding_attention"] = _additive(real & near, dtype)
    return {**inputs, "attention_mask": masks}


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


class UnaskedMask:
    """A padding mask that takes itself to contain padding when it is compared; in all else the tensor."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mask, name)

    def __getitem__(self, index: Any) -> Tensor:
        return self._mask[index]

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        return torch.zeros((), dtype=torch.bool, device=self._mask.device)

    __hash__ = None  # type: ignore[assignment]


def _makes(module: nn.Module, mask_function: str) -> bool:
    """Whether the model's own source file uses one of transformers' functions that make masks."""
    return any(hasattr(sys.modules.get(cls.__module__), mask_function) for cls in type(module).__mro__)


def _is_bidirectional(module: nn.Module) -> bool:
    """Whether ``attention_mask`` is for attention in both directions: encoders, and those with a decoder."""
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return True
    makes_bidirectional = _makes(module, "create_bidirectional_mask")
    return makes_bidirectional and not any(
        getattr(child, "is_causal", False) is True or getattr(child, "is_decoder", False) is True
        for child in module.modules()
    )
