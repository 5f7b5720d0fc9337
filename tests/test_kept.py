"""What a compiled block keeps for its backward pass: with the real compiler, since it is the compiler that decides."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import finetunes, llama
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import finetuna_func as ft
from finetuna_func import _kept
from finetuna_func._kept import make_weights_again
from finetuna_func._norms import form_before_norms

IDS = torch.tensor([[1, 5, 9]])
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on the CPU")


def kept_bytes(base: ft.Base, tuned: ft.Finetuned, ids: Tensor) -> int:
    """What autograd keeps of a compiled call, beside tensors of the base and the finetune."""
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


def only(monkeypatch: pytest.MonkeyPatch, change: Callable[[fx.Graph], None]) -> None:
    """Compiles blocks anew, with one of the changes to their graphs."""

    class Own:
        def __call__(self, graph: fx.Graph) -> None:
            change(graph)

        def uuid(self) -> None:  # nothing is taken from the compiler's cache
            ...

    monkeypatch.setattr(_kept, "_on_both_passes", Own)
    torch._dynamo.reset()


def test_what_is_marked():
    def block(codes: Tensor, scale: Tensor, ids: Tensor, x: Tensor) -> Tensor:
        weight = codes.float() * scale
        return torch.sin(x @ weight) + torch.cos(codes[ids].float() @ x.mT)

    graph = make_fx(block)(torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 1), torch.tensor([1, 0]), torch.ones(2, 2))
    make_weights_again(graph.graph)
    marked = [node.target for node in graph.graph.nodes if "recompute" in node.meta]
    aten = torch.ops.aten
    assert marked == [aten._to_copy.default, aten.mul.Tensor]
