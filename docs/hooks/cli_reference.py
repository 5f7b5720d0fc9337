"""Writes the page of the command line from the application itself, as typer words it."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

MARKER = "<!-- the commands -->"


def commands() -> str:
    """Returns the reference of all commands as Markdown, a second-level heading each."""
    import finetuna_func.cli  # noqa: F401  registers the commands
    from finetuna_func.cli._app import app

    group: Any = get_command(app)
    return "\n".join(
        _under_panels(get_docs_for_click(obj=command, ctx=context, name=name, call_prefix="finetuna", indent=1), command)
        for name in group.list_commands(typer.Context(group))
        if (command := group.get_command(None, name)) and (context := typer.Context(command, info_name=name))
    )


def _under_panels(text: str, command: Any) -> str:
    """Returns the list of options with the headings that ``--help`` puts over them."""
    panels = {f"--{p.name}".replace("_", "-"): getattr(p, "rich_help_panel", None) for p in command.params}
    panels |= {o: getattr(p, "rich_help_panel", None) for p in command.params for o in p.opts}
    lines, panel = [], None
    for line in text.splitlines():
        found = re.match(r"\* `(--[a-z-]+)", line)
        if found and (now := panels.get(found[1])) != panel:
            lines += ["", f"*{now}*" if now else "*Others*", ""] if now or panel else []
            panel = now
        lines.append(line)
    return "\n".join(lines) + "\n"


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARKER, commands()) if MARKER in markdown else markdown
