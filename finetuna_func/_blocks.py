"""The repeated blocks of a model, each run as one pure function of its tensors.

A block (a decoder layer, say) is then the unit of recomputation, ``remat="blocks"``, and of compilation,
``compile="blocks"``; for the latter, norms beside the blocks are blocks as well. Blocks that differ in nothing but
tensors and numbers share a *representative*, a copy of the first of them, through which all run: the compiler sees one
function and compiles it once, in the time of one layer and not of the whole model.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from finetuna_func import kernels
from finetuna_func._filters import join_name, split_name
from finetuna_func._hf import records_inside_blocks
from finetuna_func._kept import compile_block
from finetuna_func._layers import LEAF_NAMES, Binding, Call
from finetuna_func._levels import inside_transform
from finetuna_func._remat import remat
from finetuna_func._swap import call_on

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@dataclass
class Block:
    """What a block of the skeleton carries.

    Attributes:
        path: Its dotted path.
        representative: The module that its tensors run through.
        representative_path: The path of the block that it is a copy of.
        settings: Its own values of what differs between the blocks of one representative, such as their
            number, by (path, attribute). They are set on the representative while it runs, so that code which
            reads them gets this block's, and the compiler's guards see them.
    """

    path: str
    representative: nn.Module
    representative_path: str
    settings: Mapping[tuple[str, str], Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> Block:
        return Block(self.path, copy.deepcopy(self.representative, memo), self.representative_path, self.settings)


def mark_blocks(skeleton: nn.Module, call: Call) -> tuple[str, ...]:
    """Makes every repeated block of a skeleton one that runs as a function if the call asks for it; returns them."""
    groups: dict[Any, dict[str, nn.Module]] = {}
    repeated = block_paths(skeleton)
    for path in [*repeated, *_norms_beside(skeleton, repeated)]:
        module = skeleton.get_submodule(path)
        groups.setdefault(_structure(module), {})[path] = module
    for group in groups.values():
        representative_path, first = next(iter(group.items()))
        shared = {id(value): value for _, _, value in _attributes(first) if not _is_simple(value)}
        # A copy beside the model: what a call sets on the model's own modules never shows on it.
        representative = copy.deepcopy(first, {id(call): call, **shared})
        settings = {path: _settings(module) for path, module in group.items()}
        differing = [
            name
            for name, value in settings[representative_path].items()
            if any(own[name] != value for own in settings.values())
        ]
        for path, module in group.items():
            own = {name: settings[path][name] for name in differing}
            module._ft_block = Block(path, representative, representative_path, own)  # type: ignore[assignment]
            module._ft_call = call  # type: ignore[assignment]
            module.__class__ = _as_function(type(module), path in repeated)
    return tuple(repeated)


def block_paths(model: nn.Module) -> list[str]:
    """Returns the paths of the repeated blocks: of the outermost lists, the entries of a class that occurs again."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{block}.") for block in found):
            continue
        classes = [type(child) for child in module]
        found += [
            join_name(path, name)
            for name, child in module.named_children()
            if classes.count(type(child)) > 1 and any(True for _ in child.children())
        ]
    return found


def _norms_beside(model: nn.Module, blocks: list[str]) -> list[str]:
    """The paths of norms that run before or after the blocks: of a dozen kernels the compiler makes one."""
    beside = dict.fromkeys(split_name(split_name(path)[0])[0] for path in blocks)
    return [
        join_name(path, name)
        for path in beside
        for name, child in model.get_submodule(path).named_children()
        if not isinstance(vars(child).get("_ft"), Binding)
        and not any(True for _ in child.children())
        and {leaf.ndim for leaf in child.parameters()} == {1}
    ]


def _as_function(cls: type[nn.Module], repeated: bool) -> type[nn.Module]:
    """A subclass whose instances run as a function of their tensors if the call asks for it."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call: Call = self._ft_call  # type: ignore[assignment]
        if call.causal is not None:
            args = tuple(None if value is call.causal else value for value in args)
            kwargs = {name: None if value is call.causal else value for name, value in kwargs.items()}
        if not (call.compile or (call.remat and repeated)) or has_state((args, kwargs)) or records_inside_blocks():
            return cls.forward(self, *args, **kwargs)
        return _run(self, call, args, kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def has_state(inputs: Any) -> bool:
    """Returns whether something among the inputs, such as a key-value cache, can be changed by the model."""
    if isinstance(inputs, (tuple, list)):
        return any(has_state(value) for value in inputs)
    if isinstance(inputs, dict):
        return any(has_state(value) for value in inputs.values())
    return hasattr(inputs, "__dict__") and not isinstance(inputs, (Tensor, type, types.FunctionType))


def _run(module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a block through its representative: recomputed in the backward pass, compiled, or both."""
    block: Block = module._ft_block  # type: ignore[assignment]
    compile = call.compile and can_compile()
    again = call.remat and not compile  # the compiler does it otherwise
    function = compiled(block.representative, _call, remat=call.remat) if compile else _call
    leaves = dict(_tensors_of(module))
    some = next(iter(leaves.values()), None)
    use_kernels = compile and some is not None and kernels.available(some.device)  # which the compiler cannot ask
    state = call.of_block(block.path, block.representative_path, fused=compile, kernels=use_kernels)

    def pure(leaves: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        # The backward pass may come here again, when the call is over: all that the block knows is set and unset.
        others = _exchange(block.representative, block.settings)
        before = call.enter(state)
        try:
            with call.within():
                out = function(block.representative, call, call.rows, call.inputs, leaves, args, kwargs)
                return out, (call.seen, call.draws)
        finally:
            call.restore(before)
            _exchange(block.representative, others)

    if compile:
        leaves, args, kwargs = alike(leaves, args, kwargs)
    out, (seen, draws) = (remat(pure) if again else pure)(leaves, args, kwargs)
    call.after_block(block.path, block.representative_path, seen, draws)
    return out


def _call(
    module: nn.Module,
    call: Call,
    rows: int,
    inputs: tuple[tuple[int, ...], ...],
    leaves: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    call.rows, call.inputs = rows, inputs  # as they were; but the compiler takes arguments for symbols, not attributes
    return call_on(module, leaves, args, kwargs)


def alike(
    leaves: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], tuple[Any, ...], dict[str, Any]]:
    """Returns the inputs of a function to be compiled, such that other blocks and calls need no graph of their own.

    The compiler makes one for each pattern of what needs a derivative. Where nothing gets one, nothing needs one. And
    what comes into the first block, which does not if the embedding is not trained, does as in all blocks after it;
    the price is the products of one block that lead to it.
    """
    if not torch.is_grad_enabled():
        return torch_pytree.tree_map(
            lambda leaf: leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf,
            (leaves, args, kwargs),
        )
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor) or x.requires_grad or not x.is_floating_point() or x.is_inference():
        return leaves, args, kwargs
    if not any(leaf.requires_grad for leaf in leaves.values()):
        return leaves, args, kwargs
    x = x.detach().requires_grad_()
    return (leaves, (x, *args[1:]), kwargs) if args else (leaves, args, {**kwargs, "hidden_states": x})


def can_compile() -> bool:
    """Whether functions are compiled here.

    Not within ``torch.func`` transforms, which the compiler does not look through, nor where one is at work already.
    """
    return not inside_transform() and not torch.compiler.is_compiling()


def compiled(module: nn.Module, function: Callable[..., Any], *, remat: bool = False) -> Callable[..., Any]:
    """Returns the compiled form of a function of a module, kept with the module: like its skeleton, one thread's.

    Args:
        module: The module.
        function: A function of this library.
        remat: Whether to compute everything again in the backward pass. The compiler does better than `remat`: it
            leaves out what the derivative does not need, and makes one graph, where a forward pass without gradients
            and a recomputation with them are two.
    """
    kept: dict[Any, Callable[..., Any]] = vars(module).setdefault("_ft_compiled", {})
    key = function, remat
    if key not in kept:
        assert isinstance(function, types.FunctionType)
        # A code object of its own: recompilations are counted by it, over all who share it, and end at eight.
        own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        kept[key] = compile_block(own, remat=remat)
    return kept[key]


def _exchange(module: nn.Module, settings: Mapping[tuple[str, str], Any]) -> dict[tuple[str, str], Any]:
    """Sets attributes of a module and of those below it; returns what they were."""
    before = {}
    for (path, name), value in settings.items():
        attributes = vars(module.get_submodule(path))
        before[path, name] = attributes[name]
        attributes[name] = value
    return before


def _tensors_of(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in block.named_modules():
        attributes = vars(module)
        for own, leaf in (*module._parameters.items(), *module._buffers.items()):
            if leaf is not None:
                yield join_name(path, own), leaf
        for own in LEAF_NAMES:
            if own in attributes:
                yield join_name(path, own), attributes[own]


def _attributes(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """What a module and those below it were given beside tensors: path, name, value."""
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if name not in _OF_EVERY_MODULE and not name.startswith("_ft"):
                yield path, name, value


def _settings(module: nn.Module) -> dict[tuple[str, str], Any]:
    return {(path, name): value for path, name, value in _attributes(module) if _is_simple(value)}


def _structure(module: nn.Module) -> Any:
    """What two blocks must have in common to share a representative: all but tensors and simple settings."""
    parts: list[Any] = []
    for path, child in module.named_modules():
        tensors = [
            (name, None if leaf is None else (tuple(leaf.shape), leaf.dtype))
            for name, leaf in (*child._parameters.items(), *child._buffers.items())
        ]
        binding = vars(child).get("_ft")
        bound = None
        if isinstance(binding, Binding):
            bound = (binding.type, binding.scheme, binding.dtype, binding.weight_shape)
        parts.append((path, type(child), tuple(tensors), bound))
    rest = [(path, name, None if _is_simple(value) else _key(value)) for path, name, value in _attributes(module)]
    return tuple(parts), tuple(rest)


def _is_simple(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _key(value: Any) -> Any:
    """Equal for equal values where that can be told, and otherwise for one and the same object alone."""
    if isinstance(value, (tuple, list)):
        return type(value), tuple(value if _is_simple(value) else _key(value) for value in value)
    if type(value) is functools.partial:  # an activation, say, made anew in every block
        return functools.partial, _key(value.func), _key(value.args), _key(tuple(sorted(value.keywords.items())))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
