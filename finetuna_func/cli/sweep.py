"""`finetuna sweep`."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.markup import escape

from finetuna_func.cli import _options as o
from finetuna_func.cli._app import app, console
from finetuna_func.cli._display import STATUS, STATUS_NAMES, table_of
from finetuna_func.cli._logs import colours, save_figure, write_text
from finetuna_func.cli._run import Finished, execute, run_config, settled
from finetuna_func.train import Task

GRID = ("learning_rate", "rank", "alpha", "dropout", "seed")


@app.command(no_args_is_help=True)
def sweep(
    ctx: typer.Context,
    base: o.BaseOption = None,
    data: Annotated[
        list[Path] | None,
        o._option("Files", "File to train on: .jsonl, .json, .txt, .parquet, or a folder of `datasets`.", "--data"),
    ] = None,
    out: o.OutOption = None,
    config: o.ConfigOption = None,
    resume: o.ResumeOption = False,
    save_every: o.SaveEveryOption = 50,
    tensorboard: o.TensorboardOption = False,
    device: o.RunDevice = None,
    learning_rate: Annotated[
        list[float], o._option("Grid", "Highest learning rate. Repeat for several.", "--learning-rate", "--lr", min=0)
    ] = [3e-4, 1e-3, 3e-3],  # noqa: B006 (typer reads it)
    rank: Annotated[list[int], o._option("Grid", "Rank. Repeat for several.", "--rank", min=1)] = [8],  # noqa: B006
    alpha: Annotated[
        list[float] | None,
        o._option("Grid", "Numerator of the scale. Repeat for several. [default: twice the rank]", "--alpha"),
    ] = None,
    dropout: o.GridDropoutOption = [0.0],  # noqa: B006
    seed: Annotated[list[int], o._option("Grid", "Seed. Repeat for several.", "--seed", min=0)] = [0],  # noqa: B006
    epochs: Annotated[float, o._option("Steps", "How often to go through the data.", min=0)] = 1.0,
    steps: Annotated[int | None, o._option("Steps", "Steps to take, in place of --epochs.", min=1)] = None,
    max_length: Annotated[int, o._option("Data", "Most tokens in an example.", min=2)] = 512,
    pack: o.PackOption = False,
    completion_only: o.CompletionOption = True,
    batch_size: o.BatchOption = 4,
    accumulate: o.AccumulateOption = 1,
    schedule: o.ScheduleOption = "cosine",
    warmup: o.WarmupOption = 0.05,
    weight_decay: o.DecayOption = 0.0,
    clip: o.ClipOption = 1.0,
    remat: o.RematOption = False,
    compile: o.CompileOption = False,
    at_once: o.AtOnceOption = None,
    eval_data: Annotated[
        Path | None, o._option("Evaluation", "File to evaluate on, in place of --eval-fraction.", "--eval-data")
    ] = None,
    eval_fraction: Annotated[float, o._option("Evaluation", "Share of the examples to hold out.", min=0, max=1)] = 0.1,
    eval_every: o.EvalEveryOption = None,
    patience: o.PatienceOption = None,
    keep_best: o.KeepBestOption = True,
    adapt: o.AdaptOption = None,
    plain: o.PlainOption = None,
    dora: o.DoraOption = False,
    rslora: o.RsloraOption = False,
    init: o.InitOption = "default",
) -> None:
    r"""Train a grid of learning rates, ranks, alphas, dropouts and seeds on one file, as one stack, and rank them.

    ```
    finetuna sweep --base base --data poems.jsonl --out sweep \
        --lr 3e-4 --lr 1e-3 --lr 3e-3 --rank 4 --rank 16 --seed 0 --seed 1
    finetuna sweep --base base --data poems.jsonl --out longer \
        --lr 1e-3 --lr 3e-3 --steps 500 --patience 3 --at-once 1
    ```

    The first trains 12 adapters in the time of their batches in one model, prints them from the best to the worst on
    what is held out, the same examples for all, and draws OUT/sweep.png. Each is kept in OUT. Where memory does not
    hold them all, they are trained stack after stack, which comes to the same.
    """
    values, _ = settled(ctx)
    finished = execute(values, run_config(as_run(values)), console())
    report(finished, values)


def as_run(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of the run that trains the whole grid."""
    if len(values["data"]) > 1:
        raise typer.BadParameter("a sweep is on one file; run one for each.", param_hint="--data")
    for name in GRID:
        own = values[name] or []
        if len(set(own)) < len(own):
            raise typer.BadParameter(f"{own}: a value is there twice.", param_hint=f"--{name.replace('_', '-')}")
    alphas = values["alpha"] or [None]
    points = list(itertools.product(values["learning_rate"], values["rank"], alphas, values["dropout"], values["seed"]))
    rates, ranks, alphas, dropouts, seeds = (list(column) for column in zip(*points, strict=True))
    several = [len(values[name] or []) > 1 for name in GRID]
    names = []
    for point in points:
        labels = zip(("lr", "r", "alpha", "dropout", "seed"), point, several, strict=True)
        names.append("-".join(f"{label}{value:g}" for label, value, is_one in labels if is_one) or "only")
    eval_data = [values["eval_data"]] if values["eval_data"] else []
    return {
        **values,
        "data": values["data"] * len(points),
        "name": names,
        "learning_rate": rates,
        "rank": ranks,
        "alpha": [2.0 * r if alpha is None else alpha for r, alpha in zip(ranks, alphas, strict=True)],
        "dropout": dropouts,
        "seed": seeds,
        "epochs": [values["epochs"]],
        "steps": [values["steps"]] if values["steps"] is not None else [],
        "max_length": [values["max_length"]],
        "eval_data": eval_data,
        "eval_fraction": 0.0 if eval_data else values["eval_fraction"],
    }


def report(finished: Finished, values: dict[str, Any]) -> None:
    """Prints the adapters from best to worst, and writes the same as a table and a picture."""
    tasks, out = finished.tasks, finished.config.out
    losses, status = finished.best_loss, finished.status
    order = sorted(range(len(tasks)), key=lambda i: (losses[i], i))
    rows = []
    for place, i in enumerate(order, 1):
        task = tasks[i]
        rows.append(
            [
                str(place),
                task.name,
                f"{task.learning_rate:g}",
                str(task.adapter.r),
                f"{task.adapter.alpha:g}",
                f"{task.adapter.dropout:g}",
                str(task.seed),
                f"{losses[i]:.4f}" if math.isfinite(losses[i]) else "–",
                f"{math.exp(losses[i]):.2f}" if losses[i] < 700 else "–",
                STATUS_NAMES[status[i]],
            ]
        )
    headings = ["place", "adapter", "rate", "rank", "alpha", "dropout", "seed", "held out", "perplexity", "status"]
    columns = (0, 1, 7, 8)  # the name says the rest
    shown = [[*(escape(row[k]) for k in columns), STATUS[status[i]]] for i, row in zip(order, rows, strict=True)]
    shown[0][:-1] = [f"[bold green]{cell}[/]" for cell in shown[0][:-1]]
    title = "From best to worst on what is held out"
    console().print(table_of(title, [*(headings[k] for k in columns), ""], shown, left=2))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows([["" if cell == "–" else cell for cell in row] for row in rows])
    write_text(out / "sweep.csv", text.getvalue())
    plot_sweep(finished, values, out / "sweep.png")
    best = tasks[order[0]]
    lines = [
        f"The best is {escape(str(out / best.name))}.",
        *_beyond(best, values),
        f"Table and picture: {escape(str(out / 'sweep.png'))}",
    ]
    console().print("\n".join(lines), highlight=False, soft_wrap=True)


def _beyond(best: Task, values: dict[str, Any]) -> list[str]:
    """Says so where the best is at an edge of the grid, as there may be a better one beyond."""
    found = []
    for name, own in (("learning rate", best.learning_rate), ("rank", best.adapter.r)):
        grid = sorted(values[name.replace(" ", "_")])
        if len(grid) > 1 and own in (grid[0], grid[-1]):
            edge, more = ("lowest", "lower") if own == grid[0] else ("highest", "higher")
            found.append(f"Its {name}, {own:g}, is the {edge} of the grid; a {more} one may be better.")
    return found


def plot_sweep(finished: Finished, values: dict[str, Any], path: Path) -> None:
    """Draws the loss on what is held out over the learning rate, a line for each rank and alpha, a point a seed."""
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    groups: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for task, loss in zip(finished.tasks, finished.best_loss, strict=True):
        if math.isfinite(loss):
            key = (task.adapter.r, task.adapter.alpha, task.adapter.dropout)
            groups.setdefault(key, []).append((task.learning_rate, loss))
    several = [len({key[k] for key in groups}) > 1 for k in range(3)]
    several[1] &= bool(values["alpha"])  # else it follows from the rank
    for (key, points), colour in zip(sorted(groups.items()), colours(len(groups)), strict=True):
        label = ", ".join(
            f"{what} {value:g}"
            for what, value, is_one in zip(("rank", "alpha", "dropout"), key, several, strict=True)
            if is_one
        )
        rates = sorted({rate for rate, _ in points})
        means = [_mean([loss for own, loss in points if own == rate]) for rate in rates]
        axes.plot(rates, means, "-", color=colour, label=label or None, linewidth=1.8)
        axes.plot(*zip(*points, strict=True), "o", color=colour, markeredgecolor="w", markersize=7)
    for rate, loss in sorted(itertools.chain(*groups.values()), key=lambda point: point[1])[:1]:
        ring = {"markeredgecolor": "0.2", "markeredgewidth": 1.5, "markersize": 14, "color": "none"}
        axes.plot(rate, loss, "o", label=f"the best, {loss:.3f}", **ring)
    axes.set_xscale("log")
    rates = sorted(set(values["learning_rate"]))
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
    axes.minorticks_off()
    axes.set(xlabel="learning rate", ylabel="best held-out loss (nats per token)")
    axes.set_title(f"{len(finished.tasks)} adapters on {finished.config.data[0].name}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")
    save_figure(figure, path)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
