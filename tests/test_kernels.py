"""The Triton kernels, in Triton's interpreter: in a process of its own, since that is chosen when they are imported.

What only a GPU shows (bfloat16, compiled code, time) is checked by ``benchmarks/kernels.py``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA wheels; a CPU install has none")
    old = tuple(map(int, version("triton").split(".")[:2])) < (3, 9)
    if old and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 converts arrays in a way that numpy 2.4 refuses; 3.9's does not")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        cwd=INTERPRETED.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 30 and "skipped" not in run.stdout, run.stdout[-500:]


def test_importing_the_library_leaves_triton_alone():
    """A machine without Triton, or without a GPU, never meets the kernels."""
    code = "import sys, finetuna_func; sys.exit(any(m.startswith('finetuna_func.kernels') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert subprocess.run([sys.executable, "-c", code.replace("_func;", "_func.kernels;")]).returncode == 1
