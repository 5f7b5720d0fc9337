"""Writes the page of the command line from the application, as typer words it."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

MARKER = "<!-- the commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARKER, commands()) if MARKER in markdown else markdown


def commands() -> str:
    """Returns the reference of all commands, a second-level heading each."""
    import finetuna_func.cli  # noqa: F401  registers the commands
    from finetuna_func.cli._app import app

    group: Any = get_command(app)
    names = group.list_commands(typer.Context(group))
    return "\n".join(reference(name, group.commands[name]) for name in names)


def reference(name: str, command: Any) -> str:
    """Returns what typer says of a command, options under the headings of --help."""
    context = typer.Context(command, info_name=name)
    text = get_docs_for_click(
        obj=command, ctx=context, name=name, call_prefix="finetuna", indent=1
    )
    panels = {
        option: getattr(parameter, "rich_help_panel", None) or "Others"
        for parameter in command.params
        for option in parameter.opts
    }
    lines, panel = [], "Others" if set(panels.values()) == {"Others"} else ""
    for line in text.splitlines():
        if found := re.match(r"\* `(--[a-z-]+)", line):
            now = panels.get(found[1], "Others")
            if now != panel:
                lines += ["", f"*{now}*", ""]
                panel = now
        lines.append(line)
    return "\n".join(lines) + "\n"
