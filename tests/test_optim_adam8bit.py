"""Adam in 8 bits: the format is bitsandbytes', blocks stay within an adapter, and the steps are near Adam's."""

from __future__ import annotations

import re

import bitsandbytes
import bitsandbytes.functional as bnb
import optree
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Everything
from test_optim import Calls, assert_close, assert_far, at, randn, run, stack_of, tree_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

import finetuna_func as ft
from finetuna_func import optim
from finetuna_func.optim import _adam8bit as adam8bit

few = settings(max_examples=15)
SHAPES = {"a": (30, 20), "b": (256,), "c": (), "d": (5,), "e": (0, 3), "f": (513,)}


def coded(lr, min_size: int = 6):
    """Every leaf in codes but the smallest."""
    return optim.chain(optim.clip_by_global_norm(5.0), optim.adamw8bit(lr, min_size=min_size, weight_decay=0.1))


def floats(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of many sizes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64) ** 5
    return (x * (torch.rand(n, generator=generator) > 0.1)).to(dtype)


def quantize(x: Tensor, code: Tensor, above_zero: bool = False) -> tuple[Tensor, Tensor]:
    codes, absmax = adam8bit.quantize_blocks(adam8bit.to_blocks(x), code, above_zero)
    return adam8bit.from_blocks(codes, x.shape[-1]), absmax


def dequantize(codes: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    return adam8bit.from_blocks(adam8bit.dequantize_blocks(adam8bit.to_blocks(codes), absmax, code), codes.shape[-1])


# --- the format


def test_the_maps_are_those_of_bitsandbytes():
    ours = adam8bit.dynamic_maps()
    assert torch.equal(ours[0], bnb.create_dynamic_map(signed=True))
    assert torch.equal(ours[1], bnb.create_dynamic_map(signed=False))
    assert (ours.diff(dim=1) > 0).all()
    assert [row[zero] for row, zero in zip(ours, adam8bit.ZEROS, strict=True)] == [0, 0]


@few
@given(n=st.integers(1, 1500), signed=st.booleans(), seed=st.integers(0, 999))
def test_codes_are_those_of_bitsandbytes(n, signed, seed):
    """Its quantizer for float64, which looks for the nearest value; that for float32 looks in a coarser table."""
    code = adam8bit.dynamic_maps()[0 if signed else 1]
    x = floats(n, seed)
    x = x if signed else x.abs()
    x[:: adam8bit.BLOCK] += 1  # bitsandbytes divides by zero in a block of zeros
    codes, absmax = quantize(x, code)
    their_codes, their_absmax = torch.ops.bitsandbytes.quantize_blockwise(x.double(), code, adam8bit.BLOCK)
    assert torch.equal(absmax, their_absmax)
    # They multiply by 1 / absmax: a rounding of 1.2e-7, which moves what lies that near to a boundary.
    normed = x / absmax.repeat_interleave(adam8bit.BLOCK)[:n]
    near = ((normed.unsqueeze(-1) - (code[1:] + code[:-1]) / 2).abs() <= 2e-7 * normed.abs().unsqueeze(-1)).any(-1)
    assert ((codes == their_codes) | near).all()
    assert near.float().mean() < 0.02 or n < 100
    theirs = bnb.dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=adam8bit.BLOCK)
    assert torch.equal(dequantize(codes, absmax, code), theirs)
    if n > 50:
        assert not torch.equal(dequantize(their_codes.flip(0), absmax, code), theirs)


@few
@given(n=st.integers(1, 600), signed=st.booleans(), seed=st.integers(0, 999), exponent=st.integers(-35, 30))
def test_the_error_of_a_number_is_at_most_half_a_step_of_the_map(n, signed, seed, exponent):
    code = adam8bit.dynamic_maps()[0 if signed else 1]
    x = floats(n, seed) * 10.0**exponent
    x = x if signed else x.abs()
    codes, absmax = quantize(x, code)
    again = dequantize(codes, absmax, code)
    of_block = absmax.repeat_interleave(adam8bit.BLOCK)[:n]
    step = torch.maximum(code.diff()[codes.long().clamp(max=254)], code.diff()[(codes.long() - 1).clamp(min=0)])
    # and the roundings of quotient and product, of subnormal numbers too
    assert ((again - x).abs() <= (step / 2) * of_block + 2e-7 * of_block + 1e-44).all()
    assert (again[x == 0] == 0).all()
    extreme = x.abs() == of_block
    assert (again.abs() == of_block)[extreme & (x > 0)].all()
    if signed:
        assert (again.sign() * x.sign() >= 0).all()


def test_a_mean_square_above_zero_stays_above_zero(monkeypatch):
    code = adam8bit.dynamic_maps()[1]
    x = torch.tensor([1.0, 1e-7, 1e-30, 0.0])
    plain = dequantize(*quantize(x, code), code)
    kept = dequantize(*quantize(x, code, above_zero=True), code)
    assert plain.tolist() == [1, 0, 0, 0]
    assert kept[0] == 1 and (kept[1:3] == code[1]).all() and kept[3] == 0

    # What that is for: an element among larger ones, whose gradient stops.
    params = {"w": torch.zeros(256)}
    first, then = torch.ones(256), torch.ones(256)
    first[0], then[0] = 3e-4, 0.0
    grads = [{"w": first}] + [{"w": then}] * 3

    def end() -> Tensor:
        return run(optim.adamw8bit(1e-3, min_size=1), params, grads)[0]["w"][0].abs()

    exact = run(optim.adamw(1e-3), params, grads)[0]["w"][0].abs()
    ours = end()
    nearest = adam8bit.quantize_blocks
    monkeypatch.setattr(adam8bit, "quantize_blocks", lambda x, code, above_zero=False: nearest(x, code))
    assert ours < 2 * exact < 100 * exact < end()


# --- against bitsandbytes, and against Adam in float32


def bitsandbytes_run(params: dict[str, Tensor], grads: list[dict[str, Tensor]], lr: float) -> dict[str, Tensor]:
    leaves = {name: torch.nn.Parameter(leaf.clone()) for name, leaf in params.items()}
    optimizer = bitsandbytes.optim.AdamW8bit(leaves.values(), lr=lr, weight_decay=0.1)
    for grad in grads:
        for name, leaf in leaves.items():
            leaf.grad = grad[name].clone()
        optimizer.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far apart two runs ended, in units of the way from the start."""
    apart = sum((a[name] - b[name]).square().sum() for name in a)
    way = sum((b[name] - start[name]).square().sum() for name in a)
    return float((apart / way).sqrt())


def test_steps_against_bitsandbytes(seed):
    """Its CPU kernel finds codes in a table of 2 ** 16 entries, so that it rounds small means more coarsely."""
    shapes = {"large": (64, 100), "small": (50, 50)}
    params = randn(shapes, 0, dtype=torch.float32)
    grads = [randn(shapes, k, dtype=torch.float32) for k in range(1, 11)]
    theirs = bitsandbytes_run(params, grads, 1e-3)
    ours, state = run(optim.adamw8bit(1e-3, weight_decay=0.1), params, grads)
    assert state[0].mu["large"].dtype == torch.uint8 and state[0].mu["small"].dtype == torch.float32
    # Small leaves are in float32 in both. Params of size 3, so roundings of 2e-7 at each of 10 steps.
    assert_close(ours["small"], theirs["small"], rtol=0, atol=3e-6)
    ratio = distance({"large": ours["large"]}, {"large": theirs["large"]}, params)
    far = distance({"large": ours["large"]}, {"large": run(optim.adamw(1.1e-3), params, grads)[0]["large"]}, params)
    print(f"apart from bitsandbytes by {ratio:.4f} of the way; a tenth more learning rate: {far:.4f}")
    assert ratio < 0.03 < far


@pytest.mark.parametrize("above_zero", [True, False])
def test_one_step_is_adam_between_two_roundings(above_zero, seed):
    """With the state that comes out of the codes, one step is Adam's; what goes back is what the format makes of it."""
    n = 1000
    tx, exact = optim.scale_by_adam8bit(min_size=1), optim.scale_by_adam()
    params = {"w": torch.zeros(n)}
    state = tx.init(params)
    for k in range(3):
        g = {"w": floats(n, seed + k)}
        g["w"][:3] = 0
        g["w"][k] = 1e-6  # for the first time above zero, and its square below the smallest step of its block
        mu = dequantize(state.mu["w"], state.mu_absmax["w"], state.code[0])
        nu = dequantize(state.nu["w"], state.nu_absmax["w"], state.code[1])
        wide = optim.ScaleByAdamState(state.step, {"w": mu}, {"w": nu})
        expected, wide = exact.update(g, wide)
        updates, state = tx.update(g, state)
        assert_close(updates, expected)
        codes, absmax = quantize(wide.mu["w"], state.code[0])
        assert torch.equal(state.mu["w"], codes) and torch.equal(state.mu_absmax["w"], absmax)
        codes, absmax = quantize(wide.nu["w"], state.code[1], above_zero)
        assert torch.equal(state.nu_absmax["w"], absmax)
        assert torch.equal(state.nu["w"], codes) == above_zero
        assert (updates["w"][g["w"] != 0] != 0).all()


def test_a_real_task_ends_where_float32_ends():
    """Three finetunes of a model with everything, adapters and plain layers, 30 steps on random labels."""
    torch.manual_seed(0)
    base = ft.quantize_base_model(Everything(width=32).eval())
    stacked = ft.stack([ft.new_finetuned(base, linear_config=ft.LinearAdapterConfig(r=8)) for _ in range(3)])
    ids, labels = torch.randint(0, 20, (3, 8, 10)), torch.randint(0, 20, (3, 8, 10))

    def loss_fn(tuned: ft.Finetuned) -> Tensor:
        logits = ft.apply_stacked(base, tuned, ids)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none")
        return losses.reshape(3, -1).mean(1)

    ends = {}
    for name, tx in {
        "fp32": optim.adamw(1e-2),
        "8bit": optim.adamw8bit(1e-2, min_size=1),
        "slower": optim.adamw(8e-3),
    }.items():
        tuned, state = stacked, tx.init(stacked)
        for _ in range(30):
            _, grads = ft.stacked_value_and_grad(loss_fn)(tuned)
            updates, state = tx.update(grads, state, tuned)
            tuned = optim.apply_updates(tuned, updates)
        ends[name] = loss_fn(tuned)
    start = loss_fn(stacked)
    gained = start - ends["fp32"]
    off = ((ends["8bit"] - ends["fp32"]).abs() / gained).max()
    slower = ((ends["slower"] - ends["fp32"]).abs() / gained).min()
    print(f"loss {start.tolist()} to {ends['fp32'].tolist()}; 8 bits off by {off:.4f} of the gain, slower {slower:.4f}")
    assert (gained > 0.3).all()
    assert off < 0.03 < slower


def test_bytes_of_the_state():
    """Two bytes a parameter, 8 more for each block of 256, and the map; 8 bytes a parameter in float32."""
    params = {"w": torch.zeros(4, 64, 1024)}
    n = params["w"].numel()

    def size(tx) -> int:
        return sum(leaf.nbytes for leaf in pytree.tree_leaves(tx.init(stack_of(params, 4))))

    assert size(optim.scale_by_adam8bit()) == 2 * n + 8 * n // 256 + 4 * (2048 + 8)
    assert size(optim.scale_by_adam()) == 8 * n + 4 * 8


# --- stacks, transforms, purity


@few
@given(n=st.integers(1, 4), seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_steps_of_a_stack_are_the_steps_of_each_bitwise(n, seed, dtype):
    params = randn(SHAPES, seed, n=n, dtype=dtype)
    grads = [randn(SHAPES, seed + 1 + k, n=n, dtype=dtype) for k in range(4)]
    rates = torch.linspace(0.01, 0.1, n, dtype=dtype)
    tx = optim.adamw8bit(rates, min_size=6, weight_decay=0.1)
    tuned, state = run(tx, stack_of(params, n), grads)
    assert state[0].mu_absmax["f"].shape == (n, 3) and "d" not in state[0].mu_absmax
    for i in range(n):
        alone, alone_state = run(optim.adamw8bit(rates[i], min_size=6, weight_decay=0.1), at(params, i), at(grads, i))
        assert_close((at(tree_of(tuned), i), at(state, i)), (alone, alone_state))
        wrong, _ = run(optim.adamw8bit(rates[i], min_size=6, weight_decay=0.2), at(params, i), at(grads, i))
        assert_far(at(tree_of(tuned), i), wrong)


def test_small_is_what_an_adapter_has():
    state = optim.scale_by_adam8bit().init(stack_of({"w": torch.zeros(4, 4095), "v": torch.zeros(4, 4096)}, 4))
    assert list(state.mu_absmax) == ["v"] and state.mu["w"].dtype == torch.float32


@few
@given(n=st.integers(1, 3), seed=st.integers(0, 999))
def test_vmap_of_update_is_the_update_of_the_stack(n, seed):
    params, tx = randn(SHAPES, seed, n=n, dtype=torch.float32), coded(0.1)
    tuned = stack_of(params, n)
    state, mapped_state = tx.init(tuned), torch.func.vmap(tx.init)(params)
    assert_close(mapped_state, state)
    assert all(leaf.is_contiguous() for leaf in pytree.tree_leaves(mapped_state))
    for k in range(3):
        grads = randn(SHAPES, seed + 1 + k, n=n, dtype=torch.float32)
        updates, state = tx.update(grads, state, tuned)
        mapped, mapped_state = torch.func.vmap(tx.update)(grads, mapped_state, params)
        assert_close((mapped, mapped_state), (updates, state), rtol=1e-6, atol=1e-7)
    assert_far(updates, pytree.tree_map(lambda u: 1.01 * u, updates), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("blocks", [1, 2])
def test_large_leaves_go_in_parts(blocks, monkeypatch):
    params = randn({"w": (2, 700)}, 0, n=2, dtype=torch.float32)
    grads = [randn({"w": (2, 700)}, k, n=2, dtype=torch.float32) for k in (1, 2)]
    whole = run(coded(0.1), stack_of(params, 2), grads)
    monkeypatch.setattr(adam8bit, "_CHUNK", blocks * 2 * adam8bit.BLOCK)
    parts = run(coded(0.1), stack_of(params, 2), grads)
    assert_close((tree_of(parts[0]), parts[1]), (tree_of(whole[0]), whole[1]))


def test_temporaries_of_a_large_leaf_are_small():
    from test_smollm2 import LiveBytes

    n = 1 << 24
    params = {"w": torch.zeros(n)}
    tx = optim.scale_by_adam8bit()
    state, grads = tx.init(params), {"w": torch.ones(n)}
    with LiveBytes() as live:
        updates, _ = tx.update(grads, state)
    # the result, in parts and joined: twice 4 bytes and 2 * 2; a part of 2 ** 22 numbers in a dozen temporaries
    assert live.peak < 12 * n + 12 * 4 * (1 << 22)
    assert updates["w"].nbytes == 4 * n


def test_inputs_are_never_mutated_and_a_step_repeats():
    tx, tuned = coded(torch.tensor([0.1, 0.2])), stack_of(randn(SHAPES, 0, n=2), 2)
    state, grads = tx.init(tuned), randn(SHAPES, 1, n=2)
    _, state = tx.update(grads, state, tuned)
    inputs = pytree.tree_leaves((dict(tuned.params), state, grads))
    before = [(leaf._version, leaf.clone()) for leaf in inputs]
    first = tx.update(grads, state, tuned)
    for leaf, (version, copied) in zip(inputs, before, strict=True):
        assert leaf._version == version and torch.equal(leaf, copied)
    assert_close(tx.update(grads, state, tuned), first)
    assert list(first[0]) == sorted(SHAPES)
    backwards = dict(reversed(grads.items()))
    assert_close(tx.update(backwards, state, tuned), first)


def test_no_value_is_read_by_python():
    tx, params = coded(0.1), {name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()}
    new, state = run(tx, params, [params, params])
    assert {leaf.device.type for leaf in pytree.tree_leaves((tx.init(params), state))} == {"meta"}
    assert {name: leaf.shape for name, leaf in new.items()} == {n: leaf.shape for n, leaf in params.items()}


def test_no_step_makes_a_tensor_of_python_numbers():
    """On a GPU, that is a copy which waits."""
    tx, params = coded(0.1), randn(SHAPES, 0, dtype=torch.float32)
    state = tx.init(params)
    with Calls() as calls:
        tx.update(params, state, params)
    assert not {"lift_fresh", "_local_scalar_dense", "scalar_tensor"} & calls.names
    assert "bucketize" in calls.names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_params(dtype):
    params, grads = randn(SHAPES, 0, dtype=dtype), [randn(SHAPES, k, dtype=dtype) for k in (1, 2)]
    new, state = run(coded(0.1), params, grads)
    wide, _ = run(
        coded(0.1), {n: p.float() for n, p in params.items()}, [{n: x.float() for n, x in g.items()} for g in grads]
    )
    dtypes = {leaf.dtype for leaf in pytree.tree_leaves(state)}
    assert dtypes == {torch.float32, torch.int64, torch.uint8}
    assert {leaf.dtype for leaf in new.values()} == {dtype}
    # two steps, each rounded to 8 or 11 bits; numbers up to 4
    assert_close({n: p.float() for n, p in new.items()}, wide, rtol=0, atol=4e-2)
    assert_far(params, new)


def test_a_nan_in_one_adapter_leaves_the_others_alone():
    params, grads = randn(SHAPES, 0, n=3), [randn(SHAPES, k, n=3) for k in (1, 2)]
    sound, _ = run(coded(0.1), stack_of(params, 3), grads)
    for leaf in grads[0].values():
        leaf[1] = torch.nan
    ill, _ = run(coded(0.1), stack_of(params, 3), grads)
    for i in (0, 2):
        assert_close(at(tree_of(ill), i), at(tree_of(sound), i))
    assert all(leaf[1].isnan().all() for leaf in ill.params.values())


def test_zeros_stay_exactly_zero():
    g = torch.randn(3, 40, 20)
    g[:, 10:] = 0
    params = {"lora_a": g.clone()}
    tuned, _ = run(coded(0.1), stack_of(params, 3), [{"lora_a": g * k} for k in (1, -2, 3)])
    assert (tuned.params["lora_a"][:, 10:] == 0).all() and (tuned.params["lora_a"][:, :10] != 0).all()


@pytest.mark.parametrize("stacked", [False, True])
def test_compiles_in_one_graph_to_the_same_values(stacked):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    n = 2 if stacked else None
    tx, params = coded(torch.tensor([0.1, 0.2]) if stacked else 0.1), randn(SHAPES, 0, n=n, dtype=torch.float32)
    compiled = torch.compile(tx.update, backend=backend, fullgraph=True)
    state = other_state = tx.init(stack_of(params, 2) if stacked else params)
    for k in range(3):
        grads = randn(SHAPES, k + 1, n=n, dtype=torch.float32)
        updates, state = tx.update(grads, state, params)
        other, other_state = compiled(grads, other_state, params)
        assert_close((other, other_state), (updates, state), rtol=1e-6, atol=1e-7)
    assert backend.frame_count == 1
    torch._dynamo.reset()


def test_states_flatten_and_save():
    params, grads = randn(SHAPES, 0, n=2), [randn(SHAPES, k, n=2) for k in (1, 2)]
    tx = coded(0.1)
    tuned, state = run(tx, stack_of(params, 2), grads)
    leaves, spec = pytree.tree_flatten(state)
    assert all(isinstance(leaf, Tensor) and leaf.shape[0] == 2 and leaf.is_contiguous() for leaf in leaves)
    assert [id(leaf) for leaf in optree.tree_leaves(state)] == [id(leaf) for leaf in leaves]  # pyright: ignore
    saved = safetensors.torch.load(safetensors.torch.save({f"{i:03}": x for i, x in enumerate(leaves)}))
    again = pytree.tree_unflatten([saved[name] for name in sorted(saved)], spec)
    resumed, expected = run(tx, tuned, grads, again), run(tx, tuned, grads, state)
    assert_close((tree_of(resumed[0]), resumed[1]), (tree_of(expected[0]), expected[1]))
    assert_far(tree_of(run(tx, tuned, grads)[0]), tree_of(expected[0]))


def test_inside_multi_steps_and_masked():
    params, grads = randn(SHAPES, 0), [randn(SHAPES, k) for k in (1, 2)]
    mean = {name: (grads[0][name] + grads[1][name]) / 2 for name in SHAPES}
    new, _ = run(optim.multi_steps(coded(0.1), 2), params, grads)
    assert_close(new, run(coded(0.1), params, [mean])[0])
    both = optim.chain(
        optim.masked(optim.adamw8bit(0.1, min_size=6), lambda name, leaf: name == "a"),
        optim.masked(optim.sgd(0.1), lambda name, leaf: name != "a"),
    )
    new, _ = run(both, params, grads)
    assert_close(new["a"], run(optim.adamw8bit(0.1, min_size=6), params, grads)[0]["a"])


def test_derivative_with_respect_to_the_learning_rate():
    params, grads = randn(SHAPES, 0), [randn(SHAPES, k) for k in (1, 2)]

    def loss(lr: Tensor) -> Tensor:
        return sum((leaf**2).sum() for leaf in run(coded(lr), params, grads)[0].values())  # pyright: ignore

    lr, h = torch.tensor(0.1, dtype=torch.float64), 1e-5
    slope = torch.func.grad(loss)(lr)
    torch.testing.assert_close(slope, (loss(lr + h) - loss(lr - h)) / (2 * h), rtol=1e-7, atol=1e-7)
    assert slope.abs() > 1e-3


def test_non_contiguous_gradients():
    params = {"w": torch.randn(40, 30).T}
    g = torch.randn(40, 30).T
    tx = optim.adamw8bit(0.1, min_size=6, weight_decay=0.1)  # and no norm, a sum in the order of the memory
    one, state = run(tx, params, [{"w": g}])
    other, _ = run(tx, {"w": params["w"].contiguous()}, [{"w": g.contiguous()}])
    assert_close(one, other)
    assert all(leaf.is_contiguous() for leaf in pytree.tree_leaves(state))


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: optim.adamw8bit(0.1, b1=1.0), "scale_by_adam8bit(b1=1.0): expected a number in [0, 1)"),
        (lambda: optim.scale_by_adam8bit(b2=-1.0), "scale_by_adam8bit(b2=-1.0): expected"),
        (lambda: optim.scale_by_adam8bit(eps=0.0), "(eps=0.0): expected a finite number above 0"),
        (lambda: optim.scale_by_adam8bit(min_size=-1), "(min_size=-1): expected an integer of at least 0"),
        (lambda: optim.scale_by_adam8bit(min_size=1.5), "(min_size=1.5): expected an integer"),  # pyright: ignore
        (
            lambda: optim.adamw8bit(0.1).update({"v": W}, optim.adamw8bit(0.1).init({"w": W})),
            "scale_by_adam8bit.update(updates=...): missing names ['w'], unknown names ['v']",
        ),
        (
            lambda: optim.adamw8bit(0.1).update({"w": W[:1]}, optim.adamw8bit(0.1).init({"w": W})),
            "scale_by_adam8bit.update(updates=...): 'w' has shape (1, 3), expected (2, 3)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


W = torch.ones(2, 3)
