"""`finetuna train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetuna_func.cli import _options as o
from finetuna_func.cli._app import app, console
from finetuna_func.cli._run import execute, print_outcome, run_config, settled


@app.command(no_args_is_help=True)
def train(
    ctx: typer.Context,
    base: o.BaseOption = None,
    data: Annotated[
        list[Path] | None,
        o._option(
            "Files",
            "File to train an adapter on: .jsonl, .json, .txt, .parquet, or a folder of `datasets`. Repeat: each gets "
            "one.",
            "--data",
        ),
    ] = None,
    out: o.OutOption = None,
    config: o.ConfigOption = None,
    resume: o.ResumeOption = False,
    save_every: o.SaveEveryOption = 50,
    tensorboard: o.TensorboardOption = False,
    device: o.RunDevice = None,
    name: Annotated[
        list[str] | None, o._option("Per adapter", "What to call it. [default: after its file]", "--name")
    ] = None,
    learning_rate: Annotated[
        list[float], o._option("Per adapter", "Highest learning rate.", "--learning-rate", "--lr", min=0)
    ] = [1e-3],  # noqa: B006 (typer reads it)
    rank: Annotated[list[int], o._option("Per adapter", "Rank.", "--rank", min=1)] = [8],  # noqa: B006
    alpha: Annotated[
        list[float] | None, o._option("Per adapter", "Numerator of the scale. [default: twice the rank]", "--alpha")
    ] = None,
    epochs: o.EpochsOption = [1.0],  # noqa: B006
    steps: o.StepsOption = None,
    max_length: o.LengthOption = [512],  # noqa: B006
    dropout: o.DropoutOption = [0.0],  # noqa: B006
    seed: Annotated[list[int], o._option("Per adapter", "Of first values, order and dropout.", "--seed", min=0)] = [0],  # noqa: B006
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
    eval_data: o.EvalDataOption = None,
    eval_fraction: Annotated[float, o._option("Evaluation", "Share of the examples to hold out.", min=0, max=1)] = 0.0,
    eval_every: o.EvalEveryOption = None,
    patience: o.PatienceOption = None,
    keep_best: o.KeepBestOption = True,
    adapt: o.AdaptOption = None,
    plain: o.PlainOption = None,
    dora: o.DoraOption = False,
    rslora: o.RsloraOption = False,
    init: o.InitOption = "default",
) -> None:
    r"""Train several adapters at once, each on its own data, in one forward and backward a step.

    ```
    finetuna train --base base --data poems.jsonl --data sums.jsonl \
        --out run --lr 1e-3 --lr 3e-3 --epochs 2 --eval-fraction 0.1
    ```

    A line of a .jsonl file is `{"text": ...}`, `{"prompt": ..., "completion": ...}` or `{"messages": [...]}`; of the
    last two, completions and the assistant's turns are learnt. What is *per adapter* is given once for all, or once for
    each `--data`, in order.

    Killed, even with `kill -9`, the same command with `--resume` goes on from the last checkpoint, bitwise as if
    nothing had happened. Each adapter ends in OUT/NAME, in PEFT's format.

    The same from a file, `finetuna train --config run.yaml`:

    ```
    base: base
    data: [poems.jsonl, sums.jsonl]
    out: run
    learning_rate: [1e-3, 3e-3]
    ```
    """
    values, _ = settled(ctx)
    print_outcome(execute(values, run_config(values), console()), console())
