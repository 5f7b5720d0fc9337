"""`optim.flatten`: the steps of the transformation inside of it, on one leaf per dtype.

Each number goes through the same operations, so without a norm the results are the same bit by bit; a norm sums in
another order, so float64 is compared at 1e-12 (a few hundred roundings of 1e-16, through a few steps of Adam) and
float32 at 1e-5.
"""

from __future__ import annotations

import io
import threading
from typing import Any

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Everything, Tiny, assert_same_finetune, finetunes
from test_optim import OPTIMIZERS, Calls, assert_close, assert_far, at, few, randn, run, stack_of, tree_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

import finetuna_func as ft
from finetuna_func import optim
from finetuna_func.optim._layout import layout_of

SHAPES = {"a": (3, 2), "b": (16,), "c": (), "d": (7, 5), "e": (0, 3), "f": (2, 4, 4)}
MAKERS = {name: make for name, make in OPTIMIZERS.items() if name != "masked"} | {
    "rooted": lambda lr: optim.chain(optim.scale_by_adam(eps_root=1e-3), optim.scale_by_learning_rate(lr)),
    "copied": lambda lr: optim.with_master_params(optim.adamw(lr, weight_decay=0.1)),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
shapes_of_any = st.dictionaries(
    st.sampled_from("abcdefgh"), st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6
)
ADAM = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.1, weight_decay=0.1))


def start_of(shapes: Any, seed: int, n: int | None, dtype: torch.dtype = torch.float64) -> Any:
    params = randn(shapes, seed, n=n, dtype=dtype)
    return params if n is None else stack_of(params, n)


class Places(Calls):
    """Counts the operators that start a kernel, views left out."""

    VIEWS = frozenset(
        {"view", "_unsafe_view", "_reshape_alias", "split_with_sizes", "as_strided", "slice", "select", "detach"}
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket.__name__ in self.VIEWS:
            self.count -= 1
        return out


# --- the steps of what is inside


@every
@few
@given(shapes=shapes_of_any, n=st.sampled_from([None, 1, 3]), seed=st.integers(0, 999))
def test_steps_are_those_of_the_inner_transformation(make, shapes, n, seed):
    start = start_of(shapes, seed, n)
    grads = [randn(shapes, seed + 1 + k, n=n) for k in range(4)]
    rate = 0.1 if n is None else torch.linspace(0.05, 0.1, n, dtype=torch.float64)
    found, _ = run(optim.flatten(make(rate)), start, grads)
    expected, _ = run(make(rate), start, grads)
    assert_close(tree_of(found), tree_of(expected), rtol=1e-12, atol=1e-12)
    assert list(tree_of(found)) == sorted(shapes)
    if any(leaf.numel() for leaf in grads[0].values()):
        assert_far(tree_of(found), tree_of(run(make(2 * rate), start, grads)[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [None, 2])
@every
def test_without_a_norm_bit_by_bit(make, n, dtype):
    start = start_of(SHAPES, 0, n, dtype)
    grads = [randn(SHAPES, 1 + k, n=n, dtype=dtype) for k in range(4)]
    found, _ = run(optim.flatten(make(0.1)), start, grads)
    expected, _ = run(make(0.1), start, grads)
    clips = make in (MAKERS["clipped_adam"], MAKERS["clipped_sgd"], MAKERS["accumulated"])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype] if clips else 0.0  # bfloat16: a step of the dtype
    assert_close(tree_of(found), tree_of(expected), rtol=tolerance, atol=tolerance)
    assert_far(tree_of(found), tree_of(run(make(0.2), start, grads)[0]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n", [None, 3])
def test_against_torch(n):
    """``clip_grad_norm_`` and ``torch.optim.AdamW``, an adapter after the other."""
    rates = [0.02, 0.05, 0.1]
    tx = optim.flatten(
        optim.chain(
            optim.clip_by_global_norm(0.7),
            optim.adamw(0.02 if n is None else torch.tensor(rates, dtype=torch.float64), weight_decay=0.3),
        )
    )
    start = start_of(SHAPES, 0, n)
    grads = [randn(SHAPES, 1 + k, n=n) for k in range(12)]
    found = tree_of(run(tx, start, grads)[0])
    for i in range(n or 1):
        leaves = {k: (v if n is None else v[i]).clone().requires_grad_() for k, v in tree_of(start).items()}
        peer = torch.optim.AdamW(leaves.values(), lr=rates[i], weight_decay=0.3, foreach=False)
        for grad in grads:
            for name, leaf in leaves.items():
                leaf.grad = (grad[name] if n is None else grad[name][i]).clone()
            torch.nn.utils.clip_grad_norm_(leaves.values(), 0.7)
            peer.step()
        own = found if n is None else at(found, i)
        assert_close(own, {k: v.detach() for k, v in leaves.items()}, rtol=1e-10, atol=1e-10)
        assert_far(own, tree_of(start) if n is None else at(tree_of(start), i), rtol=1e-2, atol=1e-2)


@few
@given(shapes=shapes_of_any, n=st.integers(1, 3), seed=st.integers(0, 999))
def test_the_state_of_a_stack_is_that_of_its_adapters_and_of_vmap(shapes, n, seed):
    params = randn(shapes, seed, n=n)
    grads = [randn(shapes, seed + 1 + k, n=n) for k in range(3)]
    rates = torch.linspace(0.01, 0.1, n, dtype=torch.float64)

    def make(rate: Tensor) -> Any:
        return optim.flatten(optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(rate)))

    tuned, state = run(make(rates), stack_of(params, n), grads)
    mapped, mapped_state = params, torch.func.vmap(make(rates).init)(params)
    for grad in grads:
        updates, mapped_state = torch.func.vmap(lambda lr, g, s, p: make(lr).update(g, s, p))(
            rates, grad, mapped_state, mapped
        )
        mapped = torch.func.vmap(optim.apply_updates)(mapped, updates)
    assert_close((mapped, mapped_state), (tree_of(tuned), state), rtol=1e-12, atol=1e-12)
    for i in range(n):
        alone = run(make(rates[i]), at(params, i), at(grads, i))
        assert_close((at(tree_of(tuned), i), at(state, i)), alone, rtol=1e-12, atol=1e-12)
        if any(leaf[0].numel() for leaf in params.values()):
            assert_far(at(state, i), run(make(rates[i]), at(params, i), at(grads, i)[::-1])[1], rtol=1e-9, atol=1e-9)


def test_a_nan_in_one_adapter_leaves_the_others_alone():
    start, grads = start_of(SHAPES, 0, 3), [randn(SHAPES, 1 + k, n=3) for k in range(3)]
    expected, expected_state = run(optim.flatten(ADAM), start, grads)
    grads[1]["d"][1, 2, 2] = float("nan")
    found, state = run(optim.flatten(ADAM), start, grads)
    for i in (0, 2):
        assert_close((at(tree_of(found), i), at(state, i)), (at(tree_of(expected), i), at(expected_state, i)))
    assert found.params["a"][1].isnan().all()


def test_padded_ranks_stay_zero():
    base = ft.quantize_base_model(Tiny())
    own = [{"linear_config": ft.LinearAdapterConfig(r=r, alpha=1.0)} for r in (2, 5)]
    stacked = ft.stack([finetunes(base, 1, adapt_layers={"fc"}, **options)[0] for options in own])
    ids = torch.randint(16, (2, 3, 4), generator=torch.Generator().manual_seed(0))

    def loss(t: ft.Finetuned, ids: Tensor) -> Tensor:
        return ft.apply_stacked(base, t, ids).square().mean((1, 2, 3))

    tx = optim.flatten(ADAM)
    state = tx.init(stacked)
    for _ in range(4):
        grads = ft.stacked_value_and_grad(loss)(stacked, ids)[1]
        updates, state = tx.update(grads, state, stacked)
        stacked = optim.apply_updates(stacked, updates)
    assert not stacked.params["fc.lora_a"][0, 2:].any() and not stacked.params["fc.lora_b"][0, :, 2:].any()
    assert stacked.params["fc.lora_a"][0, :2].all() and stacked.params["fc.lora_a"][1].all()


# --- one leaf, few kernels, views


def test_the_number_of_kernels_does_not_grow_with_the_leaves():
    tx, counts = optim.flatten(ADAM), {}
    for number in (10, 224):
        start = stack_of({f"{i:03}": torch.ones(4, 4, 8) for i in range(number)}, 4)
        grads, state = dict(start.params), tx.init(start)
        for k in range(2):
            with Places() as counted:
                updates, state = tx.update(grads, state, start)
                start = optim.apply_updates(start, updates)
            counts[number, k] = counted.count
    assert counts[224, 1] == counts[10, 1] <= 31
    assert counts[224, 0] == counts[10, 0] == counts[10, 1] + 2  # once, the params are put together
    with Places() as counted:
        ADAM.update(grads, ADAM.init(start), start)
    assert counted.count > 224


def test_leaves_are_views_aligned_as_far_as_they_go():
    tx, start = optim.flatten(ADAM), start_of(SHAPES, 0, 2, torch.float32)
    tuned, state = run(tx, start, [randn(SHAPES, 1, n=2, dtype=torch.float32)])
    assert len({leaf.untyped_storage().data_ptr() for leaf in tuned.params.values()}) == 1
    (mean,) = state.inner[1][0].mu.values()
    numbers = sum(leaf[0].numel() for leaf in start.params.values())
    assert mean.shape == (2, numbers)
    offsets = {name: leaf.storage_offset() for name, leaf in tuned.params.items()}
    assert [name for name in sorted(SHAPES, key=offsets.__getitem__) if name != "e"] == ["b", "f", "a", "c", "d"]
    assert offsets["b"] == 0 and offsets["f"] == 16
    assert all(leaf.numel() == 0 or leaf.stride(0) == numbers for leaf in tuned.params.values())


def test_a_slice_of_a_stack_is_not_taken_for_more_than_it_is():
    """Beside the leaves of one adapter, in the same memory, lie those of the next."""
    params, grads = randn({"a": (2, 3)}, 0, n=3), randn({"a": (2, 3)}, 1, n=3)
    for i in range(3):
        found, state = run(optim.flatten(ADAM), at(params, i), [at(grads, i)] * 2)
        alone = {"a": params["a"][i].clone()}
        assert_close((found, state), run(optim.flatten(ADAM), alone, [at(grads, i)] * 2))
        assert_close(found, run(ADAM, alone, [at(grads, i)] * 2)[0], rtol=1e-12)


def test_leaves_that_lie_otherwise_are_copied():
    """Whatever is done to params between steps, the next step sees their values."""
    tx = optim.flatten(ADAM)
    grads = [randn(SHAPES, 1 + k, n=2) for k in range(3)]
    tuned, state = run(tx, start_of(SHAPES, 0, 2), grads[:2])
    fresh = {name: leaf.clone() for name, leaf in tuned.params.items()}
    assert [leaf.stride(0) for leaf in fresh.values()] != [leaf.stride(0) for leaf in tuned.params.values()]
    p = dict(tuned.params)
    cases = {
        "as they are": p,
        "clones": fresh,
        "one anew": {**p, "d": fresh["d"]},
        "two exchanged": {**p, "a": p["d"][:, 1:4, 1:3]},
        "another order of the adapters": {name: leaf.flip(0) for name, leaf in p.items()},
        "expanded": {name: leaf[:1].expand_as(leaf) for name, leaf in p.items()},
        "parameters": {name: nn.Parameter(leaf) for name, leaf in p.items()},
        "transposed": {**p, "f": p["f"].mT},
        "alike in memory": {**p, "b": p["b"].view(torch.int64).view(torch.float64) + 0},
    }
    for case, params in cases.items():
        alone = {name: leaf.detach().clone() for name, leaf in params.items()}
        found = tx.update(grads[2], state, stack_of(params, 2))[0]
        expected = tx.update(grads[2], state, stack_of(alone, 2))[0]
        assert_close(found, expected)
        applied = optim.apply_updates(stack_of(params, 2), found)
        slow = {name: alone[name] + leaf for name, leaf in found.items()}
        assert_close({name: leaf.detach() for name, leaf in tree_of(applied).items()}, slow)
        assert_far(tree_of(optim.apply_updates(stack_of(fresh, 2), grads[2])), slow)
        assert case  # for the report of a failure
    # updates that were changed after they were made
    updates = tx.update(grads[2], state, tuned)[0]
    halved = {name: leaf / 2 if name == "d" else leaf for name, leaf in updates.items()}
    assert_close(tree_of(optim.apply_updates(tuned, halved)), {name: p[name] + leaf for name, leaf in halved.items()})


def test_leaves_next_to_one_another_in_different_memory():
    """Two halves of a buffer that only looks whole: other leaves lie where ours would."""
    tree = {"a": torch.zeros(16), "b": torch.ones(16)}
    layout = layout_of("test", tree, None)
    flat = layout.join(tree)
    whole = layout.split(flat)
    assert layout.lies(whole) and not layout.lies(tree)
    assert layout.join(whole)[layout.buffers[0].name].data_ptr() == flat[layout.buffers[0].name].data_ptr()
    assert not layout.lies({"a": whole["b"], "b": whole["a"]})
    assert not layout.lies({"a": whole["a"], "b": whole["b"].view(torch.int32)})
    short = torch.zeros(31)
    assert not layout.lies({"a": short[:16], "b": torch.as_strided(short, (16,), (1,), 15)})
    meta = {name: leaf.to("meta") for name, leaf in whole.items()}
    assert not layout.lies(meta)
    assert layout.join(meta)[layout.buffers[0].name].shape == (32,)


def test_a_leaf_whose_derivative_is_asked_for():
    """By plain autograd, through the leaves of a flat tensor."""
    tree = {"a": torch.randn(3), "b": torch.randn(4)}
    tx = optim.flatten(optim.sgd(0.5, weight_decay=0.1))
    params, state = run(tx, tree, [tree])
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    updates, _ = tx.update(tree, state, leaves)
    grads = torch.autograd.grad(sum(leaf.sum() for leaf in updates.values()), list(leaves.values()))
    assert_close(dict(zip(leaves, grads, strict=True)), {k: torch.full_like(v, -0.05) for k, v in tree.items()})
    updates, _ = tx.update(leaves, state, params)
    applied = optim.apply_updates(params, updates)
    grads = torch.autograd.grad(sum(leaf.sum() for leaf in applied.values()), list(leaves.values()))
    assert_close(dict(zip(leaves, grads, strict=True)), {k: torch.full_like(v, -0.5) for k, v in tree.items()})


def test_dtypes_have_a_leaf_each():
    params = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.ones(2),
        "c": torch.ones(5),
        "d": torch.ones(1).half(),
    }
    tx = optim.flatten(optim.adamw(0.1))
    tuned, state = run(tx, params, [params, params])
    assert len(state.inner[0].mu) == 3
    expected, _ = run(optim.adamw(0.1), params, [params, params])
    assert_close(tuned, expected)
    assert {name: leaf.dtype for name, leaf in tuned.items()} == {name: leaf.dtype for name, leaf in params.items()}
    # gradients may have another dtype than params
    wide = {name: leaf.float() for name, leaf in params.items()}
    assert_close(run(tx, params, [wide, wide])[0], expected)
    assert_far(run(tx, params, [wide, {name: -leaf for name, leaf in wide.items()}])[0], expected)


def test_the_empty_tree_and_one_leaf():
    tx = optim.flatten(ADAM)
    assert run(tx, {}, [{}, {}])[0] == {}
    for leaf in (torch.tensor(2.0), torch.ones(0), torch.ones(5)):
        found, expected = (run(t, {"w": leaf}, [{"w": leaf}] * 3)[0] for t in (tx, ADAM))
        assert_close(found, expected, rtol=1e-6)


# --- with the other transformations


def test_masks_outside_and_around():
    params, grads = randn(SHAPES, 0), [randn(SHAPES, k) for k in (1, 2, 3)]
    chosen = {name: name in "ad" for name in SHAPES}
    rest = {name: not use for name, use in chosen.items()}

    def make(wrap: Any) -> Any:
        return optim.chain(
            optim.masked(wrap(optim.adamw(0.1)), chosen), optim.masked(wrap(optim.sgd(0.1, momentum=0.5)), rest)
        )

    found, expected = (run(make(wrap), params, grads)[0] for wrap in (optim.flatten, lambda tx: tx))
    assert_close(found, expected)
    assert_far(found, run(optim.adamw(0.1), params, grads)[0])


@pytest.mark.parametrize("n", [None, 2])
@pytest.mark.parametrize(
    "around",
    [
        lambda tx: optim.multi_steps(tx, 2),
        optim.with_master_params,
        optim.flatten,
        lambda tx: optim.chain(optim.scale(0.5), tx, optim.scale(3.0)),
    ],
    ids=["multi_steps", "master", "flatten", "chain"],
)
def test_others_around_it(around, n):
    start = start_of(SHAPES, 0, n, torch.bfloat16)
    grads = [randn(SHAPES, 1 + k, n=n, dtype=torch.bfloat16) for k in range(4)]
    inner = optim.adamw(0.1, weight_decay=0.1)
    found, expected = (run(around(tx), start, grads)[0] for tx in (optim.flatten(inner), inner))
    assert_close(tree_of(found), tree_of(expected))
    assert_far(tree_of(found), tree_of(run(inner, start, grads[::-1])[0]))


@pytest.mark.parametrize("n", [None, 2])
def test_stochastic_rounding_draws_the_same(n):
    start = start_of(SHAPES, 0, n, torch.bfloat16)
    grads, states, results = randn(SHAPES, 1, n=n, dtype=torch.bfloat16), [], []
    for tx in (optim.flatten(optim.adamw(1e-3)), optim.adamw(1e-3)):
        state = tx.init(start)
        updates, state = tx.update(grads, state, start)
        results.append(
            [
                tree_of(optim.apply_updates(start, updates, rounding="stochastic", rng=ft.random.key(seed)))
                for seed in (0, 1)
            ]
        )
        states.append(state)
    assert_close(results[0], results[1])
    assert_far(results[0][0], results[0][1])


def test_blocks_of_8_bits_do_not_span_adapters():
    n = 3
    params, grads = randn(SHAPES, 0, n=n, dtype=torch.float32), [randn(SHAPES, k, n=n) for k in (1, 2, 3)]
    rates = torch.linspace(0.01, 0.1, n)

    def make(rate: Any) -> Any:
        return optim.flatten(optim.adamw8bit(rate, min_size=1))

    tuned, state = run(make(rates), stack_of(params, n), grads)
    (absmax,) = state.inner[0].mu_absmax.values()
    assert absmax.shape == (n, 1)
    for i in range(n):
        alone, alone_state = run(make(rates[i]), at(params, i), at(grads, i))
        assert_close((at(tree_of(tuned), i), at(state, i)), (alone, alone_state))
        assert_far(at(tree_of(tuned), i), run(make(rates[i]), at(params, i), at(grads, i)[::-1])[0])


# --- transforms, the compiler, pytrees


def test_derivative_with_respect_to_the_learning_rate():
    params, grads = randn(SHAPES, 0), [randn(SHAPES, k) for k in (1, 2)]

    def total(wrap: Any, rate: Tensor) -> Tensor:
        tx = wrap(optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(rate)))
        return sum(leaf.square().sum() for leaf in run(tx, params, grads)[0].values())

    rate = torch.tensor(0.1, dtype=torch.float64)
    found, expected = (
        torch.func.grad(lambda r, wrap=wrap: total(wrap, r))(rate) for wrap in (optim.flatten, lambda tx: tx)
    )
    assert torch.allclose(found, expected, rtol=1e-12) and expected.abs() > 1e-2
    assert torch.autograd.gradcheck(lambda r: total(optim.flatten, r), rate.clone().requires_grad_())
    rates = torch.tensor([0.1, 0.2], dtype=torch.float64)
    mapped = torch.func.vmap(torch.func.grad(lambda r: total(optim.flatten, r)))(rates)
    assert torch.allclose(mapped[0], expected, rtol=1e-12) and not torch.allclose(mapped[1], expected, rtol=1e-3)


@pytest.mark.parametrize("stacked", [False, True])
def test_compiles_in_one_graph_to_the_same_values(stacked):
    torch._dynamo.reset()
    backend, n = CompileCounterWithBackend("aot_eager"), 2 if stacked else None
    tx, start = optim.flatten(ADAM), start_of(SHAPES, 0, n, torch.float32)
    compiled = torch.compile(tx.update, backend=backend, fullgraph=True)
    state = other_state = tx.init(start)
    for k in range(3):
        grads = randn(SHAPES, k + 1, n=n, dtype=torch.float32)
        updates, state = tx.update(grads, state, start)
        other, other_state = compiled(grads, other_state, start)
        assert_close((other, other_state), (updates, state), rtol=1e-6, atol=1e-7)
        assert_far(other, grads, rtol=1e-3, atol=1e-3)
    assert backend.frame_count == 1


def test_states_flatten_and_save():
    tx, start = optim.flatten(ADAM), start_of(SHAPES, 0, 2)
    _, state = run(tx, start, [randn(SHAPES, 1, n=2)])
    leaves, spec = pytree.tree_flatten(state)
    assert all(isinstance(leaf, Tensor) and leaf.shape[0] == 2 for leaf in leaves)
    assert_close(pytree.tree_unflatten(leaves, spec), state)
    assert len(optree.tree_leaves(state)) == len(leaves) == 6
    buffer = io.BytesIO()
    torch.save(leaves, buffer)
    buffer.seek(0)
    assert_close(torch.load(buffer), leaves)


def test_inputs_are_never_changed_and_a_step_repeats():
    tx = optim.flatten(ADAM)
    tuned, state = run(tx, start_of(SHAPES, 0, 2), [randn(SHAPES, 1, n=2)])
    grads = randn(SHAPES, 2, n=2)
    given = (grads, state, tree_of(tuned))
    before = pytree.tree_map(torch.clone, given)
    versions = [leaf._version for leaf in pytree.tree_leaves(given)]
    results = [run(tx, tuned, [grads], state) for _ in range(2)]
    assert_close(given, before)
    assert versions == [leaf._version for leaf in pytree.tree_leaves(given)]
    assert_close(*[(tree_of(params), new) for params, new in results])
    assert_far(tree_of(results[0][0]), before[2])


def test_threads():
    start, grads = start_of(SHAPES, 0, 2), [randn(SHAPES, 1 + k, n=2) for k in range(5)]
    expected, _ = run(optim.flatten(ADAM), start, grads)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(run(optim.flatten(ADAM), start, grads)[0])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for tuned in found:
        assert_close(tree_of(tuned), tree_of(expected))


# --- finetunes whose params are views


def flat_and_whole(seed: int = 0) -> tuple[Any, ft.Finetuned, ft.Finetuned]:
    """A stack after a step, its leaves views of one tensor; and the same, each in memory of its own."""
    torch.manual_seed(seed)
    base = ft.quantize_base_model(Everything())
    config = ft.LinearAdapterConfig(r=3, alpha=1.0, dora=True)
    start = ft.stack(
        finetunes(base, 3, linear_config={r"fc1": config, r"fc2": ft.LinearAdapterConfig(r=2, alpha=1.0, bias=True)})
    )
    flat, _ = run(optim.flatten(ADAM), start, [{name: torch.randn_like(leaf) for name, leaf in start.params.items()}])
    assert len({leaf.untyped_storage().data_ptr() for leaf in flat.params.values()}) == 1
    return base, flat, flat.replace(params={name: leaf.clone() for name, leaf in flat.params.items()})


def test_views_compute_and_store_the_same(tmp_path):
    base, flat, whole = flat_and_whole()
    ids = torch.randint(1, 20, (3, 2, 6), generator=torch.Generator().manual_seed(1))

    def loss(t: ft.Finetuned, ids: Tensor) -> Tensor:
        return ft.apply_stacked(base, t, ids).square().mean((1, 2, 3))

    for options in ({}, {"chunk_size": 2}):
        found, expected = (ft.stacked_value_and_grad(loss, **options)(t, ids) for t in (flat, whole))
        assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert_far(found, ft.stacked_value_and_grad(loss)(flat, ids.flip(0)), rtol=1e-3, atol=1e-5)
    mapped = torch.func.vmap(lambda p, t, ids: ft.apply(base, t.replace(params=p), ids))
    assert_close(mapped(dict(flat.params), flat, ids), mapped(dict(whole.params), whole, ids), rtol=1e-5, atol=1e-6)
    parts = ft.unstack(flat), ft.unstack(whole)
    for i, (one, other) in enumerate(zip(*parts, strict=True)):
        assert_same_finetune(one, other)
        assert all(leaf.is_contiguous() for leaf in one.params.values())
        ft.save(tmp_path / f"{i}", one)
        assert_same_finetune(ft.load(tmp_path / f"{i}", base), other)
    assert_same_finetune(ft.stack(parts[0]), whole)
    assert flat.nbytes == whole.nbytes
    again = ft.load_state_dict(base, whole, ft.state_dict(flat))
    assert_same_finetune(again, flat)


def test_views_of_one_finetune_are_saved(tmp_path):
    """All in one memory, which safetensors refuses as it is."""
    base = ft.quantize_base_model(Tiny())
    start = finetunes(base, 1)[0]
    grads = {name: torch.ones_like(leaf) for name, leaf in start.params.items()}
    tuned, _ = run(optim.flatten(ADAM), start, [grads])
    assert len({leaf.untyped_storage().data_ptr() for leaf in tuned.params.values()}) == 1
    ft.save(tmp_path / "one", tuned)
    assert_same_finetune(ft.load(tmp_path / "one", base), tuned)
    merged = ft.merge(base, tuned)
    assert_close(merged, ft.merge(base, tuned.replace(params={k: v.clone() for k, v in tuned.params.items()})))


# --- errors


def test_errors():
    tx, tree = optim.flatten(optim.adam(0.1)), {"a": torch.ones(2, 3), "b": torch.ones(2)}
    state = tx.init(tree)
    with pytest.raises(ValueError, match=r"flatten.update\(updates=...\): missing names \['b'\]"):
        tx.update({"a": tree["a"]}, state, tree)
    with pytest.raises(ValueError, match=r"flatten.update\(updates=...\): 'a' has shape \(3, 2\), expected \(2, 3\)"):
        tx.update({**tree, "a": torch.ones(3, 2)}, state, tree)
    # without params, or with others than at init, the name of the flat leaf tells
    for other in ({"a": torch.ones(3, 2), "b": torch.ones(2)}, {"a": torch.ones(2, 3), "c": torch.ones(2)}):
        for params in (None, other):
            with pytest.raises(ValueError, match=r"scale_by_adam.update\(updates=...\): missing names \['2 leaves"):
                tx.update(other, state, params)
    stack_state = tx.init(stack_of(tree, 2))
    with pytest.raises(ValueError, match=r"flatten.update\(updates\): leaf 'a' has shape \(3, 3\), expected 2 as its"):
        tx.update({"a": torch.ones(3, 3), "b": torch.ones(3)}, stack_state)
    with pytest.raises(ValueError, match=r"scale_by_adam.update\(updates=...\): missing names"):
        tx.update({"a": torch.ones(2, 2, 3), "b": torch.ones(2, 2)}, state)  # a stack, where init got one finetune
    with pytest.raises(ValueError, match=r"scale_by_adam.update\(updates=...\): '2 leaves .* expected \(2, 4\)"):
        tx.update({"a": torch.ones(3, 3), "b": torch.ones(3)}, stack_state._replace(stack=torch.zeros(3)))
    with pytest.raises(TypeError, match=r"flatten.init\(params\): leaf 'a' has dtype torch.int64"):
        tx.init({"a": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"flatten.init\(params\): leaf 'a' of a stack of 3 has shape \(2, 3\)"):
        tx.init(stack_of(tree, 3))
