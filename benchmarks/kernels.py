"""Do the Triton kernels win over plain torch, on one GPU?

Both products that `finetuna_func.kernels` replaces, at the widths of a Llama of 1.1 B parameters with LoRA of rank 16:
first compared with float32 (the tests compare them more closely), then timed beside plain torch, eager and compiled,
and beside what the bytes take at the rate of a large copy in the same run. Times are those of a CUDA graph of many
calls on rotating inputs, by events, per call: no launch gaps, no inputs left in the cache. Each candidate is compiled,
as it is in a compiled block.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetuna_func.kernels import lora

Run = Callable[[int], Any]  # a call on the i-th set of inputs
LAYOUTS = ((4, 2, 1024), (32, 1, 512))  # adapters, batch of each, tokens
WIDTHS = (8192, 2048, 512)
SETS, CALLS = 3, 12


@dataclass
class Row:
    """One line of the table."""

    product: str
    shape: str
    name: str
    us: float
    gb_per_s: float
    error: float


def timed(run: Run) -> float:
    """Returns the median microseconds of a call, from replays of a graph of many."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(SETS):
            run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(CALLS):
            run(i % SETS)
    graph.replay()
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def error(out: Any, exact: Any) -> float:
    """Returns the largest relative error of several tensors, each in the Frobenius norm."""
    pairs = zip(out, exact, strict=True) if isinstance(out, tuple) else [(out, exact)]
    return max(float((own.float() - other).norm() / other.norm()) for own, other in pairs)


def each(b: Tensor, rows: int) -> Tensor:
    """A factor ``(N, O, R)`` for each of the rows ``(N * B, T)``."""
    return b.unsqueeze(1).expand(-1, rows // b.shape[0], -1, -1).reshape(rows, *b.shape[1:])


def expand_plain(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    return y + torch.bmm(low, each(b, y.shape[0]).mT)


def expand_fused(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    n = b.shape[0]
    return torch.baddbmm(y.reshape(n, -1, y.shape[-1]), low.reshape(n, -1, low.shape[-1]), b.mT).view_as(y)


def adjoint_plain(g: Tensor, low: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    n = b.shape[0]
    g_rows, low_rows = g.reshape(n, -1, g.shape[-1]), low.reshape(n, -1, low.shape[-1])
    return torch.bmm(g_rows, b).view_as(low), torch.bmm(g_rows.mT, low_rows)


def adjoint_by_rows(g: Tensor, low: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    d_b = torch.bmm(g.mT, low)
    return torch.bmm(g, each(b, g.shape[0])), d_b.view(b.shape[0], -1, *d_b.shape[1:]).sum(1)


def copy_rate() -> float:
    """Returns what a large copy reaches, in 10^9 bytes read or written per second."""
    source, target = torch.randn(2**28, device="cuda").view(2, -1)
    return 2**30 / 1e3 / timed(lambda i: target.copy_(source))


def candidates() -> dict[str, dict[str, Callable[..., Any]]]:
    """Returns what is compared, by product."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, fullgraph=True)

    return {
        "expand": {
            "torch: bmm and add": expand_plain,
            "torch: baddbmm": expand_fused,
            "torch compiled: bmm and add": compiled(expand_plain),
            "Triton": compiled(lambda *own: lora.expand(*own)),
        },
        "adjoint": {
            "torch: two bmm": adjoint_plain,
            "torch compiled: two bmm by rows": compiled(adjoint_by_rows),
            "Triton": compiled(lambda *own: lora.expand_adjoint(*own)),
        },
    }


def main() -> None:
    """Checks and times, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    rate = copy_rate()
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{device}, rank {args.rank}, bfloat16; a copy {rate:.0f} GB/s")
    rows: list[Row] = []
    for n, batch, tokens in LAYOUTS:
        for width in WIDTHS:
            torch.compiler.reset()
            wide = [numbers(n * batch, tokens, width) for _ in range(SETS)]
            low = [numbers(n * batch, tokens, args.rank) for _ in range(SETS)]
            b = numbers(n, width, args.rank)
            references = {"expand": expand_plain, "adjoint": adjoint_plain}
            for product, own in candidates().items():
                exact = references[product](wide[0].float(), low[0].float(), b.float())
                gb = wide[0].numel() * 2e-9 * (2 if product == "expand" else 1)
                shape = f"{n} x {batch} x {tokens}, {width} wide"
                for name, function in own.items():

                    def run(i: int, own: Any = (function, wide, low, b)) -> Any:
                        function, wide, low, b = own
                        return function(wide[i], low[i], b)

                    row = Row(product, shape, name, timed(run), 0.0, error(run(0), exact))
                    row.gb_per_s = gb / row.us * 1e6
                    rows.append(row)
                    print(f"{product:8s} {shape:28s} {name:32s} {row.us:8.1f} us {row.gb_per_s:6.0f} GB/s  "
                          f"error {row.error:.1e}", flush=True)  # fmt: skip
    if args.json:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        report = {"commit": head.stdout.strip(), "argv": sys.argv, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(report, indent=1))
    # A rounding to bfloat16 is 1.7e-3 in the norm, and plain torch's sums may be rounded twice.
    wrong = [row for row in rows if not row.error <= 6e-3]
    sys.exit("\n".join(f"WRONG: {row}" for row in wrong) or 0)


if __name__ == "__main__":
    main()
