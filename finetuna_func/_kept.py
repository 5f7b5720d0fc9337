"""What a compiled block keeps from its forward for its backward pass.

The compiler decides, by size and by rules of thumb. It would keep a weight once it is dequantized, since the backward
pass reads it as well: twice the memory of the codes, for every layer. And it would keep the factors of adapters as they
are computed with, in 16 bits, beside those in 32 that are trained. Both are told to be made again. What norms put out
is not asked for in the backward pass at all: see `_norms`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import CheckpointPolicy

from finetuna_func import _norms

CODES = (torch.int8, torch.uint8)
_HALF = (torch.bfloat16, torch.float16)


def compile_block(function: Callable[..., Any], *, remat: bool) -> Callable[..., Any]:
    """Returns the compiled function.

    Args:
        function: A pure function.
        remat: Whether to keep nothing but inputs, and to compute all else again.
    """
    # Combined, the many small kernels for adapters are few: launching them took the host longer than a GPU the block.
    # A place that is to be used again is held until then; without that, each is given back after its last use.
    options = {"joint_custom_post_pass": _on_both_passes(), "combo_kernels": True, "allow_buffer_reuse": False}
    run = torch.compile(function, fullgraph=True, options=options)
    return functorch_config.patch(activation_memory_budget=0.0)(run) if remat else run  # read when it compiles


@functools.cache
def _on_both_passes() -> Any:
    """What is done to the graph of both passes, before the compiler decides what one keeps for the other."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files  # which takes a second

    class OnBothPasses(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            _norms.form_before_norms(graph)
            make_weights_again(graph)
            make_factors_again(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__, _norms.__file__))

    return OnBothPasses()


def make_weights_again(graph: fx.Graph) -> None:
    """Marks what is made of codes, up to the product that reads it, and makes once what is made again alike.

    (Pieces of a head each dequantize it, for instance, and the compiler looks for repetitions in training alone.)
    """
    made_of_codes: set[fx.Node] = set()
    firsts: dict[Any, fx.Node] = {}
    alike: dict[fx.Node, fx.Node] = {}  # for each node, the first that computes the same
    for node in list(graph.nodes):
        if node.op == "placeholder":
            if getattr(node.meta.get("val"), "dtype", None) in CODES:
                made_of_codes.add(node)
        elif node.op == "call_function":
            made = (
                node.target,
                *(str(fx.map_arg(own, lambda of: alike.get(of, of))) for own in (node.args, node.kwargs)),
            )
            alike[node] = firsts.setdefault(made, node) if _is_determined(node) else node
            if not _goes_on(node, made_of_codes):
                continue
            if alike[node] is not node:
                node.replace_all_uses_with(alike[node])
                graph.erase_node(node)
            else:
                made_of_codes.add(node)
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def _is_determined(node: fx.Node) -> bool:
    """Whether a result depends on the arguments alone."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in target.tags


def _goes_on(node: fx.Node, made_of_codes: set[fx.Node]) -> bool:
    """Whether a result is still made of codes: not that of a product, nor rows that are looked up among them."""
    if node.target in _PRODUCTS or (node.target in _LOOKUPS and node.args[0] in made_of_codes):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):  # a product into a place
        return False
    return any(own in made_of_codes for own in node.all_input_nodes)


def make_factors_again(graph: fx.Graph) -> None:
    """Marks what is rounded to 16 bits of inputs in 32, up to the product that reads it."""
    wide: set[fx.Node] = set()  # computed of nothing but such inputs
    rounded: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        if node.op == "placeholder":
            if value.dtype == torch.float32 and not node.name.startswith("tangents"):
                wide.add(node)
        elif node.op == "call_function" and node.target not in _PRODUCTS and _is_determined(node):
            read = node.all_input_nodes
            if not read or not all(own in wide or own in rounded for own in read):
                continue
            if value.dtype in _HALF:
                rounded.add(node)
            elif all(own in wide for own in read):
                wide.add(node)
    for node in reversed(graph.nodes):
        leads_to = node in wide and any(_is_marked(user) for user in node.users)
        if node.op == "call_function" and (node in rounded or leads_to):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def _is_marked(node: fx.Node) -> bool:
    return node.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE


_aten = torch.ops.aten
_PRODUCTS = frozenset((_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default))
_LOOKUPS = frozenset((_aten.index.Tensor, _aten.embedding.default, _aten.index_select.default, _aten.gather.default))
