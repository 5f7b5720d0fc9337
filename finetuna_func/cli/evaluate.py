"""`finetuna eval`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

import finetuna_func as ft
from finetuna_func.cli import _options as o
from finetuna_func.cli._app import app, console, errors
from finetuna_func.cli._base import (
    Adapter,
    check_reads,
    open_adapters,
    open_base,
    open_tokenizer,
    stacks,
    untrained,
)
from finetuna_func.cli._display import phase, table_of
from finetuna_func.cli._logs import write_json
from finetuna_func.data import Row, encode, pack, read_examples
from finetuna_func.train import evaluate as losses_of
from finetuna_func.train import probe


@app.command("eval", no_args_is_help=True)
def evaluate(
    base: o.RequiredBase,
    data: Annotated[list[Path], typer.Option("--data", help="File to evaluate on. Repeat for several.")],
    adapter: Annotated[list[Path] | None, typer.Option("--adapter", help="Folder of an adapter. Repeat.")] = None,
    max_length: Annotated[int, typer.Option(help="Most tokens in an example.", min=2)] = 512,
    limit: Annotated[int | None, typer.Option(help="Only the first examples of each file.", min=1)] = None,
    completion_only: Annotated[bool, typer.Option(help="Count completions and the assistant's turns only.")] = True,
    batch_size: Annotated[int, typer.Option(help="Rows of each adapter in one forward.", min=1)] = 4,
    pack_rows: Annotated[bool, typer.Option("--pack", help="Put several short examples in a row.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the numbers to this JSON file too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
    device: o.DeviceOption = None,
) -> None:
    r"""Loss and perplexity of every adapter, and of the base, on every file.

    ```
    finetuna eval --base base --adapter run/poems --adapter run/sums \
        --data poems-test.jsonl --data sums-test.jsonl
    ```

    The losses are means over the learnt tokens, in nats; the perplexity is their exponential.
    """
    opened = open_base(base, device)
    tokenizer = open_tokenizer(base)
    probe(opened, packed=pack_rows)
    adapters = [Adapter("the base", untrained(opened)), *open_adapters(opened, adapter or [])]
    rows: list[list[Row]] = []
    for path in data:
        examples = read_examples(path)[:limit]
        samples = encode(
            examples, tokenizer, max_length=max_length, completion_only=completion_only, where=str(path)
        ).samples
        check_reads(opened, max(max(s.ids) for s in samples), max(map(len, samples)), str(path))
        rows.append(pack(samples, max_length) if pack_rows else [(sample,) for sample in samples])
    matrix = torch.full((len(adapters), len(data)), math.nan, dtype=torch.float64)
    for column, (path, own) in enumerate(zip(data, rows, strict=True)):
        with phase(errors(), f"{len(adapters)} adapters on {path.name}"):
            for group in stacks(adapters):
                stacked = ft.stack([adapters[i].tuned for i in group])
                matrix[group, column] = losses_of(opened, stacked, [own] * len(group), batch_size=batch_size)
    names = [path.stem for path in data]
    if len(set(names)) < len(names):
        names = [str(path) for path in data]
    result = [
        {"adapter": name, "data": str(path), "loss": float(loss), "perplexity": _perplexity(float(loss))}
        for (name, _), line in zip(adapters, matrix, strict=True)
        for path, loss in zip(data, line, strict=True)
    ]
    if out is not None:
        write_json(out, result)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    labels = [name for name, _ in adapters]
    for title, values, form in (("Loss", matrix, ".4f"), ("Perplexity", matrix.exp(), ",.2f")):
        best = values.nan_to_num(math.inf).amin(0)
        cells = [
            [f"[bold]{escape(label)}[/]"]
            + [
                f"[bold green]{format(x, form)} *[/]" if x == low else f"{format(x, form)}  "
                for x, low in zip(line.tolist(), best.tolist(), strict=True)
            ]
            for label, line in zip(labels, values, strict=True)
        ]
        headings = ["", *(f"on {escape(name)}" for name in names)]
        console().print(table_of(title, headings, cells, "* best of its column" if len(labels) > 1 else None))


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None
