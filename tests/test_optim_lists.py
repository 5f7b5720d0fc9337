"""Many small leaves are computed together, to the bits that each would have alone."""

from __future__ import annotations

import pytest
import torch
from test_optim import OPTIMIZERS, Calls, assert_close, assert_far, randn, run, stack_of, tree_of
from torch import nn

from finetuna_func import optim
from finetuna_func.optim import _lists as lists

SHAPES = {"a": (3, 2), "b": (4,), "c": (), "d": (7, 5), "e": (0, 3)}
MAKERS = {name: make for name, make in OPTIMIZERS.items() if name != "masked"} | {
    "decayed": lambda lr: optim.chain(optim.trace(0.5, nesterov=True), optim.adamw(lr, weight_decay=torch.tensor(0.1))),
    "rooted": lambda lr: optim.chain(optim.scale_by_adam(eps_root=1e-3), optim.scale_by_learning_rate(lr)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("n", [None, 2])
def test_together_is_leaf_by_leaf_bitwise(make, n, dtype, monkeypatch):
    params = randn(SHAPES, 0, n=n, dtype=dtype)
    start = params if n is None else stack_of(params, n)
    grads = [randn(SHAPES, seed, n=n, dtype=dtype) for seed in range(1, 5)]
    rates = 0.1 if n is None else torch.tensor([0.1, 0.2])
    together, state = run(make(rates), start, grads)
    monkeypatch.setattr(lists, "_NUMBERS", 20)
    in_parts = run(make(rates), start, grads)
    monkeypatch.setattr(lists, "batches", lambda tree: [[name] for name in sorted(tree)])
    alone, alone_state = run(make(rates), start, grads)
    assert_close((tree_of(together), state), (tree_of(alone), alone_state))
    assert_close((tree_of(in_parts[0]), in_parts[1]), (tree_of(alone), alone_state))
    assert_far(tree_of(run(make(2 * rates), start, grads)[0]), tree_of(alone))
    assert list(tree_of(together)) == sorted(SHAPES)


def test_the_number_of_calls_hardly_grows_with_the_leaves():
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))
    calls = []
    for number in (10, 200):
        params = {f"{i:03}": torch.ones(4, 8) for i in range(number)}
        state = tx.init(params)
        with Calls() as counted:
            updates, _ = tx.update(params, state, params)
            optim.apply_updates(params, updates)
        calls.append(counted.count)
    assert calls[1] == calls[0] < 60
    stack, mapped = stack_of(params, 4), torch.func.vmap(tx.init)(params)
    state = tx.init(stack)
    with Calls() as counted:
        tx.update(params, state, stack)
    assert counted.count < 3 * number  # the norm of each adapter's part of a leaf, and not much else
    with Calls() as counted:
        torch.func.vmap(tx.update)(params, mapped, params)
    assert counted.count > 8 * number  # in a transform, leaf by leaf


def test_batches_have_one_kind_and_are_small(monkeypatch):
    monkeypatch.setattr(lists, "_NUMBERS", 100)
    tree = {
        "a": torch.zeros(60),
        "b": torch.zeros(60),
        "c": torch.zeros(40),
        "big": torch.zeros(1000),
        "d": torch.zeros(3, dtype=torch.float64),
        "e": nn.Parameter(torch.zeros(1)),
        "m": torch.zeros(3, device="meta"),
    }
    assert lists.batches(tree) == [["a"], ["b", "c"], ["big"], ["d"], ["e"], ["m"]]
    assert lists.batches({}) == []
    subclass = torch.zeros(2).as_subclass(type("Sub", (torch.Tensor,), {}))
    assert lists.batches({"x": torch.zeros(1), "y": subclass, "z": torch.zeros(1)}) == [["x", "z"], ["y"]]
    seen = []
    torch.func.vmap(lambda t: seen.append(lists.batches(t)) or t["a"])({"a": torch.zeros(2, 1), "b": torch.zeros(2, 1)})
    assert seen == [[["a"], ["b"]]]
    with torch.autograd.forward_ad.dual_level():
        assert lists.batches({"a": torch.zeros(1), "b": torch.zeros(1)}) == [["a"], ["b"]]


def test_a_rate_on_another_device_than_the_leaves():
    params = {name: torch.zeros(2, device="meta") for name in "ab"}
    tx = optim.sgd(torch.tensor(0.1, device="meta"))
    assert tx.update(params, tx.init(params))[0]["a"].device.type == "meta"
    with pytest.raises(RuntimeError):  # as for one leaf; no silent copy from device to device
        optim.sgd(torch.tensor([0.1, 0.2])).update(params, tx.init(params))
