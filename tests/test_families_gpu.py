"""The check of all causal families in bfloat16, `benchmarks/families_gpu.py`, on two of them and on the CPU."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "families_gpu.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("families_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["StarCoder 2", "Mixtral"])
def test_a_family_passes(script: Any, family: str, capsys: Any) -> None:
    assert script.main(["--device", "cpu", "--family", family]) == 0
    printed = capsys.readouterr().out
    assert f"| {family} |" in printed and "1 of 1 families pass." in printed


def wrong(script: Any, patch: pytest.MonkeyPatch, name: str, replacement: Any, capsys: Any) -> str:
    patch.setattr(script.Subject, name, replacement(getattr(script.Subject, name)))
    assert script.main(["--device", "cpu", "--family", "StarCoder 2"]) == 1
    return capsys.readouterr().out


def raises(function: Any) -> Any:
    def failing(self: Any) -> Any:
        raise RuntimeError("no such kernel")

    return failing


BROKEN: dict[str, tuple[str, Any, str]] = {
    "finetunes in another order": ("mapped", lambda f: lambda self: f(self).roll(1, 0), r"vmap: 1\."),
    "two percent off": ("mapped", lambda f: lambda self: 1.03 * f(self), "vmap: 0.03"),
    "not a number": ("mapped", lambda f: lambda self: f(self) * torch.nan, "not finite"),
    "a gradient of another": (
        "mapped_gradients",
        lambda f: lambda self: {name: leaf.roll(1, 0) for name, leaf in f(self).items()},
        r"∇ vmap: 1\.",
    ),
    "a model that tells nothing": ("plain", lambda f: lambda self, *x: 1.5 * f(self, *x), "can hardly tell"),
    "a failing call": ("stacked_gradients", raises, "no such kernel"),
    "a failing reference": ("plain_gradients", raises, "no such kernel"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said(script: Any, case: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    name, replacement, message = BROKEN[case]
    printed = wrong(script, monkeypatch, name, replacement, capsys)
    assert "StarCoder 2 ✗" in printed and "0 of 1 families pass." in printed
    assert re.search(message, printed), printed
