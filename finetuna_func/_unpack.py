"""Packed modules: taken apart into ordinary layers, so that each matrix is quantized and adapted by itself.

torch's ``MultiheadAttention`` keeps q, k and v in one parameter, transformers' mixtures of experts
(`_experts.py`) keep all experts in 3-D parameters, and bitsandbytes' 8-bit layers hold codes where others
hold weights. Each has a stand-in made of ``nn.Linear`` and ``nn.Embedding``, on views of the same
storage; it takes the module's place in a shadow of the model that shares every tensor, and so in
the skeleton. The user's model is not touched.

    attention.in_proj_weight (3 d, d)  ->  attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetuna_func._filters import join_name
from finetuna_func._types import Params, WeightForm


@dataclass(frozen=True)
class Packing:
    """How a parameter of the user's model is put together again.

    Attributes:
        parts: Names of the parameters it was taken apart into.
        join: Puts them together: ``torch.stack``, ``torch.cat``, or ``torch.stack`` of the transposed parts.
    """

    parts: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor]


Unpacked = tuple[nn.Module, dict[str, Packing]]
Unpacker = Callable[[nn.Module], Unpacked | None]
_REGISTRY: dict[type | str, Unpacker] = {}


def register_unpacker(cls: type[nn.Module] | str, unpacker: Unpacker) -> None:
    """Makes a function the way to take a class of modules apart.

    Args:
        cls: The class, matched exactly, or its qualified name.
        unpacker: Returns a stand-in and how its parameters are packed again, or ``None`` to leave a module whole.
    """
    _REGISTRY[cls] = unpacker


def unpacked(model: nn.Module) -> tuple[nn.Module, Mapping[str, Packing]]:
    """Returns a shadow of the model without packed modules, on the same tensors, and how to pack them.

    The model itself if it has none.
    """
    found = [(path, module) for path, module in model.named_modules() if _unpacker(module) is not None]
    if not found:
        return model, {}
    tensors: dict[int, Any] = {id(leaf): leaf for leaf in itertools.chain(model.parameters(), model.buffers())}
    for _, module in found:
        if hasattr(module, "state"):  # bitsandbytes keeps a second reference to its codes here
            tensors[id(module.state)] = module.state
    shadow = copy.deepcopy(model, tensors)
    packings: dict[str, Packing] = {}
    for path, module in found:
        unpack = _unpacker(module)
        result = None if unpack is None else unpack(shadow.get_submodule(path))
        if result is None:
            continue
        stand_in, own = result
        packings.update(
            {
                join_name(path, name): Packing(tuple(join_name(path, part) for part in packing.parts), packing.join)
                for name, packing in own.items()
            }
        )
        if not path:
            return stand_in, packings
        parent, _, name = path.rpartition(".")
        setattr(shadow.get_submodule(parent), name, stand_in)
    return shadow, packings


def ready_codes(module: nn.Module) -> Params | None:
    """Returns the int8 leaves of a stand-in for a layer that was quantized already, by suffix."""
    return getattr(module, "_ft_codes", None)


def _unpacker(module: nn.Module) -> Unpacker | None:
    cls = type(module)
    return _REGISTRY.get(cls) or _REGISTRY.get(f"{cls.__module__}.{cls.__qualname__}")


def linear_on(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Returns an ordinary layer on given tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


# --- torch's attention


class UnpackedAttention(nn.Module):
    """``nn.MultiheadAttention`` with a layer each for q, k, v and the output; attention in plain torch ops."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        d = attention.embed_dim
        packed = attention.in_proj_weight
        weights = (
            packed.split(d)
            if packed is not None
            else (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        )
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.split(d)
        self.q_proj, self.k_proj, self.v_proj = (linear_on(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = linear_on(attention.out_proj.weight, attention.out_proj.bias)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            layer._ft_form = WeightForm(beyond_peft="layers inside nn.MultiheadAttention")  # type: ignore[assignment]
        self.embed_dim, self.num_heads = d, attention.num_heads
        self.batch_first = attention.batch_first
        # What torch's Transformer layers ask before they take a fast path on the packed weights.
        self.in_proj_bias, self._qkv_same_embed_dim = None, False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns what ``nn.MultiheadAttention`` returns, ``is_causal`` being a hint as there."""
        batched = query.ndim == 3
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if batched and not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        # (..., length, d) -> (..., heads, length, d / heads)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for t in (q, k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if attn_mask is not None:
            if attn_mask.ndim == 3 and batched:  # (batch * heads, L, S)
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
            scores = scores + _additive(attn_mask, scores.dtype)
        if key_padding_mask is not None:
            scores = scores + _additive(key_padding_mask, scores.dtype).unsqueeze(-2).unsqueeze(-2)
        weights = F.softmax(scores, dim=-1)
        out = self.out_proj((weights @ v).transpose(-3, -2).flatten(-2))
        if batched and not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        return out, weights.mean(-3) if average_attn_weights else weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores; a boolean one is true where attention is forbidden."""
    if mask.dtype == torch.bool:
        return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
    return mask.to(dtype)


def _unpack_attention(attention: nn.Module) -> Unpacked | None:
    assert isinstance(attention, nn.MultiheadAttention)
    if attention.bias_k is not None or attention.add_zero_attn:
        return None  # extra keys beside the projections; such a module stays in float
    parts = ("q_proj", "k_proj", "v_proj")
    packings: dict[str, Packing] = {}
    if attention.in_proj_weight is not None:
        packings["in_proj_weight"] = Packing(tuple(f"{part}.weight" for part in parts), torch.cat)
    else:
        packings.update({f"{part}_weight": Packing((f"{part}.weight",), torch.cat) for part in parts})
    if attention.in_proj_bias is not None:
        packings["in_proj_bias"] = Packing(tuple(f"{part}.bias" for part in parts), torch.cat)
    return UnpackedAttention(attention), packings


register_unpacker(nn.MultiheadAttention, _unpack_attention)


# --- bitsandbytes


def _take_over_linear(module: nn.Module) -> Unpacked:
    weight: Any = module.weight
    stand_in = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=_float_dtype(module))
    bias = module._parameters.get("bias")
    if bias is not None:
        stand_in.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return _with_codes(stand_in, module), {}


def _take_over_embedding(module: nn.Module) -> Unpacked:
    weight: Any = module.weight
    stand_in = nn.Embedding(*weight.shape, padding_idx=module.padding_idx, device="meta", dtype=_float_dtype(module))  # type: ignore[arg-type]
    return _with_codes(stand_in, module), {}


def _with_codes(stand_in: nn.Module, module: nn.Module) -> nn.Module:
    """Gives the stand-in LLM.int8()'s codes and scales, which are ours but for the factor 127; nothing is rounded."""
    weight: Any = module.weight
    state = getattr(module, "state", None)
    scale = getattr(weight, "SCB", None)
    scale = scale if scale is not None else getattr(state, "SCB", None)
    if weight.dtype != torch.int8 or scale is None:
        raise ValueError(
            f"model: a {type(module).__name__} is not quantized yet (bitsandbytes does that when it is moved to its "
            "device); call .to(device) on the model first, or pass the float model."
        )
    # Copies, since bitsandbytes' module may go on living.
    stand_in._ft_codes = {"": weight.detach().clone(), "_scale": scale.detach().float() / 127.0}  # type: ignore[assignment]
    return stand_in


def _float_dtype(module: nn.Module) -> torch.dtype:
    bias = module._parameters.get("bias")
    return bias.dtype if bias is not None else getattr(module, "compute_dtype", None) or torch.float32


for _path in ("bitsandbytes.nn.modules.Linear8bitLt", "bitsandbytes.nn.Linear8bitLt"):
    register_unpacker(_path, _take_over_linear)
register_unpacker("bitsandbytes.nn.modules.Embedding8bit", _take_over_embedding)
