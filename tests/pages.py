"""Pages of Markdown, and the code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What pages call the model; a folder of that name, where one is, comes before the hub."""


@dataclass(frozen=True)
class Block:
    """A fenced block of code: where it is, its language, the title it may have, its text."""

    page: Path
    line: int
    language: str
    title: str | None
    code: str


def blocks(page: Path, language: str) -> list[Block]:
    """Returns the blocks of a language, in order."""
    text = page.read_text("utf-8")
    pattern = rf'^( *)```{language}(?: title="([^"]+)")?\n(.*?)^\1```$'
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, language, found[2], _dedented(found[3], found[1]))
        for found in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


def _dedented(code: str, indent: str) -> str:
    return re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)


def run(code: list[Block], names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the names that the blocks define, executed in order; a traceback shows the page's lines."""
    names = {} if names is None else names
    for block in code:
        exec(compile("\n" * block.line + block.code, str(block.page), "exec"), names)
    return names
