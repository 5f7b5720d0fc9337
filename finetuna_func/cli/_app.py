"""The application that the commands register with, and how it reports errors."""

from __future__ import annotations

import logging
import os
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

import finetuna_func as ft

EXPECTED = (ValueError, TypeError, OSError, RuntimeError, NotImplementedError, MemoryError)
"""What the library raises about what it was given; all else is a fault of its own, and is shown whole."""


COMMANDS = ("quantize", "train", "sweep", "eval", "generate", "merge", "export", "inspect")
"""In the order of a first day, as ``--help`` lists them."""


class _Group(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=COMMANDS.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            errors().print("[bold]Stopped.[/]")
            raise typer.Exit(130) from None
        except EXPECTED as error:
            if type(error).__module__.startswith("typer") or os.environ.get("FINETUNA_DEBUG"):
                raise
            errors().print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(1) from None


app = typer.Typer(
    name="finetuna",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def console() -> Console:
    """Returns where results go."""
    return Console()


def errors() -> Console:
    """Returns where everything else goes."""
    return Console(stderr=True)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"finetuna_func {ft.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    r"""Many language-model finetunes on one frozen 8-bit base, trained at once.

    A first run:

    ```
    finetuna quantize ./SmolLM2-135M base
    finetuna train --base base --data a.jsonl --data b.jsonl --out run
    finetuna eval --base base --adapter run/a --adapter run/b --data a.jsonl
    finetuna generate --base base --adapter run/a --adapter run/b \
        --prompt "An old man"
    finetuna export --base base --adapter run/a a-peft
    ```

    `finetuna COMMAND --help` explains each of them. FINETUNA_DEBUG=1 shows where an error came from.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
