"""How long does a training step of several small adapters take on a CPU, against PEFT?

Forward and backward of N LoRA adapters (r=16 on the seven projections) on SmolLM2-135M-Instruct in float32, on text:
finetuna_func on an int8 and on a float32 base, all adapters at once, against PEFT on float32, one adapter after
another, and one adapter on all tokens. A row's times are taken in turn with the others', so that whatever else the
machine does meets all of them; a ratio is the median of those within a turn.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantization import setting
from torch import Tensor, nn
from train_step import COMPILED, SHAPE, ours, peft_model, peft_step, shape_named
from transformers import PreTrainedModel

import finetuna_func as ft

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import real_data

EXAMPLES = """examples:
  python benchmarks/cpu_step.py                                  ten minutes on 2 cores
  python benchmarks/cpu_step.py --shape 8x1x64 --repeats 3       a first look
  python benchmarks/cpu_step.py --only "one after another;int8"  some of the rows
"""
AS_ON_A_GPU = 2**28 // (4 * 49152)  # tokens whose float32 logits are 256 MiB

Step = Callable[[], Any]


def model() -> PreTrainedModel:
    """Returns a model of one's own, since PEFT changes it."""
    return real_data.smollm2()[0].requires_grad_(False)


@functools.cache
def adapted() -> nn.Module:
    """Returns PEFT's model."""
    return peft_model(model())


@functools.cache
def base(name: str) -> ft.Base:
    """Returns one of our bases."""
    options: dict[str, dict[str, Any]] = {
        "float32": {"modules_not_to_quantize": ".*"},
        "int8": {},
        "int8, w8a8": {"matmul": "w8a8"},
    }
    return ft.quantize_base_model(model(), **options[name])


ROWS: dict[str, Callable[[Tensor], Step]] = {
    "PEFT, one after another": lambda ids: peft_step(adapted(), ids),
    "PEFT compiled, one after another": lambda ids: peft_step(adapted(), ids, "default"),
    "PEFT, one adapter on all tokens": lambda ids: peft_step(adapted(), ids.flatten(0, 1).unsqueeze(0)),
    "ours, float32 base": lambda ids: ours(base("float32"), ids),
    "ours, int8 base": lambda ids: ours(base("int8"), ids),
    "ours, int8 base, blocks compiled": lambda ids: ours(base("int8"), ids, **COMPILED),
    "ours, int8 base, logits in pieces of 256 MiB": lambda ids: ours(base("int8"), ids, chunk_tokens=AS_ON_A_GPU),
    "ours, int8, w8a8 base": lambda ids: ours(base("int8, w8a8"), ids),
}
"""A step of each, of token ids ``(N, B, T)``."""


def timed(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each step, after one to warm up, in turn."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    """Prints a Markdown table for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = ["8x1x64", "8x4x64", "4x2x256"]
    parser.add_argument("--shape", nargs="+", type=shape_named, default=shapes, help=SHAPE)
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--only", default="", help="parts of rows' names, with ; between; default all")
    parser.add_argument("--compiled", action="store_true", help="also what torch.compile makes of them (minutes)")
    args = parser.parse_args()
    parts = [part for part in args.only.split(";") if part]

    chosen = {
        name: make
        for name, make in ROWS.items()
        if (not parts or any(part in name for part in parts)) and (args.compiled or "compiled" not in name)
    }
    if not chosen:
        parser.error(f"--only {args.only}: no such row; there are {'; '.join(ROWS)} (those compiled with --compiled)")
    tokenizer, text = real_data.smollm2()[1], real_data.texts("milton")["milton"]
    print(setting(), flush=True)
    for shape in args.shape:
        n, b, t = (int(size) for size in shape.split("x"))
        _, windows = real_data.windows(text, tokenizer, t)
        if len(windows) < n * b:
            parser.error(f"--shape {shape}: the text has {len(windows)} rows of {t} tokens")
        ids = windows[: n * b].reshape(n, b, t)
        seconds = timed({name: make(ids) for name, make in chosen.items()}, args.repeats)
        first = next(iter(seconds.values()))
        print(f"\n| {n} adapters x {b} x {t} | s | tokens/s | of the first row's time |")
        print("|---|---:|---:|---:|")
        for name, own in seconds.items():
            ratio = statistics.median(mine / theirs for mine, theirs in zip(own, first, strict=True))
            median = statistics.median(own)
            print(f"| {name} | {median:.2f} | {ids.numel() / median:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
