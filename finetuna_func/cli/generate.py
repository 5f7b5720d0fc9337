"""`finetuna generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import finetuna_func as ft
from finetuna_func.cli import _options as o
from finetuna_func.cli._app import app, console
from finetuna_func.cli._base import (
    Adapter,
    check_reads,
    open_adapters,
    open_base,
    open_tokenizer,
    stacks,
    stop_ids,
    untrained,
)


@app.command("generate", no_args_is_help=True)
def generate(
    base: o.RequiredBase,
    adapter: Annotated[list[Path] | None, typer.Option("--adapter", help="Folder of an adapter. Repeat.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What to go on from. Repeat. [default: standard input]")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message; the assistant answers.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system's message.")] = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="Let the base itself answer too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token; above, tokens are drawn.", min=0)
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that together have this share.", min=0, max=1)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each answer.")] = False,
    device: o.DeviceOption = None,
) -> None:
    r"""Let several adapters answer the same prompts, side by side, in one run of the model.

    ```
    finetuna generate --base base --adapter run/poems --adapter run/sums \
        --with-base --prompt "An old man had" --temperature 0.7 --seed 1
    finetuna generate --base base --adapter run/sums \
        --chat --system "Be brief." --prompt "How many are 2 and 2?"
    finetuna generate --base base --adapter run/poems < prompt.txt
    ```
    """
    from finetuna_func.decode import generate as decode

    prompts = prompt or [sys.stdin.read()]
    if not all(prompts):
        raise typer.BadParameter("empty.", param_hint="--prompt")
    if system is not None and not chat:
        raise typer.BadParameter("needs --chat.", param_hint="--system")
    opened = open_base(base, device)
    tokenizer = open_tokenizer(base)
    adapters = open_adapters(opened, adapter or [])
    if with_base or not adapters:
        adapters = [Adapter("the base", untrained(opened)), *adapters]
    ids = [encode_prompt(tokenizer, own, chat, system) for own in prompts]
    if not all(ids):
        raise ValueError("--prompt: the tokenizer makes no token of it.")
    check_reads(opened, max(map(max, ids)), max(map(len, ids)) + max_new_tokens, "--prompt and --max-new-tokens")
    answers: list[list[list[int]]] = [[]] * len(adapters)
    for group in stacks(adapters):
        found = decode(
            opened,
            ft.stack([adapters[i].tuned for i in group]),
            ids,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids(opened, tokenizer),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        for i, own in zip(group, found, strict=True):
            answers[i] = own
    for p, asked in enumerate(prompts):
        texts = [tokenizer.decode(own[p], skip_special_tokens=True) for own in answers]
        if as_json:
            for (name, _), text in zip(adapters, texts, strict=True):
                typer.echo(json.dumps({"adapter": name, "prompt": asked, "answer": text}, ensure_ascii=False))
            continue
        table = Table(
            title=escape(asked),
            title_justify="left",
            title_style="bold",
            box=box.ROUNDED,
            show_header=False,
            show_lines=True,
        )
        table.add_column(no_wrap=True, style="bold cyan")
        table.add_column(overflow="fold")
        for (name, _), text in zip(adapters, texts, strict=True):
            table.add_row(Text(name), Text(text.strip("\n")))
        console().print(table)


def encode_prompt(tokenizer: Any, prompt: str, chat: bool, system: str | None) -> list[int]:
    """Returns the ids that the model is asked with."""
    if not chat:
        ids = list(tokenizer(prompt)["input_ids"])
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("--chat: the tokenizer has no chat template; leave it out, or use a base that has one.")
    messages = [{"role": "system", "content": system}] if system is not None else []
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
