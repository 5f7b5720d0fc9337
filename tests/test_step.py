"""`ft.compile_step`: a pure function that does what the loop written by hand does, bit by bit on the CPU.

What needs a GPU (recording as a CUDA graph) is below, and runs where there is one: graph and eager step launch the same
kernels on the same numbers, and are compared at 1e-6 of the largest number, since some kernels add in any order.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from models import (
    Tiny,
    assert_same_finetune,
    assert_unchanged,
    finetunes,
    gpt2,
    llama,
    snapshot,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import finetuna_func as ft
from finetuna_func import _step

N, STEPS = 3, 5
IDS = torch.randint(4, 16, (STEPS, N, 2, 6), generator=torch.Generator().manual_seed(0))


def optimizer() -> ft.optim.GradientTransformation:
    return ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-2, weight_decay=0.1))


class Counts(TorchDispatchMode):
    """How often each operator was called."""

    def __enter__(self) -> collections.Counter[str]:  # type: ignore[override]
        super().__enter__()
        self.found: collections.Counter[str] = collections.Counter()
        return self.found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Case:
    """A base, a finetune or a stack, and its loss with and without aux."""

    def __init__(self, stacked: bool, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.base = ft.quantize_base_model(Tiny()).to(device)
        tuned = [t.to(device) for t in finetunes(self.base, N)]
        self.tuned = ft.stack(tuned) if stacked else tuned[0]
        self.batches = IDS.flatten(2).to(device) if stacked else IDS[:, 0].flatten(1).to(device)

    def loss(self, tuned: ft.Finetuned, ids: Tensor, scale: float = 1.0) -> Tensor:
        if tuned.stack_size is None:
            return scale * ft.apply(self.base, tuned, ids).square().mean()
        return scale * ft.apply_stacked(self.base, tuned, ids).square().mean(dim=(1, 2))

    def with_aux(self, tuned: ft.Finetuned, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        loss = self.loss(tuned, ids)
        return loss, {"twice": 2 * loss, "ids": ids, "name": "aux", "nothing": None}


def by_hand(
    loss_fn: Callable[..., Any], tx: Any, tuned: ft.Finetuned, batches: Any, has_aux: bool = False
) -> tuple[ft.Finetuned, Any, list[Any]]:
    state, results = tx.init(tuned), []
    differentiate = ft.value_and_grad if tuned.stack_size is None else ft.stacked_value_and_grad
    for batch in batches:
        out, grads = differentiate(loss_fn, has_aux=has_aux)(tuned, batch)
        updates, state = tx.update(grads, state, tuned)
        tuned = ft.optim.apply_updates(tuned, updates)
        results.append(out)
    return tuned, state, results


def run(step: Any, tx: Any, tuned: ft.Finetuned, batches: Any) -> tuple[ft.Finetuned, Any, list[Any]]:
    state, results = tx.init(tuned), []
    for batch in batches:
        tuned, state, out = step(tuned, state, batch)
        results.append(out)
    return tuned, state, results


def assert_equal(found: Any, expected: Any) -> None:
    leaves, spec = torch_pytree.tree_flatten(found)
    expected_leaves, expected_spec = torch_pytree.tree_flatten(expected)
    assert spec == expected_spec
    for leaf, wanted in zip(leaves, expected_leaves, strict=True):
        assert torch.equal(leaf, wanted) if isinstance(wanted, Tensor) else leaf == wanted


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("has_aux", [False, True])
def test_the_loop_by_hand(stacked: bool, has_aux: bool):
    case, tx = Case(stacked), optimizer()
    loss_fn = case.with_aux if has_aux else case.loss
    found = run(ft.compile_step(loss_fn, tx, has_aux=has_aux), tx, case.tuned, case.batches)
    expected = by_hand(loss_fn, tx, case.tuned, case.batches, has_aux)
    assert_same_finetune(found[0], expected[0])
    assert_equal(found[1:], expected[1:])
    other = by_hand(loss_fn, ft.optim.adamw(1e-2), case.tuned, case.batches, has_aux)
    name = next(iter(found[0].params))
    assert not torch.equal(found[0].params[name], other[0].params[name])
    assert not torch.equal(found[0].params[name], case.tuned.params[name])
    losses = found[2][0][0] if has_aux else found[2][0]
    assert losses.shape == ((N,) if stacked else ())
    assert not losses.requires_grad


def test_training_goes_down():
    case, tx = Case(True), ft.optim.adamw(3e-2)
    step = ft.compile_step(case.loss, tx)
    losses = run(step, tx, case.tuned, [case.batches[0]] * 20)[2]
    assert (losses[-1] < 0.5 * losses[0]).all()


class Replay:
    """In place of a CUDA graph: computes the step again from the recording's inputs, into its outputs."""

    def __init__(self, function: Callable[..., Any], inputs: list[Tensor], args: Any, outputs: list[Tensor]):
        self.function, self.inputs, self.args, self.outputs = function, inputs, args, outputs
        self.count = 0

    def replay(self) -> None:
        found = [leaf for leaf in torch_pytree.tree_leaves(self.function(*self.args)) if isinstance(leaf, Tensor)]
        for own, new in zip(self.outputs, found, strict=True):
            own.copy_(new)
        self.count += 1


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Replay]:
    """What is recorded from now on, without a GPU."""
    made: list[Replay] = []

    def record(self: Any, leaves: list[Any], spec: Any) -> Any:
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = [leaf for leaf in own if isinstance(leaf, Tensor)]
        args = torch_pytree.tree_unflatten(own, spec)
        out = self._function(*args)
        out_leaves, out_spec = torch_pytree.tree_flatten(out)
        outputs = [leaf.clone() for leaf in out_leaves if isinstance(leaf, Tensor)]
        donated = 0
        if self._donate:
            _step._check_donated(args[1:3], out[:2])
            donated = sum(isinstance(leaf, Tensor) for leaf in torch_pytree.tree_leaves(out[:2]))
            outputs[:donated] = inputs[:donated]
        made.append(Replay(self._function, inputs, args, outputs))
        others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in out_leaves]
        return _step._Recording(made[-1], inputs, outputs, others, out_spec, donated)  # pyright: ignore

    monkeypatch.setattr(_step._Recorded, "_record", record)
    monkeypatch.setattr(_step, "_is_on_gpu", lambda tree: True)
    return made


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_what_is_recorded_returns_what_it_takes(stacked: bool, flat: bool, recordings: list[Replay]):
    """Params and state in the same form, so that a recording can overwrite them."""
    case, tx = Case(stacked), optimizer()
    tx = ft.optim.flatten(tx) if flat else tx
    step = ft.compile_step(case.loss, tx, donate=True, compile_optimizer=False)
    found = run(step, tx, case.tuned, case.batches)
    (replay,) = recordings
    assert replay.count == STEPS and len(replay.outputs) >= (4 if flat else 3 * len(case.tuned.params))
    assert_same_finetune(found[0], by_hand(case.loss, tx, case.tuned, case.batches)[0])
    with pytest.raises(TypeError, match="pass donate=False"):
        _step._check_donated(({"a": 1}, 2), ({"a": (1,)}, 2))


def test_results_given_back_are_in_their_place(recordings: list[Replay], monkeypatch: pytest.MonkeyPatch):
    """A donated step that goes on from its last results copies a batch and nothing else."""
    case, tx = Case(True), ft.optim.flatten(optimizer())
    step = ft.compile_step(case.loss, tx, donate=True, compile_optimizer=False)
    copied: list[int] = []
    real = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda own, new: copied.append(len(own)) or real(own, new))
    first = step(case.tuned, tx.init(case.tuned), case.batches[0])
    assert copied[0] > 4 and len(copied) == 2  # everything in, losses out
    second = step(*first[:2], case.batches[1])
    assert copied[2:] == [1, 1] and second[0] is first[0] and second[1] is first[1]
    assert_same_finetune(second[0], by_hand(case.loss, tx, case.tuned, case.batches[:2])[0])


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_anything_else_than_the_last_results(flat: bool, donate: bool, recordings: list[Replay]):
    """Another batch shape, other finetunes in between, an own copy, another state: as the step by hand takes them."""
    case, tx = Case(True), optimizer()
    tx = ft.optim.flatten(tx) if flat else tx
    step = ft.compile_step(case.loss, tx, donate=donate, compile_optimizer=False)
    plain = ft.compile_step(case.loss, tx, cuda_graph=False, compile_optimizer=False)
    halved = case.tuned.replace(params={name: leaf / 2 for name, leaf in case.tuned.params.items()})
    long, short = case.batches[0], case.batches[1][:, :8]

    def through(step: Any) -> list[Any]:
        seen = []

        def go(tuned: ft.Finetuned, state: Any, ids: Tensor, scale: float = 1.0) -> tuple[ft.Finetuned, Any]:
            tuned, state, losses = step(tuned, state, ids, scale)
            seen.append(torch_pytree.tree_map(torch.clone, (dict(tuned.params), losses)))
            return tuned, state

        at = go(case.tuned, tx.init(case.tuned), long)
        at = go(*at, long)
        at = go(*at, short)  # another shape: recorded anew, from where the first has come to
        at = go(*at, long)
        at = go(*at, long, 2.0)  # another number
        at = go(*at, long)
        other = go(halved, tx.init(halved), long)  # the first finetunes are given up
        other = go(*other, long)
        changed = other[0].replace(params={name: leaf + 0.01 for name, leaf in other[0].params.items()})
        other = go(changed, other[1], long)
        go(other[0], tx.init(changed), long)  # the optimizer starts again
        return seen

    found, expected = through(step), through(plain)
    for (params, losses), (wanted, wanted_losses) in zip(found, expected, strict=True):
        assert_equal((params, losses), (wanted, wanted_losses))
    assert len({float(losses[0]) for _, losses in expected}) == len(expected)
    assert len(recordings) == 3


def test_a_donated_update_is_computed_in_its_place(recordings: list[Replay], monkeypatch: pytest.MonkeyPatch):
    """With a compiled optimizer: params and state come out as the tensors that went in, and need no copy."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    case, tx = Case(True), ft.optim.flatten(optimizer())
    step = ft.compile_step(case.loss, tx, donate=True, compile_optimizer=True)
    found = run(step, tx, case.tuned, case.batches)
    expected = by_hand(case.loss, tx, case.tuned, case.batches)
    unlike = by_hand(case.loss, tx, case.tuned, case.batches.flip(0))
    assert_near(found[0], expected[0], unlike=unlike[0])
    (replay,) = recordings
    out = torch_pytree.tree_leaves(replay.function(*replay.args)[:2])
    places = [leaf.data_ptr() for leaf in out if isinstance(leaf, Tensor)]
    assert places == [own.data_ptr() for own in replay.inputs[: len(places)]] and len(places) >= 4
    pure = ft.compile_step(case.loss, tx, donate=True, compile_optimizer=True, cuda_graph=False)
    state = tx.init(case.tuned)
    before = snapshot(case.tuned)
    pure(case.tuned, state, case.batches[0])
    assert_unchanged(case.tuned, before)
    assert_equal(state, tx.init(case.tuned))


@pytest.mark.parametrize("stacked", [False, True])
def test_inputs_are_left_alone(stacked: bool):
    case, tx = Case(stacked), optimizer()
    step = ft.compile_step(case.loss, tx, donate=True)  # which says something about recorded steps only
    tuned, state, _ = step(case.tuned, tx.init(case.tuned), case.batches[0])
    before = [snapshot(tuned), snapshot(case.base)]
    state_before = [leaf.clone() for leaf in torch_pytree.tree_leaves(state)]
    again = [step(tuned, state, case.batches[1]) for _ in range(2)]
    assert_equal(again[0], again[1])
    assert_unchanged(tuned, before[0])
    assert_unchanged(case.base, before[1])
    assert_equal(torch_pytree.tree_leaves(state), state_before)
    assert not torch.equal(again[0][2], step(tuned, state, case.batches[2])[2])


def test_other_arguments_and_shapes():
    """Anything may follow: numbers, trees, another length."""
    case, tx = Case(False), optimizer()

    def loss(tuned: ft.Finetuned, batch: dict[str, Tensor], scale: float) -> Tensor:
        return case.loss(tuned, batch["ids"], scale)

    step = ft.compile_step(loss, tx)
    state = tx.init(case.tuned)
    for ids in (case.batches[0], case.batches[0][:4]):
        for scale in (1.0, 2.0):
            found = step(case.tuned, state, {"ids": ids}, scale)[2]
            assert torch.equal(found, case.loss(case.tuned, ids, scale))
            assert not torch.equal(found, case.loss(case.tuned, ids, scale + 1))


@pytest.mark.parametrize(
    "options",
    [{"remat": "blocks"}, pytest.param({"remat": "blocks", "compile": "blocks"}, marks=pytest.mark.slow)],
    ids=", ".join,
)
def test_with_what_it_is_made_for(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """`causal_lm_loss` with recomputed and compiled blocks, and keys for dropout as arguments."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    base = ft.quantize_base_model(llama())
    config = ft.LinearAdapterConfig(r=2, alpha=1.0, dropout=0.3)
    stacked, tx = ft.stack(finetunes(base, N, adapt_layers={"q_proj"}, linear_config=config)), optimizer()

    def loss(stacked: ft.Finetuned, ids: Tensor, key: Tensor, **options: Any) -> Tensor:
        return ft.causal_lm_loss(base, stacked, ids, train=True, rng=key, chunk_tokens=9, **options)

    keys = [ft.random.fold_in(ft.random.key(0), i) for i in range(3)]

    def trained(options: dict[str, Any], keys: list[Tensor]) -> tuple[Tensor, Tensor]:
        step = ft.compile_step(functools.partial(loss, **options), tx)
        tuned, state = stacked, tx.init(stacked)
        for ids, key in zip(IDS, keys, strict=False):
            tuned, state, losses = step(tuned, state, ids, key)
        return losses, torch.cat([leaf.flatten() for leaf in tuned.params.values()])

    found, expected, unlike = trained(options, keys), trained({}, keys), trained({}, keys[::-1])
    # Three steps of Adam, which divides by the gradient's size: 1e-3 of the 3e-2 that each has moved at most
    assert float((found[0] - expected[0]).abs().max()) <= 1e-5 * float(expected[0].max())
    assert float((found[1] - expected[1]).abs().max()) <= 3e-5
    assert float((unlike[1] - expected[1]).abs().max()) > 1e-3
    torch.compiler.reset()


@pytest.mark.parametrize("wrap", [lambda tx: tx, ft.optim.flatten], ids=["leaves", "flat"])
def test_a_compiled_optimizer(wrap: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    case, tx = Case(True), wrap(optimizer())
    found = run(ft.compile_step(case.loss, tx, compile_optimizer=True), tx, case.tuned, case.batches[:3])
    expected = by_hand(case.loss, tx, case.tuned, case.batches[:3])
    for name, leaf in expected[0].params.items():
        # The same operations; Adam's quotients of small numbers may differ by a rounding
        assert torch.allclose(found[0].params[name], leaf, rtol=1e-6, atol=1e-6), name
        assert not torch.allclose(leaf, case.tuned.params[name], rtol=1e-6, atol=1e-6), name
    torch.compiler.reset()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("has_aux", [False, True])
def test_a_flat_optimizer(stacked: bool, has_aux: bool):
    """Bit by bit the loop by hand with it, and but for the norm's rounding the loop with its inner transformation."""
    case, tx = Case(stacked), ft.optim.flatten(optimizer())
    loss_fn = case.with_aux if has_aux else case.loss
    found = run(ft.compile_step(loss_fn, tx, has_aux=has_aux), tx, case.tuned, case.batches)
    expected = by_hand(loss_fn, tx, case.tuned, case.batches, has_aux)
    assert_same_finetune(found[0], expected[0])
    assert_equal(found[1:], expected[1:])
    inner = by_hand(loss_fn, optimizer(), case.tuned, case.batches, has_aux)[0]
    other = by_hand(loss_fn, ft.optim.adamw(1e-2), case.tuned, case.batches, has_aux)[0]
    # Of five steps of 1e-2 at most, 1e-5
    assert max(float((found[0].params[k] - leaf).abs().max()) for k, leaf in inner.params.items()) <= 5e-7
    assert max(float((found[0].params[k] - leaf).abs().max()) for k, leaf in other.params.items()) > 1e-4
    assert len({leaf.untyped_storage().data_ptr() for leaf in found[0].params.values()}) == 1
    assert case.tuned.consts.keys() == found[0].consts.keys() and case.tuned.spec == found[0].spec


def test_a_flat_optimizer_of_params_in_few_bits():
    case = Case(True)
    start = case.tuned.replace(params={name: leaf.bfloat16() for name, leaf in case.tuned.params.items()})
    for make in (ft.optim.with_master_params, lambda tx: tx):
        results = []
        for tx in (ft.optim.flatten(make(ft.optim.adamw(1e-2))), make(ft.optim.adamw(1e-2))):
            results.append(run(ft.compile_step(case.loss, tx), tx, start, case.batches)[0])
        assert_same_finetune(*results)
        assert not torch.equal(results[0].params["fc.lora_a"], start.params["fc.lora_a"])


def test_a_flat_optimizer_puts_nothing_together_but_gradients():
    """From the second step on, params are taken as the flat leaf that they are views of."""
    case, tx = Case(True), ft.optim.flatten(ft.optim.adamw(1e-2))
    step = ft.compile_step(
        lambda tuned, ids: torch.stack([leaf.flatten(1).sum(1) for leaf in tuned.params.values()]).sum(0), tx
    )
    tuned, state, cats = case.tuned, tx.init(case.tuned), []
    for batch in case.batches[:3]:
        with Counts() as counts:
            tuned, state, _ = step(tuned, state, batch)
        cats.append(counts["cat"])
    assert cats == [2, 1, 1]


def test_structures_can_be_told_apart():
    """By what a recording is found again: the structure of everything that is passed."""
    case, tx = Case(True), optimizer()
    args = (case.tuned, tx.init(case.tuned), case.batches[0])
    spec = torch_pytree.tree_structure(args)
    assert hash(spec) == hash(torch_pytree.tree_structure((case.tuned.replace(), *args[1:])))
    other = ft.stack(finetunes(case.base, N, adapt_layers={"fc"}))
    assert spec != torch_pytree.tree_structure((other, tx.init(other), case.batches[0]))


def test_refusals():
    case, tx = Case(False), optimizer()
    step = ft.compile_step(case.loss, tx)
    state = tx.init(case.tuned)
    with pytest.raises(TypeError, match="the first argument is a dict; expected a Finetuned"):
        step(dict(case.tuned.params), state, case.batches[0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected exactly one Finetuned among the positional arguments"):
        step(case.tuned, state, case.batches[0], case.tuned)
    with pytest.raises(ValueError, match=r"compile_step\(cuda_graph=True\): not all tensors are on a CUDA device"):
        ft.compile_step(case.loss, tx, cuda_graph=True)(case.tuned, state, case.batches[0])
    with pytest.raises(ValueError, match=r"returned a tensor of shape \(12, 4\); expected a scalar"):
        ft.compile_step(lambda t, ids: ft.apply(case.base, t, ids), tx)(case.tuned, state, case.batches[0])
    with pytest.raises(TypeError, match=r"tx is optim.flatten\(...\) but the state is a tuple; pass the one that"):
        ft.compile_step(case.loss, ft.optim.flatten(tx))(case.tuned, state, case.batches[0])
    stacked = Case(True)
    with pytest.raises(ValueError, match=r"losses have shape \(\), expected \(3,\)"):
        ft.compile_step(lambda t, ids: stacked.loss(t, ids).mean(), tx)(
            stacked.tuned, tx.init(stacked.tuned), stacked.batches[0]
        )
    with pytest.raises(TypeError, match=r"value_and_grad\(has_aux=True\): loss_fn must return \(loss, aux\)"):
        ft.compile_step(case.loss, tx, has_aux=True)(case.tuned, state, case.batches[0])


# --- on a GPU: recorded as a CUDA graph

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GRAPH = 1e-6


def assert_near(found: Any, expected: Any, *, unlike: Any) -> None:
    """All leaves at 1e-6 of the largest number of all, and the partner far from them."""
    found, expected, unlike = (
        [leaf for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for tree in (found, expected, unlike)
    )
    scale = max(float(leaf.abs().max()) for leaf in expected)
    assert max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) <= GRAPH * scale
    assert max(float((f - u).abs().max()) for f, u in zip(found, unlike, strict=True)) > 100 * GRAPH * scale


@on_gpu
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_graph_and_eager_step(stacked: bool, has_aux: bool, donate: bool, flat: bool):
    case, tx = Case(stacked, "cuda"), ft.optim.flatten(optimizer()) if flat else optimizer()
    loss_fn = case.with_aux if has_aux else case.loss
    recorded = ft.compile_step(loss_fn, tx, has_aux=has_aux, donate=donate)
    found = run(recorded, tx, case.tuned, case.batches)
    expected = run(ft.compile_step(loss_fn, tx, has_aux=has_aux, cuda_graph=False), tx, case.tuned, case.batches)
    unlike = run(ft.compile_step(loss_fn, tx, has_aux=has_aux, cuda_graph=False), tx, case.tuned, case.batches.flip(0))
    assert_near(found, expected, unlike=unlike)
    assert torch_pytree.tree_structure(found) == torch_pytree.tree_structure(expected)
    if has_aux:
        assert found[2][0][1]["name"] == "aux"
        for (_, aux), batch in zip(found[2], case.batches, strict=True):
            assert torch.equal(aux["ids"], batch)


@on_gpu
def test_graph_of_another_shape_or_structure():
    """Each is recorded once, and found again."""
    case, tx = Case(True, "cuda"), optimizer()
    calls: list[Any] = []

    def loss(tuned: ft.Finetuned, ids: Tensor, scale: float) -> Tensor:
        calls.append(ids.shape)
        return case.loss(tuned, ids, scale)

    step = ft.compile_step(loss, tx)
    state = tx.init(case.tuned)
    counts = []
    for length, scale in ((12, 1.0), (8, 1.0), (12, 1.0), (8, 1.0), (8, 2.0), (8, 2.0)):
        ids = case.batches[0][:, :length]
        found = step(case.tuned, state, ids, scale)[2]
        assert_near(found, case.loss(case.tuned, ids, scale), unlike=case.loss(case.tuned, ids, 1.1 * scale))
        counts.append(len(calls))
    assert counts == [3, 6, 6, 6, 9, 9]  # twice to warm up, once recorded


@on_gpu
def test_graph_leaves_inputs_and_earlier_outputs_alone():
    case, tx = Case(True, "cuda"), optimizer()
    step = ft.compile_step(case.with_aux, tx, has_aux=True)
    before = [snapshot(case.tuned), snapshot(case.base)]
    first = step(case.tuned, tx.init(case.tuned), case.batches[0])
    kept = torch_pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, first)
    second = step(first[0], first[1], case.batches[1])
    assert_equal(first, kept)
    assert_unchanged(case.tuned, before[0])
    assert_unchanged(case.base, before[1])
    assert_equal(step(case.tuned, tx.init(case.tuned), case.batches[0])[2], first[2])
    assert not torch.equal(second[2][0], first[2][0])


@on_gpu
def test_graph_refuses_a_loss_that_waits():
    """In words, and the GPU is usable afterwards."""
    case, tx = Case(False, "cuda"), optimizer()

    def waits(tuned: ft.Finetuned, ids: Tensor) -> Tensor:
        loss = case.loss(tuned, ids)
        return loss if loss.item() > 0 else -loss

    state = tx.init(case.tuned)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"could not be recorded as a CUDA graph.*loss_fn waits.*cuda_graph=False"
        ):
            ft.compile_step(waits, tx)(case.tuned, state, case.batches[0])
    torch.cuda.synchronize()
    expected = ft.compile_step(waits, tx, cuda_graph=False)(case.tuned, state, case.batches[0])
    found = ft.compile_step(case.loss, tx)(case.tuned, state, case.batches[0])
    assert_near(found, expected, unlike=ft.compile_step(case.loss, tx)(case.tuned, state, case.batches[1]))


@on_gpu
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"remat": "blocks"}, {"compile": "blocks"}, {"remat": "blocks", "compile": "blocks"}]
)
def test_graph_with_blocks_and_dropout(options: dict[str, Any], stacked: bool):
    """The key is an input, so that every replay draws another mask: that of the eager step with this key."""
    torch.compiler.reset()
    base = ft.quantize_base_model(gpt2()).to("cuda")
    config = ft.LinearAdapterConfig(r=2, alpha=1.0, dropout=0.3)
    tuned = [t.to("cuda") for t in finetunes(base, N, adapt_layers={"c_attn", "c_fc"}, linear_config=config)]
    start = ft.stack(tuned) if stacked else tuned[0]
    batches = (IDS if stacked else IDS[:, 0]).to("cuda")
    keys = [ft.random.key(i).to("cuda") for i in range(STEPS)]
    tx = ft.optim.sgd(0.5)

    def loss(tuned: ft.Finetuned, ids: Tensor, key: Tensor, **options: Any) -> Tensor:
        return ft.causal_lm_loss(base, tuned, ids, train=True, rng=key, chunk_tokens=9, **options)

    def trained(keys: list[Tensor], options: dict[str, Any], **own: Any) -> list[Tensor]:
        step = ft.compile_step(functools.partial(loss, **options), tx, **own)
        tuned, state, losses = start, tx.init(start), []
        for ids, key in zip(batches, keys, strict=True):
            tuned, state, one = step(tuned, state, ids, key)
            losses.append(one)
        return losses

    found, expected = trained(keys, options), trained(keys, {}, cuda_graph=False)
    unlike = trained(keys[::-1], {}, cuda_graph=False)
    scale = max(float(leaf.max()) for leaf in expected)
    # The compiler fuses: 1e-5 a step
    assert max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) <= 5e-5 * scale
    assert max(float((f - u).abs().max()) for f, u in zip(found, unlike, strict=True)) > 1e-3 * scale
    torch.compiler.reset()


@on_gpu
def test_not_recorded_where_a_tensor_is_elsewhere():
    case, tx = Case(False, "cuda"), optimizer()
    step = ft.compile_step(lambda tuned, ids: case.loss(tuned, ids.to("cuda")), tx)
    ids = case.batches[0].cpu()
    found = step(case.tuned, tx.init(case.tuned), ids)[2]
    assert_near(found, case.loss(case.tuned, case.batches[0]), unlike=case.loss(case.tuned, case.batches[1]))
    with pytest.raises(ValueError, match="not all tensors are on a CUDA device"):
        ft.compile_step(case.loss, tx, cuda_graph=True)(case.tuned, tx.init(case.tuned), ids)
