"""Docstrings as Markdown: their links, and the names in them that have a place on these pages."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

PACKAGE = "finetuna_func"
RST_LINK = re.compile(r"`([^`<>]+?)\s+<([^<>`]+)>`_+")
NAME = re.compile(r"(?<![`\w\[])`(?:ft\.)?([A-Za-z_][A-Za-z0-9_.]*)`(?![`\]])")


class Links(Extension):
    """Turns `` `text <url>`_ `` and `` `name` `` into links, and an example into a section of its own."""

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        public = {name: f"{PACKAGE}.{name}" for name in pkg.exports or ()}
        for part in ("optim", "data", "train", "decode"):
            members = pkg[part].exports or [n for n, m in pkg[part].members.items() if not (m.is_alias or n.startswith("_"))]
            public |= {f"{part}.{name}": f"{PACKAGE}.{part}.{name}" for name in map(str, members)}
        _rewrite(pkg, public)


def _rewrite(owner: Object, public: dict[str, str]) -> None:
    for member in owner.members.values():
        if member.is_alias:
            continue
        if member.docstring:
            member.docstring.value = _linked(member.docstring.value, member.path, public)
        if member.is_module or member.is_class:
            _rewrite(member, public)


def _linked(text: str, path: str, public: dict[str, str]) -> str:
    part = path.split(".")[1]

    def link(found: re.Match[str]) -> str:
        target = public.get(f"{part}.{found[1]}") or public.get(found[1])
        shown = found[0].strip("`")
        return f"[`{shown}`][{target}]" if target and target != path else found[0]

    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)  # the word that the parser knows
    lines = (
        line if line.lstrip().startswith((">>>", "...")) else NAME.sub(link, RST_LINK.sub(r"[\1](\2)", line))
        for line in text.split("\n")
    )
    return "\n".join(lines)
