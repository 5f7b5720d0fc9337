"""Do Triton kernels win over plain torch, product by product, on one GPU?

Every kernel is first compared with a float32 reference (and its error told apart from that of a wrong adapter). Then
each product of a training step of a Llama of 1.1 B parameters with LoRA of rank 16 is timed: plain torch, eager and
compiled, torch's grouped product, Triton at several tile sizes, and what the bytes or the operations take at rates
measured in the same run. Times are those of a CUDA graph of many calls on rotating inputs, by events, per call: no
launch gaps, no inputs left in the cache. The last lines add the products up to a step of 16 layers.

On one H100 about a minute. Without a GPU, ``TRITON_INTERPRET=1 python benchmarks/kernels.py --smoke`` runs the checks
alone at small shapes, in float16.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetuna_func._quant import Int8
from finetuna_func.kernels import int8, lora

Run = Callable[[int], Any]  # a call on the i-th set of inputs
LAYERS = 16
RANK = 16
# (width, rank): how often in a layer. Queries, keys and values share their first product, as do gate and up.
PROJECTED = {(2048, 48): 1, (2048, 16): 1, (2048, 32): 1, (8192, 16): 1}
EXPANDED = {(2048, 16): 3, (512, 16): 2, (8192, 16): 2}
PARTS = ["check", "adapters4", "layer", "frozen", "W8A16", "dequantize", "adapters32"]
LAYOUTS = {"4 x 2048": (4, 2048), "32 x 512": (32, 512)}


@dataclass
class Row:
    """One line of the table."""

    part: str
    shape: str
    name: str
    us: float | None
    note: str


class Table:
    """Rows, printed as they come; a candidate that fails is a row that says so."""

    def __init__(self, budget_s: float) -> None:
        self.rows: list[Row] = []
        self.times: dict[tuple[str, str, str], float] = {}
        self.start, self.budget_s = time.perf_counter(), budget_s

    def spent(self) -> float:
        return time.perf_counter() - self.start

    def note(self, part: str, shape: str, name: str, us: float | None, note: str) -> None:
        self.rows.append(Row(part, shape, name, us, note))
        shown = "" if us is None else f"{us:9.1f} us"
        print(f"{part:10s} {shape:24s} {name:44s} {shown:12s} {note}", flush=True)

    def time(
        self, part: str, shape: str, name: str, run: Run, sets: int, *, gb: float = 0, tflop: float = 0, calls: int = 12
    ) -> float | None:
        """Times a candidate and adds its row; returns microseconds."""
        if self.spent() > self.budget_s:
            self.note(part, shape, name, None, "not run: over the budget")
            return None
        try:
            us = timed(run, sets, calls)
        except Exception as error:  # one candidate that fails must not lose the others' numbers
            torch.cuda.synchronize()
            self.note(part, shape, name, None, f"failed: {type(error).__name__}: {str(error).strip()[:200]!r}")
            return None
        rate = f"{gb / us * 1e6:7.0f} GB/s" if gb else f"{tflop / us * 1e6:7.0f} TFLOP/s" if tflop else ""
        self.note(part, shape, name, us, rate)
        self.times[part, shape, name] = us
        return us

    def best(self, part: str, shape: str, prefix: str) -> tuple[float, str] | None:
        """Returns the fastest candidate whose name begins so."""
        here = [(us, own[2]) for own, us in self.times.items() if own[:2] == (part, shape)]
        found = [own for own in here if own[1].startswith(prefix)]
        return min(found, default=None)


def timed(run: Run, sets: int, calls: int) -> float:
    """Returns the median microseconds of a call, from replays of a graph of ``calls`` of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(0)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            run(i % sets)
    graph.replay()
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def error(out: Tensor, reference: Tensor) -> float:
    """Returns the relative error in the Frobenius norm."""
    return float((out.float() - reference.float()).norm() / reference.float().norm())


def segments(lengths: Iterable[int]) -> list[slice]:
    """Returns each adapter's rows."""
    out, start = [], 0
    for length in lengths:
        out.append(slice(start, start + length))
        start += length
    return out


# A rounding to bfloat16 is 1.7e-3 in the norm: up to 2^-8 / sqrt(12) of the power of two below each number, on average.
# Sums in float32 add 1e-6 at these sizes; what is returned in float32 is rounded nowhere else.
ONE_ROUNDING, NONE = 3e-3, 2e-5


def check(smoke: bool) -> None:
    """Compares every kernel with float32 products adapter by adapter, on even, ragged and mixed rows."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for case, lengths in {
        "4 even": (40,) * 4 if smoke else (512,) * 4,
        "5 ragged": (33, 0, 1, 70, 16),
        "32 of 7": (7,) * 32,
    }.items():
        # Whole tiles, as models have them, or parts of tiles: width, width of the result, rank.
        whole = case == "4 even"
        sizes = ((64, 128, 16) if whole else (130, 72, 6)) if smoke else (2048, 1024, 16) if whole else (2050, 1100, 24)
        try:
            check_case(case, lengths, *sizes, smoke=smoke)
        except Exception as failure:
            print(f"check      {case} FAILED: {type(failure).__name__}: {str(failure)[:500]}", flush=True)


def check_case(case: str, lengths: tuple[int, ...], width: int, out_width: int, rank: int, *, smoke: bool) -> None:
    device, dtype = ("cpu", torch.float16) if smoke else ("cuda", torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    n, total, parts = len(lengths), sum(lengths), segments(lengths)
    ends = None if len(set(lengths)) == 1 else torch.tensor(lengths, device=device).cumsum(0).int()

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    def row(name: str, out: Tensor, reference: Tensor, wrong: Tensor, tolerance: float) -> None:
        right, other = error(out, reference), error(out, wrong)
        verdict = "ok" if right <= tolerance and other > 0.1 else "WRONG"
        name = f"{name}, {case}"
        print(f"check      {name:45s} error {right:.1e} <= {tolerance:.0e}, wrong adapter {other:.1e} > 0.1  {verdict}")

    def each(product: Callable[[slice, int], Tensor]) -> tuple[Tensor, Tensor]:
        own = [product(part, i) for i, part in enumerate(parts)]
        wrong = [product(part, (i + 1) % n) for i, part in enumerate(parts)]
        return torch.cat(own), torch.cat(wrong)

    x, y, g = draw(total, width), draw(total, out_width), draw(total, out_width)
    a, b = draw(n, rank, width).float(), draw(n, out_width, rank).float()  # float32, of numbers that bf16 holds
    low = draw(total, rank)
    row("project", lora.project(x, a, ends), *each(lambda s, i: x[s].float() @ a[i].T), ONE_ROUNDING)
    expected = each(lambda s, i: y[s].float() + low[s].float() @ b[i].T)
    row("expand", lora.expand(y, low, b, ends), *expected, ONE_ROUNDING)
    row("spread", lora.spread(low, a, ends), *each(lambda s, i: low[s].float() @ a[i]), ONE_ROUNDING)
    d_low, db = lora.expand_adjoint(g, low, b, ends)
    row("adjoint, d_low", d_low, *each(lambda s, i: g[s].float() @ b[i]), ONE_ROUNDING)
    sums = torch.stack([g[s].float().T @ low[s].float() for s in parts])
    row("adjoint, d_b in float32", db, sums, sums.roll(1, 0), NONE)
    same = torch.equal(lora.expand_adjoint(g, low, b, ends)[1], db)
    sums = torch.stack([low[s].float().T @ x[s].float() for s in parts])
    row("outer in float32", lora.outer(low, x, a, ends), sums, sums.roll(1, 0), NONE)
    codes, scale = Int8().quantize(draw(out_width, width, dtype=torch.float32)).values()
    weight = codes.float() * scale[:, None]
    expected = each(lambda s, i: x[s].float() @ weight.T + low[s].float() @ (16 * b[i]).T)
    row("int8 matmul with adapters", int8.matmul(x, codes, scale, low, 16 * b, ends), *expected, ONE_ROUNDING)
    exact = torch.equal(int8.dequantize(codes, scale, dtype), Int8().dequantize(dtype, codes, scale))
    print(f"check      dequantize bit for bit {'ok' if exact else 'WRONG'}, adjoint twice {'ok' if same else 'WRONG'}")


@dataclass(frozen=True)
class Rows:
    """A stack's rows, in as many sets that none is left in the cache."""

    n: int
    each: int
    width: int
    rank: int

    @property
    def total(self) -> int:
        return self.n * self.each

    @property
    def sets(self) -> int:
        return max(2, -(-200_000_000 // (2 * self.total * self.width)))

    def wide(self) -> list[Tensor]:
        return [torch.randn(self.total, self.width, device="cuda", dtype=torch.bfloat16) for _ in range(self.sets)]

    def low(self) -> list[Tensor]:
        return [torch.randn(self.total, self.rank, device="cuda", dtype=torch.bfloat16) for _ in range(self.sets)]

    def factor(self) -> Tensor:
        return torch.randn(self.n, self.rank, self.width, device="cuda", dtype=torch.bfloat16) / 45

    def ends(self) -> Tensor:
        return torch.arange(1, self.n + 1, device="cuda", dtype=torch.int32) * self.each

    def mask(self) -> Tensor:
        """Which of all adapters' columns are a row's own."""
        own = torch.eye(self.n, device="cuda", dtype=torch.bfloat16)
        return own.repeat_interleave(self.each, 0).repeat_interleave(self.rank, 1)

    def stacked(self, rows: Tensor) -> Tensor:
        return rows.view(self.n, self.each, -1)

    def gb(self, passes: float) -> float:
        """Gigabytes (10^9) of so many passes over the wide operand."""
        return passes * 2 * self.total * self.width / 1e9


PROJECT_TILES = [(64, 128, 4, 4), (32, 256, 4, 3), (64, 256, 8, 3)]
EXPAND_TILES = [(64, 128, 4), (128, 128, 8), (32, 256, 4)]
ADJOINT_TILES = [(128, 64, 4, 3, 2), (256, 64, 8, 3, 1), (256, 64, 8, 3, 2), (128, 128, 8, 3, 1), (64, 128, 4, 4, 4)]
OUTER_TILES = [(512, 64, 64, 4, 4), (512, 64, 128, 4, 3), (1024, 128, 64, 4, 3)]


def sweep(table: Table, part: str, shape: str, first: str | None, tiles: list[Any]) -> list[Any]:
    """Returns the tile sizes to try: all of them, or the best at the shape where all were tried."""
    best = None if first is None else table.best(part, first, "triton")
    if best is None or shape == first:
        return tiles
    return [tile for tile in tiles if best[1].endswith(str(tile))][:1] or tiles[:1]


def bench_project(table: Table, layout: str, rows: Rows, first: str | None, grouped: bool) -> str:
    """``x A^T``: the first product of the forward pass."""
    shape = f"{layout} K={rows.width} R={rows.rank}"
    xs, a, ends, gb = rows.wide(), rows.factor(), rows.ends(), rows.gb(1)
    table.time("project", shape, "torch bmm", lambda i: torch.bmm(rows.stacked(xs[i]), a.mT), rows.sets, gb=gb)
    if grouped:
        run = lambda i: torch._grouped_mm(xs[i], a.mT, offs=ends)  # noqa: E731
        table.time("project", shape, "torch _grouped_mm", run, rows.sets, gb=gb)
        run = lambda i: lora.launch_project(xs[i], a.mT, ends)  # noqa: E731
        table.time("project", shape, "ragged triton", run, rows.sets, gb=gb)
    if rows.n * rows.rank <= 256:
        flat, mask = a.flatten(0, 1), rows.mask()
        table.time("project", shape, "torch one product, masked", lambda i: (xs[i] @ flat.T) * mask, rows.sets, gb=gb)
    for tile in sweep(table, "project", shape, first, PROJECT_TILES):
        m, k, warps, stages = tile

        def run(i: int, m: int = m, k: int = k, warps: int = warps, stages: int = stages) -> Tensor:
            return lora.launch_project(xs[i], a.mT, None, block_m=m, block_k=k, warps=warps, stages=stages)

        table.time("project", shape, f"triton {tile}", run, rows.sets, gb=gb)
    return shape


def bench_expand(table: Table, layout: str, rows: Rows, first: str | None, add: bool, grouped: bool) -> str:
    """``y + low B^T``; without ``y``, the gradient of `bench_project` for its rows."""
    part = "expand" if add else "spread"
    shape = f"{layout} O={rows.width} R={rows.rank}"
    ys, lows, b, ends = rows.wide(), rows.low(), rows.factor().mT, rows.ends()
    gb = rows.gb(2 if add else 1)

    def plain(i: int) -> Tensor:
        low = rows.stacked(lows[i])
        return torch.baddbmm(rows.stacked(ys[i]), low, b.mT) if add else torch.bmm(low, b.mT)

    def tiled(i: int, tile: tuple[int, int, int], ends: Tensor | None) -> Tensor:
        m, n, warps = tile
        y = ys[i] if add else None
        return lora.launch_expand(y, lows[i], b, ends, block_m=m, block_n=n, warps=warps)

    table.time(part, shape, "torch " + ("baddbmm" if add else "bmm"), plain, rows.sets, gb=gb)
    if add:  # as inductor does it, one product and one sum
        run = lambda i: rows.stacked(ys[i]) + torch.bmm(rows.stacked(lows[i]), b.mT)  # noqa: E731
        table.time(part, shape, "torch bmm and add (as compiled)", run, rows.sets, gb=gb)
    if grouped:
        run = lambda i: torch._grouped_mm(lows[i], b.mT, offs=ends)  # noqa: E731
        table.time(part, shape, "torch _grouped_mm" + (" without the sum" if add else ""), run, rows.sets, gb=gb)
        table.time(part, shape, "ragged triton", lambda i: tiled(i, EXPAND_TILES[0], ends), rows.sets, gb=gb)
    for tile in sweep(table, part, shape, first, EXPAND_TILES):
        table.time(part, shape, f"triton {tile}", lambda i, tile=tile: tiled(i, tile, None), rows.sets, gb=gb)
    return shape


def bench_adjoint(table: Table, layout: str, rows: Rows, first: str | None, grouped: bool) -> str:
    """``g B`` and ``g^T low``."""
    shape = f"{layout} O={rows.width} R={rows.rank}"
    gs, lows, b, ends, gb = rows.wide(), rows.low(), rows.factor().mT.contiguous(), rows.ends(), rows.gb(1)
    wide = b.float()

    def plain(i: int) -> tuple[Tensor, Tensor]:
        g, low = rows.stacked(gs[i]), rows.stacked(lows[i])
        return torch.bmm(g, b), torch.bmm(g.mT, low).float()

    table.time("adjoint", shape, "torch two bmm", plain, rows.sets, gb=gb)
    if grouped:

        def by_group(i: int) -> tuple[Tensor, Tensor]:
            g = torch._grouped_mm(gs[i], b, offs=ends)
            return g, torch._grouped_mm(gs[i].t(), lows[i], offs=ends)

        table.time("adjoint", shape, "torch two _grouped_mm", by_group, rows.sets, gb=gb)
        run = lambda i: lora.launch_adjoint(gs[i], lows[i], wide, ends)  # noqa: E731
        table.time("adjoint", shape, "ragged triton", run, rows.sets, gb=gb)
    if rows.n * rows.rank <= 256:
        flat, mask = b.movedim(0, 1).flatten(1), rows.mask()

        def masked(i: int) -> tuple[Tensor, Tensor]:
            return (gs[i] @ flat) * mask, gs[i].t() @ (lows[i].repeat(1, rows.n) * mask)

        table.time("adjoint", shape, "torch one product, masked", masked, rows.sets, gb=gb)

    def two(i: int) -> tuple[Tensor, Tensor]:
        return lora.launch_project(gs[i], b, None), lora.launch_outer(lows[i], gs[i], rows.n, None, torch.float32)

    table.time("adjoint", shape, "triton in two passes", two, rows.sets, gb=gb)
    for tile in sweep(table, "adjoint", shape, first, ADJOINT_TILES):
        m, o, warps, stages, per = tile

        def run(i: int, m: int = m, o: int = o, warps: int = warps, stages: int = stages, per: int = per) -> Any:
            return lora.launch_adjoint(
                gs[i], lows[i], wide, None, block_m=m, block_n=o, warps=warps, stages=stages, per_processor=per
            )

        table.time("adjoint", shape, f"triton {tile}", run, rows.sets, gb=gb)
    return shape


def bench_outer(table: Table, layout: str, rows: Rows, first: str | None, grouped: bool) -> str:
    """``dlow^T x``: the gradient of A."""
    shape = f"{layout} K={rows.width} R={rows.rank}"
    xs, lows, ends, gb = rows.wide(), rows.low(), rows.ends(), rows.gb(1)
    run = lambda i: torch.bmm(rows.stacked(lows[i]).mT, rows.stacked(xs[i])).float()  # noqa: E731
    table.time("outer", shape, "torch bmm", run, rows.sets, gb=gb)
    if grouped:
        run = lambda i: torch._grouped_mm(lows[i].t(), xs[i], offs=ends)  # noqa: E731
        table.time("outer", shape, "torch _grouped_mm", run, rows.sets, gb=gb)
        run = lambda i: lora.launch_outer(lows[i], xs[i], rows.n, ends, torch.float32)  # noqa: E731
        table.time("outer", shape, "ragged triton", run, rows.sets, gb=gb)
    for tile in sweep(table, "outer", shape, first, OUTER_TILES):
        chunk, m, k, warps, stages = tile

        def run(i: int, c: int = chunk, m: int = m, k: int = k, warps: int = warps, stages: int = stages) -> Tensor:
            return lora.launch_outer(
                lows[i], xs[i], rows.n, None, torch.float32, chunk=c, block_m=m, block_n=k, warps=warps, stages=stages
            )

        table.time("outer", shape, f"triton {tile}", run, rows.sets, gb=gb)
    return shape


def bench_adapters(table: Table, layout: str, bandwidth: float) -> None:
    """All the adapters' products of a layer, then their sum over a step."""
    n, each = LAYOUTS[layout]
    lines: dict[str, dict[str, float]] = {}

    def add(part: str, shape: str, count: int, passes: float, rows: Rows) -> None:
        best = {"torch": table.best(part, shape, "torch"), "triton": table.best(part, shape, "triton")}
        if part == "expand":
            best["torch"] = table.best(part, shape, "torch bmm and add")
        plain = {"project": "torch bmm", "spread": "torch bmm", "outer": "torch bmm", "adjoint": "torch two bmm"}
        now = table.times.get((part, shape, plain.get(part, "torch bmm and add (as compiled)")))
        line = lines.setdefault(part, dict.fromkeys(("now", "torch", "triton", "bytes"), 0.0))
        line["now"] += LAYERS * count * (now or float("nan")) / 1e3
        line["bytes"] += LAYERS * count * rows.gb(passes) / bandwidth * 1e3
        for name, own in best.items():
            line[name] += LAYERS * count * (own[0] if own else float("nan")) / 1e3

    wide_first = sorted(PROJECTED, key=lambda own: -own[0])
    first: dict[str, str | None] = dict.fromkeys(("project", "spread", "outer", "expand", "adjoint"))
    for width, rank in wide_first:
        rows, grouped = Rows(n, each, width, rank), width == 8192 or rank == 48
        shape = bench_project(table, layout, rows, first["project"], grouped)
        first["project"] = first["project"] or shape
        add("project", shape, PROJECTED[width, rank], 1, rows)
        shape = bench_outer(table, layout, rows, first["outer"], grouped)
        first["outer"] = first["outer"] or shape
        add("outer", shape, PROJECTED[width, rank], 1, rows)
        shape = bench_expand(table, layout, rows, first["spread"], False, grouped)
        first["spread"] = first["spread"] or shape
        add("spread", shape, PROJECTED[width, rank], 1, rows)
    for width, rank in sorted(EXPANDED, key=lambda own: -own[0]):
        rows, grouped = Rows(n, each, width, rank), width == 8192
        shape = bench_expand(table, layout, rows, first["expand"], True, grouped)
        first["expand"] = first["expand"] or shape
        add("expand", shape, EXPANDED[width, rank], 2, rows)
        shape = bench_adjoint(table, layout, rows, first["adjoint"], grouped)
        first["adjoint"] = first["adjoint"] or shape
        add("adjoint", shape, EXPANDED[width, rank], 1, rows)
    for part, line in lines.items():
        told = ", ".join(f"{name} {ms:.2f}" for name, ms in line.items())
        table.note("step", layout, part, None, f"ms: {told}")
    total = {name: sum(line[name] for line in lines.values()) for name in ("now", "torch", "triton", "bytes")}
    told = ", ".join(f"{name} {ms:.2f}" for name, ms in total.items())
    table.note("step", layout, "all adapters' products", None, f"ms: {told}")


def bench_accumulate(table: Table) -> None:
    """The frozen product summed into the adapter's by cuBLAS, against a sum of its own; weights in bfloat16."""
    for out_width, width in ((8192, 2048), (2048, 8192), (2048, 2048)):
        rows = Rows(4, 2048, out_width, RANK)
        shape, flop = f"{width}->{out_width}", 2e-12 * rows.total * out_width * width
        x = Rows(4, 2048, width, RANK).wide()[:2]
        w = torch.randn(out_width, width, device="cuda", dtype=torch.bfloat16) / 45
        b, lows = rows.factor().mT.contiguous(), rows.low()

        def delta(i: int, rows: Rows = rows, b: Tensor = b, lows: list[Tensor] = lows) -> Tensor:
            return torch.bmm(rows.stacked(lows[i]), b.mT).view(rows.total, -1)

        own = dict(x=x, w=w, b=b, lows=lows, delta=delta)
        candidates: dict[str, Run] = {
            "frozen product alone": lambda i, o=own: F.linear(o["x"][i], o["w"]),
            "torch product + bmm, sum": lambda i, o=own: F.linear(o["x"][i], o["w"]) + o["delta"](i),
            "torch bmm, product summed into it": lambda i, o=own: o["delta"](i).addmm_(o["x"][i], o["w"].T),
            "triton expand, product summed into it": lambda i, o=own: lora.launch_expand(
                None, o["lows"][i], o["b"], None
            ).addmm_(o["x"][i], o["w"].T),
            "product, triton expand in place": lambda i, o=own: expand_into(
                F.linear(o["x"][i], o["w"]), o["lows"][i], o["b"]
            ),
        }  # fmt: skip
        for name, run in candidates.items():
            table.time("frozen", shape, name, run, 2, tflop=flop, calls=6)

    q, k, v = (torch.randn(size, 2048, device="cuda", dtype=torch.bfloat16) / 45 for size in (2048, 512, 512))
    rows = Rows(4, 2048, 2048, 48)
    gs = [[torch.randn(rows.total, w.shape[0], device="cuda", dtype=torch.bfloat16) for w in (q, k, v)] for _ in "ab"]
    a, lows = rows.factor(), rows.low()
    flop = 2e-12 * rows.total * 3072 * 2048

    def summed(i: int) -> Tensor:
        parts = [g @ w for g, w in zip(gs[i], (q, k, v), strict=True)]
        return sum_of_four(*parts, torch.bmm(rows.stacked(lows[i]), a).view(rows.total, -1))

    def chained(i: int) -> Tensor:
        dx = torch.bmm(rows.stacked(lows[i]), a).view(rows.total, -1)
        for g, w in zip(gs[i], (q, k, v), strict=True):
            dx.addmm_(g, w)
        return dx

    sum_of_four = torch.compile(lambda p, q, r, s: p + q + r + s, dynamic=False)
    table.time("frozen", "dx of q, k, v", "torch four products, compiled sum", summed, 2, tflop=flop, calls=6)
    table.time("frozen", "dx of q, k, v", "torch products summed into one another", chained, 2, tflop=flop, calls=6)


def expand_into(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """Returns ``y`` with the adapters' product added in place."""
    return lora.launch_expand(y, low, b, None, out=y)


def int8_weight(out_width: int, width: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(-127, 128, (out_width, width), device="cuda", dtype=torch.int8)
    return codes, torch.rand(out_width, device="cuda") / 127


def bench_dequantize(table: Table) -> None:
    """Codes to bfloat16."""
    scheme, shape = Int8(), "8192 x 2048"
    weights = [int8_weight(8192, 2048) for _ in range(6)]
    gb = 3 * 8192 * 2048 / 1e9
    compiled = torch.compile(lambda codes, scale: scheme.dequantize(torch.bfloat16, codes, scale), dynamic=False)
    candidates: dict[str, Run] = {
        "torch eager": lambda i: scheme.dequantize(torch.bfloat16, *weights[i]),
        "torch eager, codes alone": lambda i: weights[i][0].to(torch.bfloat16),
        "torch compiled": lambda i: compiled(*weights[i]),
    }
    for tile in [(4, 1024, 4), (1, 2048, 4), (8, 512, 4), (2, 2048, 8)]:
        o, k, warps = tile
        candidates[f"triton {tile}"] = lambda i, o=o, k=k, warps=warps: int8.launch_dequantize(
            *weights[i], torch.bfloat16, block_o=o, block_k=k, warps=warps
        )
    for name, run in candidates.items():
        table.time("dequantize", shape, name, run, 6, gb=gb)


def bench_int8_matmul(table: Table) -> None:
    """The frozen product from codes, at few rows and at many."""
    scheme = Int8()
    few = [(16, 64, 128, 4, 4), (16, 64, 256, 4, 3), (64, 64, 128, 4, 4), (128, 128, 64, 8, 4)]
    many = [(128, 128, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 128, 8, 3)]
    for rows, out_width, width in ((16, 8192, 2048), (64, 8192, 2048), (64, 2048, 8192), (512, 8192, 2048), (8192, 8192, 2048)):  # fmt: skip # noqa: E501
        weights = [int8_weight(out_width, width) for _ in range(8)]
        shape = f"{rows} rows {width}->{out_width}"
        x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
        floats = [scheme.dequantize(torch.bfloat16, *own) for own in weights]
        low = torch.randn(rows, RANK, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(4, out_width, RANK, device="cuda", dtype=torch.bfloat16)
        count = dict(gb=out_width * width / 1e9) if rows < 1000 else dict(tflop=2e-12 * rows * out_width * width)
        calls = 16 if rows < 1000 else 8

        def deq(i: int, x: Tensor = x, weights: list[tuple[Tensor, Tensor]] = weights) -> Tensor:
            return F.linear(x, int8.launch_dequantize(*weights[i], torch.bfloat16))

        candidates: dict[str, Run] = {
            "cuBLAS on a bfloat16 weight (no codes)": lambda i, x=x, w=floats: F.linear(x, w[i]),
            "torch eager": lambda i, x=x, w=weights: scheme.matmul(x, *w[i]),
            "triton dequantize, cuBLAS (as compiled)": deq,
        }
        for tile in few if rows < 1000 else many:
            m, o, k, warps, stages = tile
            if rows <= 64 and m == 128:
                continue
            sizes = dict(block_m=m, block_o=o, block_k=k, warps=warps, stages=stages)
            run = lambda i, x=x, w=weights, sizes=sizes: int8.launch_matmul(x, *w[i], **sizes)  # noqa: E731
            candidates[f"triton W8A16 {tile}"] = run
        for name, run in candidates.items():
            table.time("W8A16", shape, name, run, 8, calls=calls, **count)
        best = table.best("W8A16", shape, "triton W8A16")
        if best:
            m, o, k, warps, stages = ast.literal_eval(best[1].removeprefix("triton W8A16 "))
            sizes = dict(block_m=m, block_o=o, block_k=k, warps=warps, stages=stages)

            own = (x, weights, low, b, sizes)

            def with_lora(i: int, own: Any = own) -> Tensor:
                x, w, low, b, sizes = own
                return int8.launch_matmul(x, *w[i], low, b, None, **sizes)

            table.time("W8A16", shape, "with 4 adapters in its end: the best", with_lora, 8, calls=calls, **count)


class _Together(torch.autograd.Function):
    """A layer with its adapters, each sum taken up by the frozen product: what a route of its own could do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        low = lora.launch_project(x, a.mT, None)
        ctx.save_for_backward(x, a, b, codes, scale, low)
        y = lora.launch_expand(None, low, b, None)
        return y.addmm_(x, int8.launch_dequantize(codes, scale, x.dtype).T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, codes, scale, low = ctx.saved_tensors
        d_low, db = lora.launch_adjoint(grads[0], low, b, None)
        da = lora.launch_outer(d_low, x, a.shape[0], None, a.dtype)
        dx = lora.launch_expand(None, d_low, a.mT, None)
        return dx.addmm_(grads[0], int8.launch_dequantize(codes, scale, x.dtype)), da, db, None, None


def bench_layer(table: Table) -> None:
    """A whole layer forward and backward, 4 adapters of 2048 rows, params in float32."""
    scheme = Int8()

    def composite(x: Tensor, a: Tensor, b: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        y = x @ scheme.dequantize(x.dtype, codes, scale).mT
        low = torch.bmm(x.view(a.shape[0], -1, x.shape[-1]), a.to(x.dtype).mT)
        return (y.view(a.shape[0], -1, y.shape[-1]) + torch.bmm(low, b.to(x.dtype).mT)).view_as(y)

    def operators(x: Tensor, a: Tensor, b: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        y = x @ scheme.dequantize(x.dtype, codes, scale).mT
        return lora.expand(y, lora.project(x, a), b)

    for width, out_width in ((2048, 8192), (8192, 2048)):
        shape = f"{width}->{out_width}"
        xs = [torch.randn(8192, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
        gs = [torch.randn(8192, out_width, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        a = (torch.randn(4, RANK, width, device="cuda") / 45).requires_grad_()
        b = (torch.randn(4, out_width, RANK, device="cuda") / 45).requires_grad_()
        weight = int8_weight(out_width, width)
        floats = scheme.dequantize(torch.bfloat16, *weight)
        flop = 4e-12 * 8192 * width * out_width

        own = (xs, gs, a, b, weight)

        def step(layer: Callable[..., Tensor], own: Any = own) -> Run:
            xs, gs, a, b, w = own
            return lambda i: torch.autograd.grad(layer(xs[i], a, b, *w), (xs[i], a, b), gs[i])

        reference = step(composite)(0)
        candidates: dict[str, Run] = {
            "two frozen products alone": lambda i, xs=xs, gs=gs, w=floats: (F.linear(xs[i].detach(), w), gs[i] @ w),
            "torch eager": step(composite),
            "torch compiled": step(torch.compile(composite, fullgraph=True, dynamic=False)),
            "kernels as operators, compiled": step(torch.compile(operators, fullgraph=True, dynamic=False)),
            "kernels, sums taken up by cuBLAS": step(_Together.apply),
        }
        for name, run in candidates.items():
            table.time("layer", shape, name, run, 2, tflop=flop, calls=6)
            if name.startswith("kernels") and ("layer", shape, name) in table.times:
                errors = [error(own, plain) for own, plain in zip(run(0), reference, strict=True)]
                # Three roundings to bfloat16 in each of the two ways at most: 2 * sqrt(3) * 1.7e-3.
                verdict = "ok" if max(errors) < 6e-3 else "WRONG"
                told = ", ".join(f"{own:.1e}" for own in errors)
                table.note("layer", shape, name, None, f"dx, dA, dB differ from torch by {told}: {verdict}")
            torch.compiler.reset()


def copy_rate(table: Table) -> float:
    """Returns what a large copy reaches, in 10^9 bytes read or written per second."""
    source, target = torch.randn(2**28, device="cuda").view(2, -1)
    us = table.time("ceiling", "0.5 GiB", "copy", lambda i: target.copy_(source), 1, gb=2**30 / 1e9, calls=4)
    return 2**30 / 1e9 / us * 1e6 if us else float("nan")


def main() -> None:
    """Checks, then times, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the checks alone, at small shapes")
    parser.add_argument("--only", default="", help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--budget", type=float, default=80, help="seconds after which no further candidate is started")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else PARTS
    warnings.filterwarnings("ignore")

    table = Table(args.budget)
    if "check" in wanted or args.smoke:
        check(args.smoke)
        print(f"# checks: {table.spent():.0f} s", flush=True)
    if args.smoke:
        return
    bandwidth = copy_rate(table)
    parts: dict[str, Callable[[], None]] = {
        "adapters4": lambda: bench_adapters(table, "4 x 2048", bandwidth),
        "layer": lambda: bench_layer(table),
        "frozen": lambda: bench_accumulate(table),
        "W8A16": lambda: bench_int8_matmul(table),
        "dequantize": lambda: bench_dequantize(table),
        "adapters32": lambda: bench_adapters(table, "32 x 512", bandwidth),
    }
    for name, part in parts.items():
        if name not in wanted:
            continue
        try:
            part()
        except Exception as failure:
            print(f"{name} stopped: {type(failure).__name__}: {str(failure)[:500]}", flush=True)
        print(f"# {name}: {table.spent():.0f} s", flush=True)
    if args.json:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        report = {"commit": head.stdout.strip(), "argv": sys.argv, "rows": [asdict(row) for row in table.rows]}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
