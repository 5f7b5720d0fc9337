"""Docstrings as Markdown: their links, and names that have a place on the pages."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

PACKAGE = "finetuna_func"
RST_LINK = re.compile(r"`([^`<>]+?)\s+<([^<>`]+)>`_+")
NAME = re.compile(r"(?<![`\w\[])`(?:ft\.)?([A-Za-z_][A-Za-z0-9_.]*)`(?![`\]])")


class Links(Extension):
    """Makes links of `` `text <url>`_ `` and `` `name` ``, and sections of examples."""

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        public = {name: f"{PACKAGE}.{name}" for name in pkg.exports or ()}
        for part in ("optim", "data", "train", "decode"):
            own = pkg[part].members.items()
            here = [n for n, m in own if not m.is_alias and not n.startswith("_")]
            members = pkg[part].exports or here
            public |= {
                f"{part}.{name}": f"{PACKAGE}.{part}.{name}"
                for name in map(str, members)
            }
        _rewrite(pkg, public)


def _rewrite(owner: Object, public: dict[str, str]) -> None:
    for member in owner.members.values():
        if member.is_alias:
            continue
        if member.docstring:
            member.docstring.value = _linked(
                member.docstring.value, member.path, public
            )
        if member.is_module or member.is_class:
            _rewrite(member, public)


def _linked(text: str, path: str, public: dict[str, str]) -> str:
    part = path.split(".")[1]

    def link(found: re.Match[str]) -> str:
        target = public.get(f"{part}.{found[1]}") or public.get(found[1])
        return f"[{found[0]}][{target}]" if target else found[0]

    # The word that the parser takes for a section with code.
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    lines = []
    for line in text.split("\n"):
        if not line.lstrip().startswith((">>>", "...")):
            line = NAME.sub(link, RST_LINK.sub(r"[\1](\2)", line))
        lines.append(line)
    return "\n".join(lines)
