"""Tests of `finetuna_func.optim`: against torch.optim, laws on stacks and transforms, every error."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import optree
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from finetuna_func import optim
from finetuna_func._types import Finetuned, Spec

Tx = optim.GradientTransformation
few = settings(max_examples=15, deadline=None)

# Each takes a learning rate: a float, () or (N,) tensor. Together they go through every transformation.
OPTIMIZERS: dict[str, Callable[[Any], Tx]] = {
    "sgd": lambda lr: optim.sgd(lr, momentum=0.9, nesterov=True, weight_decay=0.1),
    "plain_sgd": optim.sgd,
    "adamw": lambda lr: optim.adamw(lr, weight_decay=0.1),
    "clipped_adam": lambda lr: optim.chain(optim.clip_by_global_norm(0.5), optim.adam(lr)),
    "clipped_sgd": lambda lr: optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(lr, momentum=0.5)),
    "scheduled": lambda lr: optim.adamw(optim.warmup_cosine_schedule(lr, 2, 5)),
    "linear": lambda lr: optim.chain(optim.scale(2.0), optim.sgd(optim.linear_schedule(lr, 0.0, 4))),
    "masked": lambda lr: optim.chain(
        optim.masked(optim.clip_by_global_norm(0.3), lambda name, leaf: name == "a"),
        optim.masked(optim.set_to_zero(), {"a": False, "b": False, "c": True}),
        optim.sgd(lr),
    ),
    "accumulated": lambda lr: optim.multi_steps(optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(lr)), every=2),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())

Shapes = dict[str, tuple[int, ...]]
shapes_of_abc = st.fixed_dictionaries(
    {name: st.lists(st.integers(1, 3), max_size=3).map(tuple) for name in ("a", "b", "c")}
)
SHAPES: Shapes = {"a": (3, 2), "b": (4,), "c": ()}


def randn(shapes: Shapes, seed: int, *, n: int | None = None, dtype: torch.dtype = torch.float64):
    """A tree of normal numbers, with a leading axis of n if given."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if n is None else (n,)
    return {
        name: torch.randn(lead + shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def stack_of(params: Mapping[str, Tensor], n: int) -> Finetuned:
    """A stack of n finetunes, made by hand."""
    return Finetuned(params, {"q.lora_scale": torch.ones(n)}, Spec("base", members=(Spec("base"),) * n))


def at(tree: Any, i: int) -> Any:
    return pytree.tree_map(lambda leaf: leaf[i], tree)


def run(tx: Tx, params: Any, grads: list[dict[str, Tensor]], state: Any = None) -> tuple[Any, Any]:
    """Params and state after one step per gradient."""
    state = tx.init(params) if state is None else state
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def tree_of(params: Any) -> dict[str, Tensor]:
    return dict(params.params if isinstance(params, Finetuned) else params)


def assert_close(actual: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Same structure, dtypes and nearly the same values; exactly the same unless a tolerance is given."""
    actual_leaves, actual_spec = pytree.tree_flatten(actual)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert actual_spec == expected_spec
    for a, b in zip(actual_leaves, expected_leaves, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def assert_far(actual: Any, expected: Any, **tolerance: float) -> None:
    """The partner of `assert_close`: it would have failed."""
    with pytest.raises(AssertionError, match=r"not close|not equal"):
        assert_close(actual, expected, **tolerance)


class Calls(TorchDispatchMode):
    """Counts the operators called inside of it, and remembers their names."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.names = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# --- Against torch.optim --------------------------------------------------------------------------

PEERS = {
    "sgd": (optim.sgd, torch.optim.SGD, {}),
    "sgd_decayed": (optim.sgd, torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (optim.sgd, torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (optim.sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (optim.adam, torch.optim.Adam, {}),
    "adam_betas": (optim.adam, torch.optim.Adam, {"b1": 0.0, "b2": 0.5, "eps": 1e-3}),
    "adamw": (optim.adamw, torch.optim.AdamW, {}),
    "adamw_decayed": (optim.adamw, torch.optim.AdamW, {"weight_decay": 0.5, "b1": 0.8}),
    "adamw_undecayed": (optim.adamw, torch.optim.AdamW, {"weight_decay": 0.0}),
}
STEPS = 25
every_peer = pytest.mark.parametrize("make,peer,options", PEERS.values(), ids=PEERS.keys())


def run_torch(peer: Any, params: Mapping[str, Tensor], grads: list[dict[str, Tensor]], **options: Any):
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    if {"b1", "b2"} & options.keys():
        options["betas"] = (options.pop("b1", 0.9), options.pop("b2", 0.999))
    optimizer = peer(leaves.values(), lr=0.05, foreach=False, **options)
    for grad in grads:
        for name, leaf in leaves.items():
            leaf.grad = grad[name].clone()
        optimizer.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


@every_peer
def test_equals_torch_in_float64(make, peer, options):
    params, grads = randn(SHAPES, 0), [randn(SHAPES, seed) for seed in range(1, STEPS + 1)]
    expected = run_torch(peer, params, grads, **options)
    assert_close(run(make(0.05, **options), params, grads)[0], expected, rtol=1e-12, atol=1e-12)
    assert_far(run(make(0.0501, **options), params, grads)[0], expected, rtol=1e-12, atol=1e-12)


@every_peer
def test_equals_torch_in_float32(make, peer, options):
    params = randn(SHAPES, 0, dtype=torch.float32)
    grads = [randn(SHAPES, seed, dtype=torch.float32) for seed in range(1, STEPS + 1)]
    expected = run_torch(peer, params, grads, **options)
    # 25 steps of 0.05 on params of size 1: a few roundings of 6e-8.
    assert_close(run(make(0.05, **options), params, grads)[0], expected, rtol=1e-6, atol=1e-6)
    assert_far(run(make(0.0501, **options), params, grads)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", [{"b1": 0.91}, {"b2": 0.998}, {"eps": 1e-4}, {"weight_decay": 0.011}])
def test_every_option_of_adamw_counts(change):
    params, grads = randn(SHAPES, 0), [randn(SHAPES, seed) for seed in range(1, 5)]
    default = run(optim.adamw(0.05), params, grads)[0]
    assert_far(run(optim.adamw(0.05, **change), params, grads)[0], default, rtol=1e-6, atol=1e-6)


def test_weight_decay_of_adamw_is_decoupled_and_that_of_sgd_is_not():
    zero, params = {"w": torch.zeros(1)}, {"w": torch.tensor([4.0])}
    tx = optim.adamw(0.5, weight_decay=0.25)
    assert_close(tx.update(zero, tx.init(params), params)[0], {"w": torch.tensor([-0.5])})  # lr * wd * p
    coupled = optim.chain(optim.add_decayed_weights(0.25), optim.adam(0.5))
    updates, _ = coupled.update(zero, coupled.init(params), params)
    assert_close(updates, {"w": torch.tensor([-0.5])}, rtol=1e-6)  # lr * sign
    assert_far(coupled.update(zero, coupled.init(params), {"w": params["w"] * 2})[0], {"w": torch.tensor([-1.0])})


def test_a_long_run_in_float32_is_as_exact_as_its_bias_correction():
    # 1 - 0.999 ** 1 in float32 is off by 1.6e-5 of itself; the first step must not be.
    tx = optim.adam(1.0, b2=0.9999)
    params = {"w": torch.zeros(1)}
    updates, _ = tx.update({"w": torch.tensor([0.3])}, tx.init(params))
    assert abs(updates["w"].item() + 1.0) < 3e-7
    naive = 0.3 / math.sqrt((torch.tensor(0.3) ** 2 * 1e-4 / (1 - torch.tensor(0.9999))).item())
    assert abs(naive - 1.0) > 3e-5


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 100.0])
def test_clip_equals_torch(max_norm):
    grads = randn(SHAPES, 3)
    leaves = [torch.nn.Parameter(torch.zeros_like(leaf)) for leaf in grads.values()]
    for leaf, grad in zip(leaves, grads.values(), strict=True):
        leaf.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    tx = optim.clip_by_global_norm(max_norm)
    updates, state = tx.update(grads, tx.init(grads))
    assert_close(updates, dict(zip(grads, [leaf.grad for leaf in leaves], strict=True)), rtol=1e-14, atol=1e-14)
    assert_close(state.norm, norm, rtol=1e-14)
    assert 2 < norm < 4  # so that the three limits are below and above it
    (assert_far if max_norm < norm else assert_close)(updates, grads)


# --- Stacks: k stacked steps are k separate ones --------------------------------------------------


@every_optimizer
@few
@given(shapes=shapes_of_abc, n=st.integers(1, 4), seed=st.integers(0, 999))
def test_steps_of_a_stack_are_the_steps_of_each(make, shapes, n, seed):
    params = randn(shapes, seed, n=n)
    grads = [randn(shapes, seed + 1 + k, n=n) for k in range(5)]
    rates = torch.linspace(0.01, 0.1, n, dtype=torch.float64)
    tuned, state = run(make(rates), stack_of(params, n), grads)
    assert isinstance(tuned, Finetuned) and tuned.stack_size == n
    for i in range(n):
        alone, alone_state = run(make(rates[i]), at(params, i), at(grads, i))
        assert_close(at(tree_of(tuned), i), alone, rtol=1e-12, atol=1e-12)
        assert_close(at(state, i), alone_state, rtol=1e-12, atol=1e-12)
        wrong, _ = run(make(2 * rates[i]), at(params, i), at(grads, i))
        assert_far(at(tree_of(tuned), i), wrong, rtol=1e-12, atol=1e-12)


@every_optimizer
@few
@given(shapes=shapes_of_abc, n=st.integers(1, 4), seed=st.integers(0, 999))
def test_vmap_of_update_is_the_update_of_the_stack(make, shapes, n, seed):
    params = randn(shapes, seed, n=n)
    rates = torch.linspace(0.01, 0.1, n, dtype=torch.float64)
    tuned, tx = stack_of(params, n), make(rates)
    state = tx.init(tuned)
    mapped_state = torch.func.vmap(make(0.01).init)(params)
    assert_close(mapped_state, state)
    assert all(leaf.is_contiguous() for leaf in pytree.tree_leaves(mapped_state))  # can be saved
    mapped = params
    for k in range(3):
        grads = randn(shapes, seed + 1 + k, n=n)
        updates, state = tx.update(grads, state, tuned)
        tuned = optim.apply_updates(tuned, updates)
        mapped_updates, mapped_state = torch.func.vmap(lambda lr, g, s, p: make(lr).update(g, s, p))(
            rates, grads, mapped_state, mapped
        )
        mapped = torch.func.vmap(optim.apply_updates)(mapped, mapped_updates)
        assert_close((mapped_updates, mapped_state), (updates, state), rtol=1e-12, atol=1e-12)
    assert_close(mapped, tree_of(tuned), rtol=1e-12, atol=1e-12)


def test_vmap_over_raw_dicts_equals_the_loop_bitwise():
    n, tx = 3, optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.1))
    params, grads = randn({"w": (4,)}, 0, n=n), randn({"w": (4,)}, 1, n=n)
    state = torch.func.vmap(tx.init)(params)
    mapped = torch.func.vmap(tx.update)(grads, state, params)
    loop = [tx.update(at(grads, i), tx.init(at(params, i)), at(params, i)) for i in range(n)]
    assert_close(mapped, pytree.tree_map(lambda *leaves: torch.stack(leaves), *loop), rtol=1e-15, atol=1e-15)


def test_clipping_a_stack_does_not_mix_adapters_and_clipping_a_mapping_does():
    grads = {"w": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}
    tx = optim.clip_by_global_norm(1.0)
    of_stack, state = tx.update(grads, tx.init(stack_of(grads, 2)))
    assert_close(state.norm, torch.tensor([5.0, 0.5]))
    assert_close(of_stack, {"w": torch.tensor([[0.6, 0.8], [0.3, 0.4]])}, atol=1e-6)
    of_one, state = tx.update(grads, tx.init(grads))
    assert_close(state.norm, torch.tensor(math.sqrt(25.25)), atol=1e-6)
    assert_far(of_one, of_stack, atol=1e-2)


def test_clip_takes_one_limit_per_adapter():
    grads = {"w": torch.tensor([[3.0, 4.0], [3.0, 4.0]])}
    tx = optim.clip_by_global_norm(torch.tensor([1.0, 10.0]))
    updates, _ = tx.update(grads, tx.init(stack_of(grads, 2)))
    assert_close(updates, {"w": torch.tensor([[0.6, 0.8], [3.0, 4.0]])}, atol=1e-6)


def test_weight_decay_and_scale_take_one_value_per_adapter():
    params = {"w": torch.ones(2, 3)}
    tx = optim.chain(optim.add_decayed_weights(torch.tensor([1.0, 2.0])), optim.scale(torch.tensor([1.0, -1.0])))
    updates, _ = tx.update({"w": torch.zeros(2, 3)}, tx.init(stack_of(params, 2)), params)
    assert_close(updates, {"w": torch.tensor([[1.0] * 3, [-2.0] * 3])})


@every_optimizer
def test_a_nan_in_one_adapter_leaves_the_others_alone(make):
    params, grads = randn(SHAPES, 0, n=3), [randn(SHAPES, k, n=3) for k in (1, 2)]
    poisoned = copy.deepcopy(grads)
    for leaf in poisoned[0].values():
        leaf[1] = math.nan
    sound, _ = run(make(0.1), stack_of(params, 3), grads)
    ill, _ = run(make(0.1), stack_of(params, 3), poisoned)
    for i in (0, 2):
        assert_close(at(tree_of(ill), i), at(tree_of(sound), i))
    assert all(leaf[1].isnan().all() for name, leaf in ill.params.items() if name != "c")


@pytest.mark.parametrize("make", [optim.adam, optim.adamw, OPTIMIZERS["clipped_adam"]])
def test_padded_rows_stay_exactly_zero(make):
    # Two adapters of rank 2 and 3, the first padded: its third row of A and third column of B.
    pad = {"lora_a": torch.ones(2, 3, 4), "lora_b": torch.ones(2, 4, 3)}
    pad["lora_a"][0, 2:] = 0
    pad["lora_b"][0, :, 2:] = 0

    def padded(seed: int) -> dict[str, Tensor]:
        tree = randn({"lora_a": (3, 4), "lora_b": (4, 3)}, seed, n=2, dtype=torch.float32)
        return {name: leaf * pad[name] for name, leaf in tree.items()}

    tuned, state = run(make(0.1), stack_of(padded(0), 2), [padded(seed) for seed in range(1, 8)])
    for name, leaf in tuned.params.items():
        assert (leaf[pad[name] == 0] == 0).all()
        assert (leaf[pad[name] == 1] != 0).all()
    tensors = pytree.tree_leaves(state)
    assert all(leaf.isfinite().all() for leaf in tensors)


# --- Purity, order, precision ---------------------------------------------------------------------


@every_optimizer
def test_inputs_are_never_mutated(make):
    tx = make(torch.tensor([0.1, 0.2], dtype=torch.float64))
    tuned = stack_of(randn(SHAPES, 0, n=2), 2)
    state, grads = tx.init(tuned), randn(SHAPES, 1, n=2)
    _, state = tx.update(grads, state, tuned)  # so that the state is not all zeros
    inputs = pytree.tree_leaves((dict(tuned.params), state, grads))
    before = [(leaf._version, leaf.clone()) for leaf in inputs]
    updates, new_state = tx.update(grads, state, tuned)
    new = optim.apply_updates(tuned, updates)
    assert_far(dict(new.params), dict(tuned.params))
    for leaf, (version, copied) in zip(inputs, before, strict=True):
        assert leaf._version == version
        assert leaf.numpy().tobytes() == copied.numpy().tobytes()
    again, again_state = tx.update(grads, state, tuned)
    assert_close((again, again_state), (updates, new_state))  # nothing is hidden


@every_optimizer
def test_order_of_names_does_not_matter(make):
    params, grads = randn(SHAPES, 0), randn(SHAPES, 1)
    tx = make(0.1)
    updates, state = tx.update(grads, tx.init(params), params)
    backwards = dict(reversed(grads.items())), dict(reversed(params.items()))
    other, other_state = tx.update(backwards[0], tx.init(backwards[1]), backwards[1])
    assert list(updates) == list(other) == ["a", "b", "c"]
    assert_close((other, other_state), (updates, state))
    assert list(optim.apply_updates(backwards[1], other)) == ["a", "b", "c"]


@every_optimizer
def test_no_value_is_read_by_python(make):
    # On the meta device tensors have no values: reading or branching on one raises.
    tx, params = make(0.1), {name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()}
    new, state = run(tx, params, [params, params])
    assert {leaf.device.type for leaf in pytree.tree_leaves((tx.init(params), state))} == {"meta"}
    assert {name: leaf.shape for name, leaf in new.items()} == {n: leaf.shape for n, leaf in params.items()}
    with pytest.raises(RuntimeError):
        bool(params["c"])


@few
@given(shapes=shapes_of_abc, seed=st.integers(0, 999))
def test_chain_is_associative(shapes, seed):
    a, b, c = optim.clip_by_global_norm(0.5), optim.trace(0.9), optim.sgd(0.1, weight_decay=0.1)
    params, grads = randn(shapes, seed), [randn(shapes, seed + k) for k in (1, 2, 3)]
    left, _ = run(optim.chain(optim.chain(a, b), c), params, grads)
    right, _ = run(optim.chain(a, optim.chain(b, c)), params, grads)
    assert_close(left, right)
    assert_close(run(optim.chain(a, b, c), params, grads)[0], left)
    assert_far(run(optim.chain(c, b, a), params, grads)[0], left, atol=1e-9)


def test_the_empty_chain_is_the_identity():
    grads = randn(SHAPES, 0)
    for tx in (optim.chain(), optim.identity()):
        updates, _ = tx.update(grads, tx.init(grads))
        assert updates is not grads
        assert_close(updates, grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_params_have_float32_moments(dtype):
    params = randn(SHAPES, 0, dtype=dtype)
    grads = [randn(SHAPES, seed, dtype=dtype) for seed in range(1, 10)]
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.01), optim.trace(0.5))
    state, wide = tx.init(params), {name: leaf.float() for name, leaf in params.items()}
    expected, wide_state = params, tx.init(wide)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        assert {u.dtype for u in updates.values()} == {torch.float32}
        params = optim.apply_updates(params, updates)
        # By hand: all in float32, the params rounded after every step.
        wide_grad = {name: leaf.float() for name, leaf in grad.items()}
        wide = {name: leaf.float() for name, leaf in expected.items()}
        wide_updates, wide_state = tx.update(wide_grad, wide_state, wide)
        expected = {name: (wide[name] + wide_updates[name]).to(dtype) for name in wide}
    assert_close(params, expected)
    assert {leaf.dtype for leaf in pytree.tree_leaves(state)} == {torch.float32, torch.int64}
    narrow = run_torch(torch.optim.AdamW, randn(SHAPES, 0, dtype=dtype), grads)
    assert_far(narrow, expected)


@pytest.mark.parametrize("params_dtype,moments", [(torch.float32, torch.float32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("grads_dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_optimizer
def test_state_keeps_its_dtypes(make, grads_dtype, params_dtype, moments):
    params, grads = randn(SHAPES, 0, dtype=params_dtype), randn(SHAPES, 1, dtype=grads_dtype)
    tx = make(0.1)
    state = tx.init(params)
    new, new_state = run(tx, params, [grads, grads], state)
    dtypes = [leaf.dtype for leaf in pytree.tree_leaves(new_state)]
    assert dtypes == [leaf.dtype for leaf in pytree.tree_leaves(state)]
    assert set(dtypes) <= {moments, torch.int64}
    assert {leaf.dtype for leaf in new.values()} == {params_dtype}


def test_mixed_dtypes_keep_their_own():
    params = {"half": torch.ones(3, dtype=torch.bfloat16), "double": torch.ones(3, dtype=torch.float64)}
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.1))
    new, state = run(tx, params, [params])
    assert {name: leaf.dtype for name, leaf in new.items()} == {n: leaf.dtype for n, leaf in params.items()}
    assert state[1][0].mu["half"].dtype == torch.float32 and state[1][0].mu["double"].dtype == torch.float64


# --- States are pytrees ---------------------------------------------------------------------------


@every_optimizer
def test_states_flatten_in_torch_and_optree_and_save(make):
    params, grads = randn(SHAPES, 0, n=2), [randn(SHAPES, k, n=2) for k in (1, 2)]
    tx = make(0.1)
    tuned, state = run(tx, stack_of(params, 2), grads)
    leaves, spec = pytree.tree_flatten(state)
    assert leaves and all(isinstance(leaf, Tensor) and leaf.shape[0] == 2 for leaf in leaves)
    opt_leaves, opt_spec = optree.tree_flatten(state)  # pyright: ignore[reportArgumentType]
    assert [id(leaf) for leaf in opt_leaves] == [id(leaf) for leaf in leaves]  # the same order in both
    saved = safetensors.torch.load(safetensors.torch.save({f"{i:03}": x for i, x in enumerate(leaves)}))
    restored = [saved[name] for name in sorted(saved)]
    after = run(tx, tuned, grads, state)
    for again in (pytree.tree_unflatten(restored, spec), optree.tree_unflatten(opt_spec, restored)):
        assert type(again) is type(state)
        resumed = run(tx, tuned, grads, again)
        assert_close((tree_of(resumed[0]), resumed[1]), (tree_of(after[0]), after[1]))
    fresh = run(tx, tuned, grads)
    if len(leaves) > 2:  # plain SGD remembers nothing that matters
        assert_far(tree_of(fresh[0]), tree_of(after[0]))


# --- Transforms and compile -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adamw", "clipped_adam"])
def test_derivative_with_respect_to_the_learning_rate(name):
    params, grads = randn(SHAPES, 0), [randn(SHAPES, k) for k in (1, 2)]

    def loss(lr: Tensor) -> Tensor:
        return sum((leaf**2).sum() for leaf in run(OPTIMIZERS[name](lr), params, grads)[0].values())  # pyright: ignore[reportReturnType]

    lr, h = torch.tensor(0.1, dtype=torch.float64), 1e-5
    slope = torch.func.grad(loss)(lr)
    torch.testing.assert_close(slope, (loss(lr + h) - loss(lr - h)) / (2 * h), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(torch.func.jvp(loss, (lr,), (torch.ones_like(lr),))[1], slope)
    assert slope.abs() > 1e-3


def test_eps_root_makes_adam_differentiable_at_a_zero_gradient():
    params = {"w": torch.zeros(2)}

    def total(g: Tensor, eps_root: float) -> Tensor:
        tx = optim.scale_by_adam(eps_root=eps_root)
        return tx.update({"w": g}, tx.init(params))[0]["w"].sum()

    g = torch.tensor([0.0, 1.0])
    assert torch.func.grad(total)(g, 1e-8).isfinite().all()
    assert torch.func.grad(total)(g, 0.0).isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", ["sgd", "clipped_adam", "scheduled", "masked", "accumulated"])
@pytest.mark.parametrize("stacked", [False, True])
def test_compiles_in_one_graph_to_the_same_values(name, stacked):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    tx = OPTIMIZERS[name](torch.tensor([0.1, 0.2]) if stacked else 0.1)
    params = randn(SHAPES, 0, n=2 if stacked else None, dtype=torch.float32)
    start = stack_of(params, 2) if stacked else params
    compiled = torch.compile(tx.update, backend=backend, fullgraph=True)
    state = other_state = tx.init(start)
    for k in range(3):
        grads = randn(SHAPES, k + 1, n=2 if stacked else None, dtype=torch.float32)
        updates, state = tx.update(grads, state, params)
        other, other_state = compiled(grads, other_state, params)
        assert_close((other, other_state), (updates, state), rtol=1e-6, atol=1e-7)
    assert backend.frame_count == 1  # a changing step recompiles nothing


# --- Learning rates and schedules -----------------------------------------------------------------


def test_a_learning_rate_may_be_a_number_a_scalar_tensor_a_schedule_or_one_per_adapter():
    grads = {"w": torch.ones(2, 3)}
    for rate in (
        0.5,
        torch.tensor(0.5),
        lambda step: 0.5,
        lambda step: torch.tensor(0.5),
        torch.full((2,), 0.5),
    ):
        tx = optim.scale_by_learning_rate(rate)
        assert_close(tx.update(grads, tx.init(grads))[0], {"w": torch.full((2, 3), -0.5)})
    tx = optim.scale_by_learning_rate(torch.tensor([1.0, 2.0]))
    assert_close(tx.update(grads, tx.init(grads))[0], {"w": torch.tensor([[-1.0] * 3, [-2.0] * 3])})
    tx = optim.scale_by_learning_rate(torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert tx.update(grads, tx.init(grads))[0]["w"].dtype == torch.float32


def test_a_schedule_is_called_with_the_steps_taken_before():
    seen = []
    tx = optim.sgd(lambda step: seen.append(step) or 0.1)
    params = {"w": torch.zeros(2, 1)}
    run(tx, stack_of(params, 2), [params] * 3)
    assert [step.tolist() for step in seen] == [[0, 0], [1, 1], [2, 2]]
    assert all(step.dtype == torch.int64 for step in seen)


def test_state_is_the_same_for_a_number_and_a_schedule():
    params = {"w": torch.zeros(2)}
    _, state = run(optim.adamw(0.1), params, [params] * 3)
    resumed = optim.adamw(lambda step: step.float())
    updates, _ = resumed.update({"w": torch.ones(2)}, state, params)
    assert (updates["w"] < -1.0).all()  # a step of size about 3, not 0


def test_schedule_values_at_the_ends():
    step = torch.tensor([0, 1, 2, 4, 6, 10, 11, 1000, 3])
    for value in (0.0, 0.3):
        assert_close(optim.constant_schedule(value)(step), torch.full((9,), value))
    line = optim.linear_schedule(0.3, 0.1, 10)(step)
    assert_close(line[[0, 5, 6, 7]], torch.tensor([0.3, 0.1, 0.1, 0.1]))
    assert_close(line[[1, 4]], torch.tensor([0.28, 0.18]), atol=1e-7)
    cosine = optim.warmup_cosine_schedule(0.7, 2, 10, init=0.1, end=0.05)(step)
    assert_close(cosine[[0, 2, 5, 6, 7]], torch.tensor([0.1, 0.7, 0.05, 0.05, 0.05]))
    assert_close(cosine[[1, 4]], torch.tensor([0.4, 0.375]), atol=1e-7)
    fall = [0.05 + 0.65 * (1 + math.cos(math.pi * k / 8)) / 2 for k in (2, 1)]
    assert_close(cosine[[3, 8]], torch.tensor(fall), atol=1e-7)
    assert_close(optim.warmup_cosine_schedule(0.7, 0, 10, init=0.1)(step)[0], torch.tensor(0.7))
    assert (cosine[2:8].diff() <= 0).all() and (cosine[:3].diff() > 0).all()


def test_schedules_take_one_value_per_adapter():
    peak = torch.tensor([1.0, 3.0])
    schedule = optim.warmup_cosine_schedule(peak, 2, 6)
    assert_close(schedule(torch.tensor(2)), peak)
    assert_close(schedule(torch.tensor([1, 6])), torch.tensor([0.5, 0.0]))  # adapters at different steps
    assert_close(optim.linear_schedule(peak, 0.0, 2)(torch.tensor([0, 1])), torch.tensor([1.0, 1.5]))
    assert_close(optim.constant_schedule(peak)(torch.tensor(7)), peak)


# --- masked, multi_steps, apply_updates, global_norm ----------------------------------------------


def test_masked_leaves_pass_through_unchanged():
    grads = randn(SHAPES, 0)
    by_name = optim.masked(optim.scale(10.0), lambda name, leaf: name != "b")
    by_mapping = optim.masked(optim.scale(10.0), {"a": True, "b": False, "c": True})
    for tx in (by_name, by_mapping):
        updates, _ = tx.update(grads, tx.init(grads))
        assert updates["b"] is grads["b"]
        assert_close({n: updates[n] for n in "ac"}, {n: grads[n] * 10 for n in "ac"})
    state = optim.masked(optim.adam(0.1), lambda name, leaf: leaf.ndim == 2).init(grads)
    assert list(state.inner[0].mu) == ["a"]
    nothing = optim.masked(optim.adam(0.1), dict.fromkeys(SHAPES, False))
    assert_close(nothing.update(grads, nothing.init(grads), grads)[0], grads)


def test_masked_groups_have_learning_rates_of_their_own():
    params, grads = randn(SHAPES, 0), [randn(SHAPES, k) for k in (1, 2)]
    tx = optim.chain(
        optim.masked(optim.adamw(0.1), lambda name, leaf: name == "a"),
        optim.masked(optim.sgd(0.01), lambda name, leaf: name != "a"),
    )
    new, _ = run(tx, params, grads)
    assert_close(new["a"], run(optim.adamw(0.1), params, grads)[0]["a"])
    assert_close(new["b"], run(optim.sgd(0.01), params, grads)[0]["b"])
    assert_far(new["b"], run(optim.adamw(0.1), params, grads)[0]["b"])


def test_masked_set_to_zero_freezes():
    params, grads = randn(SHAPES, 0), [{**randn(SHAPES, 1), "b": torch.full((4,), math.nan)}]
    tx = optim.chain(optim.adamw(0.1), optim.masked(optim.set_to_zero(), lambda name, leaf: name == "b"))
    new, _ = run(tx, params, grads)
    assert_close(new["b"], params["b"])
    assert_far(new["a"], params["a"], atol=1e-3)


@few
@given(shapes=shapes_of_abc, every=st.integers(1, 4), seed=st.integers(0, 999))
def test_multi_steps_are_steps_on_the_mean_gradient(shapes, every, seed):
    inner = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.1))
    tx, params = optim.multi_steps(inner, every), randn(shapes, seed)
    grads = [randn(shapes, seed + k) for k in range(2 * every)]
    means = [{name: sum(g[name] for g in grads[k : k + every]) / every for name in shapes} for k in (0, every)]
    new, state = run(tx, params, grads)
    expected, expected_state = run(inner, params, means)
    assert_close((new, state.inner), (expected, expected_state), rtol=1e-12, atol=1e-12)
    assert state.micro_step == 0 and not any(leaf.any() for leaf in state.total.values())
    updates, between = tx.update(grads[0], state, new)
    if every > 1:
        assert not any(u.any() for u in updates.values())
        assert_close(between.inner, state.inner)
        assert between.micro_step == 1
    else:
        assert all(u.all() for u in updates.values())


def test_multi_steps_counts_for_each_adapter():
    params = {"w": torch.zeros(2, 3)}
    tx = optim.multi_steps(optim.sgd(1.0), every=2)
    state = tx.init(stack_of(params, 2))._replace(micro_step=torch.tensor([0, 1]))
    updates, state = tx.update({"w": torch.full((2, 3), 4.0)}, state, params)
    assert_close(updates, {"w": torch.tensor([[0.0] * 3, [-2.0] * 3])})
    assert_close(state.micro_step, torch.tensor([1, 0]))
    assert_close(state.inner[2].step, torch.tensor([0, 1]))


def test_apply_updates_keeps_type_and_dtype():
    params, updates = {"w": torch.ones(2, dtype=torch.bfloat16)}, {"w": torch.full((2,), 0.001)}
    assert type(optim.apply_updates(params, updates)) is dict
    tuned = stack_of(params, 2)
    new = optim.apply_updates(tuned, updates)
    assert isinstance(new, Finetuned) and new.spec == tuned.spec and new.consts == tuned.consts
    assert new.params["w"].dtype == torch.bfloat16
    # Just above half of bfloat16's spacing at 1: added in float32 it rounds up, as bfloat16 it is a tie.
    one, nudge = torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(0.003907)
    assert optim.apply_updates({"w": one}, {"w": nudge})["w"].item() == 1.0078125
    assert (one + nudge.bfloat16()).item() == 1.0


@few
@given(shapes=shapes_of_abc, n=st.integers(1, 4), seed=st.integers(0, 999))
def test_global_norm_is_the_norm_of_all_numbers(shapes, n, seed):
    tree = randn(shapes, seed, n=n)
    rows = torch.cat([leaf.reshape(n, -1) for leaf in tree.values()], dim=1)
    assert_close(optim.global_norm(tree, stacked=True), rows.norm(dim=1), rtol=1e-14)
    assert_close(optim.global_norm(stack_of(tree, n)), rows.norm(dim=1), rtol=1e-14)
    assert_close(optim.global_norm(tree), rows.norm(), rtol=1e-14)
    assert_far(optim.global_norm({**tree, "a": tree["a"] * 2}), rows.norm(), rtol=1e-14)


def test_global_norm_dtypes_and_the_empty_tree():
    half = {"w": torch.full((10000,), 1.0, dtype=torch.bfloat16)}
    assert_close(optim.global_norm(half), torch.tensor(100.0))
    assert_close(optim.global_norm({**half, "x": torch.zeros(1).double()}), torch.tensor(100.0).double())
    assert_close(optim.global_norm({}), torch.tensor(0.0))


def test_empty_params_go_through():
    tx = optim.chain(
        optim.clip_by_global_norm(1.0),
        optim.adamw(0.1),
        optim.masked(optim.sgd(0.1), lambda name, leaf: True),
    )
    new, state = run(tx, {}, [{}])
    assert new == {} and state[1][0].step == 1


# --- Errors ---------------------------------------------------------------------------------------

W = {"w": torch.ones(2, 3)}


def update_with(tx: Tx, updates: Any, params: Any = None, *, init: Any = None) -> Callable[[], Any]:
    return lambda: tx.update(updates, tx.init(W if init is None else init), params)


ERRORS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "integer leaf": (
        TypeError,
        "scale_by_adam.init(params): leaf 'q' has dtype torch.int8, expected a floating-point tensor; leave",
        lambda: optim.adamw(0.1).init({"q": torch.ones(2, dtype=torch.int8)}),
    ),
    "nested tree": (
        TypeError,
        "trace.init(params): leaf 'q' has type dict, expected a floating-point tensor",
        lambda: optim.trace(0.9).init({"q": {}}),  # pyright: ignore[reportArgumentType]
    ),
    "module for params": (
        TypeError,
        "scale.init(params): got a Linear, expected a Finetuned or a flat mapping",
        lambda: optim.scale(0.1).init(torch.nn.Linear(1, 1)),  # pyright: ignore[reportArgumentType]
    ),
    "stack without its axis": (
        ValueError,
        "init(params): leaf 'w' of a stack of 3 has shape (2, 3), expected 3 as its first size; under vmap",
        lambda: optim.clip_by_global_norm(1.0).init(stack_of(W, 3)),
    ),
    "stack with a scalar leaf": (
        ValueError,
        "leaf 's' of a stack of 2 has shape ()",
        lambda: optim.sgd(1.0).init(stack_of({**W, "s": torch.ones(())}, 2)),
    ),
    "stack with constants of one": (
        ValueError,
        "leaf 'q.lora_scale' of a stack of 2 has shape (), expected 2 as its first size",
        lambda: optim.sgd(1.0).init(
            Finetuned(W, {"q.lora_scale": torch.ones(())}, Spec("base", members=(Spec("base"),) * 2))
        ),
    ),
    "names of adam": (
        ValueError,
        "scale_by_adam.update(updates=...): missing names ['w'], unknown names ['v']; expected exactly",
        update_with(optim.adam(0.1), {"v": torch.ones(2, 3)}),
    ),
    "names of trace": (
        ValueError,
        "trace.update(updates=...): missing names ['w'], unknown names []",
        update_with(optim.sgd(0.1, momentum=0.9), {}),
    ),
    "names of weight decay": (
        ValueError,
        "add_decayed_weights.update(updates=...): missing names ['w'], unknown names ['v']",
        update_with(optim.add_decayed_weights(0.1), {"v": torch.ones(2, 3)}, W),
    ),
    "names of multi_steps": (
        ValueError,
        "multi_steps.update(updates=...): missing names ['w'], unknown names ['v']",
        update_with(optim.multi_steps(optim.sgd(0.1), 2), {"v": torch.ones(2, 3)}),
    ),
    "names of apply_updates": (
        ValueError,
        "unknown names ['a', 'b', 'c', 'd', 'e'] ...; expected exactly the 1 names of params.",
        lambda: optim.apply_updates(W, dict.fromkeys("abcdefw", torch.ones(2, 3))),
    ),
    "shape of a gradient": (
        ValueError,
        "scale_by_adam.update(updates=...): 'w' has shape (3,), expected (2, 3), the shape in the params",
        update_with(optim.adam(0.1), {"w": torch.ones(3)}),
    ),
    "shape of an update": (
        ValueError,
        "apply_updates(updates=...): 'w' has shape (1, 3), expected (2, 3), the shape in params.",
        lambda: optim.apply_updates(W, {"w": torch.ones(1, 3)}),
    ),
    "negative learning rate": (
        ValueError,
        "scale_by_learning_rate(learning_rate=-0.1): expected a finite number of at least 0; it",
        lambda: optim.adamw(-0.1),
    ),
    "nan learning rate": (ValueError, "(learning_rate=nan): expected", lambda: optim.sgd(math.nan)),
    "bool learning rate": (ValueError, "(learning_rate=True): expected", lambda: optim.sgd(True)),
    "matrix learning rate": (
        ValueError,
        "(learning_rate=...): got a tensor of shape (2, 2) and dtype torch.float32, expected",
        lambda: optim.sgd(torch.ones(2, 2)),
    ),
    "integer learning rates": (
        ValueError,
        "got a tensor of shape (2,) and dtype torch.int64",
        lambda: optim.sgd(torch.tensor([1, 2])),
    ),
    "learning rates without an axis": (
        ValueError,
        "scale_by_learning_rate(learning_rate=...): a tensor of shape (3,) is one value per adapter, "
        "but leaf 'w' of shape (2, 3) has no leading axis of size 3; stack 3 finetunes, or pass a number",
        update_with(optim.sgd(torch.ones(3)), W),
    ),
    "learning rates for a scalar leaf": (
        ValueError,
        "but leaf 's' of shape () has no leading axis of size 1",
        update_with(optim.sgd(torch.ones(1)), {"s": torch.ones(())}, init={"s": torch.ones(())}),
    ),
    "learning rates under vmap": (
        ValueError,
        "(under vmap, make the tensor a mapped argument)",
        lambda: torch.func.vmap(lambda g: optim.sgd(torch.ones(2)).update(g, optim.sgd(0.1).init(g)))(W),
    ),
    "matrix schedule": (
        ValueError,
        "the schedule returned a tensor of shape (1, 1), expected () or (N,)",
        update_with(optim.sgd(lambda step: torch.ones(1, 1)), W),
    ),
    "momentum": (ValueError, "sgd(momentum=1.0): expected a number in [0, 1)", lambda: optim.sgd(0.1, 1.0)),
    "nesterov": (
        ValueError,
        "Nesterov's step needs a momentum above 0",
        lambda: optim.sgd(0.1, nesterov=True),
    ),
    "decay": (ValueError, "trace(decay=-0.1): expected a number in [0, 1)", lambda: optim.trace(-0.1)),
    "b1": (ValueError, "scale_by_adam(b1=1.0): expected a number in [0, 1)", lambda: optim.adam(0.1, b1=1.0)),
    "b2": (ValueError, "scale_by_adam(b2=-0.5): expected", lambda: optim.adamw(0.1, b2=-0.5)),
    "eps": (ValueError, "(eps=0.0): expected a finite number above 0", lambda: optim.adam(0.1, eps=0.0)),
    "eps_root": (ValueError, "(eps_root=-1.0): expected", lambda: optim.scale_by_adam(eps_root=-1.0)),
    "weight decay": (
        ValueError,
        "add_decayed_weights(weight_decay=-0.1): expected a finite number of at least 0",
        lambda: optim.adamw(0.1, weight_decay=-0.1),
    ),
    "params missing": (
        ValueError,
        "add_decayed_weights.update(params=None): weight decay needs the current params; call",
        update_with(optim.adamw(0.1), W),
    ),
    "weight decays without an axis": (
        ValueError,
        "add_decayed_weights(weight_decay=...): a tensor of shape (3,) is one value per adapter",
        update_with(optim.add_decayed_weights(torch.ones(3)), W, W),
    ),
    "factor": (ValueError, "scale(factor=inf): expected a finite number.", lambda: optim.scale(math.inf)),
    "max_norm": (
        ValueError,
        'clip_by_global_norm(max_norm=0.0): expected a number above 0; float("inf") clips nothing',
        lambda: optim.clip_by_global_norm(0.0),
    ),
    "max_norms for one finetune": (
        ValueError,
        "clip_by_global_norm(max_norm=...): a tensor of shape (2,) is one limit per adapter, but the state "
        "was initialized for one finetune; call init with the stacked Finetuned, or pass a number.",
        update_with(optim.clip_by_global_norm(torch.ones(2)), W),
    ),
    "max_norms for another stack": (
        ValueError,
        "but the state was initialized for a stack of 2;",
        update_with(optim.clip_by_global_norm(torch.ones(3)), W, init=stack_of(W, 2)),
    ),
    "norm of a ragged stack": (
        ValueError,
        "global_norm(stacked=True): the leading axes of the 2 leaves are [(2,), (3,)], expected the same",
        lambda: optim.global_norm({**W, "v": torch.ones(3)}, stacked=True),
    ),
    "norm of an empty stack": (
        ValueError,
        "the leading axes of the 0 leaves are []",
        lambda: optim.global_norm({}, stacked=True),
    ),
    "state of another chain": (
        ValueError,
        "chain.update(state=...): got a state of 1 parts for a chain of 2 transformations; pass the state",
        lambda: optim.adam(0.1).update(W, (optim.EmptyState(),)),
    ),
    "filter of a wrong type": (
        TypeError,
        "masked(filter='w'): expected a function (name, leaf) -> bool or a mapping name -> bool.",
        lambda: optim.masked(optim.identity(), "w"),  # pyright: ignore[reportArgumentType]
    ),
    "filter by value": (
        TypeError,
        "masked.init(filter=...): got tensor(True) of type Tensor for leaf 'w', expected a bool; decide",
        lambda: optim.masked(optim.identity(), lambda name, leaf: leaf.sum() > 0).init(W),  # pyright: ignore[reportArgumentType]
    ),
    "filter that selects nothing": (
        ValueError,
        "masked.init(filter=...): the function selects none of the 1 leaves, named ['w']; correct it",
        lambda: optim.masked(optim.identity(), lambda name, leaf: name == "W").init(W),
    ),
    "filter with other names": (
        ValueError,
        "masked.init(filter=...): missing names ['w'], unknown names ['v']; expected exactly the 1 names",
        lambda: optim.masked(optim.identity(), {"v": True}).init(W),
    ),
    "masked names": (
        ValueError,
        "masked.update(updates=...): missing names ['w'], unknown names ['v']",
        update_with(optim.masked(optim.identity(), lambda name, leaf: True), {"v": torch.ones(1)}, W),
    ),
    "every": (
        ValueError,
        "multi_steps(every=0): expected an integer of at least 1.",
        lambda: optim.multi_steps(optim.sgd(0.1), 0),
    ),
    "schedule value": (ValueError, "constant_schedule(value=-1.0)", lambda: optim.constant_schedule(-1.0)),
    "schedule start": (ValueError, "linear_schedule(init=-1.0)", lambda: optim.linear_schedule(-1.0, 0.0, 2)),
    "schedule end": (ValueError, "linear_schedule(end=-1.0)", lambda: optim.linear_schedule(1.0, -1.0, 2)),
    "schedule length": (
        ValueError,
        "linear_schedule(steps=0): expected an integer of at least 1.",
        lambda: optim.linear_schedule(1.0, 0.0, 0),
    ),
    "peak": (
        ValueError,
        "warmup_cosine_schedule(peak=-1.0): expected a finite number of at least 0",
        lambda: optim.warmup_cosine_schedule(-1.0, 1, 2),
    ),
    "warmup": (
        ValueError,
        "warmup_cosine_schedule(warmup_steps=-1): expected an integer of at least 0.",
        lambda: optim.warmup_cosine_schedule(1.0, -1, 2),
    ),
    "total": (
        ValueError,
        "warmup_cosine_schedule(total_steps=5): expected an integer of at least 6.",
        lambda: optim.warmup_cosine_schedule(1.0, 5, 5),
    ),
}


@pytest.mark.parametrize("kind,message,call", ERRORS.values(), ids=ERRORS.keys())
def test_errors_say_what_was_given_and_what_to_do(kind, message, call):
    with pytest.raises(kind, match=re.escape(message)) as caught:
        call()
    assert type(caught.value) is kind


def test_adamw_without_decay_needs_no_params():
    tx = optim.adamw(0.1, weight_decay=0.0)
    updates, _ = tx.update(W, tx.init(W))
    assert_close(updates, {"w": torch.full((2, 3), -0.1)}, atol=1e-7)


def test_everything_public_is_documented_with_an_example():
    functions = [name for name in optim.__all__ if name[0].islower()]
    assert len(functions) == 23
    for name in functions:
        assert ">>> " in getattr(optim, name).__doc__, name
