"""The training loop against plain torch, against itself one adapter at a time, and across a stop."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel

import finetuna_func as ft
from finetuna_func.data import Sample, pack
from finetuna_func.train import (
    DIVERGED,
    FINISHED,
    STOPPED,
    Settings,
    Task,
    TrainState,
    evaluate,
    fresh,
    learning_rates,
    linear_layers,
    load_state,
    probe,
    results,
    save_state,
    start,
    total_steps,
    train,
)


def samples(seed: int, count: int, longest: int = 9) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(3, longest + 1, (), generator=generator))
        ids = torch.randint(20, 60, (length,), generator=generator).tolist()
        made.append(Sample(tuple(ids), (False, *[True] * (length - 1))))
    return made


def alone(own: list[Sample]) -> list[Any]:
    return [(sample,) for sample in own]


@pytest.fixture(scope="module")
def base() -> ft.Base:
    return ft.quantize_base_model(tiny.model(), modules_not_to_quantize=())


def config(r: int = 2, **options: Any) -> ft.LinearAdapterConfig:
    return ft.LinearAdapterConfig(r=r, alpha=2.0 * r, **options)


@pytest.fixture
def tasks() -> list[Task]:
    """Other data, ranks, rates, lengths, epochs and seeds."""
    return [
        Task("a", alone(samples(1, 10)), alone(samples(4, 3)), config(2), 3e-2, epochs=2, seed=1),
        Task("b", alone(samples(2, 7, 5)), (), config(4, dropout=0.2), 1e-2, epochs=1.5, warmup=0.5, seed=2),
        Task("c", alone(samples(3, 4)), alone(samples(5, 2)), config(1), 1e-2, steps=3, clip=0.1, weight_decay=0.1),
    ]


SETTINGS = Settings(batch_size=2, accumulate=2, eval_every=2)


def run(base: ft.Base, tasks: list[Task], settings: Settings = SETTINGS) -> list[tuple[TrainState, Any]]:
    return list(train(base, tasks, settings, start(tasks, fresh(base, tasks))))


def assert_same(a: Any, b: Any) -> None:
    leaves = [torch_pytree.tree_leaves(tree) for tree in (a, b)]
    assert len(leaves[0]) == len(leaves[1]) > 0
    for x, y in zip(*leaves, strict=True):
        assert torch.equal(torch.as_tensor(x).nan_to_num(-7.0), torch.as_tensor(y).nan_to_num(-7.0))


def distance(a: ft.Finetuned, b: ft.Finetuned) -> float:
    """Largest difference of parameters."""
    assert a.params.keys() == b.params.keys()
    return max(float((a.params[k] - b.params[k]).abs().max()) for k in a.params)


# --- one adapter against plain torch --------------------------------------------------------------


def reference(base: ft.Base, task: Task, settings: Settings) -> ft.Finetuned:
    """The same training with torch.optim, one row at a time, no padding, the rate by hand. No dropout."""
    from finetuna_func.data import rows_at

    tuned = ft.index(fresh(base, [task]), 0)
    params = {name: nn.Parameter(leaf.clone()) for name, leaf in tuned.params.items()}
    optimizer = torch.optim.AdamW(list(params.values()), lr=1.0, weight_decay=task.weight_decay)
    rows = settings.batch_size * settings.accumulate
    total = task.steps * rows if task.steps else round(task.epochs * len(task.rows))
    steps = math.ceil(total / rows)
    warmup = math.ceil(task.warmup * steps)
    for step in range(steps):
        losses = []
        for (sample,) in rows_at(task.rows, step, rows, seed=task.seed, total=total):
            ids = torch.tensor([sample.ids])
            logits = ft.apply(base, tuned.replace(params=params), ids).logits[0, :-1]
            losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(list(params.values()), task.clip)
        gone = (step - warmup) / (steps - warmup)
        rate = (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * gone)) / 2
        optimizer.param_groups[0]["lr"] = task.learning_rate * rate
        optimizer.step()
    return tuned.replace(params={name: leaf.detach() for name, leaf in params.items()})


@pytest.mark.parametrize("which", [0, 2])
def test_a_run_is_what_plain_torch_computes(base, tasks, which):
    task = tasks[which]
    expected = reference(base, task, SETTINGS)
    state, _ = run(base, [task])[-1]
    (found,) = results(state, keep_best=False)
    moved = distance(ft.index(fresh(base, [task]), 0), expected)
    # float32 differs by 1e-6 in a gradient; Adam divides by its size, so a tiny gradient may err by a share of a step.
    assert distance(found, expected) < 2e-2 * moved
    assert moved > 1e-3


def test_a_stack_takes_the_steps_that_each_takes_alone(base, tasks):
    tasks[1] = dataclasses.replace(tasks[1], adapter=config(4))  # dropout depends on the padded length
    history = run(base, tasks)
    together = results(history[-1][0], keep_best=False)
    for i, task in enumerate(tasks):
        own = run(base, [task])
        (single,) = results(own[-1][0], keep_best=False)
        moved = distance(ft.index(fresh(base, [task]), 0), single)
        assert distance(together[i], single) < 2e-2 * moved
        for (_, report), (_, expected) in zip(history, own, strict=False):
            for field in ("losses", "rates", "norms", "held_out"):
                found = getattr(report, field)[i], getattr(expected, field)[0]
                torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5, equal_nan=True)
            assert report.tokens[i] == expected.tokens[0] > 0
        assert len(own) == total_steps(task, SETTINGS)
        for _, report in history[len(own) :]:
            assert report.losses[i].isnan() and report.tokens[i] == 0
    assert distance(together[0], ft.index(fresh(base, tasks), 0)) > 1e-3


def test_finished_adapters_do_not_move(base, tasks):
    history = run(base, tasks)
    lengths = [total_steps(task, SETTINGS) for task in tasks]
    assert lengths == [5, 3, 3] and len(history) == 5
    assert history[-1][0].status.tolist() == [FINISHED] * 3
    before, after = history[2][0], history[-1][0]
    for tree in ("stacked", "optimizer"):
        for old, new in zip(*(torch_pytree.tree_leaves(getattr(s, tree)) for s in (before, after)), strict=True):
            assert torch.equal(old[1:], new[1:])
    assert distance(ft.index(before.stacked, 0), ft.index(after.stacked, 0)) > 0
    assert int(before.optimizer[1][0].step[0]) == 3 and after.optimizer[1][0].step.tolist() == [5, 3, 3]


def test_accumulating_is_the_same_as_a_large_batch(base, tasks):
    # Without dropout, whose masks depend on the division.
    tasks = [tasks[0], tasks[2]]
    parts = [Settings(batch_size=b, accumulate=4 // b, eval_every=100) for b in (1, 2, 4)]
    (one, two, four) = (run(base, tasks, settings) for settings in parts)
    for (_, a), (_, b), (_, c) in zip(one, two, four, strict=True):
        torch.testing.assert_close(a.losses, c.losses, rtol=1e-3, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(b.losses, c.losses, rtol=1e-3, atol=1e-5, equal_nan=True)
        assert a.tokens.equal(c.tokens)


def test_remat_is_the_same_training(base, tasks):
    plain, again = (run(base, tasks, dataclasses.replace(SETTINGS, remat=remat)) for remat in (False, True))
    for (_, a), (_, b) in zip(plain, again, strict=True):
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_dropout_is_on_while_training_and_off_in_evaluation(base):
    rows = alone(samples(1, 4))
    with_it, without = (Task("a", rows, rows, config(2, dropout=p), 0.05, steps=3) for p in (0.5, 0.0))
    a, b, c = (run(base, [task])[-1][0] for task in (with_it, with_it, without))
    assert_same(a, b)
    assert distance(ft.index(a.stacked, 0), ft.index(c.stacked, 0)) > 1e-3
    evaluated = evaluate(base, a.stacked, [rows], batch_size=2)
    assert a.waited[0] == 0 and evaluated.allclose(a.best_loss)


# --- a stop ---------------------------------------------------------------------------------------


def test_a_run_goes_on_bitwise_from_any_step(base, tasks, tmp_path):
    history = run(base, tasks)
    first = start(tasks, fresh(base, tasks))
    for k, (state, _) in enumerate(history[:-1], 1):
        path = save_state(tmp_path / "state.safetensors", state, run="mine")
        loaded, metadata = load_state(path, first)
        assert metadata == {"run": "mine"} and loaded.step == k
        assert_same(loaded, state)
        rest = list(train(base, tasks, SETTINGS, loaded))
        assert len(rest) == len(history) - k
        for found, expected in zip(rest, history[k:], strict=True):
            assert_same(found, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_states_that_are_not_loaded(base, tasks, tmp_path):
    first = start(tasks, fresh(base, tasks))
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_state(tmp_path / "nothing", first)
    path = save_state(tmp_path / "s", first)
    with pytest.raises(ValueError, match=r"another run: .* expected"):
        load_state(path, start(tasks[:2], fresh(base, tasks[:2])))
    with pytest.raises(ValueError, match=r"another run: .* not in both"):
        load_state(path, start(tasks, fresh(base, tasks, {"q_proj"})))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a readable state"):
        load_state(path, first)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable state"):
        load_state(path, first)


# --- evaluation, early stops, divergence ----------------------------------------------------------


def test_early_stopping_keeps_the_best(base):
    rows, other = alone(samples(1, 4)), alone(samples(9, 6))
    # Learning four rows by heart with a large rate makes others worse.
    overfit = Task("a", rows, other, config(4), 0.3, steps=30, warmup=0)
    steady = Task("b", rows, rows, config(4), 1e-2, steps=12)
    settings = Settings(batch_size=4, eval_every=1, patience=2, schedule="constant")
    history = run(base, [overfit, steady], settings)
    state = history[-1][0]
    assert state.status.tolist() == [STOPPED, FINISHED]
    measured = torch.stack([report.held_out for _, report in history])
    ran = int(measured[:, 0].isfinite().sum())
    best = int(measured[:ran, 0].argmin())
    assert ran == best + 3 < 30  # two evaluations without improvement
    assert state.best_loss[0] == measured[best, 0]
    kept, last = (results(state, keep_best=k)[0] for k in (True, False))
    assert distance(kept, ft.index(history[best][0].stacked, 0)) == 0
    assert distance(last, ft.index(history[ran - 1][0].stacked, 0)) == 0 and distance(kept, last) > 0
    torch.testing.assert_close(evaluate(base, ft.stack([kept]), [other])[0], state.best_loss[0], rtol=1e-5, atol=0)


def test_what_is_not_evaluated_is_as_it_is_last(base, tasks):
    state = run(base, tasks)[-1][0]
    assert state.best_loss.isfinite().tolist() == [True, False, True]
    assert distance(results(state)[1], ft.index(state.stacked, 1)) == 0


def test_one_that_diverges_is_stopped_and_disturbs_no_other(base, tasks):
    tasks[1] = dataclasses.replace(tasks[1], adapter=config(4))
    wild = dataclasses.replace(tasks[0], name="wild", learning_rate=1e38, warmup=0.0, clip=math.inf, held_out=())
    history = run(base, [wild, *tasks])
    state = history[-1][0]
    assert state.status.tolist() == [DIVERGED, *[FINISHED] * 3]
    together, others = results(state), results(run(base, tasks)[-1][0])
    for found, expected in zip(together[1:], others, strict=True):
        assert distance(found, expected) < 1e-3
    assert all(leaf.isfinite().all() for leaf in together[0].params.values())


# --- rows -----------------------------------------------------------------------------------------


def test_packed_rows_have_the_losses_of_single_ones(base, tasks):
    own = samples(6, 12)
    stacked = run(base, tasks)[-1][0].stacked
    packed = pack(own, 20)
    assert len(packed) < len(own) / 1.5
    single, together = (evaluate(base, stacked, [rows] * 3, batch_size=5) for rows in (alone(own), packed))
    torch.testing.assert_close(single, together, rtol=1e-5, atol=0)
    # The check sees the difference that seeing one another would make.
    joined = [(Sample(sum((s.ids for s in row), ()), sum((s.learnt for s in row), ())),) for row in packed]
    assert (evaluate(base, stacked, [joined] * 3, batch_size=5) - single).abs().min() > 1e-3


def test_padding_changes_nothing(base, tasks):
    stacked = fresh(base, tasks)
    rows = [alone(samples(i, 3 + i, 4 + 3 * i)) for i in range(3)]
    found = evaluate(base, stacked, rows, batch_size=3, pad_id=0)
    assert torch.equal(found, evaluate(base, stacked, rows, batch_size=3, pad_id=99))
    for i, tuned in enumerate(ft.unstack(stacked)):
        losses = []
        for (sample,) in rows[i]:
            ids = torch.tensor([sample.ids])
            losses.append(F.cross_entropy(ft.apply(base, tuned, ids).logits[0, :-1], ids[0, 1:], reduction="none"))
        torch.testing.assert_close(found[i].float(), torch.cat(losses).mean(), rtol=1e-5, atol=0)


def test_training_on_packed_rows(base):
    own = samples(6, 16)
    task = Task("a", pack(own, 20), alone(own), config(4), 0.05, steps=12)
    history = run(base, [task], Settings(batch_size=2, eval_every=12))
    assert history[-1][1].held_out[0] < history[0][1].losses[0] - 0.3


class Mixing(nn.Module):
    """Adds the mean over the row to every token: not causal."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Any:
        out = self.inner(input_ids)  # positions are ignored
        if position_ids is None:
            out.logits = out.logits + out.logits.mean(1, keepdim=True)
        return out


class NoPositions(Mixing):
    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        return self.inner(input_ids)


def test_models_that_mix_tokens_are_refused(base):
    probe(base, packed=True)
    mixing = ft.quantize_base_model(Mixing(tiny.model()))
    with pytest.raises(ValueError, match="Mixing a token sees the ones after it"):
        probe(mixing)
    other = ft.quantize_base_model(NoPositions(tiny.model()))
    probe(other)
    with pytest.raises(ValueError, match="pack: NoPositions does not keep packed samples apart"):
        probe(other, packed=True)
    settings = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
    bert = BertLMHeadModel(BertConfig(vocab_size=99, initializer_range=0.3, **settings))
    with pytest.raises(ValueError, match="sees the ones after it"):
        probe(ft.quantize_base_model(bert, modules_not_to_quantize=()))


# --- the parts ------------------------------------------------------------------------------------


def test_layers_that_are_usually_adapted(base):
    names = {path.rpartition(".")[2] for path in linear_layers(base)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(linear_layers(base)) == 14


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules(schedule, tasks):
    settings = dataclasses.replace(SETTINGS, schedule=schedule)
    rates = torch.stack([learning_rates(tasks, settings)(torch.tensor(s)) for s in range(6)])
    for i, task in enumerate(tasks):
        steps = total_steps(task, settings)
        own = rates[:steps, i]
        assert (own > 0).all() and own.max() == pytest.approx(task.learning_rate)
        assert own[0] == pytest.approx(task.learning_rate / max(1, math.ceil(task.warmup * steps)))
        falls = own[math.ceil(task.warmup * steps) :]
        assert (falls.diff() < 0).all() if schedule != "constant" else (falls == falls[0]).all()
    each = learning_rates(tasks, settings)(torch.tensor([0, 1, 2]))
    assert torch.equal(each, rates[[0, 1, 2], [0, 1, 2]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": ()}, "'x': rows is empty"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"epochs": 0}, "epochs=0"),
        ({"steps": 0}, "steps=0"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"clip": 0}, "clip=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_tasks_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Task("x", **{"rows": [()]} | options)


def test_other_refusals(base, tasks):
    for option in ({"batch_size": 0}, {"accumulate": 1.5}, {"eval_every": 0}, {"patience": 0}, {"schedule": "x"}):
        with pytest.raises(ValueError, match=f"Settings: {next(iter(option))}="):
            Settings(**option)
    stacked = fresh(base, tasks)
    with pytest.raises(ValueError, match="2 tasks but a stack of 3"):
        start(tasks[:2], stacked)
    with pytest.raises(ValueError, match="2 tasks but a stack of 3"):
        next(train(base, tasks[:2], SETTINGS, start(tasks, stacked)))
    with pytest.raises(ValueError, match=r"\[1, 0, 1\] rows for a stack of 3"):
        evaluate(base, stacked, [tasks[0].rows[:1], [], tasks[0].rows[:1]])
