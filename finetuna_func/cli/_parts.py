"""How many adapters are trained at once: all, or stack after stack where memory does not hold them."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import replace

import torch

import finetuna_func as ft
from finetuna_func.train import Settings, Task, fresh

SPARE = 0.9
"""Share of the free memory that is used: `ft.memory_report` counts no fragmentation and no kernel's workspace."""


def parts_of(count: int, at_once: int) -> list[list[int]]:
    """Returns which of so many adapters go together, in order: as few stacks as possible, all about as large.

    Example:
        >>> parts_of(7, 3)
        [[0, 1, 2], [3, 4], [5, 6]]
    """
    stacks = -(-count // at_once)
    sizes = [count // stacks + (i < count % stacks) for i in range(stacks)]
    return [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(stacks)]


def fitting(
    base: ft.Base,
    tasks: Sequence[Task],
    settings: Settings,
    adapt: Sequence[str] | None,
    plain: Sequence[str],
    *,
    available: int | None = None,
) -> int:
    """Returns how many of the adapters can be trained at once: on CUDA as many as its free memory holds, else all.

    Args:
        base: The base, on the device.
        tasks: All of them; those of the highest ranks are taken for any.
        settings: What they share.
        adapt: As for `fresh`.
        plain: Likewise.
        available: Bytes that may be used, the base included; asked of a CUDA device if ``None``.

    Raises:
        MemoryError: There is not even room for one.
    """
    device = next(iter(base.params.values())).device
    if available is None:
        if device.type != "cuda":
            return len(tasks)
        available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    available = int(SPARE * available)
    by_rank = sorted(tasks, key=lambda task: task.adapter.r, reverse=True)
    # One of each rank, with values that cost nothing to find; the rest is shapes.
    made = {task.adapter.r: _shape_of(base, task, adapt, plain) for task in by_rank}
    length = max(sum(map(len, row)) for task in tasks for row in (*task.rows, *task.held_out))
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-3))

    def report_of(count: int) -> ft.MemoryReport:
        stacked = ft.stack([made[task.adapter.r] for task in by_rank[:count]])
        remat = "blocks" if settings.remat else None
        report = ft.memory_report(base, stacked, (count, settings.batch_size, length), tx=tx, remat=remat)
        # Beside the step there is a copy of the best so far; and of old and new, while one is chosen by adapter.
        kept = 2 * report.adapters + report.optimizer
        return replace(report, adapters=report.adapters + kept, peak=report.peak + kept)

    counts = range(1, len(tasks) + 1)
    fit = bisect.bisect_left(counts, True, key=lambda count: report_of(count).peak > available)
    if not fit:
        report_of(1).check(available=available)
    return fit


def _shape_of(base: ft.Base, task: Task, adapt: Sequence[str] | None, plain: Sequence[str]) -> ft.Finetuned:
    simple = replace(task, adapter=replace(task.adapter, init="default"))
    return ft.index(fresh(base, [simple], adapt, plain), 0).to("meta")
