"""`finetuna quantize`."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from finetuna_func.cli._app import app, console
from finetuna_func.cli._base import check_device, write_base, write_tokenizer


@app.command(no_args_is_help=True)
def quantize(
    model: Annotated[
        str, typer.Argument(help="Folder of a Hugging Face model in safetensors, a GGUF file, or a name on the hub.")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the base.")],
    scheme: Annotated[
        Literal["int8", "blockwise8", "nf4"], typer.Option(help="Format: `int8` or `blockwise8`, or `nf4` of 4 bits.")
    ] = "int8",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Layer to keep in float: a name, a path or a regex. Repeat. [default: lm_head]"),
    ] = None,
    all_layers: Annotated[bool, typer.Option("--all", help="Keep no layer in float, not even lm_head.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute, such as `cpu` or `cuda:1`.")] = "cpu",
) -> None:
    """Make the 8-bit base of a model, once; everything else starts from it.

    ```
    finetuna quantize ./SmolLM2-135M-Instruct base
    finetuna quantize ./SmolLM2-135M-Instruct base-small --all --scheme nf4
    finetuna quantize ./SmolLM2-135M-Instruct.Q4_1.gguf base-of-gguf
    ```

    The new folder has the tokenizer and its chat template too, and needs the model no longer. A head that is tied to
    the embedding keeps both in float unless `--all` is given.
    """
    if keep and all_layers:
        raise typer.BadParameter("contradicts --keep; give one of the two.", param_hint="--all")
    check_device(device)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another folder for the base.")
    options = {"modules_not_to_quantize": keep or ()} if keep or all_layers else {}
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Made beside it, so that the folder appears with everything in it or not at all.
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        base = write_base(model, staging / "base", scheme=scheme, device=device, **options)
        write_tokenizer(model, staging / "base")
        os.replace(staging / "base", target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    quantized = sum(layer.scheme is not None for layer in base.skeleton.layers.values())
    console().print(
        f"{escape(str(out))}: {base.skeleton.name}, {quantized} layers in {escape(scheme)}, "
        f"{base.nbytes / 1e6:,.1f} MB, fingerprint {base.fingerprint}",
        highlight=False,
        soft_wrap=True,
    )
