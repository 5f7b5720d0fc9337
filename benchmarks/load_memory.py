"""How much host memory and time does it take to come from a checkpoint on disk to a model in 8 bits?

Each way in a process of its own, on SmolLM2-135M (float32 on disk) and on a Llama-shaped checkpoint
of 1.1 B parameters (bfloat16), which is made of random numbers file by file in a temporary folder.
The ways:

  load_base                ft.load_base of the checkpoint
  load_base, GPU           the same with device="cuda", where there is one; what is allowed is two largest tensors
  load_base, saved         ft.load_base of what ft.save_base wrote, and one forward of 8 tokens, since
                           a mapped base is read when it is used
  quantize_base_model      ft.quantize_base_model(from_pretrained(...))
  LLM.int8                 transformers with BitsAndBytesConfig(load_in_8bit=True)

All quantize the same layers: every linear layer and the embedding but the head's matrix, except
LLM.int8, which leaves embeddings in float. The columns, all of what was there when the process had
imported everything and loaded one tiny model:

  peak MB                  resident memory, by the kernel's high-water mark (VmHWM)
  anonymous MB             that part of it that no file backs, sampled every 2 ms: the kernel can drop
                           the pages of a mapped file, and processes share them
  of the base              peak by the bytes of the model that was made
  allowed                  1.15 times the bytes of the base, and its largest tensor as it is on disk

Linux only. The weights of SmolLM2 are fetched on first use (see examples/real_data.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import finetuna_func as ft

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import real_data

EXAMPLES = """examples:
  python benchmarks/load_memory.py                     both models: two minutes, 6 GB of disk for as long
  python benchmarks/load_memory.py --models smollm2    a first look
"""

# TinyLlama's shape: 1.1 B parameters.
SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "dtype": torch.bfloat16,
}
TINY: dict[str, Any] = SHAPE | {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def make_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """Writes a Llama checkpoint of random numbers, a file for each layer, which alone is in memory."""
    config = LlamaConfig(**shape)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, leaf in model.state_dict().items():
        found = re.search(r"layers\.(\d+)\.", name)
        parts.setdefault(found[1] if found else name, {})[name] = tuple(leaf.shape)
    generator = torch.Generator().manual_seed(0)
    placed, total = {}, 0
    for number, names in enumerate(tqdm(parts.values(), desc="making a checkpoint", disable=None), 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {name: torch.randn(size, generator=generator).mul_(0.02).bfloat16() for name, size in names.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        placed.update(dict.fromkeys(names, file))
        total += sum(leaf.nbytes for leaf in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def largest_tensor(folder: Path) -> int:
    """Returns the bytes of the largest tensor in a checkpoint."""
    largest = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (a handle is no dict)
                largest = max(largest, opened.get_tensor(name).nbytes)
    return largest


# --- the ways, each run in a process of its own


def load_base(folder: Path, device: str = "cpu") -> ft.Base:
    return ft.load_base(folder, device=device, progress=False)


def load_saved(folder: Path) -> ft.Base:
    base = ft.load_base(folder)
    with torch.no_grad():
        ft.apply(base, None, input_ids=torch.arange(8)[None])
    return base


def quantize(folder: Path) -> ft.Base:
    return ft.quantize_base_model(AutoModelForCausalLM.from_pretrained(folder))


def llm_int8(folder: Path) -> nn.Module:
    config = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def load_on_gpu(folder: Path) -> ft.Base:
    return load_base(folder, "cuda")


WAYS: dict[str, Callable[[Path], Any]] = {
    "load_base": load_base,
    "load_base, GPU": load_on_gpu,
    "load_base, saved": load_saved,
    "quantize_base_model": quantize,
    "LLM.int8": llm_int8,
}


def resident(*fields: str) -> list[int]:
    """Returns lines of /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return [1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in fields]  # type: ignore[index]


@contextmanager
def sampled(found: dict[str, int]) -> Iterator[None]:
    """Keeps the largest RssAnon, looked at every 2 ms."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.002):
            found["anonymous"] = max(found["anonymous"], resident("RssAnon")[0])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def child(way: str, folder: Path, warm: Path) -> None:
    """Runs one way and prints what it took, as JSON."""
    logging.disable_progress_bar()
    run = WAYS[way]
    run(warm)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    rss, anonymous = resident("VmRSS", "RssAnon")
    found = {"anonymous": 0}
    start = time.perf_counter()
    with sampled(found):
        made = run(folder)
    seconds = time.perf_counter() - start
    nbytes = made.nbytes if isinstance(made, ft.Base) else made.get_memory_footprint()
    peak = resident("VmHWM")[0] - rss
    print(json.dumps({"peak": peak, "anonymous": found["anonymous"] - anonymous, "seconds": seconds, "bytes": nbytes}))


def measured(way: str, folder: Path, warm: Path) -> dict[str, float]:
    """Returns what a way took, in a fresh process."""
    command = [sys.executable, __file__, "--child", way, str(folder), str(warm)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows(name: str, folder: Path, scratch: Path, ways: list[str]) -> Iterator[str]:
    """Yields the lines of the table for one checkpoint."""
    tiny, tiny_saved, saved = scratch / "tiny", scratch / "tiny-saved", scratch / f"{name}-saved"
    if not tiny.exists():
        make_checkpoint(tiny, TINY)
        ft.save_base(tiny_saved, ft.load_base(tiny))
    if "load_base, saved" in ways:  # in another process, so that its memory is given back
        code = "import sys, finetuna_func as ft; ft.save_base(sys.argv[2], ft.load_base(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(folder), str(saved)], check=True)
    for way in ways:
        at, warm = (saved, tiny_saved) if way == "load_base, saved" else (folder, tiny)
        took = measured(way, at, warm)
        largest = largest_tensor(folder)
        allowed = {"load_base": 1.15 * took["bytes"] + largest, "load_base, GPU": 2 * largest}.get(way)
        megabytes = [f"{took[key] / 1e6:.0f}" for key in ("bytes", "peak", "anonymous")]
        cells = [name, way, *megabytes, f"{took['peak'] / took['bytes']:.2f}"]
        yield f"| {' | '.join(cells)} | {f'{allowed / 1e6:.0f}' if allowed else ''} | {took['seconds']:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="smollm2,llama-1.1b", help="of smollm2, llama-1.1b")
    parser.add_argument("--ways", default=";".join(WAYS), help="of those above, with ; between them")
    parser.add_argument("--scratch", default=None, help="folder for temporary files")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, folder, warm = arguments.child
        return child(way, Path(folder), Path(warm))
    if not os.path.exists("/proc/self/clear_refs"):
        sys.exit("load_memory.py reads /proc, which this system does not have.")
    chosen = [way.strip() for way in arguments.ways.split(";")]
    ways = [way for way in WAYS if way in chosen and ("GPU" not in way or torch.cuda.is_available())]
    print("| checkpoint | way | base MB | peak MB | anonymous MB | of the base | allowed MB | s |")
    print("|---|---|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for name in arguments.models.split(","):
            folder = Path(scratch) / name
            if name == "smollm2":
                folder = real_data.smollm2_path()
            else:
                make_checkpoint(folder, SHAPE)
            for line in rows(name, folder, Path(scratch), ways):
                print(line, flush=True)
    return None


if __name__ == "__main__":
    main()
