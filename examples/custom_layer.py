"""Layers of your own in 8 bits: what to tell the library about a class that it does not know.

The library goes by the exact class of a module, since a subclass may compute something else. One that is not
registered stays in float and takes no adapter, and the log says so. There are two ways to register it:

* ``ft.register_layer``, for a forward that computes with ``self.weight``. In the base that holds 8-bit codes, so the
  forward is written once more, as a function of the layer's tensors, on ``ft.linear`` or ``ft.embedding``.
* ``ft.register_subclass``, for a forward that leaves the computing to ``super().forward``. It is right as it is.

Run it: ``python examples/custom_layer.py``
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finetuna_func as ft


class GatedLinear(nn.Linear):
    """A linear layer whose outputs are scaled, each by a gate between 0 and 1."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.gate = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate) * F.linear(x, self.weight, self.bias)


@ft.register_layer(GatedLinear, adapter="linear")
def gated_linear(layer: nn.Module, leaves: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The same from ``leaves``: ``ft.linear`` takes weight, bias and adapter among them, in 8 bits or in float."""
    return torch.sigmoid(leaves["gate"]) * ft.linear(layer, leaves, x)


class ScaledEmbedding(nn.Embedding):
    """A table whose rows are scaled by the root of their width."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embedding_dim**0.5


ft.register_subclass(ScaledEmbedding, of=nn.Embedding)


class UnknownLinear(GatedLinear):
    """A subclass that nobody registered, though its forward is the same."""


class Model(nn.Module):
    """Ids in, logits out."""

    def __init__(self, vocab: int = 64, width: int = 32) -> None:
        super().__init__()
        self.embed = ScaledEmbedding(vocab, width)
        self.mix = GatedLinear(width, width)
        self.other = UnknownLinear(width, width)
        self.lm_head = nn.Linear(width, vocab)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.embed(ids)))
        return self.lm_head(torch.tanh(self.other(x)))


def main() -> tuple[Model, ft.Base, list[ft.Finetuned], Tensor]:
    """Returns the model, its base, three trained finetunes and the ids that each was trained on."""
    torch.manual_seed(0)
    model = Model().eval()
    base = ft.quantize_base_model(model)
    for name in ("embed", "mix", "other", "lm_head"):
        layer = type(model.get_submodule(name)).__name__
        print(f"{name:8} {layer:16} {base.params[f'{name}.weight'].dtype}")

    tuned = [ft.new_finetuned(base, plain_layers=()) for _ in range(3)]
    print("adapters on", ", ".join(adapter.path for adapter in tuned[0].spec.adapters))

    ids = torch.randint(0, 64, (3, 4, 8))  # three finetunes, four rows of eight ids each
    with torch.no_grad():
        exact = model(ids[0])
    rounding = (ft.apply(base, None, ids[0]) - exact).norm() / exact.norm()
    print(f"the base is the model, but for {100 * rounding:.1f} % of rounding")

    def losses(stacked: ft.Finetuned, ids: Tensor) -> Tensor:
        """Of each finetune, on its own ids: the next id is to be found."""
        logits = ft.apply_stacked(base, stacked, ids)
        each = F.cross_entropy(logits[:, :, :-1].flatten(0, -2), ids[:, :, 1:].flatten(), reduction="none")
        return each.unflatten(0, (len(ids), -1)).mean(1)

    stacked, tx = ft.stack(tuned), ft.optim.adamw(0.03)
    state = tx.init(stacked)
    for step in range(31):
        values, grads = ft.stacked_value_and_grad(losses)(stacked, ids)
        if step % 10 == 0:
            print(f"step {step:2}: losses", " ".join(f"{value:.2f}" for value in values.tolist()))
        updates, state = tx.update(grads, state, stacked)
        stacked = ft.optim.apply_updates(stacked, updates)
    tuned = ft.unstack(stacked)

    merged = copy.deepcopy(model)
    merged.load_state_dict(ft.merge(base, tuned[0]))
    with torch.no_grad():
        apart = (merged(ids[0]) - ft.apply(base, tuned[0], ids[0])).abs().max()
    print(f"merged into the float model, the first finetune is the same to {apart:.0e}")
    return model, base, tuned, ids


if __name__ == "__main__":
    main()
