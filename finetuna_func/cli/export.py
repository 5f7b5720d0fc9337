"""`finetuna export`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

import finetuna_func as ft
from finetuna_func.cli import _options as o
from finetuna_func.cli._app import app, console
from finetuna_func.cli._base import TOKENIZER_FILES, open_adapters, open_base, quiet_transformers
from finetuna_func.cli._logs import write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@app.command(no_args_is_help=True)
def export(
    base: o.RequiredBase,
    adapter: Annotated[list[Path], typer.Option("--adapter", help="Folder of an adapter.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    format: Annotated[
        Literal["peft", "merged"],
        typer.Option(help="`peft`: the adapter alone, for PEFT and vLLM. `merged`: the whole model in float."),
    ] = "peft",
    model: Annotated[
        str | None,
        typer.Option(help="With `peft`: the model's name or folder, for tools that find it by the adapter."),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"With `merged`: {', '.join(DTYPES)}.")] = "float32",
) -> None:
    r"""Write an adapter for other tools.

    ```
    finetuna export --base base --adapter run/poems \
        --model ./SmolLM2-135M-Instruct poems-peft
    finetuna export --base base --adapter run/poems \
        --format merged --dtype bfloat16 poems-model
    ```

    The first is read by `peft.PeftModel.from_pretrained(model, "poems-peft")`, the second by
    `AutoModelForCausalLM.from_pretrained("poems-model")`.
    """
    if len(adapter) > 1:
        raise typer.BadParameter("one at a time; finetuna merge puts several into one model.", param_hint="--adapter")
    opened = open_base(base, "cpu")
    ((name, tuned),) = open_adapters(opened, adapter)
    if format == "merged":
        write_model(base, opened, ft.merge(opened, tuned, dtype=DTYPES.get(dtype)), out, dtype)
    else:
        _check_new(out)
        ft.save(out, tuned)
        described = out / "adapter_config.json"
        if not described.is_file():
            raise ValueError(
                f"{adapter[0]}: PEFT has no form for this adapter (the log says why); use --format merged."
            )
        said = json.loads(described.read_text("utf-8"))
        write_json(described, said | {"base_model_name_or_path": model, "task_type": "CAUSAL_LM"})
    console().print(f"{out}: {name} as {format}", highlight=False, soft_wrap=True)


def write_model(folder: Path, base: ft.Base, weights: Mapping[str, torch.Tensor], out: Path, dtype: str) -> None:
    """Writes an ordinary Hugging Face model of the base's kind, with its tokenizer, to a new folder."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}.", param_hint="--dtype")
    _check_new(out)
    module: Any = base.skeleton.module()
    if not hasattr(module, "config"):
        raise ValueError(
            f"{folder}: {base.skeleton.name} is no Hugging Face model, so there is no form to write it in."
        )
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    config = type(module.config).from_dict(module.config.to_dict())
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    cast = {name: leaf.to(DTYPES[dtype]) if leaf.is_floating_point() else leaf for name, leaf in weights.items()}
    model.load_state_dict(cast, assign=True, strict=False)
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(staging / "model")
        for name in TOKENIZER_FILES:
            if (folder / name).is_file() and not (staging / "model" / name).exists():
                shutil.copyfile(folder / name, staging / "model" / name)
        os.replace(staging / "model", target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_new(out: Path) -> None:
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another folder.")
