"""The skeleton: a meta-device copy of the user's model whose layers are reinterpreted.

The user's module is never touched. Its copy holds no numbers, so a parameter missing from a call
is a loud meta-tensor error and can never fall back to stale weights. ``functional_call`` swaps
attributes on a module, which two threads must not do to one object, so every thread gets a copy
of its own (it costs Python objects, no tensors).
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack  # type: ignore[import-not-found]

from finetuna_func._blocks import mark_blocks
from finetuna_func._body import mark_body_and_head
from finetuna_func._filters import join_name, split_name
from finetuna_func._gated import mark_gated
from finetuna_func._hf import (
    cap_scores,
    has_shared_bias,
    has_unmapped_root,
    keeps_rows_apart,
    layers_with_folded_rows,
    leave_weights_alone,
    switch_off_warnings,
    weights_read_by_parent,
    with_bias_per_row,
    with_mapped_root,
)
from finetuna_func._layers import Binding, Call, Context, LayerType, float_weight, layer_type, leaves_of, seen_weight
from finetuna_func._quant import Scheme
from finetuna_func._types import MATRIX, Follower, Spec, WeightForm
from finetuna_func._unpack import Packing, ready_codes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """A reinterpreted layer of the model.

    Attributes:
        path: Its dotted path.
        type: Its reinterpretation.
        shape: ``(out, in)`` of its matrix; ``(rows, width)`` of a table; ``None`` without one.
        dtype: The float dtype it had.
        scheme: Its 8-bit format; ``None`` where the base holds it in float.
        form: How the user's model holds the weight.
        groups: Of a convolution.
    """

    path: str
    type: LayerType
    shape: tuple[int, int] | None
    dtype: torch.dtype
    scheme: Scheme | None
    form: WeightForm = MATRIX
    groups: int = 1

    @property
    def quantizable(self) -> bool:
        """Whether its weight can be held in 8 bits."""
        return self.type.adapter is not None and not self.type.convolution

    @property
    def adaptable(self) -> bool:
        """Whether it takes an adapter; a convolution in groups has no single matrix."""
        return self.type.adapter is not None and self.groups == 1


class Skeleton:
    """The static half of a `Base`; immutable after construction, shared by all that uses the base.

    Attributes:
        name: Class name of the model.
        architecture: Classes and, of a Hugging Face model, what its config sets; for the fingerprint.
        layers: Reinterpreted layers, by path.
        dtype: Float dtype of the model's layers.
        owners: Names of the parameters that each module owns directly, by module path.
        ties: Parameter names that are another parameter: alias -> canonical name.
        shapes: Shape of each parameter, under all its names.
        same_module: Other paths of modules that the model holds several times.
        required: Names of the tensors that a call must bring.
        blocks: Paths of the repeated blocks.
        body: Path of the model without its head, of a Hugging Face language model; ``None`` of another.
        head: Path of its head.
        dropouts: Paths of ``nn.Dropout`` layers with a positive rate.
        default_scheme: The 8-bit format for layers quantized later.
        packings: How the user's packed parameters are put together again.
        rows_apart: Whether the model surely computes each row of a batch by itself.
        reads: Layers whose weight the model computes with itself, by kind of call; noted at the first.
        unfolded: Kinds of calls that turned out to have no stacked form; see `_fold.fold`.
    """

    def __init__(
        self,
        model: nn.Module,
        schemes: Mapping[str, Scheme],
        default_scheme: Scheme,
        packings: Mapping[str, Packing] = MappingProxyType({}),
    ):
        """Copies ``model`` to the meta device and reinterprets its layers; ``model`` is not changed."""
        self.name = type(model).__name__
        self.architecture = _describe(model)
        self.default_scheme = default_scheme
        self.packings = packings
        self._module = _meta_copy(model)
        self.ties: Mapping[str, str] = find_ties(model)
        self._caching = _switch_off_caches(self._module)
        self.owners: Mapping[str, tuple[str, ...]] = {
            path: tuple(join_name(path, name) for name in own)
            for path, module in self._module.named_modules()
            if (own := [name for name, leaf in module._parameters.items() if leaf is not None])
        }
        self.shapes: Mapping[str, tuple[int, ...]] = {
            join_name(path, name): tuple(leaf.shape)
            for path, module in self._module.named_modules()
            for name, leaf in module._parameters.items()
            if leaf is not None
        }
        self.same_module: Mapping[str, str] = _second_paths(self._module)
        read_by_parent = weights_read_by_parent(model)
        folded = layers_with_folded_rows(model)
        layers: dict[str, Layer] = {}
        call = Call(pure=False)  # until one begins
        for path, module in list(self._module.named_modules()):
            kind = layer_type(module)
            if kind is not None and path not in read_by_parent:
                weight = module._parameters.get("weight") if kind.adapter else None
                dtype = torch.float32 if weight is None else weight.dtype
                scheme = schemes.get(path)
                shape = None
                if weight is not None:
                    matrix = float_weight(kind, weight)
                    shape = (matrix.shape[0], matrix.shape[1])
                groups = int(getattr(module, "groups", 1))
                layers[path] = Layer(path, kind, shape, dtype, scheme, _form(kind, module), groups)
                weight_shape = (0, 0) if weight is None else tuple(weight.shape)
                ndims = {name: leaf.ndim for name, leaf in module._parameters.items() if leaf is not None}
                module._ft = Binding(  # type: ignore[assignment]
                    path, kind, scheme or default_scheme, dtype, weight_shape, call, ndims, path in folded
                )
                module.__class__ = _reinterpreted(type(module), kind)
            elif has_shared_bias(module):
                module.__class__ = with_bias_per_row(type(module))
            elif path in self.owners:
                if has_unmapped_root(module):
                    module.__class__ = with_mapped_root(type(module))
                module._ft_call, module._ft_path = call, path  # type: ignore[assignment]
                module._ft_ndims = {  # type: ignore[assignment]
                    name: leaf.ndim
                    for name, leaf in module._parameters.items()
                    if leaf is not None and not self._read_below(path, name)
                }
                module.__class__ = _stackable(type(module))
        _introduce_siblings(self._module)
        self.layers: Mapping[str, Layer] = layers
        self.dtype = next((layer.dtype for layer in layers.values() if layer.shape is not None), torch.float32)
        self.dropouts = tuple(
            path for path, module in self._module.named_modules() if isinstance(module, nn.Dropout) and module.p > 0
        )
        self.required = frozenset(self._required_names())
        mark_gated(self._module, call)
        self.blocks = mark_blocks(self._module, call)
        self.body, self.head = mark_body_and_head(self._module, call)
        self._module._ft_call = call  # type: ignore[assignment]
        self._within: Context = nullcontext
        self._local = threading.local()
        self.rows_apart = keeps_rows_apart(model)
        self.reads: dict[Hashable, frozenset[str]] = {}
        self.unfolded: set[Hashable] = set()

    def __repr__(self) -> str:
        return f"Skeleton({self.name}, {len(self.layers)} layers)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Skeleton:
        return self

    @functools.cached_property
    def layers_in_blocks(self) -> Mapping[str, Layer]:
        """The layers within repeated blocks."""
        return {path: own for path, own in self.layers.items() if any(path.startswith(f"{b}.") for b in self.blocks)}

    def module(self) -> nn.Module:
        """Returns a fresh copy of the skeleton's module, on the meta device, for the caller to own."""
        module = copy.deepcopy(self._module)
        for path in self._caching:
            module.get_submodule(path).config.use_cache = True  # type: ignore[union-attr]
        return module

    def within(self, context: Context) -> Skeleton:
        """Returns a skeleton like this whose calls, and their recomputations, run in a context."""
        other = copy.copy(self)
        other._within, other._local = context, threading.local()
        return other

    def state_names(self) -> tuple[str, ...]:
        """Returns the names in the model's ``state_dict``: parameters and persistent buffers."""
        return tuple(self._module.state_dict())

    def completed(self, spec: Spec) -> Spec:
        """Returns the spec with what follows from it and the model: parts of packed parameters, and tied ones."""
        parts = {part for packing in self.packings.values() for part in packing.parts}
        adapted = {join_name(adapter.path, "weight") for adapter in spec.adapters}
        followers: list[Follower] = []
        for name, of in self.ties.items():
            if name not in adapted and name not in spec.plain and (of in adapted or of in spec.plain):
                path, own = split_name(name)
                layer = self.layers.get(path) if own == "weight" else None
                followers.append(Follower(name, of, layer.type.adapter if layer is not None else None))
        packed = tuple(name for name in spec.plain if name in parts)
        return replace(spec, packed=packed, followers=tuple(followers))

    @contextmanager
    def calling(self, *, masked: bool = False, on_cpu: bool = False, **fields: Any) -> Iterator[tuple[nn.Module, Call]]:
        """Yields this thread's module, set up for one call, and what the call knows.

        Args:
            masked: Whether an attention mask is among the inputs.
            on_cpu: Whether the call runs on the CPU.
            **fields: Of the `Call`.
        """
        module = self._checkout(masked, on_cpu)
        call: Call = module._ft_call  # type: ignore[assignment]
        before = call.begin(within=self._within, **fields)
        try:
            with self._within():
                yield module, call
        finally:
            call.restore(before)

    def _read_below(self, path: str, own: str) -> bool:
        """Whether a module's parameter is tied to one of a layer below it, which is the one that reads it."""
        name = join_name(path, own)
        canonical = self.ties.get(name, name)
        same = [canonical, *(alias for alias, other in self.ties.items() if other == canonical)]
        return any(other != name and other.startswith(join_name(path, "")) for other in same)

    def _required_names(self) -> Iterator[str]:
        for path, module in self._module.named_modules():
            for own, leaf in itertools.chain(module._parameters.items(), module._buffers.items()):
                if leaf is not None:
                    yield join_name(path, own)
        for path, layer in self.layers.items():
            if layer.scheme is not None and join_name(path, "weight") not in self.ties:
                yield from (join_name(path, "weight") + suffix for suffix in layer.scheme.suffixes)

    def _checkout(self, masked: bool, on_cpu: bool) -> nn.Module:
        if torch.compiler.is_compiling():  # traced once, under the compiler's own lock; nothing swaps at run time
            return self._module
        variant = "eager" if _beyond_fused_attention(masked, on_cpu) else "default"
        module = getattr(self._local, variant, None)
        if module is None:
            module = copy.deepcopy(self._module)
            if variant == "eager":
                _use_eager_attention(module)
            setattr(self._local, variant, module)
        return module


def _form(kind: LayerType, module: nn.Module) -> WeightForm:
    """How the user's model holds a layer's weight."""
    if not kind.convolution:
        return getattr(module, "_ft_form", MATRIX)
    kernel = tuple(module._parameters["weight"].shape[1:])  # type: ignore[union-attr]
    plain = getattr(module, "padding_mode", "zeros") == "zeros" and set(getattr(module, "dilation", (1,))) == {1}
    return WeightForm(kernel, beyond_peft="" if plain else "convolutions with dilation or a padding mode")


def find_ties(model: nn.Module) -> dict[str, str]:
    """Returns ``{alias: canonical}`` for tensors that several modules hold.

    The canonical name is that of an embedding where there is one, in whatever order the model
    registers its layers; otherwise the first. One module under two paths is not a tie.
    """
    names: dict[int, list[str]] = {}
    tables: set[str] = set()
    for path, module in model.named_modules():
        for own, leaf in itertools.chain(module._parameters.items(), module._buffers.items()):
            if leaf is not None:
                name = join_name(path, own)
                names.setdefault(id(leaf), []).append(name)
                if isinstance(module, nn.Embedding):
                    tables.add(name)
    ties: dict[str, str] = {}
    for group in names.values():
        canonical = next((name for name in group if name in tables), group[0])
        ties.update({name: canonical for name in group if name != canonical})
    return ties


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model with every parameter and buffer on the meta device; numbers are not copied."""
    memo: dict[int, Any] = {}
    for leaf in itertools.chain(model.parameters(), model.buffers()):
        meta = torch.empty_like(leaf, device="meta", requires_grad=False)
        memo[id(leaf)] = nn.Parameter(meta, requires_grad=False) if isinstance(leaf, nn.Parameter) else meta
    for module in model.modules():
        codes = ready_codes(module)
        if codes is not None:
            memo[id(codes)] = {}
    skeleton = copy.deepcopy(model, memo)
    for path, module in skeleton.named_modules():
        if "forward" in vars(module):
            if "_old_forward" not in vars(module):
                raise ValueError(
                    f"model: {path or 'the model'} has its forward replaced on the instance, which cannot be "
                    "reinterpreted; remove the patch, or make it a subclass."
                )
            # accelerate's placement hooks: tensors are explicit here, so there is nothing to place
            for name in ("forward", "_old_forward", "_hf_hook"):
                vars(module).pop(name, None)
    _switch_off_fast_paths(skeleton)
    switch_off_warnings(skeleton)
    leave_weights_alone(skeleton)
    cap_scores(skeleton)
    return skeleton.eval()


def _introduce_siblings(skeleton: nn.Module) -> None:
    """Tells layers which others get the same input, as far as their names say it; a call checks that it is so."""
    for module in skeleton.modules():
        children = dict(module.named_children())
        for names in _SAME_INPUT:
            group = [children[name] for name in names if isinstance(getattr(children.get(name), "_ft", None), Binding)]
            for child in group:
                child._ft.siblings = tuple(other for other in group if other is not child)  # type: ignore[union-attr]


_SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


@functools.cache
def _reinterpreted(cls: type[nn.Module], kind: LayerType) -> type[nn.Module]:
    """A subclass whose forward is the registered pure function; attributes and isinstance stay."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        leaves = leaves_of(self)
        binding: Binding = self._ft  # type: ignore[assignment]
        binding.call.seen.add(binding.path)
        if binding.call.stack is not None:
            for name, ndim in binding.own_ndims.items():
                if name not in ("weight", "bias") and leaves[name].ndim > ndim:
                    raise NotImplementedError(
                        f"apply_stacked: {binding.path!r} trains its parameter {name!r}, and its registered forward "
                        "knows a stack of weight and bias only. Use torch.func.vmap over ft.apply."
                    )
        running = binding.call.running
        if running is None:
            return kind.forward(self, leaves, *args, **kwargs)
        running.append(binding.path)
        try:
            return kind.forward(self, leaves, *args, **kwargs)
        finally:
            running.pop()

    if kind.extends is not None:
        # The class's own forward runs, and its super().forward is the reinterpreted one, by method order.
        parent = _reinterpreted(kind.extends, replace(kind, extends=None))
        return type(f"Functional{cls.__name__}", (cls, parent), {"__module__": cls.__module__})
    members: dict[str, Any] = {"forward": forward, "__module__": cls.__module__}
    if kind.adapter is not None:
        members["weight"] = property(seen_weight)
    return type(f"Functional{cls.__name__}", (cls,), members)


@functools.cache
def _stackable(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass that, in a stacked call with own parameters per finetune, maps its forward over them."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call: Call = self._ft_call  # type: ignore[assignment]
        path: str = self._ft_path  # type: ignore[assignment]
        call.seen.add(path)
        ndims: dict[str, int] = self._ft_ndims  # type: ignore[assignment]
        own = {name: self._parameters[name] for name in ndims}
        stacked: dict[str, Tensor] = {
            name: leaf for name, leaf in own.items() if leaf is not None and leaf.ndim > ndims[name]
        }
        if call.stack is None or not stacked:
            return cls.forward(self, *args, **kwargs)
        if any(True for _ in self.children()):
            raise NotImplementedError(
                f"apply_stacked: {cls.__name__} owns trained parameters {sorted(stacked)} beside layers below it; "
                "use torch.func.vmap over ft.apply for this model."
            )
        stack = call.stack

        def one(params: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
            call.stack = None
            try:
                return torch.func.functional_call(self, params, args, kwargs, tie_weights=False)
            finally:
                call.stack = stack

        def unfold(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.ndim == 0:
                return leaf
            leaf = call.divided(path, leaf)
            return leaf.reshape(stack, leaf.shape[0] // stack, *leaf.shape[1:])

        args, kwargs = torch_pytree.tree_map(unfold, (args, kwargs))
        dims = torch_pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) and leaf.ndim else None, (args, kwargs))
        out = torch.func.vmap(one, in_dims=(0, *dims))(stacked, args, kwargs)
        return torch_pytree.tree_map(lambda leaf: leaf.flatten(0, 1) if isinstance(leaf, Tensor) else leaf, out)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _describe(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    # Without such a config, the settings of the layers (an epsilon, a stride) are what they say of themselves.
    has_settings = hasattr(config, "to_diff_dict")
    said = {path: "" if has_settings else module.extra_repr() for path, module in model.named_modules()}
    classes = {path: f"{type(module).__name__}({said[path]})" for path, module in model.named_modules()}
    settings: dict[str, Any] = config.to_diff_dict() if has_settings else {}  # type: ignore[union-attr]
    computed = {name: value for name, value in settings.items() if name not in _INCIDENTAL and name[0] != "_"}
    return json.dumps([classes, computed], sort_keys=True, default=str)


# What a config says that changes no number: versions, names, storage.
_INCIDENTAL = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "name_or_path"}


def _second_paths(model: nn.Module) -> dict[str, str]:
    """Returns ``{other path: first path}`` for modules that the model holds under several paths."""
    first: dict[int, str] = {}
    return {
        path: first[id(module)]
        for path, module in model.named_modules(remove_duplicate=False)
        if first.setdefault(id(module), path) != path
    }


def _switch_off_caches(skeleton: nn.Module) -> tuple[str, ...]:
    """Returns the modules whose config asked for a key-value cache, after switching it off.

    A cache is mutable state, and a pure call has none unless it is passed ``use_cache=True``.
    """
    caching = []
    for path, module in skeleton.named_modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False  # type: ignore[union-attr]
            caching.append(path)
    return tuple(caching)


def _switch_off_fast_paths(skeleton: nn.Module) -> None:
    """Makes torch's Transformer layers call their children, instead of a fused kernel on the children's weights."""
    for module in skeleton.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False


def _beyond_fused_attention(masked: bool, on_cpu: bool) -> bool:
    """Whether fused attention cannot serve this call.

    Its kernels lack forward mode and the derivative of their backward (grad of grad). Under ``vmap``
    with a mask, Hugging Face's preparation of the mask for them branches on its values, and on CUDA
    torch's batching rule expands it to a wrong shape. Under ``vmap`` and ``grad`` the choice of kernel
    cannot see that a bias needs a gradient; and on the CPU the kernel has no batching rule but a loop.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    levels = [level.key() for level in get_interpreter_stack() or ()]
    mapped = TransformType.Vmap in levels
    return levels.count(TransformType.Grad) > 1 or (mapped and (masked or on_cpu or TransformType.Grad in levels))


def _use_eager_attention(module: nn.Module) -> None:
    """Chooses the attention that is plain torch ops, which Hugging Face models have beside the fused one."""
    for child in module.modules():
        config = getattr(child, "config", None)
        if hasattr(config, "_attn_implementation"):  # read at every call; its setter refuses some models' choice
            config._attn_implementation = "eager"  # type: ignore[union-attr]
