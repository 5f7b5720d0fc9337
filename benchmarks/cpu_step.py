"""How long does a training step of several small adapters take on a CPU, against PEFT?

Forward and backward of N LoRA adapters (r=16 on the seven projections) on SmolLM2-135M-Instruct in float32, on text:
finetuna_func on an int8 and on a float32 base, all adapters at once, against PEFT on float32, one adapter after
another, and one adapter on all tokens. A row's times are taken in turn with the others', so that whatever else the
machine does meets all of them; a ratio is the median of those within a turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantization import setting
from torch import Tensor
from train_step import COMPILED, ours, peft_model, peft_step
from transformers import PreTrainedModel

import finetuna_func as ft

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import real_data

EXAMPLES = """examples:
  python benchmarks/cpu_step.py                                  ten minutes on 2 cores
  python benchmarks/cpu_step.py --shape 8x1x64 --repeats 3       a first look
  python benchmarks/cpu_step.py --only "one after another;int8"  some of the rows
"""
REFERENCE = "PEFT, one after another"


def rows(wanted: Callable[[str], bool]) -> dict[str, Callable[[Tensor], Callable[[], Any]]]:
    """Returns the rows: each makes a step of token ids ``(N, B, T)``."""

    def model() -> PreTrainedModel:
        return real_data.smollm2()[0].requires_grad_(False)

    made: dict[str, Callable[[Tensor], Callable[[], Any]]] = {}
    if any(wanted(name) for name in (REFERENCE, "PEFT, one adapter on all tokens", "PEFT compiled, one after another")):
        adapted = peft_model(model())
        made[REFERENCE] = lambda ids: peft_step(adapted, ids)
        made["PEFT compiled, one after another"] = lambda ids: peft_step(adapted, ids, "default")
        made["PEFT, one adapter on all tokens"] = lambda ids: peft_step(adapted, ids.flatten(0, 1).unsqueeze(0))
    bases: dict[str, dict[str, Any]] = {
        "float32": {"modules_not_to_quantize": ".*"},
        "int8": {},
        "int8, w8a8": {"matmul": "w8a8"},
    }
    for name, options in bases.items():
        if wanted(own := f"ours, {name} base"):
            base = ft.quantize_base_model(model(), **options)
            made[own] = lambda ids, base=base: ours(base, ids)
            made[f"{own}, blocks compiled"] = lambda ids, base=base: ours(base, ids, **COMPILED)
    return {name: make for name, make in made.items() if wanted(name)}


def timed(steps: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
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
    parser.add_argument("--shape", nargs="+", default=shapes, help="adapters x rows of each x tokens of a row")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--only", default="", help="parts of rows' names, with ; between; default all")
    parser.add_argument("--compiled", action="store_true", help="also what torch.compile makes of them (minutes)")
    args = parser.parse_args()
    parts = [part for part in args.only.split(";") if part]

    def wanted(name: str) -> bool:
        chosen = not parts or any(part in name for part in parts)
        return chosen and (args.compiled or "compiled" not in name)

    makers = rows(wanted)
    tokenizer, text = real_data.smollm2()[1], real_data.texts("milton")["milton"]
    print(setting(), flush=True)
    for shape in args.shape:
        n, b, t = (int(size) for size in shape.split("x"))
        _, windows = real_data.windows(text, tokenizer, t)
        ids = windows[: n * b].reshape(n, b, t)
        seconds = timed({name: make(ids) for name, make in makers.items()}, args.repeats)
        against = seconds.get(REFERENCE) or next(iter(seconds.values()))
        print(f"\n| {n} adapters x {b} x {t} | s | tokens/s | of the first row's time |")
        print("|---|---:|---:|---:|")
        for name, own in seconds.items():
            ratio = statistics.median(mine / theirs for mine, theirs in zip(own, against, strict=True))
            median = statistics.median(own)
            print(f"| {name} | {median:.2f} | {ids.numel() / median:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
