"""Layer types: one small pure function per class of module, in a registry.

`register_layer` maps a class to a function ``(layer, leaves, *inputs) -> output`` that replaces its
``forward`` in the skeleton. ``leaves`` are the layer's tensors of this call: from the base
(``weight``, ``weight_scale``, ``bias``), from the finetune (``lora_a``, ``lora_b``, ``lora_bias``, or
a float ``weight`` of its own) and constants (``lora_scale``, ``lora_dropout``, ``dropout_key``).
``layer`` is the skeleton's module, for its static attributes.

Classes match exactly (``type(m) is T``), since a subclass may override ``forward``; an unregistered
subclass keeps its own forward, in float.

A *stack* is a call over N finetunes without ``vmap``: leaves of the finetune have a leading axis N,
activations are ``(N * B, ...)``, the frozen product sees all rows at once and the adapters are
batched products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack  # type: ignore[import-not-found]

from finetuna_func import _random, kernels
from finetuna_func._levels import inside_transform
from finetuna_func._low_rank import with_low_rank
from finetuna_func._ops import compute_dtype, frozen_matmul
from finetuna_func._products import adapted_products
from finetuna_func._quant import SUFFIXES, Int8, Scheme
from finetuna_func._types import AdapterKind

Leaves = Mapping[str, Tensor]
LayerFunction = Callable[..., Tensor]
Fn = TypeVar("Fn", bound=LayerFunction)
T = TypeVar("T")

LEAF_NAMES = (
    *("weight" + suffix for suffix in SUFFIXES if suffix),
    "lora_a",
    "lora_b",
    "lora_bias",
    "lora_scale",
    "lora_dropout",
    "lora_magnitude",
    "lora_weight_norm",
    "lora_a0",
    "lora_b0",
    "dropout_key",
)
"""Leaves that a layer may receive beside its own parameters and buffers."""


@dataclass(frozen=True)
class LayerType:
    """How a class of modules is reinterpreted.

    Attributes:
        forward: The pure function.
        adapter: Which adapter fits on it; ``None`` if it takes none.
        transposed: Whether the float weight is stored as ``(in, out)``.
        convolution: Whether ``weight`` is a convolution's kernel: kept in float, adapted only if named,
            and to an adapter the matrix ``(out, in * kernel)``.
        extends: For a class that keeps its own forward, the registered class whose forward it calls.
    """

    forward: LayerFunction
    adapter: AdapterKind | None
    transposed: bool = False
    convolution: bool = False
    extends: type[nn.Module] | None = None


Part = Literal["all", "body", "head"]
SharedProducts = dict[str, tuple[Tensor, Any]]
Context = Callable[[], AbstractContextManager[Any]]
CallState = tuple[Any, ...]  # the fields of a `Call`, but for `running`


@dataclass
class Call:
    """What a call on one thread's skeleton knows that is not a tensor; shared by its layers."""

    stack: int | None = None
    rows: int = 0  # N * B, the leading axis of every activation of a stacked call
    inputs: tuple[tuple[int, ...], ...] = ()  # shapes of the inputs without (N, B), such as (T,)
    pure: bool = True  # whether a call runs at all, and not a module that `to_module` gave away
    remat: bool = False  # whether blocks are computed again in the backward pass
    compile: bool = False  # whether blocks are compiled
    fused: bool = False  # whether this is a block that is compiled
    kernels: bool = False  # whether it may use Triton kernels
    part: Part = "all"  # of a model with a head: the body without the head, or the head without the body
    body_output: Any = None  # what the body returned, or stands for what it returns
    causal: Tensor | None = None  # a mask that blocks take for none: see `_hf.causal_mask`
    within: Context = nullcontext  # what the model's code runs in
    seen: set[str] = field(default_factory=set)  # layers whose forward ran
    draws: dict[str, int] = field(default_factory=dict)  # dropout masks drawn so far, by layer
    shared: SharedProducts = field(default_factory=dict)  # input and product, for a sibling, by layer
    running: list[str] | None = None  # layers whose forward runs now, the innermost last, if anybody asks

    def begin(self, **fields: Any) -> CallState:
        """Starts a call with these fields and the others as they are by default; returns what `restore` takes."""
        return self._exchange(Call(**fields)._state())

    def restore(self, state: CallState) -> None:
        """Ends a call."""
        for name, value in zip(_CALL_FIELDS, state, strict=True):
            setattr(self, name, value)

    def of_block(self, path: str, representative: str, *, fused: bool = False, kernels: bool = False) -> Call:
        """Returns what a block knows that runs through its representative: its draws so far under those paths."""
        draws = {representative + own[len(path) :]: n for own, n in self.draws.items() if _is_below(own, path)}
        of_all = Call(self.stack, self.rows, self.inputs, self.pure, within=self.within, draws=draws)
        return replace(of_all, fused=fused, kernels=kernels)

    def enter(self, block: Call) -> CallState:
        """Starts what `of_block` describes, each time anew; returns what `restore` takes at its end."""
        return self._exchange(replace(block, seen=set(), draws=dict(block.draws), shared={})._state())

    def without_blocks(self) -> CallState:
        """Starts the same call anew, with blocks that run like other modules; returns what `restore` takes."""
        again = replace(self, remat=False, compile=False, seen=set(), draws={}, shared={})
        return self._exchange(again._state())

    def _state(self) -> CallState:
        return tuple(getattr(self, name) for name in _CALL_FIELDS)

    def _exchange(self, state: CallState) -> CallState:
        before = self._state()
        self.restore(state)
        return before

    def after_block(self, path: str, representative: str, seen: set[str], draws: dict[str, int]) -> None:
        """Takes over what happened in a block, under its own paths."""
        self.seen |= {path + own[len(representative) :] for own in seen}
        self.draws.update({path + own[len(representative) :]: count for own, count in draws.items()})

    def divided(self, path: str, x: Tensor, *, folded: bool = False, listed: bool = False) -> Tensor:
        """Returns an input of a layer with parameters per finetune, with a leading axis that divides by rows.

        An input that all rows share, with a leading axis of 1 (positions, say), gets a row each.

        Args:
            path: The layer.
            x: Its input.
            folded: Whether the model is known to fold another axis into the rows, as windows of an image.
            listed: Whether an input of one axis is a list that all rows share, such as positions ``(T,)``.

        Raises:
            ValueError: The leading axis is something else.
        """
        # Tokens as rows, as in mixtures of experts.
        flattened = any(x.shape[0] == self.rows * shape[0] for shape in self.inputs if shape and shape[0] > 1)
        # One number per row can only come from an input of one number per row; otherwise it is a list of positions.
        per_row = x.shape[0] == self.rows and (x.ndim > 1 or () in self.inputs)
        if per_row or flattened or (folded and x.shape[0] % self.rows == 0):
            return x
        if listed and x.ndim == 1:
            return x.expand(self.rows, *x.shape)
        if x.ndim > 1 and x.shape[0] == 1 and self.rows not in x.shape[1:]:
            return x.expand(self.rows, *x.shape[1:])
        raise ValueError(
            f"apply_stacked: layer {path!r} has parameters per finetune but got an input of shape {tuple(x.shape)}, "
            f"whose leading axis is not the {self.rows} rows of the call (finetunes times batch): the model shares it "
            "between rows, or puts another axis first. Use torch.func.vmap over ft.apply, or leave this layer out of "
            "adapt_layers and plain_layers."
        )

    def key_for(self, path: str, key: Tensor) -> Tensor:
        """Returns the key of a layer's next mask: a layer that runs twice in a call draws two."""
        count = self.draws.get(path, 0)
        self.draws[path] = count + 1
        return _random.fold_in(key, count) if count else key


_CALL_FIELDS = tuple(own.name for own in fields(Call) if own.name != "running")


@dataclass
class Binding:
    """What a layer of the skeleton carries: static facts and the shared `Call`."""

    path: str
    type: LayerType
    scheme: Scheme
    dtype: torch.dtype
    weight_shape: tuple[int, ...]  # of the float weight, as the user's model holds it
    call: Call = field(default_factory=Call)
    own_ndims: Mapping[str, int] = field(default_factory=dict)
    folded: bool = False  # whether its inputs have further axes folded into the rows
    siblings: tuple[nn.Module, ...] = ()  # other layers that get the same input


_REGISTRY: dict[type | str, LayerType] = {}


def register_layer(
    cls: type[nn.Module] | str,
    *,
    adapter: AdapterKind | None = None,
    transposed: bool = False,
    convolution: bool = False,
) -> Callable[[Fn], Fn]:
    """Returns a decorator that makes a function the reinterpretation of a class of modules.

    Args:
        cls: The class, matched exactly; or its qualified name, so that it need not be imported.
        adapter: ``"linear"`` or ``"embedding"`` if the class has a matrix ``weight`` that can be
            quantized and adapted; ``None`` for a layer that is only reinterpreted.
        transposed: Whether ``weight`` is stored as ``(in, out)``.
        convolution: Whether ``weight`` is a convolution's kernel ``(out, in, ...)``, which stays in float.

    Raises:
        ValueError: The class is registered already.

    Example:
        >>> class Doubled(nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> @register_layer(Doubled, adapter="linear")
        ... def doubled(layer, leaves, x):
        ...     return 2 * linear(layer, leaves, x)
    """
    if cls in _REGISTRY:
        raise ValueError(f"register_layer: {cls} is registered already.")
    if adapter not in (None, "linear", "embedding"):
        raise ValueError(f"register_layer(adapter={adapter!r}): expected 'linear', 'embedding' or None.")

    def decorator(function: Fn) -> Fn:
        _REGISTRY[cls] = LayerType(function, adapter, transposed, convolution)
        return function

    return decorator


def register_subclass(cls: type[nn.Module] | str, of: type[nn.Module]) -> None:
    """Declares that a subclass's forward is right as it is, once ``super().forward`` is reinterpreted.

    For a forward that prepares its inputs (positions from a mask) or scales the result, and never
    computes with ``self.weight`` itself; what it may ask are dtype, shape and device.

    Args:
        cls: The subclass, or its qualified name.
        of: The registered class that it extends.

    Raises:
        ValueError: ``cls`` is registered already, or ``of`` is not.

    Example:
        >>> class Shifted(nn.Embedding):
        ...     def forward(self, ids):
        ...         return super().forward(ids + 1)
        >>> register_subclass(Shifted, of=nn.Embedding)
    """
    if cls in _REGISTRY:
        raise ValueError(f"register_subclass: {cls} is registered already.")
    if of not in _REGISTRY:
        raise ValueError(f"register_subclass(of={of}): not a registered class; register it with register_layer.")
    _REGISTRY[cls] = replace(_REGISTRY[of], extends=of)


def seen_weight(module: nn.Module) -> Tensor | None:
    """Returns what others see as a layer's ``weight``: a float tensor, whatever the layer holds.

    Models ask for dtype, shape or device of a layer below them, to cast what they hand to it. In place of
    codes they get a tensor without storage that answers as the float weight would, and is NaN throughout:
    its numbers are the layer's own matter.
    """
    leaf = module._parameters["weight"]
    if leaf is None or leaf.is_floating_point():
        return leaf
    binding: Binding = module._ft  # type: ignore[assignment]
    seen = torch.full((), torch.nan, dtype=binding.dtype, device=leaf.device).expand(binding.weight_shape)
    if not torch.compiler.is_compiling():
        seen._ft_codes = leaf  # type: ignore[attr-defined] # by which a use of it is known, see `_reads`
    return seen


def layer_type(module: nn.Module) -> LayerType | None:
    """Returns how a module is reinterpreted, or ``None`` if its class is not registered."""
    cls = type(module)
    return _REGISTRY.get(cls) or _REGISTRY.get(f"{cls.__module__}.{cls.__qualname__}")


@register_layer(nn.Linear, adapter="linear")
def linear(layer: nn.Module, leaves: Leaves, x: Tensor) -> Tensor:
    """Returns what ``nn.Linear`` would, ``(..., out)``, on an 8-bit or float weight, plus the adapter.

    The building block for `register_layer`: it knows all formats, LoRA, DoRA, dropout and stacks.

    Args:
        layer: The layer, as the registered function got it.
        leaves: Its tensors, likewise: ``weight``, perhaps ``bias``, and what belongs to the adapter.
        x: ``(..., in)``, floating point.

    Example:
        >>> class Halved(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x) / 2
        >>> @register_layer(Halved, adapter="linear")
        ... def halved(layer, leaves, x):
        ...     return linear(layer, leaves, x) / 2
        >>> model = nn.Sequential(Halved(8, 4))
        >>> base, tuned = new_finetuned(model)
        >>> base.params["0.weight"].dtype, apply(base, tuned, torch.ones(3, 8)).shape
        (torch.int8, torch.Size([3, 4]))
    """
    x = _to_rows(layer, leaves, x)
    if "lora_magnitude" in leaves:
        return _dora(layer, leaves, x)
    if _is_fused(layer, leaves):
        return _fused(layer, leaves, x)
    return _adapted(layer, leaves, x)


@register_layer("transformers.pytorch_utils.Conv1D", adapter="linear", transposed=True)
def conv1d(layer: nn.Module, leaves: Leaves, x: Tensor) -> Tensor:
    """GPT-2's ``Conv1D``: a linear layer whose float weight is stored as ``(in, out)``."""
    return linear(layer, leaves, x)


@register_layer(nn.Embedding, adapter="embedding")
def embedding(layer: nn.Module, leaves: Leaves, ids: Tensor) -> Tensor:
    """Returns what ``nn.Embedding`` would, ``(..., width)``, on an 8-bit or float table, plus LoRA.

    Like `linear`, a building block for `register_layer`.

    Args:
        layer: The layer, as the registered function got it.
        leaves: Its tensors, likewise.
        ids: ``(...)``, integers.
    """
    ids = _to_rows(layer, leaves, ids)
    binding: Binding = layer._ft  # type: ignore[assignment]
    weight = leaves["weight"]
    padding = getattr(layer, "padding_idx", None)
    by_frequency = bool(getattr(layer, "scale_grad_by_freq", False))
    if not weight.is_floating_point():
        y = binding.scheme.rows(ids, binding.dtype, *_quantized(leaves, binding.scheme))
    elif weight.ndim == 3:  # a table per finetune
        per_finetune = torch.func.vmap(lambda i, w: _lookup(i, w, padding, by_frequency))
        y = _fold(per_finetune(_unfold(ids, binding.call), weight))
    else:
        y = _lookup(ids, weight, padding, by_frequency)
    if "lora_a" not in leaves:
        return y
    a, b, scale = (leaves[name].to(y.dtype) for name in ("lora_a", "lora_b", "lora_scale"))
    if a.ndim == 2:
        return y + (_lookup(ids, a.T, padding) * scale) @ b.T
    flat = _unfold(ids, binding.call).reshape(a.shape[0], 1, -1)
    low = a.gather(2, flat.expand(-1, a.shape[1], -1))  # (N, r, rows), straight from A as it is stored
    if padding is not None:
        low = torch.where(flat == padding, low.detach(), low)
    low = low * scale.reshape(-1, 1, 1)
    return torch.baddbmm(y.reshape(a.shape[0], -1, y.shape[-1]), low.mT, b.mT).reshape(y.shape)


@register_layer(nn.Conv1d, adapter="linear", convolution=True)
@register_layer(nn.Conv2d, adapter="linear", convolution=True)
def convolution(layer: nn.Module, leaves: Leaves, x: Tensor) -> Tensor:
    """``nn.Conv1d`` and ``nn.Conv2d``, plus LoRA: A is a convolution to r channels, B one of kernel size 1."""
    binding: Binding = layer._ft  # type: ignore[assignment]
    x = _to_rows(layer, leaves, x)
    dropped = x
    if _is_dropped(leaves):
        dropped = _dropout(layer, leaves, x, leaves["lora_dropout"])
    dims = {name: 0 for name, leaf in leaves.items() if _is_stacked(binding, name, leaf)}
    if binding.call.stack is None or not dims:
        return _convolve(layer, leaves, x, dropped)
    x, dropped = _unfold(x, binding.call), _unfold(dropped, binding.call)
    leaves = {name: leaf for name, leaf in leaves.items() if name != "dropout_key"}
    in_dims = {name: 0 if name in dims or name.startswith("lora_") else None for name in leaves}
    per_finetune = torch.func.vmap(lambda own, *xs: _convolve(layer, own, *xs), in_dims=(in_dims, 0, 0))
    return _fold(per_finetune(leaves, x, dropped))


def _convolve(layer: nn.Module, leaves: Leaves, x: Tensor, dropped: Tensor) -> Tensor:
    binding: Binding = layer._ft  # type: ignore[assignment]
    x = x.to(compute_dtype(x))
    weight, bias = leaves["weight"].to(x.dtype), leaves.get("bias")
    y = layer._conv_forward(x, weight, None if bias is None else bias.to(x.dtype))  # type: ignore[operator]
    if "lora_a" not in leaves:
        return y
    a, b = (factor.to(x.dtype) for factor in effective_factors(leaves))
    low = layer._conv_forward(dropped.to(x.dtype), a.unflatten(1, weight.shape[1:]), None)  # type: ignore[operator]
    channels = 1 - len(binding.weight_shape)
    update = torch.matmul(low.movedim(channels, -1), b.mT)
    if "lora_bias" in leaves:
        update = update + leaves["lora_bias"].to(x.dtype)
    return y + leaves["lora_scale"].to(x.dtype) * update.movedim(-1, channels)


def _lookup(ids: Tensor, table: Tensor, padding: int | None, by_frequency: bool = False) -> Tensor:
    y = F.embedding(ids, table, scale_grad_by_freq=by_frequency)
    if padding is None:
        return y
    # Not F.embedding's padding_idx: its vmap rule masks the row of the first finetune alone.
    return torch.where((ids == padding).unsqueeze(-1), y.detach(), y)


@register_layer(nn.Dropout)
def keyed_dropout(layer: nn.Module, leaves: Leaves, x: Tensor) -> Tensor:
    """``nn.Dropout`` drawn from the call's key; the identity when there is none."""
    if "dropout_key" not in leaves:
        return x
    return _dropout(layer, leaves, x, layer.p)


def _is_below(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def inside_vmap() -> bool:
    """Returns whether a ``torch.func.vmap`` is active."""
    return any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ())


def float_weight(layer_type: LayerType, weight: Tensor) -> Tensor:
    """Returns a float weight as the matrix ``(out, in)``; its own inverse, but for convolutions."""
    if layer_type.convolution:
        return weight.flatten(1)
    return weight.mT if layer_type.transposed else weight


def _affine(layer: nn.Module, leaves: Leaves, x: Tensor) -> Tensor:
    """The frozen or plain part: ``x @ W.T + bias``."""
    binding: Binding = layer._ft  # type: ignore[assignment]
    weight, bias = leaves["weight"], leaves.get("bias")
    if not weight.is_floating_point():
        y = frozen_matmul(x, binding.scheme, *_quantized(leaves, binding.scheme))
        return y if bias is None else y + _per_row(bias.to(y.dtype), y, binding.call, 1)
    matrix = float_weight(binding.type, weight)
    # Explicitly, since under autocast torch's vmap rules leave the bias in its own dtype.
    x = x.to(compute_dtype(x))
    matrix, bias = matrix.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if matrix.ndim == 2 and (bias is None or bias.ndim == 1):
        return F.linear(x, matrix, bias)
    if matrix.ndim == 2:
        y = F.linear(x, matrix)
    else:
        y = torch.bmm(_unfold(x, binding.call).flatten(1, -2), matrix.mT).reshape(*x.shape[:-1], matrix.shape[-2])
    return y if bias is None else y + _per_row(bias.to(y.dtype), y, binding.call, 1)


def _adapted(layer: nn.Module, leaves: Leaves, x: Tensor) -> Tensor:
    """``x @ W.T + bias + lora_scale * (dropout(x) @ A.T @ B.T + lora_bias)``, the last product one with the sum."""
    if "lora_a" not in leaves:
        return _affine(layer, leaves, x)
    call: Call = layer._ft.call  # type: ignore[union-attr, assignment]
    recorded_at_most = not torch.compiler.is_compiling() and not inside_transform()
    if recorded_at_most and x.is_contiguous() and not _is_dropped(leaves):  # rows of other tensors are copies
        return _add_lora_bias(leaves, _adapted_in_place(layer, leaves, x), call)
    y = _affine(layer, leaves, x)
    low, b = _low_rank(layer, leaves, x, y.dtype), _scaled_b(leaves, y.dtype)
    if torch.compiler.is_compiling():
        out = _plus_by_rows(y, low, b)
    elif b.ndim == 2:
        out = torch.addmm(y.reshape(-1, y.shape[-1]), low.reshape(-1, low.shape[-1]), b.T).reshape(y.shape)
    else:
        out = torch.baddbmm(y.reshape(b.shape[0], -1, y.shape[-1]), low, b.mT).reshape(y.shape)
    return _add_lora_bias(leaves, out, call)


def _adapted_in_place(layer: nn.Module, leaves: Leaves, x: Tensor) -> Tensor:
    """The same where plain autograd alone records, if anything: no sum is a pass of its own, forward or backward."""
    own = x.to(compute_dtype(x))

    def products(group: list[tuple[Binding, Leaves]]) -> tuple[tuple[Tensor, Tensor], ...]:
        factors = [effective_factors(theirs)[0] for _, theirs in group]
        a = _on_top(factors).to(own.dtype)
        rows, low = with_low_rank(own.reshape(*a.shape[:-2], -1, own.shape[-1]), a)
        return tuple((rows, part) for part in low.split([factor.shape[-2] for factor in factors], dim=-1))

    rows, low = _with_siblings(layer, leaves, x, products)
    y, b = _affine(layer, leaves, rows), _scaled_b(leaves, own.dtype)
    if y._is_view():  # autograd would copy the cotangent of all of it
        y = torch.addmm(y, low, b.mT) if b.ndim == 2 else torch.baddbmm(y, low, b.mT)
    else:
        y = y.addmm_(low, b.mT) if b.ndim == 2 else y.baddbmm_(low, b.mT)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _scaled_b(leaves: Leaves, dtype: torch.dtype) -> Tensor:
    """``lora_scale * B``: not the product, which is larger, and rounded already."""
    b, scale = effective_factors(leaves)[1], leaves.get("lora_scale")  # which B may hold already: see `_factors`
    return (b if scale is None else b * scale.unsqueeze(-1).unsqueeze(-1)).to(dtype)


def _is_dropped(leaves: Leaves) -> bool:
    return "dropout_key" in leaves and "lora_dropout" in leaves


def _add_lora_bias(leaves: Leaves, y: Tensor, call: Call) -> Tensor:
    if "lora_bias" not in leaves:
        return y
    bias = leaves["lora_bias"].to(y.dtype) * leaves["lora_scale"].to(y.dtype).unsqueeze(-1)
    return y + _per_row(bias, y, call, 1)


def _is_fused(layer: nn.Module, leaves: Leaves) -> bool:
    """Whether a layer and its adapter run as one function: in a compiled block, on codes (floats it would copy)."""
    binding: Binding = layer._ft  # type: ignore[assignment]
    if not binding.call.fused or "lora_a" not in leaves or "dropout_key" in leaves or "lora_magnitude" in leaves:
        return False
    return not leaves["weight"].is_floating_point() and binding.scheme.linearised == binding.scheme


def divided_by_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Returns an input of a layer as its own forward takes it: in a stacked call, checked to be divided by rows."""
    return _to_rows(layer, leaves_of(layer), x)


def has_hooks(module: nn.Module) -> bool:
    """Returns whether a module has to run by itself, for those who watch it."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds)


def is_plain_linear(layer: Any) -> bool:
    """Returns whether a module of a skeleton is a linear layer that computes with its weight and does nothing else."""
    binding = getattr(layer, "_ft", None)
    return isinstance(binding, Binding) and binding.type.forward is linear and binding.type.extends is None


def fused_parts(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns the weight, A and ``scale * B`` of a layer for x, if these are all that its result depends on."""
    leaves = leaves_of(layer)
    if not _is_fused(layer, leaves) or "bias" in leaves or "lora_bias" in leaves:
        return None
    binding: Binding = layer._ft  # type: ignore[assignment]
    weight = binding.scheme.dequantize(x.dtype, *_quantized(leaves, binding.scheme))
    return weight, effective_factors(leaves)[0].to(x.dtype), _scaled_b(leaves, x.dtype)


def int8_codes(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Returns the codes of a layer's weight and the scales of their rows, if it is these, int8 and float32."""
    binding, leaves = layer._ft, leaves_of(layer)
    if not isinstance(binding, Binding) or type(binding.scheme) is not Int8:
        return None
    codes, scales = _quantized(leaves, binding.scheme)
    return (codes, scales) if scales.dtype == torch.float32 else None


def _fused(layer: nn.Module, leaves: Leaves, x: Tensor) -> Tensor:
    """The layer's product and its adapter's, made with those of its siblings, and biases."""
    call: Call = layer._ft.call  # type: ignore[union-attr, assignment]
    own = x.to(compute_dtype(x))

    def products(group: list[tuple[Binding, Leaves]]) -> tuple[Tensor, ...]:
        weights = [of.scheme.dequantize(own.dtype, *_quantized(theirs, of.scheme)) for of, theirs in group]
        a = _on_top([effective_factors(theirs)[0] for _, theirs in group]).to(own.dtype)
        bs = [_scaled_b(theirs, own.dtype) for _, theirs in group]
        use_kernels = call.kernels and kernels.fits(own, tuple(b.shape[-1] for b in bs))
        return adapted_products(own, a, weights, bs, use_kernels=use_kernels)

    y, bias = _with_siblings(layer, leaves, x, products), leaves.get("bias")
    y = y if bias is None else y + _per_row(bias.to(y.dtype), y, call, 1)
    return _add_lora_bias(leaves, y, call)


def _plus_by_rows(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """``y + low @ B.T``, for the compiler: as a sum, which what comes next takes up (``baddbmm`` copies y first).

    The product is of the rows ``(N * B, T, ...)`` that y has, with a B for each, so that the cotangent of y goes into
    products as it is. Of a view of it, inductor computes a copy for every product, a tenth of a step in all.
    """
    if y.ndim != 3 or y.shape[1] == 1:
        if b.ndim == 3:
            y_rows = y.reshape(b.shape[0], -1, y.shape[-1])
            return (y_rows + torch.bmm(low, b.mT)).reshape(y.shape)
        return y + torch.matmul(low, b.mT)
    rows = y.shape[0]
    each = b.mT if b.ndim == 3 else b.mT.unsqueeze(0)
    each = each.unsqueeze(1).expand(-1, rows // each.shape[0], -1, -1).reshape(rows, *each.shape[1:])
    return y + torch.bmm(low.reshape(rows, y.shape[1], low.shape[-1]), each)


def _low_rank(layer: nn.Module, leaves: Leaves, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``dropout(x) @ A.T``, ``(..., r)`` or ``(N, rows, r)``, in the dtype of the layer's own product.

    Layers that read the same input (queries, keys and values) share one product with their A's on top of one another.
    """
    if _is_dropped(leaves):
        dropped = _dropout(layer, leaves, x, leaves["lora_dropout"])
        return _times_factors(dropped, [effective_factors(leaves)[0]], dtype)[0]

    def products(group: list[tuple[Binding, Leaves]]) -> tuple[Tensor, ...]:
        return _times_factors(x, [effective_factors(theirs)[0] for _, theirs in group], dtype)

    return _with_siblings(layer, leaves, x, products)


def _with_siblings(
    layer: nn.Module,
    leaves: Leaves,
    x: Tensor,
    products: Callable[[list[tuple[Binding, Leaves]]], tuple[T, ...]],
) -> T:
    """The layer's own of ``products``, which the first of its siblings makes for all that are like it.

    It leaves the others' in the call. One that gets another input then makes its own.
    """
    binding: Binding = layer._ft  # type: ignore[assignment]
    shared = binding.call.shared
    given = shared.pop(binding.path, None)
    if given is not None and given[0] is x:
        return given[1]
    group = [(binding, leaves)]
    if given is None:
        fused = _is_fused(layer, leaves)
        for sibling in binding.siblings:
            theirs = leaves_of(sibling)
            if "lora_a" not in theirs or "dropout_key" in theirs or _is_fused(sibling, theirs) != fused:
                continue
            if _stack_up(theirs["lora_a"], leaves["lora_a"]):
                group.append((sibling._ft, theirs))  # type: ignore[arg-type]
    own, *others = products(group)
    for (of, _), other in zip(group[1:], others, strict=True):
        shared[of.path] = (x, other)
    return own


def _stack_up(a: Tensor, b: Tensor) -> bool:
    return a.ndim == b.ndim and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-1]


def _times_factors(x: Tensor, factors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """``x @ A.T`` for each A, computed in a given dtype, whatever they are stored in."""
    x = x.to(dtype)
    a = _on_top(factors).to(dtype)
    low = F.linear(x, a) if a.ndim == 2 else torch.bmm(x.reshape(a.shape[0], -1, x.shape[-1]), a.mT)
    return low.split([factor.shape[-2] for factor in factors], dim=-1) if len(factors) > 1 else (low,)


def _on_top(factors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(factors), dim=-2) if len(factors) > 1 else factors[0]


def leaves_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors that a layer of the skeleton holds during a call."""
    attributes = vars(module)
    leaves: dict[str, Tensor] = {name: leaf for name, leaf in module._parameters.items() if leaf is not None}
    leaves.update({name: attributes[name] for name in LEAF_NAMES if name in attributes})
    leaves.update({name: leaf for name, leaf in module._buffers.items() if leaf is not None})
    return leaves


def effective_factors(leaves: Leaves) -> tuple[Tensor, Tensor]:
    """Returns A and B, with the initial product subtracted where the adapter started from the weight."""
    a, b = leaves["lora_a"], leaves["lora_b"]
    if "lora_a0" not in leaves:
        return a, b
    return torch.cat([a, leaves["lora_a0"].to(a.dtype)], -2), torch.cat([b, -leaves["lora_b0"].to(b.dtype)], -1)


def _dora(layer: nn.Module, leaves: Leaves, x: Tensor) -> Tensor:
    """``magnitude / ||W + update|| * (x @ (W + update).T) + bias``, the norm by rows and without a derivative."""
    binding: Binding = layer._ft  # type: ignore[assignment]
    without_bias = {name: leaf for name, leaf in leaves.items() if name != "bias"}
    y = _adapted(layer, without_bias, x)
    a, b = (factor.detach() for factor in effective_factors(leaves))
    through_weight = _through_weight(binding, leaves, a)
    ratio = leaves["lora_magnitude"] / updated_norm(
        leaves["lora_weight_norm"], through_weight.detach(), a, b, leaves["lora_scale"]
    )
    y = y * _per_row(ratio.to(y.dtype), y, binding.call, 1)
    bias = leaves.get("bias")
    return y if bias is None else y + _per_row(bias.to(y.dtype), y, binding.call, 1)


SMALLEST_NORM = 1e-12  # below it a row counts as zero, and DoRA leaves it so


def updated_norm(norm: Tensor, through_weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Returns the norms ``(..., out)`` of the rows of ``W + scale * B @ A``, without forming the sum.

    Args:
        norm: ``(..., out)``, of the rows of W.
        through_weight: ``A @ W.T``, ``(..., r, out)``.
        a: ``(..., r, in)``.
        b: ``(..., out, r)``.
        scale: ``(...)``.
    """
    # A difference of squares: in float64, since an update may nearly undo a row.
    dtype = norm.dtype
    norm, through_weight, a, b, scale = (t.double() for t in (norm, through_weight, a, b, scale.unsqueeze(-1)))
    cross = (through_weight.mT * b).sum(-1)
    square = ((b @ (a @ a.mT)) * b).sum(-1)
    squared = norm.square() + 2 * scale * cross + scale.square() * square
    return squared.clamp_min(SMALLEST_NORM**2).sqrt().to(dtype)


def _through_weight(binding: Binding, leaves: Leaves, a: Tensor) -> Tensor:
    """``A @ W.T`` of factors ``(..., r, in)``, with the weight as it is stored, activations never rounded."""
    weight = leaves["weight"]
    if weight.is_floating_point():
        return a @ float_weight(binding.type, weight).mT.to(a.dtype)
    return frozen_matmul(a, binding.scheme.linearised, *_quantized(leaves, binding.scheme))


def _dropout(layer: nn.Module, leaves: Leaves, x: Tensor, p: Any) -> Tensor:
    binding: Binding = layer._ft  # type: ignore[assignment]
    call = binding.call
    key = call.key_for(binding.path, leaves["dropout_key"])
    if key.ndim == 0:
        return _random.dropout(key, x, p)
    p_dim = 0 if isinstance(p, Tensor) and p.ndim else None
    return _fold(torch.func.vmap(_random.dropout, in_dims=(0, 0, p_dim))(key, _unfold(x, call), p))


def _quantized(leaves: Leaves, scheme: Scheme) -> tuple[Tensor, ...]:
    return tuple(leaves["weight" + suffix] for suffix in scheme.suffixes)


def _to_rows(layer: nn.Module, leaves: Leaves, x: Tensor) -> Tensor:
    """Checks that a stacked input is divided by rows; one that all rows share (positions) gets a row each."""
    binding: Binding = layer._ft  # type: ignore[assignment]
    call = binding.call
    call.seen.add(binding.path)
    if call.stack is None or not any(_is_stacked(binding, name, leaf) for name, leaf in leaves.items()):
        return x
    return call.divided(binding.path, x, folded=binding.folded, listed=binding.type.adapter == "embedding")


_UNSTACKED_NDIM = {"bias": 1, "lora_a": 2, "lora_b": 2, "lora_bias": 1, "lora_magnitude": 1}


def _is_stacked(binding: Binding, name: str, leaf: Tensor) -> bool:
    ndim = len(binding.weight_shape) if name == "weight" else _UNSTACKED_NDIM.get(name)
    return ndim is not None and leaf.ndim == ndim + 1


def _unfold(x: Tensor, call: Call) -> Tensor:
    assert call.stack is not None
    return x.reshape(call.stack, x.shape[0] // call.stack, *x.shape[1:])


def _fold(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _per_row(leaf: Tensor, y: Tensor, call: Call, ndim: int) -> Tensor:
    """A leaf that broadcasts against ``y``: as it is, or one per finetune repeated over its rows."""
    if leaf.ndim == ndim or call.stack is None:
        return leaf
    repeated = leaf.repeat_interleave(y.shape[0] // call.stack, dim=0)
    return repeated.reshape(y.shape[0], *([1] * (y.ndim - 1 - ndim)), *leaf.shape[1:])
