"""A module called on given tensors: what ``functional_call`` gives, and nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetuna_func._swap import call_on


class Model(nn.Module):
    """A parameter, a buffer and, on one layer, a tensor that is there in a call only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.fails = False

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        layer: Any = self.inner[0]
        if self.fails:
            raise ValueError("in the middle")
        return scale * self.inner(x) + getattr(layer, "extra", torch.zeros(()))


def leaves_of(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    named = [*model.named_parameters(), *model.named_buffers()]
    floats = {name: torch.rand(leaf.shape, generator=generator) for name, leaf in named if leaf.is_floating_point()}
    return floats | {"inner.0.extra": torch.rand(3, generator=generator)}


def state_of(model: nn.Module) -> list[Any]:
    return [(path, list(vars(m)), list(m._parameters.items()), list(m._buffers.items()))
            for path, m in model.named_modules()]  # fmt: skip


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


X = torch.arange(6.0).reshape(2, 3)


def test_as_functional_call(model: Model):
    for seed in range(3):
        leaves = leaves_of(model, seed)
        expected = torch.func.functional_call(model, leaves, (X,), {"scale": 2.0}, tie_weights=False)
        assert torch.equal(call_on(model, leaves, (X,), {"scale": 2.0}), expected)
        assert not torch.equal(expected, call_on(model, leaves_of(model, seed + 1), (X,), {"scale": 2.0}))


def test_nothing_is_left_behind(model: Model):
    leaves = leaves_of(model, 0)
    call_on(model, leaves, (X,), {})  # which finds the places
    before, out = state_of(model), model(X)
    call_on(model, leaves, (X,), {})
    model.fails = True
    with pytest.raises(ValueError, match="in the middle"):
        call_on(model, leaves, (X,), {})
    model.fails = False
    after = state_of(model)
    assert [own[:2] for own in after] == [own[:2] for own in before]
    for (_, _, *tensors), (_, _, *others) in zip(after, before, strict=True):
        own, other = ([leaf for named in group for _, leaf in named] for group in (tensors, others))
        assert all(a is b for a, b in zip(own, other, strict=True))
    assert torch.equal(model(X), out)


def test_a_name_that_is_not_there(model: Model):
    before = state_of(model)
    with pytest.raises(AttributeError, match="has no attribute `absent`"):
        call_on(model, {"inner.0.weight": torch.zeros(3, 3), "absent.weight": torch.zeros(3)}, (X,), {})
    assert model.inner[0].weight.abs().max() > 0
    assert [own[0] for own in state_of(model)] == [own[0] for own in before]


def test_a_copy_has_places_of_its_own(model: Model):
    leaves = leaves_of(model, 0)
    expected = call_on(model, leaves, (X,), {})
    copied = copy.deepcopy(model)
    out = model(X)
    assert torch.equal(call_on(copied, leaves, (X,), {}), expected)
    assert torch.equal(model(X), out) and torch.equal(copied(X), out)


def test_calls_within_a_call(model: Model):
    """The inner one restores what the outer one has set."""
    first, second = leaves_of(model, 0), leaves_of(model, 1)
    expected = call_on(model, first, (call_on(model, second, (X,), {}),), {})

    class Outer(Model):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            if x is X:
                x = call_on(self, second, (X + 0,), {})
            return super().forward(x, scale=scale)

    model.__class__ = Outer
    assert torch.equal(call_on(model, first, (X,), {}), expected)


def test_under_transforms_and_gradients(model: Model):
    leaves = {name: leaf for name, leaf in leaves_of(model, 0).items() if "running" not in name}

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        return call_on(model, leaves, (X,), {}).square().sum()

    def reference(leaves: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, leaves, (X,), tie_weights=False).square().sum()

    found, expected = torch.func.grad(loss)(leaves), torch.func.grad(reference)(leaves)
    assert all(torch.equal(found[name], expected[name]) for name in leaves)
    assert found["inner.0.weight"].abs().max() > 0
