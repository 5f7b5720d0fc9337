"""Is a finetune on an 8-bit base as good as one on the float model?

SmolLM2-135M-Instruct learns small tasks whose answers can be checked, each from several seeds, on the same budget
with every method: the same items in the same order, the same first values of the adapters, rank, alpha and layers,
AdamW with the same schedule and clipping. Then it is tested on items held out.

  base       the model untrained, float32
  peft       PEFT on the float32 model, one run after another
  ours       finetuna_func on an int8 base, all runs stacked: one training step is a step of all
  llm.int8   PEFT on bitsandbytes' LLM.int8 layers (threshold 6), which compute in float16, one run after another
  ours-nf4   like ours, on a 4-bit base

What no method adapts (norms, the embedding, which is the head too) is float32 in all of them, and so are the
adapters; on a GPU, products of float32 are not rounded to TF32. The tasks:

  sums       reasoning-gym's chain_sum, two or three numbers of one or two digits; the number must be right
  family     reasoning-gym's family_relationships; the word must be right
  reviews    lines of film reviews, positive or negative; the likelier answer counts. No film is in both parts.
  spam       text messages, spam or ham, likewise

Answers to the first two are generated greedily, at most --new-tokens of them. A reply in a sentence counts, if its
last number is the right one, or the right word is its only answer: the untrained model speaks in sentences. The loss
is the mean next-token loss of the held-out answers, in nats.

Each run is for itself: with --json, results go to a file after every run, and a run that is in it is not run again.
So parts can run side by side, and --report puts their files together, after checking that their budgets are equal.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import finetuna_func as ft
from finetuna_func import data, decode

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _tasks
from _tasks import TASKS, Items, real_data
from train_step import PROJECTIONS, llm_int8

EXAMPLES = """examples:
  python benchmarks/quality.py                          a first look: 2 tasks, 1 seed, 30 steps
  python benchmarks/quality.py --seeds 3 --steps 200 --batch 16 --tasks sums,family,reviews,spam --test 400
                                                        what was published; hours on a CPU
  python benchmarks/quality.py --methods ours --json ours.json
  python benchmarks/quality.py --methods peft --runs sums:0,sums:1 --json sums.json
                                                        parts, in processes of their own
  python benchmarks/quality.py --report ours.json sums.json --markdown --plot quality.png
                                                        and put together
  python benchmarks/quality.py --prepare tasks          make the tasks' files here ...
  python benchmarks/quality.py --data tasks --model ./SmolLM2       ... for a machine without network
"""

METHODS = {
    "base": "untrained",
    "peft": "PEFT, float32",
    "ours": "finetuna_func, int8",
    "llm.int8": "PEFT, LLM.int8",
    "ours-nf4": "finetuna_func, nf4",
}
REFERENCE = "peft"
IGNORED = -100


class Run(NamedTuple):
    """One finetune: what it learns, and from which seed. The seed decides its first values and the order of items."""

    task: str
    seed: int


@dataclass(frozen=True)
class Budget:
    """What all methods must have in common.

    Attributes:
        steps: Of training.
        batch: Items in a step.
        rank: Of the adapters.
        alpha: Their scale is ``alpha / rank``.
        lr: Of AdamW, at its peak: a tenth of the steps up, then down along a cosine to zero.
        weight_decay: Of AdamW.
        clip: The largest norm of a gradient.
        test: Held-out items, at most.
        new_tokens: Tokens generated in a reply, at most.
        model: Digest of the weights.
        tasks: Digests of the tasks' files.
    """

    steps: int
    batch: int
    rank: int
    alpha: float
    lr: float
    weight_decay: float
    clip: float
    test: int
    new_tokens: int
    model: str
    tasks: dict[str, str]

    def schedule(self, step: int | Tensor) -> Tensor:
        """Returns the learning rate of a step, the first of which is 0."""
        warmup = max(1, self.steps // 10)
        of_step = ft.optim.warmup_cosine_schedule(self.lr, warmup, max(self.steps, warmup + 1), init=self.lr / warmup)
        return of_step(torch.as_tensor(step))


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        method: Of `METHODS`.
        task: Of the run.
        seed: Of the run.
        right: A digit for each held-out item, 1 if the answer was right.
        loss: Mean loss of the held-out answers' tokens.
        train_losses: Of each step.
        tokens: Trained on, without padding.
        trainable: Parameters that were trained.
        seconds: Of training; for a stack those of all its runs together.
    """

    method: str
    task: str
    seed: int
    right: str
    loss: float
    train_losses: list[float]
    tokens: int
    trainable: int
    seconds: float

    @property
    def run(self) -> Run:
        """Which run it was."""
        return Run(self.task, self.seed)

    @property
    def accuracy(self) -> float:
        """Share of the held-out items that were answered right, in percent."""
        return 100 * self.right.count("1") / len(self.right)


# --- from items to tokens -------------------------------------------------------------------------


class Row(NamedTuple):
    """The tokens of a question and its answer; the answer begins at ``start``."""

    ids: list[int]
    start: int


class Encoder:
    """Items of one task as tokens of one tokenizer, in its chat template."""

    def __init__(self, tokenizer: Any, instruction: str) -> None:
        self.tokenizer, self.instruction = tokenizer, instruction

    def prompt(self, prompt: str) -> list[int]:
        """Returns the tokens up to the answer."""
        turns = [{"role": "system", "content": self.instruction}, {"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def row(self, prompt: str, answer: str) -> Row:
        """Returns the tokens of question, answer and the end of the turn, which is learnt too."""
        asked = self.prompt(prompt)
        said = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return Row([*asked, *said, self.tokenizer.eos_token_id], len(asked))

    def reply(self, ids: Sequence[int]) -> str:
        """Returns the text of generated tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def collate(rows: Sequence[Row], width: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns ids and labels ``(B, T)``, padded on the right.

    What is on the right of a token has no part in its prediction, so no mask is needed.
    """
    width = width or max(len(row.ids) for row in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, row.start : len(row.ids)] = torch.tensor(row.ids[row.start :])
    return ids, labels


class Corpus(NamedTuple):
    """A task, encoded."""

    name: str
    items: Items
    encoder: Encoder
    train: list[Row]
    answers: list[str]

    @classmethod
    def of(cls, name: str, items: Items, tokenizer: Any) -> Corpus:
        """Returns the corpus of a task's items."""
        encoder = Encoder(tokenizer, TASKS[name].instruction)
        rows = [encoder.row(*item) for item in items.train]
        return cls(name, items, encoder, rows, sorted({item.answer for item in items.train}))

    def batches(self, seed: int, budget: Budget) -> list[list[Row]]:
        """Returns the rows of every step: epoch by epoch, each in an order of its own."""
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        while len(order) < budget.steps * budget.batch:
            order += torch.randperm(len(self.train), generator=generator).tolist()
        rows = [self.train[i] for i in order[: budget.steps * budget.batch]]
        return [rows[i : i + budget.batch] for i in range(0, len(rows), budget.batch)]


# --- testing --------------------------------------------------------------------------------------

Losses = Callable[[Tensor, Tensor], Tensor]
"""Ids and labels ``(B, T)`` to the losses ``(N, B, T - 1)`` of N finetunes, zero where a label is ignored."""
Generate = Callable[[list[list[int]], int], list[list[list[int]]]]
"""Prompts and how many tokens at most, to N finetunes' new tokens for each prompt."""


@torch.no_grad()
def evaluate(
    corpus: Corpus, losses: Losses, generate: Generate, budget: Budget, device: str, size: int = 32
) -> list[tuple[str, float]]:
    """Returns for each finetune which held-out answers are right, and their mean loss."""
    task, items, encoder = TASKS[corpus.name], corpus.items.test, corpus.encoder

    def totals(rows: list[Row]) -> Tensor:
        """Losses of whole answers, ``(N, rows)``."""
        parts = []
        for first in tqdm(range(0, len(rows), size), desc=f"testing {corpus.name}", leave=False, disable=None):
            ids, labels = collate(rows[first : first + size])
            parts.append(losses(ids.to(device), labels.to(device)).sum(-1).cpu())
        return torch.cat(parts, dim=1)

    rows = [encoder.row(*item) for item in items]
    tokens = sum(len(row.ids) - row.start for row in rows)
    if task.answer == "choice":
        of_each = [totals([encoder.row(item.prompt, answer) for item in items]) for answer in corpus.answers]
        by_answer = torch.stack(of_each, dim=-1)  # (N, items, answers)
        places = torch.tensor([corpus.answers.index(item.answer) for item in items])
        sums = by_answer[:, torch.arange(len(items)), places].sum(1)
        right = (by_answer.argmin(-1) == places).tolist()
    else:
        sums = totals(rows).sum(1)
        prompts = [encoder.prompt(item.prompt) for item in items]
        right = []
        for replies in generate(prompts, budget.new_tokens):
            answers = zip(map(encoder.reply, replies), items, strict=True)
            right.append([task.right(reply, item.answer, corpus.answers) for reply, item in answers])
    digits = ["".join("01"[hit] for hit in own) for own in right]
    return list(zip(digits, (sums / tokens).tolist(), strict=True))


# --- the methods ----------------------------------------------------------------------------------


def first_values(model: nn.Module, seed: int, rank: int) -> dict[str, Tensor]:
    """Returns A for each adapted layer, ``(rank, in)``, drawn as PEFT does and we do; B begins at zero."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for path, module in model.named_modules():
        if path.endswith(PROJECTIONS):
            bound = 1 / math.sqrt(module.in_features)
            values[path] = torch.empty(rank, module.in_features).uniform_(-bound, bound, generator=generator)
    return values


def run_stacked(
    method: str,
    base: ft.Base,
    starts: Mapping[int, Mapping[str, Tensor]],
    runs: Sequence[Run],
    corpora: Mapping[str, Corpus],
    budget: Budget,
    device: str,
) -> Iterator[Result]:
    """Trains all runs in one stack, and yields their results."""
    config = ft.LinearAdapterConfig(r=budget.rank, alpha=budget.alpha)
    fresh = ft.new_finetuned(base, adapt_layers=PROJECTIONS, plain_layers=(), linear_config=config)
    members = []
    for run in runs:
        first = {f"{path}.lora_a": value.to(device) for path, value in starts[run.seed].items()}
        members.append(fresh.replace(params=dict(fresh.params) | first))
    stacked = ft.stack(members)
    tx = ft.optim.chain(
        ft.optim.clip_by_global_norm(budget.clip), ft.optim.adamw(budget.schedule, weight_decay=budget.weight_decay)
    )
    state = tx.init(stacked)
    gradients = ft.stacked_value_and_grad(
        lambda tuned, ids, labels: ft.causal_lm_loss(base, tuned, ids, labels),
        chunk_size=None if device.startswith("cuda") else 3,  # the activations of nine would take 13 GB
    )
    batches = [corpora[run.task].batches(run.seed, budget) for run in runs]
    start, trace = time.perf_counter(), []
    for step in tqdm(range(budget.steps), desc=f"{method}, {len(runs)} runs", unit="step", disable=None):
        rows = [own[step] for own in batches]
        width = max(len(row.ids) for own in rows for row in own)
        ids, labels = (
            torch.stack(leaf).to(device) for leaf in zip(*(collate(own, width) for own in rows), strict=True)
        )
        losses, grads = gradients(stacked, ids, labels)
        updates, state = tx.update(grads, state, stacked)
        stacked = ft.optim.apply_updates(stacked, updates)
        trace.append(losses)
    train_losses = torch.stack(trace, dim=1).tolist()
    seconds = time.perf_counter() - start
    trained = dict(zip(runs, ft.unstack(stacked), strict=True))
    indices = {run: i for i, run in enumerate(runs)}
    for task in dict.fromkeys(run.task for run in runs):
        own = [run for run in runs if run.task == task]
        scores = evaluate(
            corpora[task], *stack_scorer(base, ft.stack([trained[run] for run in own]), corpora[task]), budget, device
        )
        for run, (right, loss) in zip(own, scores, strict=True):
            tokens = sum(len(row.ids) for rows in batches[indices[run]] for row in rows)
            trainable = sum(leaf.numel() for leaf in trained[run].params.values())
            steps = train_losses[indices[run]]
            yield Result(method, run.task, run.seed, right, loss, steps, tokens, trainable, seconds)


def stack_scorer(base: ft.Base, stacked: ft.Finetuned, corpus: Corpus) -> tuple[Losses, Generate]:
    """Returns how a stack is tested."""
    n = len(stacked.spec.members)

    def losses(ids: Tensor, labels: Tensor) -> Tensor:
        every = (leaf.expand(n, *leaf.shape) for leaf in (ids, labels))
        return ft.causal_lm_loss(base, stacked, *every, reduction="none")

    def generate(prompts: list[list[int]], most: int) -> list[list[list[int]]]:
        stop = {corpus.encoder.tokenizer.eos_token_id}
        return decode.generate(base, stacked, prompts, max_new_tokens=most, stop_ids=stop)

    return losses, generate


def run_peft(
    method: str,
    model: nn.Module,
    starts: Mapping[int, Mapping[str, Tensor]],
    runs: Sequence[Run],
    corpora: Mapping[str, Corpus],
    budget: Budget,
    device: str,
) -> Iterator[Result]:
    """Trains one run after another, and yields their results."""
    import peft

    for run in runs:
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=budget.rank,
            lora_alpha=budget.alpha,  # type: ignore[arg-type]  # a float as well
            lora_dropout=0.0,
            target_modules=list(PROJECTIONS),
        )
        wrapped = peft.get_peft_model(model, config)  # type: ignore[arg-type]
        for path, value in starts[run.seed].items():
            wrapped.get_parameter(f"base_model.model.{path}.lora_A.default.weight").data.copy_(value)
        trained = [leaf for leaf in wrapped.parameters() if leaf.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=budget.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: budget.schedule(step).item())
        batches = corpora[run.task].batches(run.seed, budget)
        wrapped.train()
        start, trace = time.perf_counter(), []
        for rows in tqdm(batches, desc=f"{method}, {run.task} {run.seed}", unit="step", disable=None):
            ids, labels = (leaf.to(device) for leaf in collate(rows))
            loss = wrapped(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, budget.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            trace.append(loss.detach())
        train_losses = torch.stack(trace).tolist()
        seconds = time.perf_counter() - start
        wrapped.eval()
        [(right, loss)] = evaluate(corpora[run.task], *module_scorer(wrapped, corpora[run.task]), budget, device)
        tokens = sum(len(row.ids) for rows in batches for row in rows)
        trainable = sum(leaf.numel() for leaf in trained)
        yield Result(method, run.task, run.seed, right, loss, train_losses, tokens, trainable, seconds)
        model = wrapped.unload()  # type: ignore[assignment,operator]  # without the adapter, as it was


def run_untrained(model: nn.Module, runs: Sequence[Run], corpora: Mapping[str, Corpus], budget: Budget, device: str):
    """Yields the results of the model as it is, for each task once."""
    for task in dict.fromkeys(run.task for run in runs):
        [(right, loss)] = evaluate(corpora[task], *module_scorer(model, corpora[task]), budget, device)
        yield Result("base", task, 0, right, loss, [], 0, 0, 0.0)


def module_scorer(model: Any, corpus: Corpus) -> tuple[Losses, Generate]:
    """Returns how an ordinary model is tested."""
    tokenizer = corpus.encoder.tokenizer

    def losses(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")[None]

    def generate(prompts: list[list[int]], most: int) -> list[list[list[int]]]:
        replies: list[list[int]] = []
        device = next(model.parameters()).device
        for first in range(0, len(prompts), 100):
            part = prompts[first : first + 100]
            inputs = tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt").to(device)
            ids = model.generate(
                **inputs,
                max_new_tokens=most,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            replies += ids[:, inputs["input_ids"].shape[1] :].tolist()
        return [replies]

    return losses, generate


def in_llm_int8(model: nn.Module) -> nn.Module:
    """Returns the model, its projections replaced by bitsandbytes' LLM.int8 layers, and ready for PEFT."""
    import peft

    model = llm_int8(model)  # type: ignore[arg-type]
    model.is_loaded_in_8bit = True  # type: ignore[assignment]  # as transformers says of a model that it loads so
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[arg-type]


def run_method(
    method: str,
    model: nn.Module,
    runs: Sequence[Run],
    corpora: Mapping[str, Corpus],
    budget: Budget,
    device: str,
) -> Iterator[Result]:
    """Yields the results of a method's runs. The model may be changed; it is for one method only."""
    starts = {seed: first_values(model, seed, budget.rank) for seed in {run.seed for run in runs}}
    if method == "base":
        return run_untrained(model, runs, corpora, budget, device)
    if method in ("peft", "llm.int8"):
        own = model if method == "peft" else in_llm_int8(model)
        return run_peft(method, own, starts, runs, corpora, budget, device)
    base = ft.quantize_base_model(model, scheme="nf4" if method == "ours-nf4" else "int8")
    return run_stacked(method, base, starts, runs, corpora, budget, device)


# --- results on disk ------------------------------------------------------------------------------


class Book(NamedTuple):
    """What a file of results holds."""

    budget: dict[str, Any]
    made_with: list[str]
    results: list[Result]


def read_book(path: Path) -> Book:
    """Returns the content of a file of results.

    Raises:
        ValueError: It is none.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        book = Book(dict(content["budget"]), list(content["made_with"]), [Result(**row) for row in content["results"]])
        if any(row.method not in METHODS or row.task not in TASKS or not row.right for row in book.results):
            raise ValueError("a method or task that is not known")
        return book
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no file of results that this script wrote ({error}).") from error


def write_book(path: Path, book: Book) -> None:
    """Writes a file of results, whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    content = {"budget": book.budget, "made_with": book.made_with, "results": [asdict(row) for row in book.results]}
    scratch.write_text(json.dumps(content, indent=1), "utf-8")
    os.replace(scratch, path)


def merged(books: Mapping[str, Book]) -> Book:
    """Returns the books as one.

    Raises:
        ValueError: Budgets that differ, or two results for the same run.
    """
    (first, book), *others = books.items()
    budget, made_with, results = dict(book.budget), list(book.made_with), list(book.results)
    for name, other in others:
        same = budget | {"tasks": {}} == other.budget | {"tasks": {}}
        tasks, more = budget["tasks"], other.budget["tasks"]
        if not same or any(tasks[task] != more[task] for task in tasks.keys() & more.keys()):
            differing = [key for key in budget if budget[key] != other.budget.get(key)]
            shown = "; ".join(f"{key} {budget[key]} and {other.budget.get(key)}" for key in differing)
            raise ValueError(f"{first} and {name} had different budgets, so they cannot be compared: {shown}.")
        budget["tasks"] = tasks | more
        made_with += [line for line in other.made_with if line not in made_with]
        results += other.results
    seen: set[tuple[str, str, int]] = set()
    tokens: dict[Run, int] = {}
    for row in results:
        key = (row.method, *row.run)
        if key in seen:
            raise ValueError(f"there are two results of {row.method} on {row.task} with seed {row.seed}; give it once.")
        seen.add(key)
        if row.method != "base" and tokens.setdefault(row.run, row.tokens) != row.tokens:
            raise ValueError(f"{row.task} with seed {row.seed} was trained on different numbers of tokens.")
    return Book(budget, made_with, results)


# --- the report -----------------------------------------------------------------------------------


def spread(values: Sequence[float], form: str) -> str:
    """Returns mean and sample standard deviation, the latter if there is one."""
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}" if len(values) > 1 else mean


def difference(rows: Sequence[Result], reference: Sequence[Result], of: Callable[[Result], float], form: str) -> str:
    """Returns by how much the same runs differ from the reference: mean and its standard error."""
    other = {row.run: of(row) for row in reference}
    steps = [of(row) - other[row.run] for row in rows if row.run in other]
    if not steps:
        return ""
    mean = format(statistics.fmean(steps), form)
    error = statistics.stdev(steps) / math.sqrt(len(steps)) if len(steps) > 1 else None
    return mean if error is None else f"{mean} ± {format(error, form.lstrip('+'))}"


def by_method(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Returns the results of each method, in the order of `METHODS`."""
    ordered = sorted(results, key=lambda row: (list(METHODS).index(row.method), list(TASKS).index(row.task), row.seed))
    return {method: list(rows) for method, rows in groupby(ordered, key=lambda row: row.method)}


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Returns the titles of the columns and the cells."""
    methods = by_method(results)
    tasks = [task for task in TASKS if any(row.task == task for row in results)]
    reference = methods.get(REFERENCE, [])
    titles = ["", *(f"{task} {what}" for task in tasks for what in ("accuracy", "loss"))]
    if reference:
        titles += ["accuracy, difference", "loss, difference"]
    cells = []
    for method, rows in methods.items():
        cells.append([METHODS[method]])
        for task in tasks:
            own = [row for row in rows if row.task == task]
            cells[-1] += [
                spread([row.accuracy for row in own], ".1f") + " %" if own else "",
                spread([row.loss for row in own], ".3f") if own else "",
            ]
        if reference:
            compared = method not in (REFERENCE, "base")
            cells[-1] += [
                difference(rows, reference, lambda row: row.accuracy, "+.2f") if compared else "",
                difference(rows, reference, lambda row: row.loss, "+.4f") if compared else "",
            ]
    return titles, cells


def as_text(titles: list[str], cells: list[list[str]], markdown: bool) -> str:
    """Returns the table, in columns or as Markdown."""
    if markdown:
        lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    shown = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (titles, *cells)
    ]
    return "\n".join(line.rstrip() for line in shown)


def plot(results: Sequence[Result], path: Path) -> None:
    """Draws accuracy and loss of every method on every task: means, and the seeds as dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = by_method(results)
    tasks = [task for task in TASKS if any(row.task == task for row in results)]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    colors = dict(zip(METHODS, ("#b8b8b8", "#3b6fb6", "#d1495b", "#6aa84f", "#e3a23c"), strict=True))
    width = 0.8 / len(methods)
    of: tuple[tuple[Any, str, Callable[[Result], float]], ...] = (
        (panels[0], "accuracy on held-out items, %", lambda row: row.accuracy),
        (panels[1], "loss of held-out answers, nats", lambda row: row.loss),
    )
    for panel, title, value in of:
        highest = 0.0
        for i, (method, rows) in enumerate(methods.items()):
            label: str | None = METHODS[method]
            for place, task in enumerate(tasks):
                own = [value(row) for row in rows if row.task == task]
                if own:
                    at = place + (i - (len(methods) - 1) / 2) * width
                    panel.bar(at, statistics.fmean(own), 0.9 * width, color=colors[method], label=label)
                    label = None  # a method is named once
                    if method != "base":
                        panel.plot([at] * len(own), own, "o", color="black", markersize=2.5)
                        highest = max(highest, *own)
        cut_off = " (untrained: cut off)" if panel is panels[1] and "base" in methods else ""
        panel.set_title(title + cut_off, fontsize=10)
        panel.set_xticks(range(len(tasks)), tasks)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
    panels[0].set_ylim(0, 100)
    panels[1].set_ylim(0, 1.6 * highest or None)  # the untrained model's loss is far above
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(methods), frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def show(book: Book, markdown: bool, picture: Path | None) -> None:
    """Prints the table with what it was made with, and draws the plot if asked."""
    print("\n".join(book.made_with))
    shown = {key: value for key, value in book.budget.items() if key not in ("model", "tasks")}
    print(", ".join(f"{key} {value}" for key, value in shown.items()) + "\n")
    print(as_text(*table(book.results), markdown))
    if picture is not None:
        plot(book.results, picture)


# --- what it is made with -------------------------------------------------------------------------


def load_model(path: Path) -> tuple[Any, Any]:
    """Returns model and tokenizer of a checkpoint folder or a GGUF file: float32, in eval mode, frozen."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if not path.exists():
        raise FileNotFoundError(f"--model {path}: there is nothing; expected a checkpoint folder or a GGUF file.")
    options: dict[str, Any] = {"local_files_only": True}
    folder = path
    if path.suffix == ".gguf":
        folder, options = path.parent, options | {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if tokenizer.pad_token is None:  # which some checkpoints leave open; padding is masked, so that any will do
        tokenizer.pad_token = tokenizer.eos_token
    if path.suffix == ".gguf":
        options["quantization_config"] = GgufConfig(gguf_file=path.name, dequantize=True)
    with real_data._quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval().requires_grad_(False), tokenizer


def digest(model: nn.Module) -> str:
    """Returns a digest of a model's weights."""
    found = hashlib.sha256()
    for name, leaf in sorted(model.named_parameters()):
        found.update(name.encode())
        found.update(leaf.detach().cpu().contiguous().numpy())
    return found.hexdigest()[:16]


def made_with(device: str) -> str:
    """Returns the line on what the numbers were made with, and when."""
    packages = []
    for name in ("torch", "transformers", "bitsandbytes", "peft"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    folder = Path(__file__).resolve().parents[1]
    git = ["git", "rev-parse", "--short", "HEAD"]
    head = subprocess.run(git, cwd=folder, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} CPU"
    return f"{today}, commit {head}, {', '.join(packages)}, Python {platform.python_version()}, {machine}"


# --- command line ---------------------------------------------------------------------------------


def names_of(kind: str, known: Iterable[str]) -> Callable[[str], list[str]]:
    """Returns a parser of comma-separated names."""
    known = list(known)

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"no {kind} {', '.join(unknown)!r}; there are {', '.join(known)}")
        return list(dict.fromkeys(names))

    return parse


def runs_of(text: str) -> list[Run]:
    """Returns the runs in ``TASK:SEED,...``."""
    runs = []
    for part in filter(None, text.split(",")):
        task, _, seed = part.strip().partition(":")
        if task not in TASKS or not seed.isdecimal():
            raise argparse.ArgumentTypeError(f"{part!r}: expected TASK:SEED with a task of {', '.join(TASKS)}")
        runs.append(Run(task, int(seed)))
    if not runs:
        raise argparse.ArgumentTypeError("expected TASK:SEED,...")
    return list(dict.fromkeys(runs))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_argument_group("what is run")
    which.add_argument(
        "--methods",
        type=names_of("method", METHODS),
        default=["base", "peft", "ours", "llm.int8"],
        help=f"of {', '.join(METHODS)} (default all but the last)",
    )
    which.add_argument(
        "--tasks",
        type=names_of("task", TASKS),
        default=["sums", "reviews"],
        help=f"of {', '.join(TASKS)} (default sums,reviews)",
    )
    which.add_argument("--seeds", type=int, default=1, help="0, 1, ... for each task (default 1 of them)")
    which.add_argument("--runs", type=runs_of, help="these TASK:SEED,... instead of all tasks with all seeds")
    budget = parser.add_argument_group("the budget, the same for all")
    budget.add_argument("--steps", type=int, default=30, help="of training (default 30)")
    budget.add_argument("--batch", type=int, default=8, help="items in a step (default 8)")
    budget.add_argument("--rank", type=int, default=16, help="of the adapters (default 16)")
    budget.add_argument("--alpha", type=float, default=32.0, help="their scale by 1 / rank (default 32)")
    budget.add_argument("--lr", type=float, default=1e-3, help="of AdamW, at its peak (default 1e-3)")
    budget.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW (default 0.01)")
    budget.add_argument("--clip", type=float, default=1.0, help="largest norm of a gradient (default 1)")
    budget.add_argument("--test", type=int, default=100, help="held-out items of each task, at most (default 100)")
    budget.add_argument("--new-tokens", type=int, default=24, help="in a reply, at most (default 24)")
    places = parser.add_argument_group("where things are")
    places.add_argument("--model", type=Path, help="checkpoint folder or GGUF file (default: fetched once)")
    places.add_argument("--data", type=Path, help="folder of the tasks' files, made if missing (default: in the cache)")
    places.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    places.add_argument("--json", type=Path, help="file of results: read first, written after every run")
    report = parser.add_argument_group("the report")
    report.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    report.add_argument("--plot", type=Path, help="also draw it, as PNG")
    instead = parser.add_argument_group("instead of running").add_mutually_exclusive_group()
    instead.add_argument("--prepare", type=Path, metavar="DIR", help="only make the tasks' files, all of them")
    instead.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="only report what is in these files")
    args = parser.parse_args(given)
    for name in ("seeds", "steps", "batch", "rank", "test", "new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    for name in ("alpha", "lr", "clip"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} {getattr(args, name)}: a number above 0")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no GPU here")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"--{name} {path}: there is no folder {path.absolute().parent}")
    return args


def run_all(args: argparse.Namespace) -> Book:
    """Returns the results of all runs that are asked for; those that are there already are not run again."""
    runs = args.runs or [Run(task, seed) for task in args.tasks for seed in range(args.seeds)]
    names = [task for task in TASKS if any(run.task == task for run in runs)]
    folder = args.data or real_data.cache_dir() / "quality"
    files = dict(zip(names, _tasks.prepare(folder, names), strict=True))
    path = args.model or real_data.smollm2_path()
    model, tokenizer = load_model(path)
    corpora = {}
    for name, file in files.items():
        items = _tasks.load(file)
        corpora[name] = Corpus.of(name, Items(items.train, items.test[: args.test]), tokenizer)
    digests = {name: data.file_digest(file)[:16] for name, file in files.items()}
    own = {key: getattr(args, key) for key in Budget.__dataclass_fields__ if hasattr(args, key)}
    budget = Budget(**own | {"model": digest(model), "tasks": digests})
    book = Book(asdict(budget), [made_with(args.device)], [])
    if args.json is not None and args.json.exists():
        book = merged({str(args.json): read_book(args.json), "the command line": book})
    for method in args.methods:
        there = {row.run for row in book.results if row.method == method}
        wanted = [run for run in runs if run not in there]
        if method == "base":
            wanted = [Run(task, 0) for task in names if Run(task, 0) not in there]
        if not wanted:
            continue
        if model is None:
            model, _ = load_model(path)
        for result in run_method(method, model.to(args.device), wanted, corpora, budget, args.device):
            book.results.append(result)
            if args.json is not None:
                write_book(args.json, book)
            shown = f"{METHODS[method]}: {result.task}, seed {result.seed}: {result.accuracy:.1f} % right"
            tqdm.write(f"{shown}, loss {result.loss:.3f}, {result.seconds:.0f} s of training")
        if method != "base":
            model = None  # it was changed
    return book


def main(given: Sequence[str] | None = None) -> None:
    """Runs or reports."""
    args = arguments(given)
    torch.set_float32_matmul_precision("highest")
    warnings.filterwarnings("ignore", message="MatMul8bitLt")  # bitsandbytes, at every layer of every step
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT, of its own use
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if args.prepare is not None:
            for file in _tasks.prepare(args.prepare):
                print(f"{file}: {file.stat().st_size:,} bytes")
            return
        book = merged({str(path): read_book(path) for path in args.report}) if args.report else run_all(args)
    except (real_data.FetchError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    show(book, args.markdown, args.plot)


if __name__ == "__main__":
    main()
