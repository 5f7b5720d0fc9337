"""What a compiled block keeps for its backward pass: with the real compiler, since it is the compiler that decides."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from models import finetunes, llama
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

import finetuna_func as ft
from finetuna_func import _kept
from finetuna_func._kept import make_factors_again, make_weights_again
from finetuna_func._norms import form_before_norms

IDS = torch.tensor([[1, 5, 9]])
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on the CPU")


def kept_bytes(base: ft.Base, tuned: ft.Finetuned, ids: Tensor) -> int:
    """What autograd keeps of a compiled call, beside tensors of the base and the finetune."""
    torch._dynamo.reset()  # or shapes that differ from those of a call before would be symbols
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in tuned.params.items()}
    given = {leaf.untyped_storage()._cdata for leaf in (*base.params.values(), *leaves.values())}
    found: dict[int, Tensor] = {}

    def note(leaf: Tensor) -> Tensor:
        if leaf.untyped_storage()._cdata not in given:
            found[leaf.untyped_storage()._cdata] = leaf
        return leaf

    with torch.autograd.graph.saved_tensors_hooks(note, lambda leaf: leaf):
        ft.apply(base, tuned.replace(params=leaves), ids, compile="blocks")
    return sum(leaf.untyped_storage().nbytes() for leaf in found.values())


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_weights_are_made_again_from_their_codes(scheme: str, monkeypatch: pytest.MonkeyPatch):
    model = llama(hidden_size=64, intermediate_size=256)
    of_blocks = sum(p.nbytes for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    def kept(**options: Any) -> int:
        base = ft.quantize_base_model(model, **options)
        return kept_bytes(base, finetunes(base, 1, adapt_layers=layers, plain_layers=set())[0], IDS)

    of_codes, of_floats = kept(scheme=scheme), kept(modules_not_to_quantize=".*")
    assert of_codes <= of_floats + 0.1 * of_blocks

    only(monkeypatch, form_before_norms)
    assert kept(scheme=scheme) >= of_codes + 0.5 * of_blocks


def test_what_norms_put_out_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    """Two norms a block, whose outputs only gradients of adapters would read: a token as wide as the model."""
    model = llama(hidden_size=64, intermediate_size=64)
    base, other = ft.quantize_base_model(model), ft.quantize_base_model(model)
    tuned = finetunes(base, 1, adapt_layers={"q_proj", "gate_proj", "up_proj"}, plain_layers=set())[0]
    ids, layers = torch.arange(32).view(2, 16), model.config.num_hidden_layers
    without = kept_bytes(base, tuned, ids)
    only(monkeypatch, make_weights_again)
    assert kept_bytes(other, tuned, ids) >= without + 2 * layers * ids.numel() * 64 * 4


def test_factors_are_not_kept_in_16_bits(monkeypatch: pytest.MonkeyPatch):
    """Beside those in 32 bits that are trained: to the byte."""
    model = llama(hidden_size=64, intermediate_size=256).bfloat16()
    base, other = ft.quantize_base_model(model), ft.quantize_base_model(model)
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    tuned = finetunes(base, 1, adapt_layers=layers, plain_layers=set())[0]
    ids = torch.arange(32).view(2, 16)
    without = kept_bytes(base, tuned, ids)
    only(monkeypatch, form_before_norms, make_weights_again)
    assert kept_bytes(other, tuned, ids) == without + sum(2 * leaf.numel() for leaf in tuned.params.values())


def only(monkeypatch: pytest.MonkeyPatch, *changes: Callable[[fx.Graph], None]) -> None:
    """Compiles blocks anew, with some of the changes to their graphs."""

    class Own:
        def __call__(self, graph: fx.Graph) -> None:
            for change in changes:
                change(graph)

        def uuid(self) -> None:  # nothing is taken from the compiler's cache
            ...

    monkeypatch.setattr(_kept, "_on_both_passes", Own)


def marked_after(change: Callable[[fx.Graph], None], block: Callable[..., Tensor], *given: Tensor) -> list[Any]:
    graph = make_fx(block)(*given)
    change(graph.graph)
    graph.graph.lint()
    return [node.target for node in graph.graph.nodes if "recompute" in node.meta]


_aten = torch.ops.aten
CODES, SCALE, X = torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 1), torch.ones(2, 2)


def test_what_is_marked():
    def block(codes: Tensor, scale: Tensor, ids: Tensor, x: Tensor) -> Tensor:
        weight = codes.float() * scale
        return torch.sin(x @ weight) + torch.cos(codes[ids].float() @ x.mT)

    marked = marked_after(make_weights_again, block, CODES, SCALE, torch.tensor([1, 0]), X)
    assert marked == [_aten._to_copy.default, _aten.mul.Tensor]


def test_a_product_into_a_place_ends_what_is_made_of_codes():
    from finetuna_func.kernels.in_place import add_product_

    def block(codes: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        add_product_(y, x, codes.float() * scale)
        return y.sin()

    marked: list[Any] = []

    def compiler(graph: fx.GraphModule, inputs: Any) -> Any:
        make_weights_again(graph.graph)
        marked.extend(node.target for node in graph.graph.nodes if "recompute" in node.meta)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(block, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    torch.testing.assert_close(compiled(CODES, SCALE, X), torch.full((2, 2), 2.0).sin())
    assert marked == [_aten._to_copy.default, _aten.mul.Tensor]


def test_a_weight_is_dequantized_once():
    """In the pieces of a head, say; but two weights are two."""

    def block(codes: Tensor, scale: Tensor, other: Tensor, x: Tensor) -> Tensor:
        pieces = [own @ (codes.float() * scale.view(2, 1)) for own in x.split(1)]
        noise = [x @ (codes.float() * torch.rand(2, 1)) for _ in range(2)]
        return torch.cat(pieces) + x @ (codes.float() * other) + sum(noise)

    marked = marked_after(make_weights_again, block, CODES, SCALE.view(2), SCALE, X)
    assert marked.count(_aten._to_copy.default) == 1 and marked.count(_aten.mul.Tensor) == 4


def test_what_is_marked_of_factors():
    def block(b: Tensor, scale: Tensor, x: Tensor, norm: Tensor) -> Tensor:
        own = (b * scale).bfloat16()
        return (x @ torch.cat([own, own]).mT) * (x.float() * norm).bfloat16().sum()

    given = torch.ones(2, 2), torch.ones(()), torch.ones(2, 2).bfloat16(), torch.ones(2)
    marked = marked_after(make_factors_again, block, *given)
    assert marked == [_aten.mul.Tensor, _aten._to_copy.default, _aten.cat.default, _aten.transpose.int]
