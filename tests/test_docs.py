"""The documentation does what it says: its code runs, its names and options exist, and it leaves nothing out."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pages
import pytest
import tiny
import torch
import typer
from pages import HUB_NAME, ROOT
from typer.main import get_command

import finetuna_func as ft
from finetuna_func.cli import _app

DOCS = ROOT / "docs"
ALL = sorted(path for path in DOCS.rglob("*.md"))
TUTORIAL = DOCS / "tutorial/command_line.md"


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).with_suffix("").as_posix()


def python(page: Path) -> list[pages.Block]:
    """The blocks that run by themselves; one with a title is a script, which the shell blocks call."""
    return [block for block in pages.blocks(page, "python") if block.title is None]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def workplace(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, where the model's name on the hub is a tiny model."""
    (tmp_path / HUB_NAME).parent.mkdir()
    (tmp_path / HUB_NAME).symlink_to(model_folder)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in ALL if python(page)], ids=name_of)
def test_python_blocks_run_in_order(page: Path, workplace: Path, capsys: pytest.CaptureFixture[str]):
    pages.run(python(page))


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_code_that_is_not_tested_is_of_a_kind_that_cannot_be(page: Path):
    """Blocks are run (python, bash), data, or shown; what is only shown installs or serves."""
    opened = re.findall(r"^ *```([a-z]*)", page.read_text("utf-8"), re.MULTILINE)[::2]
    assert set(opened) <= {"python", "bash", "yaml", "text", "sh", ""}
    for block in pages.blocks(page, "sh"):
        assert re.match(r"(pip|vllm) ", block.code), block


def test_pages_that_must_have_code_do():
    with_code = {name_of(page) for page in ALL if python(page)}
    guides = {name_of(page) for page in (DOCS / "guides").glob("*.md")} - {"guides/index"}
    assert with_code >= guides | {"index", "tutorial/python", "explanation/shapes"}


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_it_names_only_what_exists(page: Path):
    for path in sorted(set(re.findall(r"\bft((?:\.[A-Za-z_]\w*)+)", page.read_text("utf-8")))):
        value: Any = ft
        for attribute in path.removeprefix(".").split("."):
            assert hasattr(value, attribute), f"ft{path}"
            value = getattr(value, attribute)


def public_names() -> set[str]:
    """Every name that users are to import, with its module's."""
    names = {f"finetuna_func.{name}" for name in ft.__all__ if not isinstance(getattr(ft, name), ModuleType)}
    names |= {f"finetuna_func.optim.{name}" for name in ft.optim.__all__}
    random = {name for name, value in vars(ft.random).items() if inspect.isfunction(value) and not name.startswith("_")}
    return names | {f"finetuna_func.random.{name}" for name in random}


def test_every_public_name_has_one_place_in_the_reference():
    text = "\n".join(page.read_text("utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
    there = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert public_names() <= set(there), sorted(public_names() - set(there))
    assert len(there) == len(set(there))
    assert "finetuna_func.optim.adamw" in there and "finetuna_func.random.key" in there


def test_the_index_of_the_reference_lists_its_pages_and_names():
    index = (DOCS / "reference/index.md").read_text("utf-8")
    for page in (DOCS / "reference").glob("*.md"):
        names = re.findall(r"^::: finetuna_func\.(\w+)$", page.read_text("utf-8"), re.MULTILINE)
        assert page.name == "index.md" or f"]({page.name})" in index, page.name
        for name in names:
            assert f"`{name}`" in index, name


def commands(page: Path) -> list[list[str]]:
    """The calls of ``finetuna`` in a page's shell blocks, as arguments."""
    script = "\n".join(block.code for block in pages.blocks(page, "bash")).replace("\\\n", " ")
    lines = (line.strip().removesuffix("&") for line in script.splitlines())
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("finetuna ")]


@pytest.mark.parametrize("page", [page for page in ALL if commands(page)], ids=name_of)
def test_commands_have_the_options_that_pages_give(page: Path, workplace: Path):
    """They are parsed, not run."""
    (workplace / "run.yaml").write_text("base: base\n")
    group: Any = get_command(_app.app)
    for name, *arguments in commands(page):
        command = group.get_command(typer.Context(group), name)
        assert command is not None, name
        command.make_context(name, arguments, resilient_parsing=False)


def test_a_command_with_an_unknown_option_would_be_noticed():
    group: Any = get_command(_app.app)
    with pytest.raises(Exception, match=r"[Nn]o such option"):
        group.get_command(typer.Context(group), "eval").make_context("eval", ["--base", "b", "--datum", "a.jsonl"])


def hook(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"hooks/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_command_line_has_every_command_and_option():
    text = hook("cli_reference").on_page_markdown("before\n<!-- the commands -->\nafter")
    group: Any = get_command(_app.app)
    assert re.findall(r"^## `finetuna (\w+)`$", text, re.MULTILINE) == list(_app.COMMANDS)
    for part, name in zip(text.split("\n## ")[1:], _app.COMMANDS, strict=True):
        for parameter in group.commands[name].params:
            assert not parameter.opts[0].startswith("--") or parameter.opts[0] in part, (name, parameter.opts)
    assert text.startswith("before\n") and text.endswith("\nafter")
    train = text.split("\n## ")[2]
    assert train.index("*Per adapter*") < train.index("--learning-rate") < train.index("*Steps*")


def test_docstrings_become_markdown():
    linked = hook("docstrings")._linked
    public = {"apply": "ft.apply", "optim.adamw": "ft.optim.adamw"}
    text = "See `apply`, ``apply``, `adamw`, `other`.\n    Example:\n    >>> `apply`\n`Adam <https://a.org>`_."
    assert linked(text, "finetuna_func.optim.sgd", public) == (
        "See [`apply`][ft.apply], ``apply``, [`adamw`][ft.optim.adamw], `other`.\n"
        "    Examples:\n    >>> `apply`\n[Adam](https://a.org)."
    )


@pytest.mark.slow
def test_the_tutorial_of_the_command_line(tmp_path: Path):
    """All of it, on the real model, in a shell of its own."""
    import real_data

    (tmp_path / HUB_NAME).parent.mkdir()
    (tmp_path / HUB_NAME).symlink_to(real_data.smollm2_path())
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, call in (("python", ""), ("finetuna", "-m finetuna_func.cli ")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {call}"$@"\n')
        (programs / name).chmod(0o755)
    for block in pages.blocks(TUTORIAL, "python") + pages.blocks(TUTORIAL, "yaml"):
        assert block.title is not None
        (tmp_path / block.title).write_text(block.code)
    steps = [block.code for block in pages.blocks(TUTORIAL, "bash") if "pip install" not in block.code]
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(steps)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Going on after step" in done.stdout + done.stderr
    assert re.search(r"21 \+ 34 = \d+", done.stdout)
    number = r" +[\d.]+ +│"
    for place, name in enumerate(("sums", "loud", "weather")):  # each adapter is best on its own text
        assert re.search(rf"│ {name} +│{number * place} +[\d.]+ \* ", done.stdout), name
    for name in ("sums", "loud", "weather"):
        assert (tmp_path / "run" / name / "adapter_model.safetensors").is_file()
