"""The package as others get it: built, installed where nothing of the checkout is, used; and what developers use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Runs a command that sees nothing of the checkout; returns what it printed."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    clean = {name: value for name, value in os.environ.items() if name not in hidden} | environment
    done = subprocess.run(
        [str(own) for own in command], cwd=cwd, env=clean, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and, built from that, the wheel. Nothing is fetched."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel, which finds its dependencies in this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=folder)
    ours = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A line of a .pth file adds a folder, and reads none of the .pth files in it: not that of an editable install.
    (ours / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import finetuna_func; print(finetuna_func.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(ours)
    return python


def test_what_is_in_the_package(built: Path) -> None:
    """The wheel is the library alone; the source archive has what its tests need; neither has caches or weights."""
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(archive) as file:
        in_archive = {name.partition("/")[2] for name in file.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "finetuna_func").rglob("*.py")}
    assert {name for name in in_wheel if not name.split("/")[0].endswith(".dist-info")} == sources | {
        "finetuna_func/py.typed"
    }
    assert any(name.endswith("licenses/LICENSE") for name in in_wheel)
    assert in_archive >= sources | {"README.md", "LICENSE", "Makefile", "pyproject.toml", "CONTRIBUTING.md"}
    assert {f"tests/{path.name}" for path in Path(__file__).parent.glob("*.py")} <= in_archive
    assert not [name for name in in_archive if re.search(r"\.(safetensors|gguf|pyc|pt)$|__pycache__|\.venv", name)]


def test_the_installed_command(installed: Path, tmp_path: Path) -> None:
    finetuna = installed.with_name("finetuna")
    assert re.fullmatch(r"finetuna_func \d+\.\d+\.\d+\S*\n", run(finetuna, "--version", cwd=tmp_path))
    assert "finetuna quantize" in run(finetuna, "--help", cwd=tmp_path, COLUMNS="100")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_whole_way_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """examples/cli.sh on SmolLM2, which checks at its end what PEFT and the merged model compute."""
    finetuna = str(installed.with_name("finetuna"))
    script = ROOT / "examples" / "cli.sh"
    out = run("bash", script, tmp_path, cwd=tmp_path, PYTHON=str(installed), FINETUNA=finetuna, STEPS="6")
    print(out)
    assert "Going on after step" in out and "every byte is that of the run that was never stopped" in out
    results = json.loads((tmp_path / "eval.json").read_text())
    found = {(own["adapter"], Path(own["data"]).stem): own["loss"] for own in results}
    for name in ("milton", "math", "films"):
        assert found[name, name] < found["the base", name]
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG") and "Stack 2 of 2" in out
    assert {"run/milton", "milton-peft", "mixture"} <= {str(own.relative_to(tmp_path)) for own in tmp_path.rglob("*")}


# --- for developers -------------------------------------------------------------------------------


def test_every_target_is_in_the_help() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    listed = {line.split()[1] for line in run("make", "-C", ROOT, "help", cwd=ROOT).splitlines() if line[:5] == "make "}
    assert targets == listed
    documented = set(re.findall(r"`make ([a-z-]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert documented == targets - {"help", "clean"}


def test_hooks_are_local() -> None:
    """They are read by pre-commit, run what `make lint` runs, and need no network."""
    from pre_commit.clientlib import load_config

    path = ROOT / ".pre-commit-config.yaml"
    repositories = load_config(str(path))["repos"]
    assert [own["repo"] for own in repositories] == ["local"]
    hooks = {hook["id"]: hook for hook in repositories[0]["hooks"]}
    assert set(hooks) == {"ruff-check", "ruff-format", "pyright"}
    assert all(hook["language"] == "system" for hook in yaml.safe_load(path.read_text())["repos"][0]["hooks"])
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks.values())
