"""The command line: `finetuna quantize`, `train`, `sweep`, `eval`, `generate`, `merge`, `export`, `inspect`.

Each command is a file of its own, and a thin layer over the library: what it does can be copied into a
script. Needs the extra ``cli``: ``pip install 'finetuna_func[cli]'``.
"""

from __future__ import annotations

import sys

try:
    import matplotlib  # noqa: F401
    import rich  # noqa: F401
    import typer  # noqa: F401
    import yaml  # noqa: F401
except ImportError as error:  # the library alone needs none of them
    sys.exit(f"error: {error}; the command line needs more packages: pip install 'finetuna_func[cli]'")

# Each registers its command.
from finetuna_func.cli import evaluate, export, generate, inspect, merge, quantize, sweep, train  # noqa: F401
from finetuna_func.cli._app import app

__all__ = ["app", "main"]


def main() -> None:
    """Runs the command line: 0 done, 1 an error, 2 a wrong call, 130 interrupted."""
    app()
