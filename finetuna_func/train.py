"""The training loop: many adapters on one base, each on its own data, as functions of a state.

    tasks = [Task("milton", rows, held_out, learning_rate=3e-3), Task("math", other_rows, epochs=2)]
    settings = Settings(batch_size=4)
    state = start(tasks, fresh(base, tasks))
    for state, report in train(base, tasks, settings, state):
        print(report.step, report.losses)
    for task, tuned in zip(tasks, results(state)):
        ft.save(f"runs/{task.name}", tuned)

This is a recipe to read and to copy, not a framework: a step is one forward and one backward of the
stack, one call of the optimizer, and a mask. `TrainState` is all that a run is, so `save_state` and
`load_state` between any two steps change nothing, bitwise. An adapter's batches, dropout, schedule and
clipping come from its own task alone; in a stack it takes the steps that it would take by itself, up
to rounding. (Which elements dropout zeroes also depends on the padded length, so on the neighbours.)
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.utils._pytree as torch_pytree
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from finetuna_func import _random, optim
from finetuna_func._adapters import new_finetuned
from finetuna_func._functional import apply
from finetuna_func._losses import causal_lm_loss
from finetuna_func._transforms import stacked_value_and_grad
from finetuna_func._trees import stack, unstack
from finetuna_func._types import Base, EmbeddingAdapterConfig, Finetuned, LinearAdapterConfig, Selector
from finetuna_func.data import IGNORED, Batch, Row, collate, rows_at

ScheduleName: TypeAlias = Literal["cosine", "linear", "constant"]

RUNNING, FINISHED, STOPPED, DIVERGED = range(4)
"""What has become of an adapter: all steps taken; stopped early; its loss was no longer a number."""


DEFAULT_ADAPTER = LinearAdapterConfig(r=8, alpha=16.0)


@dataclass(frozen=True)
class Task:
    """What one adapter is trained on, and how.

    Attributes:
        name: To tell it by.
        rows: What it is trained on, from `finetuna_func.data`.
        held_out: What it is evaluated on; may be empty.
        adapter: Its rank, alpha, dropout and so on.
        learning_rate: The highest of its schedule.
        epochs: How often it sees its rows; may be a fraction.
        steps: How many steps it takes, in place of ``epochs``.
        warmup: Share of its steps in which the rate rises.
        weight_decay: Decoupled, as in AdamW.
        clip: Limit of the norm of its gradient; ``math.inf`` for none.
        seed: Of its first values, its order of rows and its dropout.
    """

    name: str
    rows: Sequence[Row]
    held_out: Sequence[Row] = ()
    adapter: LinearAdapterConfig = DEFAULT_ADAPTER
    learning_rate: float = 1e-3
    epochs: float = 1.0
    steps: int | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        where = f"Task {self.name!r}"
        if not self.rows:
            raise ValueError(f"{where}: rows is empty; expected at least one to train on.")
        _check(where, "learning_rate", self.learning_rate, 0 <= self.learning_rate < math.inf, "at least 0")
        _check(where, "epochs", self.epochs, 0 < self.epochs < math.inf, "above 0")
        _check(where, "steps", self.steps, self.steps is None or _is_count(self.steps, 1), "an integer of at least 1")
        _check(where, "warmup", self.warmup, 0 <= self.warmup < 1, "a share in [0, 1)")
        _check(where, "weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0")
        _check(where, "clip", self.clip, self.clip > 0, "above 0; math.inf clips nothing")
        _check(where, "seed", self.seed, _is_count(self.seed, 0), "an integer of at least 0")


@dataclass(frozen=True)
class Settings:
    """What all adapters of a run share.

    Attributes:
        batch_size: Rows of each adapter in one forward.
        accumulate: Forwards in one step.
        schedule: How the learning rate falls after the warm-up.
        eval_every: Steps between evaluations on what is held out; there is one at the end of each adapter too.
        patience: Stop an adapter after so many evaluations without improvement; ``None`` never does.
        pad_id: Any token id that the model knows.
        remat: Whether the blocks' activations are computed again in the backward pass, for less memory.
        compile: Whether the blocks go through ``torch.compile`` in training, for less time after the first steps.
    """

    batch_size: int = 4
    accumulate: int = 1
    schedule: ScheduleName = "cosine"
    eval_every: int = 100
    patience: int | None = None
    pad_id: int = 0
    remat: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "eval_every"):
            value = getattr(self, name)
            _check("Settings", name, value, _is_count(value, 1), "an integer of at least 1")
        patient = self.patience is None or _is_count(self.patience, 1)
        _check("Settings", "patience", self.patience, patient, "an integer of at least 1, or None")
        known = get_args(ScheduleName)
        _check("Settings", "schedule", self.schedule, self.schedule in known, f"one of {known}")

    @property
    def rows_per_step(self) -> int:
        """Rows of each adapter in one step."""
        return self.batch_size * self.accumulate


class TrainState(NamedTuple):
    """All that a run is, between two steps. A pytree.

    Attributes:
        step: Steps taken.
        stacked: The adapters.
        optimizer: The state of the optimizer.
        status: What has become of each, ``(N,)``: `RUNNING`, `FINISHED`, `STOPPED` or `DIVERGED`.
        best_loss: Lowest loss on what is held out, ``(N,)`` float64; infinite before the first.
        waited: Evaluations since then, ``(N,)``.
        best: The parameters at that time.
    """

    step: int
    stacked: Finetuned
    optimizer: Any
    status: Tensor
    best_loss: Tensor
    waited: Tensor
    best: dict[str, Tensor]


class Report(NamedTuple):
    """What happened in a step; ``(N,)`` float64 tensors, NaN for adapters that had no part in it.

    Attributes:
        step: Steps taken, this one included.
        losses: In nats per learnt token.
        rates: Learning rates.
        norms: Of the gradients, before clipping.
        tokens: How many were learnt, int64.
        held_out: Losses on what is held out, where it was evaluated.
    """

    step: int
    losses: Tensor
    rates: Tensor
    norms: Tensor
    tokens: Tensor
    held_out: Tensor


def total_rows(task: Task, settings: Settings) -> int:
    """Returns how many rows a task trains on, repetitions counted."""
    if task.steps is not None:
        return task.steps * settings.rows_per_step
    return max(1, round(task.epochs * len(task.rows)))


def total_steps(task: Task, settings: Settings) -> int:
    """Returns how many steps a task takes.

    Example:
        >>> rows = [()] * 10
        >>> total_steps(Task("a", rows, epochs=1.5), Settings(batch_size=2, accumulate=2))
        4
    """
    return -(-total_rows(task, settings) // settings.rows_per_step)


# --- The loop -------------------------------------------------------------------------------------


def fresh(
    base: Base, tasks: Sequence[Task], adapt_layers: Selector | None = None, plain_layers: Selector = ()
) -> Finetuned:
    """Returns a stack with a fresh adapter for each task; so far each computes what the base computes.

    Args:
        base: The base.
        tasks: At least one.
        adapt_layers: As for `ft.new_finetuned`; default `linear_layers`.
        plain_layers: Likewise; default none.
    """
    layers = linear_layers(base) if adapt_layers is None else adapt_layers
    made = []
    for task in tasks:
        config = task.adapter
        table = EmbeddingAdapterConfig(r=config.r, alpha=config.alpha, rank_stabilized=config.rank_stabilized)
        generator = torch.Generator().manual_seed(task.seed)
        made.append(
            new_finetuned(base, layers, plain_layers, embedding_config=table, linear_config=config, generator=generator)
        )
    return stack(made)


def linear_layers(base: Base) -> list[str]:
    """Returns the paths of the layers that are usually adapted: every linear one but the head."""
    module: Any = base.skeleton.module()
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    heads = {path for path, own in module.named_modules(remove_duplicate=False) if own is head}
    paths = [path for path, layer in base.skeleton.layers.items() if layer.adaptable and layer.type.adapter == "linear"]
    return [path for path in paths if path not in heads]


def start(tasks: Sequence[Task], stacked: Finetuned) -> TrainState:
    """Returns the state before the first step."""
    n = len(tasks)
    if stacked.stack_size != n:
        raise ValueError(f"start: {n} tasks but a stack of {stacked.stack_size}; expected an adapter for each.")
    return TrainState(
        step=0,
        stacked=stacked,
        optimizer=_optimizer(tasks, Settings(), stacked).init(stacked),
        status=torch.zeros(n, dtype=torch.int64),
        best_loss=torch.full((n,), math.inf, dtype=torch.float64),
        waited=torch.zeros(n, dtype=torch.int64),
        best=dict(stacked.params),
    )


def train(
    base: Base, tasks: Sequence[Task], settings: Settings, state: TrainState
) -> Iterator[tuple[TrainState, Report]]:
    """Yields the state and a report after each step, until no adapter is running.

    Args:
        base: The base.
        tasks: One for each adapter, the same for the whole run.
        settings: What they share; likewise.
        state: From `start`, or any that was yielded before, in this process or another.

    Raises:
        ValueError: The tasks and the stack do not fit, or the model mixes rows; see `probe`.
    """
    if state.stacked.stack_size != len(tasks):
        raise ValueError(f"train: {len(tasks)} tasks but a stack of {state.stacked.stack_size}.")
    packed = any(len(row) > 1 for task in tasks for row in (*task.rows, *task.held_out))
    probe(base, packed=packed)
    tx = _optimizer(tasks, settings, state.stacked)
    while bool((state.status == RUNNING).any()):
        state, report = _step(base, tasks, settings, tx, state, packed)
        yield state, report


def results(state: TrainState, *, keep_best: bool = True) -> list[Finetuned]:
    """Returns the adapters: each as it was best on what is held out, or as it is if it was never evaluated."""
    evaluated = state.best_loss.isfinite() & keep_best
    params = {name: _where(evaluated, state.best[name], leaf) for name, leaf in state.stacked.params.items()}
    return unstack(state.stacked.replace(params=params))


def _step(
    base: Base,
    tasks: Sequence[Task],
    settings: Settings,
    tx: optim.GradientTransformation,
    state: TrainState,
    packed: bool,
) -> tuple[TrainState, Report]:
    running = [i for i, status in enumerate(state.status.tolist()) if status == RUNNING]
    rows = [_rows_of_step(tasks[i], settings, state.step) for i in running]
    keys = torch.stack([_random.fold_in(_random.key(tasks[i].seed), state.step) for i in running])
    losses, grads, tokens = _losses_and_gradients(base, _take(state.stacked, running), rows, keys, settings, packed)

    n = len(tasks)
    grads = {name: _spread(leaf, running, n) for name, leaf in grads.items()}
    updates, optimizer = tx.update(grads, state.optimizer, state.stacked)
    norms = optimizer[0].norm.double().cpu()[running]
    healthy = losses.isfinite() & norms.isfinite()
    moved = _spread(healthy, running, n)
    stacked = optim.apply_updates(state.stacked, updates)
    stacked = stacked.replace(params={k: _where(moved, v, state.stacked.params[k]) for k, v in stacked.params.items()})
    optimizer = torch_pytree.tree_map(lambda new, old: _where(moved, new, old), optimizer, state.optimizer)

    status = state.status.clone()
    status[[i for i, well in zip(running, healthy.tolist(), strict=True) if not well]] = DIVERGED
    done = state.step + 1
    last = [i for i in running if done == total_steps(tasks[i], settings)]
    status[last] = torch.where(status[last] == RUNNING, FINISHED, status[last])
    state = TrainState(done, stacked, optimizer, status, state.best_loss, state.waited, state.best)
    state, held_out = _evaluate_due(base, tasks, settings, state, running)
    nan = torch.full((n,), math.nan, dtype=torch.float64)
    rates = torch.as_tensor(learning_rates(tasks, settings)(torch.tensor(done - 1)), dtype=torch.float64)
    at = torch.tensor(running)
    report = Report(
        step=done,
        losses=nan.index_copy(0, at, losses),
        rates=nan.index_copy(0, at, rates[at]),
        norms=nan.index_copy(0, at, norms),
        tokens=torch.zeros(n, dtype=torch.int64).index_copy(0, at, tokens),
        held_out=held_out,
    )
    return state, report


def _rows_of_step(task: Task, settings: Settings, step: int) -> list[Row]:
    return rows_at(task.rows, step, settings.rows_per_step, seed=task.seed, total=total_rows(task, settings))


def _losses_and_gradients(
    base: Base, stacked: Finetuned, rows: list[list[Row]], keys: Tensor, settings: Settings, packed: bool
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Mean losses ``(n,)`` over all rows, their gradients, and how many tokens they are over.

    However the rows are divided into forwards, each token has the same weight.
    """
    tokens = torch.tensor([sum(sample.targets for row in own for sample in row) for own in rows])
    losses = torch.zeros(len(rows), dtype=torch.float64)
    grads: dict[str, Tensor] = {}
    for micro, at in enumerate(range(0, max(map(len, rows)), settings.batch_size)):
        batch = collate([own[at : at + settings.batch_size] for own in rows], pad_id=settings.pad_id)
        share = batch.targets / tokens.clamp_min(1)
        rng = _random.fold_in(keys, micro)

        def loss_fn(stacked: Finetuned, batch: Batch = batch, share: Tensor = share, rng: Tensor = rng) -> Tensor:
            own = token_losses(
                base, stacked, batch, packed=packed, train=True, rng=rng, remat=settings.remat, compile=settings.compile
            )
            return own * share.to(own)

        part, own = stacked_value_and_grad(loss_fn)(stacked)
        losses += part.double().cpu()
        grads = {name: leaf + grads[name] if grads else leaf for name, leaf in own.items()}
    return losses, grads, tokens


def token_losses(
    base: Base,
    stacked: Finetuned,
    batch: Batch,
    *,
    packed: bool,
    train: bool = False,
    rng: Tensor | None = None,
    remat: bool = False,
    compile: bool = False,
) -> Tensor:
    """Returns each adapter's mean loss over the tokens it learns, ``(N,)``, in nats; 0 if there is none."""
    device = next(iter(stacked.params.values())).device
    batch = batch.to(device)
    # Without positions, models that know of none work too.
    positions: dict[str, Any] = {"position_ids": batch.position_ids} if packed else {}
    return causal_lm_loss(
        base,
        stacked,
        batch.input_ids,
        batch.labels,
        ignore_index=IGNORED,
        train=train,
        rng=None if rng is None else rng.to(device),
        remat="blocks" if remat else None,
        compile="blocks" if compile else None,
        **positions,
    )


@torch.no_grad()
def evaluate(
    base: Base, stacked: Finetuned, rows: Sequence[Sequence[Row]], *, batch_size: int = 4, pad_id: int = 0
) -> Tensor:
    """Returns each adapter's mean loss on rows of its own, ``(N,)`` float64, in nats per learnt token.

    Args:
        base: The base.
        stacked: The adapters.
        rows: For each of them, at least one row.
        batch_size: Rows of each in one forward.
        pad_id: Any token id that the model knows.
    """
    if len(rows) != stacked.stack_size or not all(rows):
        raise ValueError(
            f"evaluate: {[len(own) for own in rows]} rows for a stack of {stacked.stack_size}; expected at least one "
            "for each."
        )
    packed = any(len(row) > 1 for own in rows for row in own)
    losses, tokens = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.int64)
    for at in range(0, max(map(len, rows)), batch_size):
        batch = collate([own[at : at + batch_size] for own in rows], pad_id=pad_id)
        own = token_losses(base, stacked, batch, packed=packed)
        losses += own.double().cpu() * batch.targets
        tokens += batch.targets
    return losses / tokens


def _evaluate_due(
    base: Base, tasks: Sequence[Task], settings: Settings, state: TrainState, running: list[int]
) -> tuple[TrainState, Tensor]:
    """Evaluates the adapters whose turn it is, keeps what is best, and stops what no longer improves."""
    status, best_loss, waited = state.status.clone(), state.best_loss.clone(), state.waited.clone()
    held_out = torch.full_like(best_loss, math.nan)
    regular = state.step % settings.eval_every == 0
    due = [i for i in running if tasks[i].held_out and status[i] != DIVERGED and (regular or status[i] == FINISHED)]
    if not due:
        return state, held_out
    rows = [tasks[i].held_out for i in due]
    batch_size = settings.batch_size
    held_out[due] = evaluate(base, _take(state.stacked, due), rows, batch_size=batch_size, pad_id=settings.pad_id)
    improved = held_out < best_loss  # NaN does not
    best_loss = torch.where(improved, held_out, best_loss)
    waited[due] += 1
    waited = torch.where(improved, 0, waited)
    best = {name: _where(improved, state.stacked.params[name], leaf) for name, leaf in state.best.items()}
    if settings.patience is not None:
        status[(status == RUNNING) & (waited >= settings.patience)] = STOPPED
    return state._replace(status=status, best_loss=best_loss, waited=waited, best=best), held_out


def learning_rates(tasks: Sequence[Task], settings: Settings) -> optim.Schedule:
    """Returns the schedule of all tasks, ``(N,)``: a rise in a line to each one's peak, then a fall to 0.

    The first step has a rate above 0 already, and so has the last.

    Example:
        >>> task = Task("a", [()] * 4, learning_rate=1.0, warmup=0.5)
        >>> learning_rates([task], Settings(batch_size=1))(torch.tensor(0))
        tensor([0.5000])
    """
    peaks = torch.tensor([float(task.learning_rate) for task in tasks])
    totals = torch.tensor([total_steps(task, settings) for task in tasks])
    warmups = torch.tensor([math.ceil(task.warmup * total) for task, total in zip(tasks, totals.tolist(), strict=True)])

    def schedule(step: Tensor) -> Tensor:
        peak, total, warmup = (leaf.to(step.device) for leaf in (peaks, totals, warmups))
        rising = (step + 1) / warmup.clamp_min(1)
        gone = ((step - warmup) / (total - warmup).clamp_min(1)).clamp(0, 1)
        falls = {"cosine": (1 + torch.cos(math.pi * gone)) / 2, "linear": 1 - gone, "constant": torch.ones_like(gone)}
        return peak * torch.where(step < warmup, rising, falls[settings.schedule])

    return schedule


def _optimizer(tasks: Sequence[Task], settings: Settings, stacked: Finetuned) -> optim.GradientTransformation:
    device = next(iter(stacked.params.values())).device
    clips = torch.tensor([float(task.clip) for task in tasks], device=device)
    decays = torch.tensor([float(task.weight_decay) for task in tasks], device=device)
    rates = learning_rates(tasks, settings)
    return optim.chain(optim.clip_by_global_norm(clips), optim.adamw(rates, weight_decay=decays))


@torch.no_grad()
def probe(base: Base, *, packed: bool = False) -> None:
    """Checks on the model itself that rows may be padded on the right and, if asked for, packed.

    Raises:
        ValueError: Its tokens see later ones, or those of other samples in their row.
    """
    first, second = torch.arange(1, 6), torch.arange(6, 11)
    device = next(iter(base.params.values())).device

    def logits(ids: Tensor, **kwargs: Tensor) -> Tensor:
        inputs: dict[str, Any] = {name: leaf[None].to(device) for name, leaf in {"input_ids": ids, **kwargs}.items()}
        return apply(base, None, **inputs).logits[0].double()

    def same(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).norm() <= max(1e-3, 4 * torch.finfo(base.skeleton.dtype).eps) * b.norm())

    both = torch.cat([first, second])
    if not same(logits(both)[: len(first)], logits(first)):
        raise ValueError(
            f"base: in {base.skeleton.name} a token sees the ones after it, so it is no causal language model, and "
            "next-token training would teach it to copy; choose a causal model."
        )
    if packed:
        positions = torch.arange(5).repeat(2)
        try:
            separate = same(logits(both, position_ids=positions)[len(first) :], logits(second))
        except TypeError:  # it has no such argument
            separate = False
        if not separate:
            raise ValueError(
                f"pack: {base.skeleton.name} does not keep packed samples apart by their position_ids, so they would "
                "see one another; train without packing."
            )


# --- A state on disk ------------------------------------------------------------------------------


def save_state(path: str | os.PathLike[str], state: TrainState, **metadata: str) -> Path:
    """Returns the file it wrote: the whole state, as safetensors. It is replaced at once or not at all.

    Args:
        path: The file.
        state: Any state of a run.
        **metadata: Strings to keep with it, such as what identifies the run.
    """
    target = Path(path)
    tensors = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in _named_leaves(state).items()}
    # Under one name, since safetensors writes several in any order, and the same state is to be the same file.
    content = to_safetensors(tensors, {"run": json.dumps({"step": state.step, **metadata})})
    staging = target.with_name(f".{target.name}.new")
    with staging.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, target)
    return target


def load_state(path: str | os.PathLike[str], like: TrainState) -> tuple[TrainState, Mapping[str, str]]:
    """Returns the state that `save_state` wrote, bitwise, and what was kept with it.

    Args:
        path: The file.
        like: A state of the same run, such as the one from `start`; gives structure and devices.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is damaged, or the state of another run.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_state: there is no file {path}.")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = dict(json.loads((file.metadata() or {})["run"]))
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step = int(metadata.pop("step"))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"load_state: {path} is not a readable state: {error}") from error
    leaves = _named_leaves(like)
    if differing := sorted(found.keys() ^ leaves.keys()):
        raise ValueError(f"load_state: {path} is the state of another run: {differing[:3]} are not in both.")
    for name, leaf in leaves.items():
        if (found[name].shape, found[name].dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"load_state: {path} is the state of another run: {name} is {found[name].dtype} "
                f"{tuple(found[name].shape)}, expected {leaf.dtype} {tuple(leaf.shape)}."
            )
    _, structure = torch_pytree.tree_flatten(like._replace(step=step))
    tensors = [found[name].to(leaf.device) for name, leaf in leaves.items()]
    return torch_pytree.tree_unflatten([step, *tensors], structure), metadata


def _named_leaves(state: TrainState) -> dict[str, Tensor]:
    """The tensors of a state by their place in it, in pytree order; the step, which comes first, is none."""
    leaves = torch_pytree.tree_leaves_with_path(state)
    return {torch_pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


# --- Parts of a stack -----------------------------------------------------------------------------


def _take(stacked: Finetuned, indices: Sequence[int]) -> Finetuned:
    """The stack of some of its adapters, ranks as padded as they were."""
    if list(indices) == list(range(len(stacked.spec.members))):
        return stacked
    at = torch.tensor(indices)
    members = tuple(stacked.spec.members[i] for i in indices)
    params = {name: leaf[at.to(leaf.device)] for name, leaf in stacked.params.items()}
    consts = {name: leaf[at.to(leaf.device)] for name, leaf in stacked.consts.items()}
    return Finetuned(params, consts, dataclasses.replace(stacked.spec, members=members))


def _spread(leaf: Tensor, indices: Sequence[int], n: int) -> Tensor:
    """The slices at their places among N, zeros elsewhere."""
    return leaf.new_zeros(n, *leaf.shape[1:]).index_copy(0, torch.tensor(indices, device=leaf.device), leaf)


def _where(mask: Tensor, then: Tensor, otherwise: Tensor) -> Tensor:
    """Chooses by adapter, exactly."""
    mask = mask.to(then.device)
    return torch.where(mask.reshape(mask.shape + (1,) * (then.ndim - 1)), then, otherwise)


# --- Checks ---------------------------------------------------------------------------------------


def _check(where: str, argument: str, value: object, allowed: bool, expected: str) -> None:
    if not allowed:
        raise ValueError(f"{where}: {argument}={value!r}; expected {expected}.")


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
