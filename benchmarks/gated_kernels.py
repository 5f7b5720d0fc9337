"""How long do the kernels of gated MLPs take by themselves, tile by tile, against their bytes and plain torch?

What lies between the frozen products of a gated MLP, in bfloat16, with SiLU, on one GPU: forward (h and h A^T) and
backward (five cotangents). For each of the two passes:

  bytes           the time in which as many bytes are copied as the op is given and returns: tensors F wide, what is
                  r wide, and the parts of sums. The rate is that of `copy_` on 1 GiB, reads and writes counted.
  torch           the composite that defines what a kernel computes, eager
  torch compiled  and under torch.compile
  op              the library's, as it stands
  tile ...        its kernel, launched with the rows, columns, warps and stages of --forward or --backward

An op and its kernel leave the sums over parts to what comes after them, but for one that the op of the backward pass
forms (of `low`'s cotangents, uncompiled here); the composite has none to leave. Times are
medians, from CUDA events, with nothing in the L2 cache. Results of the op and of each tile are compared with the
composite in float32: one that is off by more than 2**-6 gets "wrong" for a time, and one that does not compile or run
the name of its error.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetuna_func import kernels
from finetuna_func._gated import _between, _between_backward
from finetuna_func.kernels import padded

EXAMPLES = """examples:
  python benchmarks/gated_kernels.py
  python benchmarks/gated_kernels.py --rank 64 --backward 32x64x4x1 32x32x2x1
  python benchmarks/gated_kernels.py --adapters 1 --rows 512 --json times.json
"""
TILE = "ROWSxCOLUMNSxWARPSxSTAGES"
GELU = False
TOLERANCE = 2**-6
"""Of the largest number of an output, and of its norm: four times the largest error of one rounding to bfloat16."""
COPIED = 2**30
FLUSHED = 256 * 2**20  # several times an L2 cache
FLUSHES = 8  # the GPU is at these while Python gets to the end of what is timed, so that no kernel is waited for

Tensors = tuple[Tensor, ...]
Launch = Callable[[], Any]


@dataclass(frozen=True)
class Tile:
    """How a kernel is launched."""

    rows: int
    columns: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.warps}x{self.stages}"


@dataclass
class Row:
    """One line of the table; ``failed`` says why there is no time."""

    which: str
    what: str
    us: float | None = None
    of_bytes: float | None = None
    registers: int | None = None
    spills: int | None = None
    failed: str = ""

    def __str__(self) -> str:
        time = self.failed if self.us is None else f"{self.us:.1f}"
        ratio = "" if self.of_bytes is None else f"{self.of_bytes:.2f}"
        registers, spills = ("" if count is None else str(count) for count in (self.registers, self.spills))
        return LINE.format(self.which, self.what, time, ratio, registers, spills).rstrip()


LINE = "{:8s}  {:22s}  {:>16s}  {:>14s}  {:>9s}  {:>6s}"
HEADER = LINE.format("pass", "what", "microseconds", "of bytes' time", "registers", "spills")


@dataclass(frozen=True)
class Pass:
    """Forward or backward: what is timed, and how its results become those of the composite."""

    name: str
    inputs: Tensors
    composite: Callable[..., Tensors]
    op: Callable[..., Tensors]
    launch: Callable[[Tensors, Tile], tuple[Launch, Tensors]]
    summed: Callable[[Tensors], Tensors]


def draw(adapters: int, rows: int, width: int, rank: int, device: str = "cuda") -> Tensors:
    """Returns gu, low, b_g, b_u, a, d_h and d_low_h, as the ops take them."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).bfloat16()

    total = adapters * rows
    factors = [normal(adapters, width, rank, scale=rank**-0.5) for _ in range(2)]
    factors.append(normal(adapters, rank, width, scale=width**-0.5))
    return normal(total, 2 * width), normal(total, 2 * rank), *factors, normal(total, width), normal(total, rank)


def launch_forward(inputs: Tensors, tile: Tile) -> tuple[Launch, Tensors]:
    """Returns what launches the kernel with a tile, as `gated` does, and the tensors that it writes to."""
    from finetuna_func.kernels import gated as own

    gu, low, b_g, b_u, a = inputs
    (n, width, rank_g), rank_u, rank_h = b_g.shape, b_u.shape[-1], a.shape[-2]
    total = gu.shape[0]
    rows, blocks = total // n, -(-width // tile.columns)
    parts = min(own.SPLITS, blocks)
    cols = -(-blocks // parts) * tile.columns
    kernel: Any = own._forward_kernel  # which has no types for what is about the launch
    h = gu.new_empty(total, width)
    low_h = gu.new_empty(parts, total, rank_h, dtype=torch.float32)

    def launch() -> Any:
        return kernel[(n * -(-rows // tile.rows) * parts,)](
            gu, low, b_g, b_u, a, h, low_h, total, rows, width, cols,
            RG=rank_g, RU=rank_u, RH=rank_h, BG=padded(rank_g), BU=padded(rank_u), BH=padded(rank_h),
            GELU=GELU, PARTS=parts, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    return launch, (h, low_h)


def launch_backward(inputs: Tensors, tile: Tile) -> tuple[Launch, Tensors]:
    """Returns what launches the kernel with a tile, and the tensors that it writes to; the op launches it twice."""
    from finetuna_func.kernels import gated as own

    gu, low, b_g, b_u, a, d_h, d_low_h = inputs
    (n, width, rank_g), rank_u, rank_h = b_g.shape, b_u.shape[-1], a.shape[-2]
    total = gu.shape[0]
    rows, blocks = total // n, -(-width // tile.columns)
    chunks = -(-rows // own.CHUNK)
    kernel: Any = own._backward_kernel
    d_g, d_u = torch.empty_like(d_h), torch.empty_like(d_h)
    d_low = gu.new_empty(blocks, total, rank_g + rank_u)
    d_bg, d_bu, d_a = (
        gu.new_empty(n, chunks, *shape, dtype=torch.float32)
        for shape in ((width, rank_g), (width, rank_u), (rank_h, width))
    )

    def launch() -> Any:
        return kernel[(n * chunks * blocks,)](
            gu, low, b_g, b_u, a, d_h, d_low_h, d_g, d_u, d_low, d_bg, d_bu, d_a, 0, total, rows, width, own.CHUNK,
            RG=rank_g, RU=rank_u, RH=rank_h, BG=padded(rank_g), BU=padded(rank_u), BH=padded(rank_h),
            GELU=GELU, BLOCK_M=tile.rows, BLOCK_N=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    return launch, (d_g, d_u, d_low, d_bg, d_bu, d_a)


def summed_forward(outputs: Tensors) -> Tensors:
    """Returns h and h A^T."""
    h, low_h = outputs
    return h, low_h.sum(0)


def summed_backward(outputs: Tensors) -> Tensors:
    """Returns the cotangents of the gate, up, low, b_g, b_u and a."""
    d_g, d_u, d_low, *d_factors = outputs
    d_low = d_low if d_low.ndim == 2 else d_low.sum(0, dtype=torch.float32)  # of the op a sum already
    return d_g, d_u, d_low, *(part.sum(1) for part in d_factors)


def backward_in_place(*inputs: Any) -> Tensors:
    """Returns what `launch_backward` writes to, of the op, which replaces d_h and sums up d_low."""
    from finetuna_func.kernels.gated import gated_backward_

    d_g, *others = gated_backward_(*inputs)
    return d_g, inputs[5], *others


def passes(numbers: Tensors) -> tuple[Pass, Pass]:
    """Returns both, of what `draw` returns."""
    from finetuna_func.kernels.gated import gated

    return (
        Pass("forward", numbers[:5], _between, gated, launch_forward, summed_forward),
        Pass("backward", numbers, _between_backward, backward_in_place, launch_backward, summed_backward),
    )


def exact(own: Pass) -> Tensors:
    """Returns the results of the composite in float32."""
    return own.composite(*(given.float() for given in own.inputs), GELU, False)


def agree(found: Tensors, expected: Tensors) -> bool:
    """Returns whether results are within `TOLERANCE` of those in float32; NaN is not."""

    def close(one: Tensor, other: Tensor) -> bool:
        error = one.float() - other
        largest = float(error.abs().max()) <= TOLERANCE * float(other.abs().max())
        return largest and float(error.norm()) <= TOLERANCE * float(other.norm())

    return all(one.shape == other.shape and close(one, other) for one, other in zip(found, expected, strict=True))


def checked_launch(own: Pass, tile: Tile, expected: Tensors) -> tuple[Launch, Any, bool]:
    """Returns what launches a tile, its compiled kernel, and whether its results are right."""
    launch, outputs = own.launch(own.inputs, tile)
    for output in outputs:
        output.fill_(torch.nan)  # so that what is not written to is noticed
    kernel = launch()
    return launch, kernel, agree(own.summed(outputs), expected)


def timed(run: Launch, repeats: int) -> float:
    """Returns the median time in seconds, after warm-up, each with nothing in the L2 cache."""
    scratch = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(FLUSHES):
            scratch.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def copy_rate(repeats: int) -> float:
    """Returns the bytes per second of a copy, read and written."""
    source = torch.randn(COPIED // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / timed(lambda: target.copy_(source), repeats)


def rows_of(own: Pass, tiles: list[Tile], rate: float, repeats: int) -> Iterator[Row]:
    """Yields the lines of a pass, each when it is measured."""
    replaced = [given.clone() for given in own.inputs]  # by each run of the op in its own place
    parts = own.op(*replaced, GELU)
    seconds = sum(tensor.nbytes for tensor in (*own.inputs, *parts)) / rate
    yield Row(own.name, "bytes", seconds * 1e6, 1.0)
    expected = exact(own)
    right = agree(own.summed(parts), expected)
    del parts
    compiled = torch.compile(own.composite, fullgraph=True, dynamic=False)

    def measured(what: str, get_ready: Callable[[], tuple[Launch, Any, bool]]) -> Row:
        row = Row(own.name, what)
        try:
            run, kernel, right = get_ready()
            row.registers, row.spills = getattr(kernel, "n_regs", None), getattr(kernel, "n_spills", None)
            if not right:
                row.failed = "wrong"
                return row
            time = timed(run, repeats)
        except Exception as error:  # one tile that fails must not lose the others' times
            row.failed = type(error).__name__
            return row
        row.us, row.of_bytes = time * 1e6, time / seconds
        return row

    yield measured("torch", lambda: (lambda: own.composite(*own.inputs, GELU, False), None, True))
    yield measured("torch compiled", lambda: (lambda: compiled(*own.inputs, GELU, False), None, True))
    yield measured("op", lambda: (lambda: own.op(*replaced, GELU), None, right))
    for tile in tiles:
        yield measured(f"tile {tile}", lambda tile=tile: checked_launch(own, tile, expected))


def number_from(low: int, high: int | None = None) -> Callable[[str], int]:
    """Returns what checks a whole number of the command line."""

    def number(text: str) -> int:
        if re.fullmatch(r"\d{1,9}", text) and low <= int(text) <= (high or int(text)):
            return int(text)
        expected = f"at least {low}" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, {expected}")

    return number


def tile_named(text: str) -> Tile:
    """Returns the tile of a text such as ``32x64x2x1``."""

    def power_of_two(number: int) -> bool:
        return number > 0 and number & (number - 1) == 0

    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})x(\d{1,9})x(\d{1,9})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: expected {TILE}, such as 32x64x2x1")
    tile = Tile(*map(int, found.groups()))
    for name, size in (("rows", tile.rows), ("columns", tile.columns)):
        if size < 16 or not power_of_two(size):
            raise argparse.ArgumentTypeError(f"{text}: {size} {name}; expected a power of two, at least 16")
    if tile.warps > 16 or not power_of_two(tile.warps):
        raise argparse.ArgumentTypeError(f"{text}: {tile.warps} warps; expected 1, 2, 4, 8 or 16")
    if tile.stages < 1:
        raise argparse.ArgumentTypeError(f"{text}: {tile.stages} stages; expected at least 1")
    return tile


def what_lacks() -> str:
    """Returns why nothing can be measured here, or an empty text."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, and torch sees none"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if not kernels.available(torch.device("cuda")):
        return "needs an NVIDIA GPU whose tensor cores take bfloat16 (compute capability 8.0 or later)"
    return ""


def main() -> None:
    """Measures both passes and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, tiles = number_from(1), {"nargs": "+", "type": tile_named, "metavar": TILE}
    forward, backward = "32x128x2x3 32x64x2x2 64x128x4x2", "32x64x2x1 64x64x4x1 32x64x4x1 64x128x8x1"
    parser.add_argument("--adapters", type=count, default=4, metavar="N", help="default %(default)s")
    parser.add_argument("--rows", type=count, default=2048, metavar="N", help="of each adapter, default %(default)s")
    parser.add_argument("--width", type=count, default=8192, metavar="F", help="of the MLP, default %(default)s")
    of_rank = f"of each adapter, 1 to {kernels.MAX_RANK}, default %(default)s"
    parser.add_argument("--rank", type=number_from(1, kernels.MAX_RANK), default=16, metavar="R", help=of_rank)
    powers = "rows and columns: powers of two, at least 16; warps: 1, 2, 4, 8 or 16"
    parser.add_argument(
        "--forward", **tiles, default=[*map(tile_named, forward.split())], help=f"tiles, default {forward} ({powers})"
    )
    parser.add_argument(
        "--backward", **tiles, default=[*map(tile_named, backward.split())], help=f"likewise, default {backward}"
    )
    parser.add_argument("--repeats", type=count, default=20, metavar="N", help="of each time, default %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows here, after each")
    args = parser.parse_args()
    if lacking := what_lacks():
        parser.exit(2, f"{parser.prog}: error: {lacking}\n")

    import triton

    rate = copy_rate(args.repeats)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"{rate / 1e12:.2f} TB/s copy; "
        f"{args.adapters} adapters x {args.rows} rows, width {args.width}, rank {args.rank}"
    )
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    report = {"commit": head.stdout.strip(), "argv": sys.argv, "rate": rate, "rows": []}
    torch.cuda.empty_cache()

    print(HEADER)
    numbers = draw(args.adapters, args.rows, args.width, args.rank)
    for own, chosen in zip(passes(numbers), (args.forward, args.backward), strict=True):
        for row in rows_of(own, chosen, rate, args.repeats):
            print(row, flush=True)
            report["rows"].append(asdict(row))
            if args.json:
                args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
