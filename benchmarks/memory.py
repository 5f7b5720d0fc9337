"""How little memory does a training step take, and is it what `ft.memory_report` predicts?

On one GPU: a model of the shape of Llama 3 8B with random weights, N LoRA adapters (r=16, all projections) on
N x 1 x 2048 tokens, recomputed blocks and a loss in pieces, on an int8 and on an nf4 base, against PEFT with
bitsandbytes' LLM.int8 and nf4 layers and gradient checkpointing, one adapter after another. Then growth: what
each further adapter takes, on a model of 1 B parameters.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from train_step import PROJECTIONS, llm_int8, peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import finetuna_func as ft

SIZES = {
    "1B": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8B": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
GIB = 2**30


def llama(size: str, layers: int | None = None) -> LlamaForCausalLM:
    """Returns a random model in bfloat16 on the GPU."""
    config = LlamaConfig(
        **SIZES[size] | ({"num_hidden_layers": layers} if layers else {}),
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def stack_of(base: ft.Base, n: int) -> ft.Finetuned:
    """Returns n adapters on the projections."""
    config = ft.LinearAdapterConfig(r=16, alpha=16)
    tuned = ft.new_finetuned(base, adapt_layers=PROJECTIONS, plain_layers=(), linear_config=config)
    return ft.stack([tuned] * n)


def peak_of(step: Callable[[], Any]) -> tuple[float, float]:
    """Returns peak GiB and seconds of a step, after one of warm-up."""
    step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / GIB, time.perf_counter() - start


def report(name: str, step: Callable[[], Any], tokens: int, predicted: float | None = None) -> None:
    """Prints a row of the table."""
    try:
        peak, seconds = peak_of(step)
    except Exception as error:  # one that fails must not lose the others' numbers
        print(f"| {name} | failed: {type(error).__name__}: {str(error)[:160]} | | | |", flush=True)
        return
    said = "" if predicted is None else f"{predicted:.2f} ({predicted / peak - 1:+.1%})"
    print(f"| {name} | {peak:.2f} | {said} | {seconds:.2f} | {tokens / seconds / 1e3:.2f} |", flush=True)


def ours(base: ft.Base, n: int, length: int, rows: str, options: dict[str, Any], chunk: int | None, adam: str) -> None:
    """Prints the row of one setting of this library: loss, gradients and, if given, the optimizer."""
    gc.collect()
    torch.cuda.empty_cache()
    stacked = stack_of(base, n)
    ids = torch.randint(0, 32000, (n, 1, length), device="cuda")
    tx = {"": None, "AdamW": ft.optim.adamw(1e-5), "8-bit AdamW": ft.optim.adamw8bit(1e-5)}[adam]

    def loss(stacked: ft.Finetuned, ids: Tensor) -> Tensor:
        return ft.causal_lm_loss(base, stacked, ids, **options)

    differentiate = ft.stacked_value_and_grad(loss, chunk_size=chunk)
    predicted = None
    if chunk is None and "compile" not in options:
        predicted = ft.memory_report(base, stacked, (n, 1, length), tx=tx, **options).peak / GIB
    if tx is None:
        fixed = stacked
        report(rows, lambda: differentiate(fixed, ids), ids.numel(), predicted)
        return
    held: list[Any] = [stack_of(base, n), tx.init(stacked)]  # a copy: the stack itself is not kept by a step

    def step() -> None:
        grads = differentiate(held[0], ids)[1]
        updates, held[1] = tx.update(grads, held[1], held[0])
        del grads
        held[0] = ft.optim.apply_updates(held[0], updates)

    stacked = None
    report(rows, step, ids.numel(), predicted)


def nf4(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Replaces the projections by bitsandbytes' nf4 layers with double quantization."""
    import bitsandbytes as bnb

    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in PROJECTIONS:
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type="nf4",
            )  # fmt: skip
            layer.weight = bnb.nn.Params4bit(
                module.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, layer.to("cuda"))
    return model


def peft_row(name: str, model: LlamaForCausalLM, n: int, length: int) -> None:
    """Prints the row of PEFT: n adapters, one after another, with gradient checkpointing."""
    import peft

    wrapped: Any = peft_model(model)
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=list(PROJECTIONS))
    for i in range(1, n):
        wrapped.add_adapter(f"adapter{i}", config)
    wrapped.enable_input_require_grads()
    wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped.train()
    ids = torch.randint(0, 32000, (n, 1, length), device="cuda")
    names = ["default", *(f"adapter{i}" for i in range(1, n))]

    def step() -> None:
        kept = []
        for adapter, batch in zip(names, ids, strict=True):
            wrapped.set_adapter(adapter)
            parameters = [p for p in wrapped.parameters() if p.requires_grad]
            loss = wrapped(batch, labels=batch, use_cache=False).loss
            kept.append(torch.autograd.grad(loss, parameters))

    report(name, step, ids.numel())


def main() -> None:
    """Runs the variants and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8B")
    parser.add_argument("--layers", type=int, help="fewer than the size has, for a trial")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--growth", action="store_true", help="the second table instead of the first")
    parser.add_argument("--peers", action="store_true", help="PEFT with bitsandbytes as well")
    parser.add_argument("--scheme", choices=("int8", "nf4"), help="that one alone, also of the peers")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    n, length = args.adapters, args.length
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {args.size}, {n} x 1 x {length} tokens")
    print("| | peak GiB | predicted | s | k tok/s |\n|---|---:|---:|---:|---:|")
    blocks: dict[str, Any] = {"remat": "blocks"}
    if args.growth:
        model = llama("1B", args.layers)
        base = ft.quantize_base_model(model)
        del model
        for count in (1, 2, 4, 8, 16):
            ours(base, count, length, f"N = {count}", blocks, None, "AdamW")
        return
    model = llama(args.size, args.layers)
    schemes = [args.scheme] if args.scheme else ["int8", "nf4"]
    for scheme in schemes:
        base = ft.quantize_base_model(model, scheme=scheme)
        if scheme == schemes[-1]:
            del model
        else:
            model.to("cpu")
        gc.collect()
        torch.cuda.empty_cache()
        print(f"| *{scheme} base, {base.nbytes / GIB:.2f} GiB* | | | | |")
        ours(base, n, length, f"{scheme}", blocks, None, "")
        ours(base, n, length, f"{scheme}, 4 adapters at a time", blocks, 4, "")
        ours(base, n, length, f"{scheme}, 2 adapters at a time, 8-bit AdamW", blocks, 2, "8-bit AdamW")
        ours(base, n, length, f"{scheme}, blocks compiled", {**blocks, "compile": "blocks"}, None, "")
        del base
        if scheme != schemes[-1]:
            model.to("cuda")
    if args.peers:
        for scheme in schemes:
            kind, replace = {"int8": ("LLM.int8", llm_int8), "nf4": ("nf4", nf4)}[scheme]
            name = f"PEFT + {kind}, one after another"
            gc.collect()
            torch.cuda.empty_cache()
            try:
                peft_row(name, replace(llama(args.size, args.layers)), n, length)
            except Exception as error:
                print(f"| {name} | failed: {type(error).__name__}: {str(error)[:160]} | | | |", flush=True)


if __name__ == "__main__":
    main()
