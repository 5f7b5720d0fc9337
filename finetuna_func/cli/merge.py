"""`finetuna merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import finetuna_func as ft
from finetuna_func.cli import _options as o
from finetuna_func.cli._app import app, console
from finetuna_func.cli._base import open_adapters, open_base
from finetuna_func.cli.export import DTYPES, write_model


@app.command(no_args_is_help=True)
def merge(
    base: o.RequiredBase,
    adapter: o.AdapterOption,
    out: Annotated[Path, typer.Argument(help="New folder for the model.")],
    weight: Annotated[
        list[float] | None, typer.Option(help="Of each adapter's change to the weights. [default: 1 for each]")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = "float32",
) -> None:
    r"""Add one or several adapters into the weights: an ordinary float model, for any Hugging Face tool.

    ```
    finetuna merge --base base --adapter run/poems --adapter run/sums \
        --weight 0.7 --weight 0.3 both
    ```

    With several, each one's change of the weights is multiplied by its weight, and all are added.
    """
    weights = weight or [1.0] * len(adapter)
    if len(weights) != len(adapter):
        raise typer.BadParameter(
            f"{len(weights)} for {len(adapter)} adapters; give one for each.", param_hint="--weight"
        )
    opened = open_base(base, "cpu")
    adapters = open_adapters(opened, adapter)
    if weights == [1.0]:
        merged = ft.merge(opened, adapters[0].tuned, dtype=DTYPES.get(dtype))
    else:
        merged = _sum(opened, [own.tuned for own in adapters], weights)
    write_model(base, opened, merged, out, dtype)
    console().print(f"{out}: {', '.join(own.name for own in adapters)} in {dtype}", highlight=False, soft_wrap=True)


def _sum(base: ft.Base, tuned: list[ft.Finetuned], weights: list[float]) -> dict[str, torch.Tensor]:
    start = ft.merge(base, None, dtype=torch.float32)
    total = {name: leaf.clone() for name, leaf in start.items()}
    for own, weight in zip(tuned, weights, strict=True):
        for name, leaf in ft.merge(base, own, dtype=torch.float32).items():
            if leaf.is_floating_point():
                total[name] += weight * (leaf - start[name])
    return total
