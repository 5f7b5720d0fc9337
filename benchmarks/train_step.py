"""How long does one training step take, against PEFT, on one GPU?

Forward and backward of N LoRA adapters (r=16 on the seven projections) on a Llama-shaped model with
random weights, in bfloat16: finetuna_func on an int8 and on a bfloat16 base, eager and compiled,
against PEFT on bfloat16 (one adapter after another, and one adapter on all tokens) and PEFT on
bitsandbytes' LLM.int8. All in one run. The ceiling is 4 * parameters * tokens floating-point
operations (forward, and the gradient with respect to activations) at the matrix product rate
measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
    """One line of the table."""

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
    if route == "step":  # with clipping and AdamW
        step_options = {name: options.pop(name) for name in ("cuda_graph", "donate") if name in options}
        tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-5))
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


def peft_model(model: nn.Module) -> nn.Module:
    """Returns PEFT's LoRA on the model, in training mode with gradients for the adapters alone."""
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=list(PROJECTIONS))
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    return wrapped


def peft_step(model: nn.Module, ids: Tensor, *, compiled: bool) -> Callable[[], Any]:
    """Returns a step of PEFT over batches ``(N, B, T)``, one after another."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss(batch: Tensor) -> Tensor:
        return causal_loss(model(batch, use_cache=False).logits, batch)

    run = torch.compile(loss) if compiled else loss

    def step() -> None:
        for batch in ids:
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


def measure(name: str, make: Callable[[], Callable[[], Any]], tokens: int, ceiling_ms: float, repeats: int) -> Row:
    """Returns the median time of a step, after warm-up, and its peak memory."""
    gc.collect()
    torch.cuda.empty_cache()
    step = make()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    ms = statistics.median(times)
    row = Row(name, ms, tokens / ms * 1e3, torch.cuda.max_memory_allocated() / 2**30, ceiling_ms / ms, first)
    print(f"{row.name:62s} {row.ms:8.1f} ms {row.tokens_per_s / 1e3:8.1f} k tok/s {row.peak_gib:6.2f} GiB "
          f"{row.ceiling:6.1%} of ceiling  first call {row.first_call_s:5.1f} s", flush=True)  # fmt: skip
    return row


def matmul_rate() -> float:
    """Returns the measured rate of a large bfloat16 product, in floating-point operations per second."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(10):
        a @ a
    end.record()
    end.synchronize()
    return 10 * 2 * 8192**3 / (begin.elapsed_time(end) * 1e-3)


def main() -> None:
    """Runs the variants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2, help="rows per adapter")
    parser.add_argument("--length", type=int, default=1024, help="tokens per row")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", default="", help="parts of variants' names, or =name, with ; between; default all")
    parser.add_argument("--profile", default="", help="part of a variant's name: print its kernels by time")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()

    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", message="MatMul8bitLt")  # bitsandbytes, at every layer of every step
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    device = "cuda"
    n, b, t = args.adapters, args.batch, args.length
    ids = torch.randint(0, 32000, (n, b, t), device=device)
    one = ids.reshape(1, n * b, t)
    rate = matmul_rate()
    model = llama(args.layers, device)
    parameters = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    ceiling_ms = 4 * parameters * ids.numel() / rate * 1e3
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {rate / 1e12:.0f} TFLOP/s bf16 matmul; "
        f"{parameters / 1e9:.2f} B matmul parameters, {n} adapters x {b} x {t}; ceiling {ceiling_ms:.1f} ms"
    )

    bases = [ft.quantize_base_model(model)]
    del model  # so that a peak is that of a row's own

    def int8() -> ft.Base:
        return bases[0]

    def bf16() -> ft.Base:
        return ft.quantize_base_model(llama(args.layers, device), modules_not_to_quantize=".*")

    def peft_bf16() -> nn.Module:
        return peft_model(llama(args.layers, device))

    variants: dict[str, Callable[[], Callable[[], Any]]] = {
        "ours int8 eager": lambda: ours(int8(), ids),
        "ours bf16 eager": lambda: ours(bf16(), ids),
        "ours int8 blocks compiled": lambda: ours(int8(), ids, compile="blocks"),
        "ours bf16 blocks compiled": lambda: ours(bf16(), ids, compile="blocks"),
        "ours int8 blocks compiled, remat": lambda: ours(int8(), ids, compile="blocks", remat="blocks"),
        "ours int8 blocks compiled, step with AdamW": lambda: ours(
            int8(), ids, route="step", compile="blocks", cuda_graph=False
        ),
        "ours int8 blocks compiled, step with AdamW, CUDA graph": lambda: ours(
            int8(), ids, route="step", compile="blocks", cuda_graph=True, donate=True
        ),
        "ours int8 blocks compiled, step with AdamW by leaf, CUDA graph": lambda: ours(
            int8(), ids, route="step", compile="blocks", cuda_graph=True, donate=True, flat=False
        ),
        "ours int8 blocks compiled, remat, step with AdamW, CUDA graph": lambda: ours(
            int8(), ids, route="step", compile="blocks", remat="blocks", cuda_graph=True, donate=True
        ),
        "ours int8 eager, remat": lambda: ours(int8(), ids, remat="blocks"),
        "ours int8 whole compiled": lambda: ours(int8(), ids, route="whole"),
        "ours int8 whole compiled, CUDA graphs": lambda: ours(int8(), ids, route="whole", mode="reduce-overhead"),
        "ours int8 eager vmapped": lambda: ours(int8(), ids, route="vmapped"),
        "ours int8 raw vmap(grad)": lambda: ours(int8(), ids, route="raw"),
        "PEFT bf16 eager, loop": lambda: peft_step(peft_bf16(), ids, compiled=False),
        "PEFT bf16 compiled, loop": lambda: peft_step(peft_bf16(), ids, compiled=True),
        "PEFT bf16 eager, one adapter": lambda: peft_step(peft_bf16(), one, compiled=False),
        "PEFT bf16 compiled, one adapter": lambda: peft_step(peft_bf16(), one, compiled=True),
        "PEFT + LLM.int8 eager, loop": lambda: peft_step(
            peft_model(llm_int8(llama(args.layers, device))), ids, compiled=False
        ),
    }
    wanted = [part for part in args.only.split(";") if part]
    rows = []
    for name, make in variants.items():
        if wanted and not any(part == f"={name}" or part in name for part in wanted):
            continue
        if name.startswith("PEFT"):
            bases.clear()
        torch._dynamo.reset()
        try:
            rows.append(measure(name, make, ids.numel(), ceiling_ms, args.repeats))
            if args.profile and args.profile in name:
                show_kernels(make())
        except torch.OutOfMemoryError:
            print(f"{name:62s} out of memory", flush=True)
        except Exception as error:  # one peer that fails must not lose the others' numbers
            print(f"{name:62s} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
    if args.json:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        report = {"commit": head.stdout.strip(), "argv": sys.argv, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(report, indent=1))


def show_kernels(step: Callable[[], Any]) -> None:
    """Prints the GPU kernels of a step, by time."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        torch.cuda.synchronize()
    print(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=28, max_name_column_width=70))


if __name__ == "__main__":
    main()
