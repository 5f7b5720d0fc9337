"""What a run leaves behind while it goes: a CSV file, TensorBoard's events, and a picture of the curves."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.figure import Figure

from finetuna_func.train import Report

COLUMNS = ("step", "adapter", "loss", "held_out", "learning_rate", "grad_norm", "tokens", "seconds")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's


class Logs:
    """Writes each step to ``log.csv``, a line an adapter, and to TensorBoard if asked for.

    Lines after step ``after`` are of a run that was stopped before its next checkpoint, and are
    dropped: the steps are taken again.
    """

    def __init__(self, out: Path, names: Sequence[str], *, after: int, tensorboard: bool) -> None:
        self.names = names
        path = out / "log.csv"
        kept = [line for line in read_log(path) if line.step <= after] if path.is_file() else []
        staging = path.with_name(".log.csv.new")
        with staging.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(line.cells for line in kept)
        os.replace(staging, path)
        self._events = _summary_writer(out / "tensorboard", after) if tensorboard else None
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def write(self, report: Report, seconds: float) -> None:
        """Adds a step that took so many seconds."""
        for i, name in enumerate(self.names):
            if not int(report.tokens[i]):
                continue
            values = [float(leaf[i]) for leaf in (report.losses, report.held_out, report.rates, report.norms)]
            cells = ["" if math.isnan(value) else f"{value:.9g}" for value in values]  # as exact as float32
            self._writer.writerow([report.step, name, *cells, int(report.tokens[i]), f"{seconds:.3f}"])
            if self._events is not None:
                for tag, value in zip(("loss", "held_out", "learning_rate", "grad_norm"), values, strict=True):
                    if not math.isnan(value):
                        self._events.add_scalar(f"{tag}/{name}", value, report.step)
        self._file.flush()

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def check_tensorboard() -> None:
    """Raises unless TensorBoard's events can be written."""
    try:
        import tensorboard  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise ValueError("--tensorboard: the package is not installed; pip install tensorboard.") from error


def _summary_writer(folder: Path, after: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=after + 1)


class Line(NamedTuple):
    """A line of ``log.csv``; what was not measured is NaN."""

    step: int
    adapter: str
    loss: float
    held_out: float
    cells: list[str]


def read_log(path: Path) -> list[Line]:
    """Returns the lines of a log; the last may be cut short, by a process that was killed, and is left out."""
    whole = path.read_text("utf-8").rpartition("\n")[0]
    lines = []
    for cells in list(csv.reader(whole.split("\n")))[1:]:
        try:
            loss, held_out = (float(cell) if cell else math.nan for cell in cells[2:4])
            lines.append(Line(int(cells[0]), cells[1], loss, held_out, cells))
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path}: {','.join(cells)!r:.80} is not a line of a log of finetuna train.") from error
    return lines


def join_logs(paths: Sequence[Path], path: Path) -> None:
    """Writes the lines of several logs to one, in this order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for own in paths:
        writer.writerows(line.cells for line in read_log(own))
    write_text(path, text.getvalue())


def smooth(values: Sequence[float], decay: float = 0.85) -> list[float]:
    """Returns the running mean, which forgets what is older."""
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return means


def plot_curves(lines: Sequence[Line], names: Sequence[str], path: Path, title: str) -> None:
    """Writes a picture of the losses by step; an adapter has the same colour in training and evaluation."""
    figure = Figure(figsize=(9, 5), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    few = len(names) <= len(COLOURS)
    dots = {"marker": "o", "markersize": 6 if few else 3, "markeredgecolor": "w" if few else "none", "linestyle": "--"}
    for name, colour in zip(names, colours(len(names)), strict=True):
        own = [line for line in lines if line.adapter == name]
        steps, losses = [line.step for line in own], [line.loss for line in own]
        measured = [(line.step, line.held_out) for line in own if not math.isnan(line.held_out)]
        if few:
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(losses), color=colour, linewidth=1.8, label=name)
        if measured:
            axes.plot(*zip(*measured, strict=True), color=colour, linewidth=1, **dots)
    if any(not math.isnan(line.held_out) for line in lines):
        axes.plot([], [], color="0.4", linewidth=1, label="held out", **dots)
    axes.set_title(title, loc="left")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(names) <= 24:
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    save_figure(figure, path)


def colours(count: int) -> list[Any]:
    """Returns as many colours, all different."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [colormaps["viridis"](i / (count - 1)) for i in range(count)]


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG at once or not at all."""
    staging = path.with_name(f".{path.name}.new")
    figure.savefig(staging, format="png")
    os.replace(staging, path)


def write_text(path: Path, text: str) -> None:
    """Writes a file at once or not at all."""
    staging = path.with_name(f".{path.name}.new")
    staging.write_text(text, "utf-8")
    os.replace(staging, path)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file at once or not at all; what is no number is ``null``."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
