"""What is seen of a run: a live table in a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from finetuna_func.train import DIVERGED, FINISHED, RUNNING, STOPPED, Report, Settings, Task, TrainState, total_steps

STATUS = {
    RUNNING: "[cyan]training[/]",
    FINISHED: "[green]done[/]",
    STOPPED: "[yellow]stopped[/]",
    DIVERGED: "[bold red]diverged[/]",
}
STATUS_NAMES = {RUNNING: "running", FINISHED: "finished", STOPPED: "stopped early", DIVERGED: "diverged"}


@contextmanager
def phase(console: Console, what: str) -> Iterator[None]:
    """Shows a spinner, then one line with the time it took."""
    begun = time.perf_counter()
    with console.status(f"{escape(what)} ..."):
        yield
    console.print(f"{escape(what)} [dim]{time.perf_counter() - begun:.1f} s[/]", highlight=False, soft_wrap=True)


class Display:
    """Shows how far each adapter is: a live table in a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, tasks: Sequence[Task], settings: Settings, state: TrainState) -> None:
        self.console, self.tasks = console, tasks
        self.totals = [total_steps(task, settings) for task in tasks]
        self.longest = max(self.totals)
        self.began, self.first = time.perf_counter(), state.step
        self.tokens = [0] * len(tasks)
        self.losses, self.weights = [0.0] * len(tasks), [0.0] * len(tasks)
        self.held_out = [loss if math.isfinite(loss) else math.nan for loss in state.best_loss.tolist()]
        self.rates = [math.nan] * len(tasks)
        self.done = [min(state.step, total) for total in self.totals]
        self.status = state.status.tolist()
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self.live is not None:
            self.live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live is not None:
            self.live.__exit__(kind, error, at)

    def show(self, state: TrainState, report: Report) -> None:
        """Shows a step."""
        self.status = state.status.tolist()
        for i, loss in enumerate(report.losses.tolist()):
            if report.tokens[i]:
                self.done[i] = report.step
                self.tokens[i] += int(report.tokens[i])
                self.rates[i] = float(report.rates[i])
                self.losses[i], self.weights[i] = 0.85 * self.losses[i] + loss, 0.85 * self.weights[i] + 1
            if not math.isnan(held_out := float(report.held_out[i])):
                self.held_out[i] = held_out
        if self.live is not None:
            self.live.update(self.table(), refresh=True)
            return
        evaluated = not report.held_out.isnan().all()
        if evaluated or report.step % max(1, self.longest // 10) == 0 or report.step == self.longest:
            self.console.print(self.line(report), highlight=False, soft_wrap=True)

    def line(self, report: Report) -> str:
        """Returns what has changed, for a log."""
        if len(self.tasks) > 6:
            return self.short_line(report)
        parts = []
        for i, task in enumerate(self.tasks):
            if report.tokens[i]:
                held_out = float(report.held_out[i])
                parts.append(f"{task.name} {self.loss(i)}" + ("" if math.isnan(held_out) else f" ({held_out:.3f})"))
                if self.status[i] != RUNNING:
                    parts[-1] += f" {STATUS_NAMES[self.status[i]]}"
        return escape(f"step {report.step}/{self.longest}: {', '.join(parts)}; {self.speed()}")

    def short_line(self, report: Report) -> str:
        """Returns the same of many adapters."""
        running = sum(status == RUNNING for status in self.status)
        losses = report.losses[~report.losses.isnan()]
        text = f"step {report.step}/{self.longest}: {running} of {len(self.tasks)} running, "
        text += f"loss {float(losses.min()):.3f} to {float(losses.max()):.3f}"
        held_out = [(loss, task.name) for loss, task in zip(self.held_out, self.tasks, strict=True) if loss == loss]
        if held_out:
            text += ", best held out {:.3f} ({})".format(*min(held_out))
        return escape(f"{text}; {self.speed()}")

    def loss(self, i: int) -> str:
        """Returns the running mean of an adapter's loss."""
        return f"{self.losses[i] / self.weights[i]:.3f}" if self.weights[i] else "–"

    def speed(self) -> str:
        """Returns the speed of all adapters together."""
        return f"{sum(self.tokens) / max(1e-9, time.perf_counter() - self.began):,.0f} tokens/s"

    def table(self) -> Table:
        """Returns the live table."""
        elapsed = time.perf_counter() - self.began
        step = max(self.done)
        ends = max(total if own == RUNNING else 0 for total, own in zip(self.totals, self.status, strict=True))
        left = elapsed / max(1, step - self.first) * max(0, ends - step)
        caption = f"{self.speed()}   {_clock(elapsed)} gone, {_clock(left)} left"
        table = Table(
            box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False, padding=(0, 1, 0, 0)
        )
        # Wide enough for what comes, so that columns stay where they are; the bars take what is left.
        widths = {"step": 2 * len(str(self.longest)) + 1, "loss": 6, "held out": 8, "rate": 7, "": 8}
        longest = max(len(task.name) for task in self.tasks)
        bar_width = min(16, max(4, self.console.width - longest - sum(widths.values()) - 2 * len(widths) - 4))
        table.add_column("adapter", overflow="ellipsis")  # rich takes from columns that may wrap, if it must
        table.add_column("", no_wrap=True)
        for heading, width in widths.items():
            table.add_column(heading, justify="right" if heading else "left", min_width=width, no_wrap=True)
        for i, task in enumerate(self.tasks):
            style = "green" if self.status[i] == FINISHED else "yellow" if self.status[i] == STOPPED else "cyan"
            bar = ProgressBar(self.totals[i], self.done[i], width=bar_width, complete_style=style, finished_style=style)
            table.add_row(
                f"[bold]{escape(task.name)}[/]",
                bar,
                f"{self.done[i]}/{self.totals[i]}",
                self.loss(i),
                _number(self.held_out[i], ".3f"),
                _number(self.rates[i], ".1e"),
                STATUS[self.status[i]],
            )
        return table


def table_of(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None, *, left: int = 1
) -> Table:
    """Returns a table, its first columns aligned on the left and the others on the right; cells are markup."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        box=box.ROUNDED,
    )
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i >= left else "left", overflow="fold", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row)
    return table


def facts_of(title: str, facts: Mapping[str, object]) -> Table:
    """Returns a table of names and values."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.ROUNDED, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, escape(str(value)))
    return table


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _clock(seconds: float) -> str:
    minutes, own = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{own:02}" if hours else f"{minutes}:{own:02}"
