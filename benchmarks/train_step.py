"""How long does one training step take, against PEFT, on one GPU?

Forward and backward of N LoRA adapters (r=16 on the seven projections) on a Llama-shaped model with
random weights, in bfloat16: finetuna_func on an int8 and on a bfloat16 base, eager and compiled,
against PEFT on bfloat16 (one adapter after another, and one adapter on all tokens) and PEFT on
bitsandbytes' LLM.int8. All in one run. The ceiling is 4 * parameters * tokens floating-point
operations (forward, and the gradient with respect to activations) at the matrix product rate
measured in the same run, for ten products at rest; the rate for a second of them is printed beside.
Every row is a process of its own. Several get ready (compile) at the same time, and then are timed one after another,
with nothing else at work.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import multiprocessing
import re
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import finetuna_func as ft

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Row:
    """One line of the table; ``ceiling`` is its share of what the GPU could do."""

    shape: str
    name: str
    ms: float
    tokens_per_s: float
    peak_gib: float
    ceiling: float
    first_call_s: float


def llama(layers: int, device: str) -> LlamaForCausalLM:
    """Returns a Llama-shaped model of 1.04 B parameters (at 16 layers), random, bfloat16."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return model.eval().requires_grad_(False)


def causal_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Returns the mean next-token loss of ``(..., T, V)`` logits, over all but the leading finetune axis."""
    return F.cross_entropy(logits[..., :-1, :].flatten(0, -2).float(), ids[..., 1:].flatten())


def stacked_loss(base: ft.Base, **options: Any) -> Callable[[ft.Finetuned, Tensor], Tensor]:
    """Returns losses ``(N,)`` of a stack on ``(N, B, T)`` token ids."""

    def loss(stacked: ft.Finetuned, ids: Tensor) -> Tensor:
        return ft.causal_lm_loss(base, stacked, ids, **options)

    return loss


def stack_of(base: ft.Base, n: int) -> ft.Finetuned:
    """Returns n finetunes with both factors nonzero."""
    tuned = []
    for i in range(n):
        fresh = ft.new_finetuned(
            base,
            adapt_layers=PROJECTIONS,
            plain_layers=(),
            linear_config=ft.LinearAdapterConfig(r=16, alpha=16),
            generator=torch.Generator().manual_seed(i),
        )
        tuned.append(fresh.replace(params={k: v + 0.01 * torch.randn_like(v) for k, v in fresh.params.items()}))
    return ft.stack(tuned)


def ours(base: ft.Base, ids: Tensor, *, route: str = "stacked", **options: Any) -> Callable[[], Any]:
    """Returns a step of N finetunes at once; ``options`` are those of `ft.causal_lm_loss`."""
    stacked = stack_of(base, ids.shape[0])
    if route == "stacked":
        step = ft.stacked_value_and_grad(stacked_loss(base, **options))
        return lambda: step(stacked, ids)
    if route in ("step", "gradients"):  # with clipping and AdamW, or with nothing to do but add up
        step_options = {name: options.pop(name) for name in ("cuda_graph", "donate") if name in options}
        tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-5))
        if route == "gradients":
            tx = ft.optim.scale(-1e-5)
        if options.pop("flat", True):
            tx = ft.optim.flatten(tx)
        state = tx.init(stacked)
        train = ft.compile_step(stacked_loss(base, **options), tx, **step_options)
        held = [stacked, state]
        del stacked, state

        def trained() -> None:
            held[0], held[1], _ = train(*held, ids)

        return trained
    if route == "whole":  # one graph of the whole model
        step = ft.stacked_value_and_grad(torch.compile(stacked_loss(base), fullgraph=True, **options))
        return lambda: step(stacked, ids)

    def one(tuned: ft.Finetuned, ids: Tensor) -> Tensor:
        return ft.causal_lm_loss(base, tuned, ids, **options)

    if route == "vmapped":
        step = ft.stacked_value_and_grad(one, in_dims=(0, 0))
        return lambda: step(stacked, ids)

    def raw(params: dict[str, Tensor], tuned: ft.Finetuned, ids: Tensor) -> Tensor:
        return one(tuned.replace(params=params), ids)

    return lambda: torch.func.vmap(torch.func.grad(raw))(dict(stacked.params), stacked, ids)


def peft_model(model: nn.Module, *, float32: bool = False) -> nn.Module:
    """Returns PEFT's LoRA on the model, in training mode with gradients for the adapters alone.

    Args:
        model: The model.
        float32: Whether adapters are in float32, and what they compute, as PEFT does by default; else in the model's
            dtype, which is faster. (Ours are stored in float32 and computed in the model's dtype.)
    """
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=list(PROJECTIONS))
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=float32)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    return wrapped


def peft_step(model: nn.Module, ids: Tensor, compile: str | None = None) -> Callable[[], Any]:
    """Returns a step of PEFT over batches ``(N, B, T)``, one after another; ``compile`` is torch.compile's mode."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss(batch: Tensor) -> Tensor:
        return causal_loss(model(batch, use_cache=False).logits, batch)

    run = loss if compile is None else torch.compile(loss, mode=compile, dynamic=False)

    def step() -> None:
        for batch in ids:
            torch.compiler.cudagraph_mark_step_begin()
            torch.autograd.grad(run(batch), parameters)

    return step


def llm_int8(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Replaces the projections by bitsandbytes' LLM.int8 layers, as transformers does."""
    import bitsandbytes as bnb

    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in PROJECTIONS:
            layer = bnb.nn.Linear8bitLt(
                module.in_features, module.out_features, bias=False, has_fp16_weights=False, threshold=6.0
            )
            layer.weight = bnb.nn.Int8Params(
                module.weight.data.half().cpu(), requires_grad=False, has_fp16_weights=False
            )
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, layer.to(module.weight.device))
    return model


def ready(make: Callable[[], Callable[[], Any]]) -> tuple[Callable[[], Any], float]:
    """Returns a step that has run once, and how long that took, in seconds."""
    step = make()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    gc.collect()
    torch.cuda.empty_cache()
    return step, first


def timed(step: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Returns the median time of a step in ms, after warm-up, and its peak memory in GiB.

    One step follows another, as in a loop of training: the host waits for none of them.
    """
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]
    return statistics.median(times), torch.cuda.max_memory_allocated() / 2**30


def matmul_rate(repeats: int = 10) -> float:
    """Returns the measured rate of large bfloat16 products, one after another, in floating-point operations a second.

    Ten are over in 14 ms. In a longer run, such as those of steps, power is limited, and a GPU slower.
    """
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        a @ a
    end.record()
    end.synchronize()
    return repeats * 2 * 8192**3 / (begin.elapsed_time(end) * 1e-3)


SHAPE = "adapters x rows of each x tokens of a row"
ONLY = "parts of rows' names, or =name, or '=4x2x1024 name', with ; between; default all"
COMPILED = {"compile": "blocks"}
RECORDED = {"compile": "blocks", "cuda_graph": True, "donate": True}
OURS: dict[str, dict[str, Any]] = {
    "int8 eager": {},
    "bf16 eager": {},
    "int8 blocks compiled": COMPILED,
    "bf16 blocks compiled": COMPILED,
    "int8 blocks compiled, remat": {**COMPILED, "remat": "blocks"},
    "int8 blocks compiled, step with AdamW": {**COMPILED, "route": "step", "cuda_graph": False},
    "int8 blocks compiled, CUDA graph": {**RECORDED, "route": "gradients"},
    "bf16 blocks compiled, CUDA graph": {**RECORDED, "route": "gradients"},
    "int8 blocks compiled, by leaf, CUDA graph": {**RECORDED, "route": "gradients", "flat": False},
    "int8 blocks compiled, step with AdamW, CUDA graph": {**RECORDED, "route": "step"},
    "int8 blocks compiled, step with AdamW by leaf, CUDA graph": {**RECORDED, "route": "step", "flat": False},
    "int8 blocks compiled, remat, step with AdamW, CUDA graph": {**RECORDED, "route": "step", "remat": "blocks"},
    "int8 eager, remat": {"remat": "blocks"},
    "int8 whole compiled": {"route": "whole"},
    "int8 whole compiled, CUDA graphs": {"route": "whole", "mode": "reduce-overhead"},
    "int8 eager vmapped": {"route": "vmapped"},
    "int8 raw vmap(grad)": {"route": "raw"},
}
PEFT = {
    "bf16 compiled, loop": "default",
    "bf16 compiled, CUDA graphs, loop": "reduce-overhead",
    "bf16 compiled, one adapter": "default",
    "bf16 compiled, CUDA graphs, one adapter": "reduce-overhead",
    "bf16 compiled, adapters in float32, loop": "default",
    "bf16 compiled, adapters in float32, one adapter": "default",
    "bf16 eager, loop": None,
    "bf16 eager, one adapter": None,
    "+ LLM.int8 eager, loop": None,
}


def variant(name: str, shape: tuple[int, int, int], layers: int) -> Callable[[], Any]:
    """Returns the step of a row."""
    ids = torch.randint(0, 32000, shape, device="cuda")
    whose, own = name.split(" ", 1)
    if whose == "ours":
        model = llama(layers, "cuda")
        base = ft.quantize_base_model(model, modules_not_to_quantize=".*" if own.startswith("bf16") else ())
        del model  # so that a peak is that of a row's own
        return ours(base, ids, **OURS[own])
    if own.endswith("one adapter"):
        ids = ids.reshape(1, -1, shape[-1])
    model = llama(layers, "cuda")
    model = peft_model(llm_int8(model) if "LLM.int8" in own else model, float32="float32" in own)
    return peft_step(model, ids, PEFT[own])


def run_row(
    channel: Connection, name: str, shape: tuple[int, int, int], layers: int, repeats: int, profile: bool
) -> None:
    """Gets a row ready, says so, waits for its turn, and sends its numbers; in a process of its own."""
    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", message="MatMul8bitLt")  # bitsandbytes, at every layer of every step
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        step, first = ready(lambda: variant(name, shape, layers))
        channel.send(first)
        channel.recv()
        channel.send(timed(step, repeats))
        if profile:
            show_kernels(step)
    except torch.OutOfMemoryError:
        channel.send("out of memory")
    except Exception as error:  # one peer that fails must not lose the others' numbers
        traceback.print_exc()
        channel.send(f"failed: {type(error).__name__}: {str(error)[:300]}")


def shape_named(text: str) -> str:
    """Checks a shape such as ``4x2x1024``."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text}: expected three numbers with x between, such as 4x2x1024")
    return text


def main() -> None:
    """Runs the variants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", type=shape_named, default=["4x2x1024"], help=SHAPE)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", default="", help=ONLY)
    parser.add_argument("--at-once", type=int, default=4, help="rows that get ready at the same time")
    parser.add_argument("--profile", default="", help="part of a variant's name: print its kernels by time")
    parser.add_argument("--json", type=Path, help="also write the rows here, after each")
    parser.add_argument("--report", type=Path, nargs="+", help="run nothing: print what --json wrote, as Markdown")
    parser.add_argument("--plot", type=Path, help="with --report, also draw it, as PNG")
    args = parser.parse_args()
    if args.plot and not args.report:
        parser.error("--plot draws what --report names; give both")
    if args.report:
        report_of(args.report, args.plot)
        return

    rate, sustained = matmul_rate(), matmul_rate(700)
    with torch.device("meta"):
        model = llama(args.layers, "meta")
    parameters = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {rate / 1e12:.0f} TFLOP/s bf16 matmul, "
        f"{sustained / 1e12:.0f} sustained for a second; "
        f"{parameters / 1e9:.2f} B matmul parameters"
    )
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    report = {"commit": head.stdout.strip(), "argv": sys.argv, "rate": rate, "sustained": sustained, "rows": []}
    torch.cuda.empty_cache()

    wanted = [part for part in args.only.split(";") if part]
    names = [f"PEFT {own}" for own in PEFT] + [f"ours {own}" for own in OURS]
    todo = [
        (shape, name)
        for shape in args.shape
        for name in names
        if not wanted
        or any(f"{shape} {name}".endswith(part[1:]) if part[0] == "=" else part in name for part in wanted)
    ]
    todo.sort(key=lambda own: names.index(own[1]))
    spawn = multiprocessing.get_context("spawn")
    while todo:
        group, todo = todo[: args.at_once], todo[args.at_once :]
        running = []
        for shape, name in group:
            here, there = spawn.Pipe()
            sizes = tuple(int(size) for size in shape.split("x"))
            profiled = bool(args.profile) and args.profile in name
            process = spawn.Process(target=run_row, args=(there, name, sizes, args.layers, args.repeats, profiled))
            process.start()
            there.close()
            running.append((shape, name, sizes, process, here))
        firsts = [answer_of(channel) for *_, channel in running]
        for (shape, name, sizes, process, channel), first in zip(running, firsts, strict=True):
            answer: Any = first
            if isinstance(first, float):
                channel.send("your turn")
                answer = answer_of(channel)
            process.join()
            if isinstance(answer, str):
                print(f"{shape:9s} {name:62s} {answer}", flush=True)
                continue
            (ms, peak), tokens = answer, sizes[0] * sizes[1] * sizes[2]
            row = Row(shape, name, ms, tokens / ms * 1e3, peak, 4 * parameters * tokens / rate / ms * 1e3, first)
            print(f"{shape:9s} {row.name:62s} {row.ms:8.1f} ms {row.tokens_per_s / 1e3:8.1f} k tok/s "
                  f"{row.peak_gib:6.2f} GiB {row.ceiling:6.1%} of ceiling  first call {row.first_call_s:5.1f} s",
                  flush=True)  # fmt: skip
            report["rows"].append(asdict(row))
            if args.json:
                args.json.write_text(json.dumps(report, indent=1))


def report_of(paths: list[Path], picture: Path | None) -> None:
    """Prints the rows of JSON files as a Markdown table, and draws them; of rows of one name the last."""
    read = [Row(**row) for path in paths for row in json.loads(path.read_text())["rows"]]
    rows = list({(row.shape, row.name): row for row in read}.values())
    for shape in dict.fromkeys(row.shape for row in rows):
        print(f"| {shape.replace('x', ' x ')} | ms | k tok/s | peak GiB | of the ceiling | first call, s |")
        print("|---|---:|---:|---:|---:|---:|")
        for row in rows:
            if row.shape == shape:
                peak = "" if "CUDA graph" in row.name else f"{row.peak_gib:.2f}"  # whose own memory is not counted
                print(f"| {row.name} | {row.ms:.1f} | {row.tokens_per_s / 1e3:.1f} | {peak} | {row.ceiling:.1%} "
                      f"| {row.first_call_s:.0f} |")  # fmt: skip
    if picture is not None:
        plot(rows, picture)


def plot(rows: list[Row], path: Path) -> None:
    """Draws the times of a step, and for each shape the time at the rate of a plain matrix product."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row.shape for row in rows))
    counts = [sum(row.shape == shape for row in rows) for shape in shapes]
    figure = Figure(figsize=(9, 0.8 * len(shapes) + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(shapes), 1, squeeze=False, height_ratios=counts)[:, 0]
    for shape, panel in zip(shapes, panels, strict=True):
        own = sorted((row for row in rows if row.shape == shape), key=lambda row: -row.ms)
        colors = ["tab:blue" if row.name.startswith("ours") else "tab:gray" for row in own]
        bars = panel.barh([row.name for row in own], [row.ms for row in own], color=colors)
        panel.bar_label(bars, [f"{row.ms:.0f} ms" for row in own], padding=3, fontsize=8)
        panel.axvline(own[0].ceiling * own[0].ms, color="tab:red", linestyle="--", linewidth=1)
        panel.set_title(f"{shape.replace('x', ' x ')}; red: the same products at the GPU's full rate", fontsize=9)
        panel.set_xlim(0, 1.12 * own[0].ms)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def answer_of(channel: Connection) -> Any:
    """Returns what a row's process sends."""
    try:
        return channel.recv()
    except EOFError:
        return "failed: its process ended"


def show_kernels(step: Callable[[], Any]) -> None:
    """Prints the GPU kernels of a step, by time."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        torch.cuda.synchronize()
    print(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))


if __name__ == "__main__":
    main()
