"""`finetuna inspect`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.markup import escape
from rich.tree import Tree
from safetensors import SafetensorError, safe_open

from finetuna_func.checkpoint import DESCRIPTION
from finetuna_func.cli._app import app, console
from finetuna_func.cli._base import is_adapter, open_base
from finetuna_func.cli._display import facts_of


class Leaf(NamedTuple):
    """A tensor's dtype, shape and bytes, and its 8-bit format if it has one."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    scheme: str = ""


@app.command(no_args_is_help=True)
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a base or of an adapter.")],
    every: Annotated[
        bool, typer.Option("--every", help="A line for every tensor; else repeated blocks are one.")
    ] = False,
) -> None:
    """Show what is in a base or an adapter: its tree, bytes, formats, ranks.

    ```
    finetuna inspect base
    finetuna inspect run/poems
    ```
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder; expected one of a base, a model or an adapter.")
    if not is_adapter(path) and not (path / "config.json").is_file() and not (path / DESCRIPTION).is_file():
        inside = sorted(str(own) for own in path.iterdir() if is_adapter(own))
        hint = f"; there are {', '.join(inside[:5])} in it" if inside else ""
        raise ValueError(f"{path}: is not the folder of a base, a model or an adapter{hint}.")
    if is_adapter(path) and (path / "adapter_model.safetensors").is_file():
        title, facts, leaves = _adapter(path)
    else:
        title, facts, leaves = _base(path)
    console().print(facts_of(title, facts))
    console().print(_tree(path.name or str(path), leaves if every else _folded(leaves)))


def _adapter(path: Path) -> tuple[str, dict[str, Any], dict[str, Leaf]]:
    leaves = {
        name.removeprefix("base_model.model."): leaf
        for name, leaf in _header(path / "adapter_model.safetensors").items()
    }
    facts: dict[str, Any] = {}
    own, peft = (_json(path / name) for name in ("finetuna.json", "adapter_config.json"))
    if own:
        ranks = sorted({entry.get("r") for entry in own.get("adapters", [])})
        alphas = sorted({entry.get("alpha") for entry in own.get("adapters", [])})
        facts = {
            "base": own.get("base"),
            "adapted layers": len(own.get("adapters", [])),
            "rank": ", ".join(map(str, ranks)),
            "alpha": ", ".join(f"{alpha:g}" for alpha in alphas),
            "plain parameters": ", ".join(own.get("plain", [])) or "none",
        }
    elif peft:
        facts = {"rank": peft.get("r"), "alpha": peft.get("lora_alpha"), "base": "unknown: not written by finetuna"}
    facts["for PEFT"] = "yes" if peft else "no"
    facts["parameters"] = f"{sum(_count(leaf.shape) for leaf in leaves.values()):,}"
    facts["bytes"] = f"{sum(leaf.nbytes for leaf in leaves.values()):,}"
    return "Adapter", facts, leaves


def _base(path: Path) -> tuple[str, dict[str, Any], dict[str, Leaf]]:
    base = open_base(path, "cpu")
    leaves = {}
    for name, leaf in base.params.items():
        layer = base.skeleton.layers.get(name.removesuffix(".weight"))
        scheme = layer.scheme if layer is not None and name.endswith(".weight") else None
        dtype = str(leaf.dtype).removeprefix("torch.")
        leaves[name] = Leaf(dtype, tuple(leaf.shape), leaf.nbytes, "" if scheme is None else scheme.name)
    schemes = [layer.scheme.name for layer in base.skeleton.layers.values() if layer.scheme is not None]
    facts = {
        "model": base.skeleton.name,
        "fingerprint": base.fingerprint,
        "layers in 8 bits": ", ".join(f"{schemes.count(own)} {own}" for own in sorted(set(schemes))) or "none",
        "tied": ", ".join(f"{alias} = {name}" for alias, name in base.skeleton.ties.items()) or "none",
        "bytes": f"{base.nbytes:,}",
    }
    return "Base", facts, leaves


def _header(path: Path) -> dict[str, Leaf]:
    try:
        with safe_open(str(path), "pt") as file:
            leaves = {}
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                leaf = file.get_tensor(name)
                leaves[name] = Leaf(str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape), leaf.nbytes)
            return leaves
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _folded(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Tensors that differ by the number of their block alone, as one."""
    groups: dict[tuple[str, str, tuple[int, ...], str], list[tuple[str, Leaf]]] = {}
    for name, leaf in leaves.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1)
        groups.setdefault((pattern, leaf.dtype, leaf.shape, leaf.scheme), []).append((name, leaf))
    folded = {}
    for (pattern, dtype, shape, scheme), own in groups.items():
        if len(own) == 1:
            folded[own[0][0]] = own[0][1]
            continue
        numbers = [int(re.search(r"\.(\d+)\.", name).group(1)) for name, _ in own]  # type: ignore[union-attr]
        folded[pattern.replace("*", _ranges(sorted(numbers)), 1)] = Leaf(
            dtype, shape, sum(leaf.nbytes for _, leaf in own), scheme
        )
    return folded


def _ranges(numbers: list[int]) -> str:
    """`[0-3,5]`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return "[" + ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts) + "]"


def _tree(name: str, leaves: Mapping[str, Leaf]) -> Tree:
    """The leaves by their dotted names; a part that has one part only is written with it."""
    nested: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, own = path.split(".")
        node = nested
        for part in above:
            node = node.setdefault(part, {})
        node[own] = leaf
    root = Tree(f"[bold]{escape(name)}[/] [dim]{_nbytes(nested):,} bytes[/]")
    _grow(root, nested)
    return root


def _grow(tree: Tree, nested: Mapping[str, Any]) -> None:
    for part, below in nested.items():
        while isinstance(below, dict) and len(below) == 1:
            ((own, below),) = below.items()
            part = f"{part}.{own}"
        if isinstance(below, dict):
            _grow(tree.add(f"[cyan]{escape(part)}[/] [dim]{_nbytes(below):,}[/]"), below)
        else:
            shape = " × ".join(map(str, below.shape)) or "scalar"
            scheme = f" [green]{below.scheme}[/]" if below.scheme else ""
            tree.add(f"{escape(part)} {below.dtype} {shape} [dim]{below.nbytes:,}[/]{scheme}")


def _nbytes(nested: Any) -> int:
    return sum(map(_nbytes, nested.values())) if isinstance(nested, dict) else nested.nbytes


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
