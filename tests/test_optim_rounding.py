"""Params in few bits: stochastic rounding is unbiased and reproducible; float32 copies are followed exactly."""

from __future__ import annotations

import math
import re
import shutil

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_optim import Calls, assert_close, assert_far, at, randn, run, stack_of, tree_of
from torch import Tensor
from torch.utils import _pytree as pytree

import finetuna_func as ft
from finetuna_func import optim
from finetuna_func.optim import _rounding as rounding

LOW = [torch.bfloat16, torch.float16]
SHAPES = {"a": (30, 20), "b": (7,), "c": (), "e": (0, 3)}
few = settings(max_examples=25)


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two numbers of the dtype around each x, found among all of them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    every = every[every.isfinite()].unique()
    below = every[torch.searchsorted(every, x.double(), right=True) - 1]
    above = every[torch.searchsorted(every, x.double()).clamp(max=len(every) - 1)]
    return below, above


def stochastic(x: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return rounding.stochastic_leaf(x, dtype, ft.random.key(seed))


# --- stochastic rounding


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "value", [1.003, -1.003, 1.9999, -0.00987, 3e-6, 2.5e-7, -3e-8, 0.99999, 30000.5, 1.0 + 2**-8, math.pi]
)
def test_the_mean_is_the_number(value, dtype):
    """Of a million draws: the standard error is spacing * sqrt(p (1 - p) / n); five of those, once in 2 million."""
    n = 1_000_000
    x = torch.full((n,), value)
    below, above = (float(bound[0]) for bound in neighbours(x[:1], dtype))
    rounded = stochastic(x, dtype).double()
    assert set(rounded.unique().tolist()) <= {below, above}
    exact = float(x[0].double())
    p = (exact - below) / (above - below) if above > below else 0.0
    error = float(rounded.mean()) - exact
    allowed = 5 * (above - below) * math.sqrt(p * (1 - p) / n) + 1e-12 * abs(exact)
    assert abs(error) <= allowed
    if 0.02 < p < 0.48 or 0.52 < p < 0.98:  # rounding to the nearest would have been seen
        assert abs(float(x[0].to(dtype)) - exact) > allowed


@few
@given(
    exponent=st.integers(-45, 37), seed=st.integers(0, 999), dtype=st.sampled_from(LOW), wide=st.sampled_from([32, 64])
)
def test_to_a_neighbour_always_and_exact_numbers_stay(exponent, seed, dtype, wide):
    x = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    x = x.to(torch.float64 if wide == 64 else torch.float32)
    largest = torch.finfo(dtype).max
    x = x[x.abs() < largest]
    below, above = neighbours(x, dtype)
    rounded = stochastic(x, dtype, seed)
    assert rounded.dtype == dtype
    assert ((rounded.double() == below) | (rounded.double() == above)).all()
    assert torch.equal(stochastic(rounded.to(x.dtype), dtype, seed + 1), rounded)


@pytest.mark.parametrize("dtype", LOW)
def test_special_numbers(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, largest, -largest, 3.4e38, 1e-45])
    rounded = stochastic(x, dtype)
    assert rounded[0].isnan()
    assert rounded[1:7].tolist() == [math.inf, -math.inf, 0, 0, largest, -largest]
    assert torch.signbit(rounded[4]) and not torch.signbit(rounded[3])
    assert not rounded.isnan()[1:].any()
    assert rounded[8] in (0, torch.tensor(0.0, dtype=dtype).nextafter(torch.tensor(1.0, dtype=dtype)))


def test_every_number_has_a_draw_of_its_own():
    """No two leaves, keys, adapters or places share draws, and a large leaf goes in parts that do not repeat."""
    x = torch.full((2, 1000), 1.003)
    params = {name: torch.zeros(2, 1000, dtype=torch.bfloat16) for name in "ab"}
    key = ft.random.key(0)
    apply = optim.apply_updates
    one = apply(params, {"a": x, "b": x}, rounding="stochastic", rng=key)
    draws = [one["a"][0], one["a"][1], one["b"][0], one["b"][1]]
    draws.append(apply(params, {"a": x, "b": x}, rounding="stochastic", rng=ft.random.key(1))["a"][0])
    stacked = apply(stack_of(params, 2), {"a": x, "b": x}, rounding="stochastic", rng=key)
    draws += [stacked.params["a"][0], stacked.params["a"][1]]
    for i, first in enumerate(draws):
        for other in draws[:i]:
            # Independent draws differ where one goes up and the other does not: 2 p (1 - p) = 0.47 of places.
            assert 0.3 < float((first != other).float().mean()) < 0.65
    assert_close(apply(params, {"a": x, "b": x}, rounding="stochastic", rng=key), one)


def test_large_leaves_go_in_parts(monkeypatch):
    monkeypatch.setattr(rounding, "_CHUNK", 1000)
    rounded = stochastic(torch.full((5, 500), 1.003), torch.bfloat16).reshape(-1)
    parts = rounded.split(1000)
    assert [len(part) for part in parts] == [1000, 1000, 500]
    assert not torch.equal(parts[0], parts[1])
    assert abs(float(rounded.double().mean()) - 1.003) < 5 * 2**-8 / math.sqrt(2500)


@pytest.mark.parametrize("dtype", LOW)
def test_a_stack_is_its_adapters_and_vmap(dtype):
    n = 3
    params, updates = randn(SHAPES, 0, n=n, dtype=dtype), randn(SHAPES, 1, n=n, dtype=torch.float32)
    keys = ft.random.split(ft.random.key(7), n)
    whole = optim.apply_updates(stack_of(params, n), updates, rounding="stochastic", rng=ft.random.key(7))
    assert isinstance(whole, ft.Finetuned)
    by_keys = optim.apply_updates(stack_of(params, n), updates, rounding="stochastic", rng=keys)
    mapped = torch.func.vmap(lambda p, u, k: optim.apply_updates(p, u, rounding="stochastic", rng=k))(
        params, updates, keys
    )
    for i in range(n):
        alone = optim.apply_updates(at(params, i), at(updates, i), rounding="stochastic", rng=keys[i])
        for other in (whole.params, by_keys.params, mapped):
            assert_close(at(dict(other), i), alone)
    assert_far(tree_of(whole), tree_of(optim.apply_updates(stack_of(params, n), updates)))


def test_wide_params_are_not_rounded():
    params = {"w": torch.randn(50), "v": torch.randn(50, dtype=torch.float64), "h": torch.randn(50).bfloat16()}
    updates = {name: torch.randn(50) for name in params}
    new = optim.apply_updates(params, updates, rounding="stochastic", rng=ft.random.key(0))
    plain = optim.apply_updates(params, updates)
    assert torch.equal(new["w"], plain["w"]) and torch.equal(new["v"], plain["v"])
    assert not torch.equal(new["h"], plain["h"])


def test_small_steps_add_up():
    """1000 steps of 1/1000: rounding to the nearest forgets each of them, stochastic rounding none on average."""
    params = nearest = {"w": torch.ones(4000, dtype=torch.bfloat16)}
    update = {"w": torch.full((4000,), 1e-3)}
    for step in range(1000):
        params = optim.apply_updates(
            params, update, rounding="stochastic", rng=ft.random.fold_in(ft.random.key(0), step)
        )
        nearest = optim.apply_updates(nearest, update)
    assert (nearest["w"] == 1).all()
    # Each walk has steps of spacing 2 ** -7 taken with p = 0.128: standard error 0.0826 / sqrt(4000) = 0.0013.
    assert abs(float(params["w"].double().mean()) - 2.0) < 5 * 0.0013


def test_compiles_and_reads_no_value():
    torch._dynamo.reset()
    params, updates = randn(SHAPES, 0, dtype=torch.bfloat16), randn(SHAPES, 1, dtype=torch.float32)

    def apply(params, updates, key):
        return optim.apply_updates(params, updates, rounding="stochastic", rng=key)

    key = ft.random.key(3)
    compiled = torch.compile(apply, backend="aot_eager", fullgraph=True)
    assert_close(compiled(params, updates, key), apply(params, updates, key))
    assert_far(compiled(params, updates, ft.random.key(4)), apply(params, updates, key))
    meta = {name: leaf.to("meta") for name, leaf in params.items()}
    new = apply(meta, meta, key.to("meta"))
    assert {name: leaf.shape for name, leaf in new.items()} == {name: leaf.shape for name, leaf in params.items()}
    with Calls() as calls:
        apply(params, updates, key)
    assert "_local_scalar_dense" not in calls.names
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on the CPU")
def test_inductor_gives_the_same_values():
    """It elides casts to fewer bits and back, and has kernels of its own for the ends of odd sizes."""
    torch._dynamo.reset()
    params = {"a": torch.randn(513).bfloat16(), "b": torch.randn(3, 7).half()}
    grads = {name: 0.01 * torch.randn(leaf.shape) for name, leaf in params.items()}
    tx = optim.with_master_params(optim.adamw8bit(0.1, min_size=1))

    def step(params, grads, state, key):
        updates, state = tx.update(grads, state, params)
        rounded = optim.apply_updates(params, grads, rounding="stochastic", rng=key)
        return optim.apply_updates(params, updates), rounded, state

    compiled, state = torch.compile(step, fullgraph=True), tx.init(params)
    for k in range(2):
        expected = step(params, grads, state, ft.random.key(k))
        found = compiled(params, grads, state, ft.random.key(k))
        assert_close(found[1], expected[1])
        assert_far(found[1], optim.apply_updates(params, grads))
        for one, other in ((found[0], expected[0]), (found[2].master, expected[2].master)):
            # roundings of 1e-7, which a bfloat16 param passes on as one of its own
            for name in one:
                allowed = 2**-7 if one[name].dtype in LOW else 1e-5
                torch.testing.assert_close(one[name].float(), other[name].float(), rtol=allowed, atol=1e-6)
        params, state = expected[0], expected[2]
    torch._dynamo.reset()


# --- float32 copies


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("n", [None, 2])
def test_params_are_the_rounded_copies_at_every_step(dtype, n):
    shapes = {"a": (40, 30), "b": (7,), "c": ()}
    params = randn(shapes, 0, n=n, dtype=dtype)
    tx = optim.with_master_params(optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3)))
    inner = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))
    start = params if n is None else stack_of(params, n)
    wide = {name: leaf.float() for name, leaf in params.items()}
    wide = wide if n is None else stack_of(wide, n)
    state, wide_state, tuned = tx.init(start), inner.init(wide), start
    for k in range(12):
        grads = randn(shapes, k + 1, n=n, dtype=dtype)
        updates, state = tx.update(grads, state, tuned)
        tuned = optim.apply_updates(tuned, updates)
        wide_updates, wide_state = inner.update(grads, wide_state, wide)
        wide = optim.apply_updates(wide, wide_updates)
        assert_close(state.master, tree_of(wide))
        assert_close(tree_of(tuned), {name: leaf.to(dtype) for name, leaf in tree_of(wide).items()})
    without, _ = run(inner, start, [randn(shapes, k + 1, n=n, dtype=dtype) for k in range(12)])
    assert_far(tree_of(without), tree_of(tuned))


@few
@given(dtype=st.sampled_from(LOW), seed=st.integers(0, 999))
def test_the_update_is_exact_however_far_it_goes(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-6, 5, (2, 400), generator=generator)
    a, b = (torch.randn(2, 400, generator=generator) * 10.0**exponents).unbind()
    b[:20] = 0
    params = {"w": a.to(dtype)}
    tx = optim.with_master_params(optim.identity())
    state = tx.init(params)
    updates, state = tx.update({"w": b - a.to(dtype).float()}, state, params)
    new = optim.apply_updates(params, updates)
    assert torch.equal(new["w"], state.master["w"].to(dtype))


def test_float32_does_not_hold_every_update():
    tx, params = optim.with_master_params(optim.identity()), {"w": torch.ones(1, dtype=torch.bfloat16)}
    state = tx.init(params)
    for step in (-(2.0**-24), -1.0):  # the copy is 1 - 2 ** -24, which rounds to 1, and then -2 ** -24
        updates, state = tx.update({"w": torch.tensor([step])}, state, params)
        in_float32 = optim.apply_updates(params, {"w": updates["w"].float()})
        params = optim.apply_updates(params, updates)
    assert state.master["w"].item() == params["w"].item() == -(2.0**-24)
    assert in_float32["w"].item() == 0


def test_wide_params_have_no_copies_and_are_updated_as_ever():
    params = {"v": torch.randn(5, dtype=torch.float64), "w": torch.randn(5)}
    grads = [{name: torch.randn(5) for name in params} for _ in range(3)]
    tx = optim.with_master_params(optim.adamw(0.1))
    assert tx.init(params).master == {}
    assert_close(run(tx, params, grads)[0], run(optim.adamw(0.1), params, grads)[0])
    both = {**params, "h": torch.randn(5).bfloat16()}
    assert list(tx.init(both).master) == ["h"]
    new, _ = run(tx, both, [{**g, "h": torch.randn(5)} for g in grads])
    assert_close({n: new[n] for n in params}, run(optim.adamw(0.1), params, grads)[0])


def test_copies_with_8_bit_moments_multi_steps_and_masks():
    params = {"v": torch.randn(3).bfloat16(), "w": torch.randn(100, 100).bfloat16()}
    grads = [{name: torch.randn_like(leaf) for name, leaf in params.items()} for _ in range(4)]
    for tx in (
        optim.with_master_params(optim.adamw8bit(1e-3)),
        optim.with_master_params(optim.multi_steps(optim.adamw(1e-3), 2)),
        optim.multi_steps(optim.with_master_params(optim.adamw(1e-3)), 2),
    ):
        new, state = run(tx, params, grads)
        master = state.inner.master if isinstance(state, optim.MultiStepsState) else state.master
        assert_close(new, {name: leaf.bfloat16() for name, leaf in master.items()})
        assert_far(new, params)
    masked = optim.masked(optim.with_master_params(optim.sgd(0.1)), lambda name, leaf: name == "w")
    state = masked.init(params)
    assert list(state.inner.master) == ["w"]
    updates, _ = masked.update(grads[0], state, params)
    assert updates["v"] is grads[0]["v"]


def test_vmap_of_the_copies():
    n, tx = 3, optim.with_master_params(optim.adamw(0.01))
    params = randn({"w": (40,)}, 0, n=n, dtype=torch.bfloat16)
    tuned = stack_of(params, n)
    state, mapped_state, mapped = tx.init(tuned), torch.func.vmap(tx.init)(params), params
    for k in range(3):
        grads = randn({"w": (40,)}, k + 1, n=n, dtype=torch.bfloat16)
        updates, state = tx.update(grads, state, tuned)
        tuned = optim.apply_updates(tuned, updates)
        mapped_updates, mapped_state = torch.func.vmap(tx.update)(grads, mapped_state, mapped)
        mapped = torch.func.vmap(optim.apply_updates)(mapped, mapped_updates)
    assert_close((mapped, mapped_state), (tree_of(tuned), state), rtol=1e-6, atol=1e-7)
    assert [id(x) for x in optree.tree_leaves(state)] == [id(x) for x in pytree.tree_leaves(state)]  # pyright: ignore


def test_copies_compile():
    torch._dynamo.reset()
    tx = optim.with_master_params(optim.adamw(0.01))
    params, grads = randn(SHAPES, 0, dtype=torch.bfloat16), randn(SHAPES, 1, dtype=torch.bfloat16)
    state = tx.init(params)
    compiled = torch.compile(tx.update, backend="aot_eager", fullgraph=True)
    assert_close(compiled(grads, state, params), tx.update(grads, state, params), rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()


# --- errors

W = {"w": torch.ones(2, 3, dtype=torch.bfloat16)}
KEY = ft.random.key(0)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: optim.apply_updates(W, W, rounding="up"), '(rounding=\'up\'): expected "nearest" or "stochastic".'),
        (lambda: optim.apply_updates(W, W, rounding="stochastic"), "(rng=...): got NoneType, and stochastic rounding"),
        (lambda: optim.apply_updates(W, W, rounding="stochastic", rng=3), "(rng=...): got int, and"),  # pyright: ignore
        (
            lambda: optim.apply_updates(W, W, rounding="stochastic", rng=torch.tensor(1.0)),
            "(rng=...): got a tensor of dtype torch.float32, and stochastic rounding needs a key",
        ),
        (lambda: optim.apply_updates(W, W, rng=KEY), '(rng=...): rounding="nearest" draws no numbers'),
        (
            lambda: optim.apply_updates(W, W, rounding="stochastic", rng=ft.random.split(KEY, 2)),
            "(rng=...): got keys of shape (2,), expected one key, of shape ().",
        ),
        (
            lambda: optim.apply_updates(stack_of(W, 2), W, rounding="stochastic", rng=ft.random.split(KEY, 3)),
            "(rng=...): got keys of shape (3,), expected () or (2,), a key each.",
        ),
        (
            lambda: MASTER.update(W, MASTER.init(W)),
            "with_master_params.update(params=None): the update is what leads from",
        ),
        (
            lambda: MASTER.update(W, MASTER.init({"v": W["w"]}), W),
            "missing names ['v'], unknown names ['w']; expected exactly the 1 names of the params given to init",
        ),
        (
            lambda: MASTER.update(W, MASTER.init({"w": torch.ones(2, 3)}), W),
            "missing names [], unknown names ['w']; expected exactly the 0 names of the params given to init, of few",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


MASTER = optim.with_master_params(optim.sgd(0.1))
