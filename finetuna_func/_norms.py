"""Gradients of adapters that follow a norm, formed of what the norm reads, in the graph of a compiled block.

A norm puts out ``x * s * w``, with s a number for each row and w one for each column, and the gradient of an adapter's
A is a sum over rows, ``P.T @ (x * s * w) = ((P * s).T @ x) * w``. On the right a few columns are scaled instead of what
is as wide as the model, and what the norm puts out is neither kept for the backward pass nor made again there: x is
kept anyway, for the norm's own derivative.

The graph says where that is so, whatever class of norm it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

_aten, _convert = torch.ops.aten, torch.ops.prims.convert_element_type.default
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
_DTYPES = (torch.bfloat16, torch.float32)  # not float16, in which a scaled gradient could be too small for a number


def form_before_norms(graph: fx.Graph) -> None:
    """Replaces the sums over rows of what norms put out by those of what they read."""
    for node in graph.find_nodes(op="call_function", target=_aten.bmm.default):
        left, right = _pair(node)
        (n, _, width), columns = _value(right).shape, _value(left).shape[1]
        if _value(node).dtype not in _DTYPES or not all(isinstance(own, int) for own in (n, width, columns)):
            continue
        found = _scaled(right) if columns < width else None
        if found is not None:
            _replace(graph, node, *found)


def _scaled(node: Any) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """Returns x, s and the factors of columns, w, if a node is ``(N, rows, width)`` of a product of them, by views."""
    dtype = _value(node).dtype
    while node.target in _VIEWS and _same(_value(node).shape[-1:], _value(node.args[0]).shape[-1:]):
        node = node.args[0]
    by_row: list[fx.Node] = []
    by_column: list[fx.Node] = []
    shape = _value(node).shape
    while node.target in (_convert, _aten.mul.Tensor):
        if node.target is _aten.mul.Tensor:
            factors, others = [], []
            for own in node.args:
                kept = isinstance(own, fx.Node) and _same(_value(own).shape, shape)
                (others if kept else factors).append(own)
            if len(others) != 1 or not isinstance(factors[0], fx.Node):
                return None
            if _same(_value(factors[0]).shape, shape[-1:]):
                by_column += factors
            elif _same(_value(factors[0]).shape, (*shape[:-1], 1)):
                by_row += factors
            else:
                return None
            node = others[0]
        else:
            node = node.args[0]
    return (node, by_row[0], by_column) if len(by_row) == 1 and _value(node).dtype == dtype else None


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal."""
    return len(one) == len(other) and all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))


def _replace(graph: fx.Graph, node: fx.Node, x: fx.Node, by_row: fx.Node, by_column: list[fx.Node]) -> None:
    left, right = _pair(node)
    dtype, shape = _value(node).dtype, list(_value(right).shape)

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta = {name: value for name, value in node.meta.items() if name not in ("tensor_meta", "recompute")}
        made.meta["val"] = target(*(_value(own) if isinstance(own, fx.Node) else own for own in args))
        return made

    def times(own: fx.Node, factor: fx.Node) -> fx.Node:
        wide = torch.promote_types(dtype, torch.float32)
        product = call(_aten.mul.Tensor, call(_convert, own, wide), call(_convert, factor, wide))
        return call(_convert, product, dtype)

    with graph.inserting_before(node):
        own = times(left, call(_aten.reshape.default, by_row, [shape[0], 1, -1]))
        own = call(_aten.bmm.default, own, call(_aten.reshape.default, x, [shape[0], -1, shape[2]]))
        for factor in by_column:
            own = times(own, factor)
    node.replace_all_uses_with(own)
    graph.erase_node(node)


def _pair(node: Any) -> tuple[fx.Node, fx.Node]:
    return node.args


def _value(node: Any) -> Tensor:
    return node.meta["val"]
