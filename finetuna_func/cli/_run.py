"""A run in a folder: what `train` and `sweep` do, from options to saved adapters.

config.yaml              the options, resolved; `finetuna train --config` takes it
checkpoint.safetensors   the last state, replaced as a whole
log.csv, tensorboard/    every step
curves.png               the losses
summary.json             how each adapter ended
NAME/                    each adapter, in PEFT's format
part-1/ ...              checkpoint and log of each stack, where several are trained one after another
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape

import finetuna_func as ft
from finetuna_func.cli._base import check_reads, default_device, open_base, open_tokenizer
from finetuna_func.cli._display import STATUS, STATUS_NAMES, Display, phase, table_of
from finetuna_func.cli._logs import Logs, check_tensorboard, join_logs, plot_curves, read_log, write_json, write_text
from finetuna_func.cli._parts import fitting, parts_of
from finetuna_func.data import Row, Sample, encode, file_digest, pack, read_examples, split_off
from finetuna_func.train import (
    DIVERGED,
    Settings,
    Task,
    TrainState,
    fresh,
    load_state,
    results,
    save_state,
    start,
    total_steps,
    train,
)

CONFIG, CHECKPOINT, LOG, CURVES, SUMMARY = (
    "config.yaml",
    "checkpoint.safetensors",
    "log.csv",
    "curves.png",
    "summary.json",
)
RESERVED = {CONFIG, CHECKPOINT, LOG, CURVES, SUMMARY, "tensorboard", "sweep.csv", "sweep.png"}
PER_ADAPTER = (
    "name",
    "learning_rate",
    "rank",
    "alpha",
    "epochs",
    "steps",
    "max_length",
    "dropout",
    "seed",
    "eval_data",
)
_PART = re.compile(r"part-\d+")
SPLIT_SEED = 0  # the same examples are held out in every run on a file, so that runs compare


@dataclass(frozen=True)
class RunConfig:
    """The options of a run. Lists of `PER_ADAPTER` have an entry for each adapter, or none."""

    base: Path
    data: list[Path]
    out: Path
    name: list[str]
    learning_rate: list[float]
    rank: list[int]
    alpha: list[float]
    epochs: list[float]
    steps: list[int]
    max_length: list[int]
    dropout: list[float]
    seed: list[int]
    eval_data: list[Path]
    eval_fraction: float
    eval_every: int | None
    patience: int | None
    keep_best: bool
    adapt: list[str]
    plain: list[str]
    dora: bool
    rslora: bool
    init: str
    batch_size: int
    accumulate: int
    schedule: str
    warmup: float
    weight_decay: float
    clip: float
    remat: bool
    compile: bool
    pack: bool
    completion_only: bool
    at_once: int | None
    save_every: int
    tensorboard: bool
    device: str


@dataclass(frozen=True)
class Finished:
    """What a run came to: for each adapter its task, what became of it, and its lowest loss on what is held out."""

    config: RunConfig
    tasks: list[Task]
    status: list[int]
    best_loss: list[float]


# --- options --------------------------------------------------------------------------------------


def settled(ctx: typer.Context) -> tuple[dict[str, Any], bool]:
    """Returns the options of this call, or of the run that it resumes, and whether it does."""
    names = [own.name for own in ctx.command.params if own.name in ctx.params]
    given = {name: _plain(ctx.params[name]) for name in names if name not in (None, "config", "resume")}
    if not given["out"]:
        raise typer.BadParameter("missing; the new folder for the run.", param_hint="--out")
    out = Path(given["out"])
    saved = out / CONFIG
    if ctx.params["resume"] and saved.is_file():
        begun = _read_begun(saved, given)
        for name, value in given.items():
            if ctx.get_parameter_source(name).name != "DEFAULT" and value != begun.get(name):  # type: ignore[union-attr]
                raise typer.BadParameter(
                    f"the run in {out} was begun with {begun.get(name)!r}, not {value!r}; leave it out, or begin "
                    "another run.",
                    param_hint=_flag(name),
                )
        return begun, True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        hint = "go on with --resume, or choose another" if saved.is_file() else "choose another"
        raise typer.BadParameter(f"{out} exists and is not empty; {hint}.", param_hint="--out")
    for name, what in (("base", "the folder of the base"), ("data", "a file to train on")):
        if not given[name]:
            raise typer.BadParameter(f"missing; {what}.", param_hint=_flag(name))
    given["device"] = given["device"] or default_device()
    return given, False


def _read_begun(path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options with which a run was begun, by this command."""
    try:
        begun = yaml.safe_load(path.read_text("utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--resume: {path} cannot be read: {error}") from error
    if not isinstance(begun, dict) or begun.keys() != like.keys():
        differing = sorted(map(str, begun.keys() ^ like.keys())) if isinstance(begun, dict) else ["everything"]
        raise ValueError(
            f"--resume: {path} was not written by this command, or by another version of it: it differs in "
            f"{', '.join(differing[:5])}."
        )
    return begun


def _plain(value: Any) -> Any:
    """As YAML has it; paths are absolute, so that a run can be resumed from anywhere."""
    if isinstance(value, Path):
        return str(value.expanduser().resolve())
    return [_plain(own) for own in value] if isinstance(value, (list, tuple)) else value


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """Returns the options, each per-adapter list as long as ``data``.

    Raises:
        typer.BadParameter: A list is of another length, or a name cannot be a folder's.
    """
    values = dict(values)
    count = len(values["data"])
    for name in PER_ADAPTER:
        own = list(values[name] or [])
        if len(own) not in (0, 1, count):
            raise typer.BadParameter(
                f"given {len(own)} times for {count} adapters; give it once for all of them, or once for each --data.",
                param_hint=_flag(name),
            )
        if name == "name" and own and len(own) != count:
            raise typer.BadParameter(f"one for {count} adapters; give one for each --data.", param_hint="--name")
        values[name] = own * count if len(own) == 1 else own
    values["name"] = values["name"] or _names([Path(path).stem for path in values["data"]])
    values["alpha"] = values["alpha"] or [2.0 * r for r in values["rank"]]
    for name in values["name"]:
        if (
            not re.fullmatch(r"[^\s/\\.][^/\\]*", name)
            or name in RESERVED
            or _PART.fullmatch(name)
            or name != name.strip()
        ):
            raise typer.BadParameter(f"{name!r} cannot be the name of a folder in the run.", param_hint="--name")
    if len({name.casefold() for name in values["name"]}) < count:
        raise typer.BadParameter(f"{values['name']}: two are the same; each needs its own.", param_hint="--name")
    if not 0 <= values["eval_fraction"] < 1:
        raise typer.BadParameter("expected a share in [0, 1).", param_hint="--eval-fraction")
    if values["eval_fraction"] and values["eval_data"]:
        raise typer.BadParameter("there is --eval-data already; give one of the two.", param_hint="--eval-fraction")
    if values["patience"] is not None and not (values["eval_fraction"] or values["eval_data"]):
        raise typer.BadParameter("needs --eval-fraction or --eval-data to evaluate on.", param_hint="--patience")
    for name in ("base", "out"):
        values[name] = Path(values[name])
    for name in ("data", "eval_data"):
        values[name] = [Path(path) for path in values[name]]
    for name in ("adapt", "plain"):
        values[name] = list(values[name] or [])
    return RunConfig(**{field.name: values[field.name] for field in fields(RunConfig)})


def _names(stems: list[str]) -> list[str]:
    """Stems, numbered where they are the same."""
    return [f"{stem}-{stems[: i + 1].count(stem)}" if stems.count(stem) > 1 else stem for i, stem in enumerate(stems)]


def save_options(out: Path, values: Mapping[str, Any]) -> None:
    """Writes the options of a command to the folder of its run."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / CONFIG, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


# --- the run --------------------------------------------------------------------------------------


def execute(values: Mapping[str, Any], config: RunConfig, console: Console) -> Finished:
    """Trains what the options say, going on from the checkpoint if there is one, and saves everything.

    Args:
        values: The command's options as they were given, for `CONFIG`.
        config: The same, resolved.
        console: Where to show it.
    """
    if config.tensorboard:
        check_tensorboard()
    with phase(console, f"Reading {config.base}"):
        base = open_base(config.base, config.device)
        tokenizer = open_tokenizer(config.base)
    tasks = _tasks(config, tokenizer, console)
    samples = [sample for task in tasks for row in (*task.rows, *task.held_out) for sample in row]
    check_reads(base, max(max(s.ids) for s in samples), max(map(len, samples)), "--data")
    longest = max(total_steps(task, Settings(config.batch_size, config.accumulate)) for task in tasks)
    settings = Settings(
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        schedule=config.schedule,  # type: ignore[arg-type]
        eval_every=config.eval_every or max(1, longest // 10),
        patience=config.patience,
        pad_id=tokenizer.pad_token_id or 0,
        remat=config.remat,
        compile=config.compile,
    )
    at_once = config.at_once
    try:
        if at_once is None:
            at_once = fitting(base, tasks, settings, config.adapt or None, config.plain)
        parts = parts_of(len(tasks), at_once)
        # What is wrong with layers or ranks shows now, before there is a folder.
        widest = sorted(range(len(tasks)), key=lambda i: tasks[i].adapter.r)[-1:] if len(parts) > 1 else []
        fresh(base, [tasks[i] for i in widest or parts[0]], config.adapt or None, config.plain)
    except ValueError as error:  # the library speaks of its own arguments
        raise ValueError(_in_flags(str(error))) from error
    save_options(config.out, {**values, "at_once": at_once})
    with _alone(config.out):
        finished = Finished(config, tasks, [], [])
        for number, part in enumerate(parts, 1):
            own = [tasks[i] for i in part]
            folder = config.out / f"part-{number}" if len(parts) > 1 else config.out
            if len(parts) > 1:
                folder.mkdir(exist_ok=True)
                console.print(
                    f"[bold]Stack {number} of {len(parts)}: {len(part)} of {len(tasks)} adapters[/]", highlight=False
                )
            state = start(own, fresh(base, own, config.adapt or None, config.plain))
            state = _train(base, config, own, settings, state, folder, console)
            for task, tuned in zip(own, results(state, keep_best=config.keep_best), strict=True):
                ft.save(config.out / task.name, tuned)
            finished.status.extend(state.status.tolist())
            finished.best_loss.extend(state.best_loss.tolist())
        if len(parts) > 1:
            join_logs([config.out / f"part-{number}" / LOG for number in range(1, len(parts) + 1)], config.out / LOG)
        write_json(config.out / SUMMARY, _summary(finished))
        lines = read_log(config.out / LOG)
        title = f"{len(tasks)} adapters on {config.base.name}" if len(tasks) > 1 else f"{tasks[0].name}"
        plot_curves(lines, [task.name for task in tasks], config.out / CURVES, title)
    return finished


def _in_flags(message: str) -> str:
    for argument, flag in (
        ("adapt_layers", "--adapt"),
        ("plain_layers", "--plain"),
        ("linear_config: rank", "--rank:"),
    ):
        message = message.replace(argument, flag)
    return message


def _train(
    base: ft.Base,
    config: RunConfig,
    tasks: list[Task],
    settings: Settings,
    state: TrainState,
    folder: Path,
    console: Console,
) -> TrainState:
    checkpoint = folder / CHECKPOINT
    files = sorted({*config.data, *config.eval_data})
    identity = {"base": base.fingerprint, "data": json.dumps({str(path): file_digest(path) for path in files})}
    if checkpoint.is_file():
        state, kept = load_state(checkpoint, state)
        for what, own in identity.items():
            if kept.get(what) != own:
                raise ValueError(f"{checkpoint}: the {what} is not what the run was begun with, so it cannot go on.")
        console.print(f"Going on after step {state.step}.", highlight=False)
    names = [task.name for task in tasks]
    saved, logged = state.step, state
    with _terminable(), Logs(folder, names, after=state.step, tensorboard=config.tensorboard) as logs:
        try:
            with Display(console, tasks, settings, state) as display:
                begun = time.perf_counter()
                for state, report in train(base, tasks, settings, state):  # noqa: B020 (each state from the last)
                    seconds, begun = time.perf_counter() - begun, time.perf_counter()
                    logs.write(report, seconds)
                    logged = state
                    display.show(state, report)
                    if state.step % config.save_every == 0:
                        save_state(checkpoint, state, **identity)
                        saved = state.step
        finally:
            # Also where it was interrupted; killed outright, it goes on from the last checkpoint.
            if logged.step > saved:
                save_state(checkpoint, logged, **identity)
    return state


def _tasks(config: RunConfig, tokenizer: Any, console: Console) -> list[Task]:
    read: dict[tuple[Path, int], list[Sample]] = {}

    def samples_of(path: Path, max_length: int) -> list[Sample]:
        if (path, max_length) not in read:
            found = encode(
                read_examples(path),
                tokenizer,
                max_length=max_length,
                completion_only=config.completion_only,
                where=str(path),
            )
            read[path, max_length] = found.samples
            losses = [f"{found.cut} cut at {max_length} tokens"] * (found.cut > 0)
            losses += [f"{found.dropped} with nothing to learn left out"] * (found.dropped > 0)
            if losses:
                console.print(f"[yellow]{escape(path.name)}: {', '.join(losses)}[/]", highlight=False)
        return read[path, max_length]

    def rows_of(samples: list[Sample], max_length: int) -> list[Row]:
        return pack(samples, max_length) if config.pack else [(sample,) for sample in samples]

    tasks = []
    for i, (name, path) in enumerate(zip(config.name, config.data, strict=True)):
        length = config.max_length[i]
        samples, held_out = samples_of(path, length), []
        if config.eval_data:
            held_out = samples_of(config.eval_data[i], length)
        elif config.eval_fraction:
            try:
                samples, held_out = split_off(samples, config.eval_fraction, SPLIT_SEED)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        tasks.append(
            Task(
                name=name,
                rows=rows_of(samples, length),
                held_out=rows_of(held_out, length),
                adapter=ft.LinearAdapterConfig(
                    r=config.rank[i],
                    alpha=config.alpha[i],
                    dropout=config.dropout[i],
                    dora=config.dora,
                    rank_stabilized=config.rslora,
                    init=config.init,  # type: ignore[arg-type]
                ),
                learning_rate=config.learning_rate[i],
                epochs=config.epochs[i],
                steps=config.steps[i] if config.steps else None,
                warmup=config.warmup,
                weight_decay=config.weight_decay,
                clip=config.clip,
                seed=config.seed[i],
            )
        )
    _show_data(tasks, console)
    return tasks


def _show_data(tasks: list[Task], console: Console) -> None:
    rows = []
    for task in tasks:
        tokens = sum(sample.targets for row in task.rows for sample in row)
        held_out = str(len(task.held_out)) if task.held_out else "–"
        rows.append([escape(task.name), f"{len(task.rows):,}", f"{tokens:,}", held_out])
    if len({tuple(row[1:]) for row in rows}) == 1 < len(rows):
        rows = [[f"all {len(rows)}", *rows[0][1:]]]
    console.print(table_of("", ["adapter", "rows", "tokens to learn", "rows held out"], rows))


def _summary(finished: Finished) -> list[dict[str, Any]]:
    return [
        {
            "name": task.name,
            "status": STATUS_NAMES[status],
            "held_out_loss": loss,
            "learning_rate": task.learning_rate,
            "rank": task.adapter.r,
            "alpha": task.adapter.alpha,
            "seed": task.seed,
            "data": str(path),
        }
        for task, path, status, loss in zip(
            finished.tasks, finished.config.data, finished.status, finished.best_loss, strict=True
        )
    ]


def print_outcome(finished: Finished, console: Console) -> None:
    """Prints how each adapter ended, and where everything is."""
    out, lines = finished.config.out, read_log(finished.config.out / LOG)
    rows = []
    for task, status, best in zip(finished.tasks, finished.status, finished.best_loss, strict=True):
        own = [line.loss for line in lines if line.adapter == task.name]
        tail = own[-max(1, len(own) // 10) :]
        rows.append(
            [
                f"[bold]{escape(task.name)}[/]",
                STATUS.get(status, ""),
                str(len(own)),
                f"{own[0]:.3f}" if own else "–",
                f"{sum(tail) / len(tail):.3f}" if tail else "–",
                f"{best:.3f}" if best < float("inf") else "–",
            ]
        )
    headings = ["adapter", "", "steps", "loss at first", "at last", "best held out"]
    console.print(table_of("", headings, rows))
    console.print(f"Adapters, logs and curves are in {escape(str(out))}.", highlight=False, soft_wrap=True)
    if DIVERGED in finished.status:
        console.print("[red]An adapter diverged: it was stopped before that step. Try a lower learning rate.[/]")


@contextmanager
def _terminable() -> Iterator[None]:
    """Being asked to end is like Ctrl-C: the state is saved first."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keeps two processes out of one run; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"--out {out}: another process is at work on this run.") from None
        yield
