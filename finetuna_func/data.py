"""Text to token rows: what a model reads, and which of its tokens it is to learn.

    examples = read_examples("chat.jsonl")                 # dicts, one a line
    samples = encode(examples, tokenizer, max_length=512)  # tokens, and which of them are learnt
    rows = pack(samples, 512)                              # or [(s,) for s in samples]
    batch = collate([rows[:4], other_rows[:4]])            # tensors (N, B, T), for N adapters

An example is a mapping in one of four formats; any iterable of them will do, a ``datasets.Dataset`` too.

    {"text": "..."}, or the string alone                   every token is learnt
    {"prompt": "...", "completion": "..."}                 the completion is learnt
    {"messages": [{"role": "user", "content": "..."},      the assistant's turns are learnt, through the
                  {"role": "assistant", "content": ...}]}  tokenizer's own chat template
    {"input_ids": [...], "labels": [...]}                  tokens already; learnt where the label is not -100

Batches from elsewhere, a ``torch.utils.data.DataLoader`` for each adapter, are put together by `ft.stack_batches`.

Nothing here keeps a position: `rows_at` says which rows a step trains on from the step alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from finetuna_func import _random

IGNORED = -100
"""The label of a token that is not learnt, as everywhere in torch and transformers."""

FORMATS = {
    "text": ("text",),
    "prompt and completion": ("prompt", "completion"),
    "chat": ("messages",),
    "tokens": ("input_ids",),
}
"""The formats, and the keys by which each is known."""


class DataError(ValueError):
    """A file or an example is not in a known format; the message says where, and what is expected."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The tokens of one example.

    Attributes:
        ids: Token ids.
        learnt: For each of them, whether it is learnt, that is, predicted from those before it.
    """

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.learnt):
            raise ValueError(f"Sample: {len(self.ids)} ids but {len(self.learnt)} learnt; expected one each.")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """How many tokens are learnt; the first has none before it and never is."""
        return sum(self.learnt[1:])


Row: TypeAlias = tuple[Sample, ...]
"""Samples that share a row of a batch, side by side; most often one."""


class Batch(NamedTuple):
    """Tensors for N adapters: ``(N, B, T)`` int64.

    Attributes:
        input_ids: Padded on the right.
        labels: The same ids where they are learnt, else `IGNORED`: at padding, prompts, and the first
            token of each sample. Not shifted, as Hugging Face models expect them.
        position_ids: Counted from 0 in each sample of a row.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor

    @property
    def targets(self) -> Tensor:
        """How many tokens each adapter learns, ``(N,)`` int64."""
        return (self.labels != IGNORED).flatten(1).sum(1)

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch on another device."""
        return Batch(*(leaf.to(device) for leaf in self))


# --- Reading --------------------------------------------------------------------------------------


def read_examples(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the examples of a file, in order.

    Args:
        path: ``.jsonl``: one JSON object a line. ``.json``: a list of objects. ``.txt``: one text. ``.parquet``, or a
            folder that ``datasets.Dataset.save_to_disk`` wrote: its rows (needs the package ``datasets``).

    Raises:
        FileNotFoundError: No such file.
        DataError: Not UTF-8, not JSON, not objects, or none at all; the message names the line.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "a.jsonl")
        ...     _ = path.write_text('{"prompt": "1+1=", "completion": "2"}')
        ...     read_examples(path)
        [{'prompt': '1+1=', 'completion': '2'}]
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file.")
    if path.is_dir() or path.suffix == ".parquet":
        return _read_dataset(path)
    if path.suffix not in (".jsonl", ".json", ".txt"):
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; expected {_FILES}.")
    try:
        content = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); expected {_FILES}.") from error
    if path.suffix == ".txt":
        examples = [{"text": content}] if content.strip() else []
    elif path.suffix == ".json":
        examples = _parsed(content, str(path))
        if not isinstance(examples, list):
            raise DataError(f"{path}: holds {_kind(examples)}, expected a list of objects; or use .jsonl, one a line.")
    else:
        # Not splitlines, which also breaks at characters that JSON leaves as they are in a string.
        lines = enumerate(content.split("\n"), 1)
        examples = [_parsed(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    for number, example in enumerate(examples, 1):
        if not isinstance(example, dict):
            raise DataError(f"{path}: example {number} is {_kind(example)}, expected an object, such as {_SHAPES}.")
    if not examples:
        raise DataError(f"{path}: there is no example in it.")
    return examples


_FILES = ".jsonl, .json, .txt, .parquet, or a folder from datasets' save_to_disk"


def _read_dataset(path: Path) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path}: needs the package datasets; pip install 'finetuna_func[datasets]'.") from error
    try:
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
        else:
            with tempfile.TemporaryDirectory() as cache:  # which it would otherwise leave in the user's
                found = list(datasets.Dataset.from_parquet(str(path), cache_dir=cache))
    except Exception as error:  # of many kinds, as the formats below it are
        raise DataError(f"{path}: datasets cannot read it: {str(error).rstrip('.')}; expected {_FILES}.") from error
    if isinstance(found, Mapping):
        names = sorted(map(str, found))
        raise DataError(f"{path}: holds the splits {names}; name one of them, such as {path / names[0]}.")
    examples = [dict(example) for example in found]
    if not examples:
        raise DataError(f"{path}: there is no example in it.")
    return examples


def file_digest(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file, or of all in a folder, by which a resumed run knows that its data are the same."""
    path = Path(path)
    if path.is_dir():
        files = sorted(own for own in path.rglob("*") if own.is_file())
        digests = [f"{own.relative_to(path).as_posix()} {file_digest(own)}" for own in files]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in content else ""
        raise DataError(f"{where}: not JSON: {error.msg} at {line}character {error.colno}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error


_SHAPES = '{"text": ...}, {"prompt": ..., "completion": ...}, {"messages": [...]} or {"input_ids": [...]}'


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")


# --- Encoding -------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """The samples of a dataset, and what had to be left out of them."""

    samples: list[Sample]
    cut: int  # examples that lost tokens at their end, being longer than allowed
    dropped: int  # examples of which nothing was left to learn


def encode(
    examples: Iterable[Mapping[str, Any] | str],
    tokenizer: Any,
    *,
    max_length: int = 512,
    completion_only: bool = True,
    where: str = "examples",
) -> Encoded:
    """Returns the samples of examples in any of the formats, in order.

    A text is followed by the end-of-text token, and divided into samples if it is longer than
    ``max_length``, so that no token is lost. Any other example that is longer is cut at its end; one of
    which nothing learnt remains is dropped. Both are counted.

    Args:
        examples: In one of the formats, each for itself; see the module's docstring. Any iterable, read once.
        tokenizer: A Hugging Face tokenizer. Chats need one with a chat template.
        max_length: Most tokens in a sample, at least 2.
        completion_only: Whether only completions and the assistant's turns are learnt; else every token.
        where: What to call the examples in errors.

    Raises:
        DataError: An example is in no format or of the wrong type, there is none, or none is left.
        TypeError: ``examples`` is one of them, or splits by name, and not an iterable of examples.

    Example:
        >>> class Letters:  # a tokenizer
        ...     eos_token_id, is_fast = 0, False
        ...
        ...     def __call__(self, text, add_special_tokens=True):
        ...         return {"input_ids": [ord(letter) for letter in text]}
        >>> encode([{"prompt": "AB", "completion": "C"}], Letters()).samples
        [Sample(ids=(65, 66, 67, 0), learnt=(False, False, True, True))]
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(f"encode(max_length={max_length!r}): expected an integer of at least 2.")
    if isinstance(examples, (str, Mapping)):
        keys = "" if isinstance(examples, str) else f" with the keys {sorted(map(str, examples))[:5]}"
        raise TypeError(
            f"encode: {where} is {_kind(examples)}{keys}; expected an iterable of examples: [example], or one split of "
            "a dataset."
        )
    samples: list[Sample] = []
    cut = dropped = number = 0
    for number, given in enumerate(examples, 1):
        place = f"{where}, example {number}"
        example = {"text": given} if isinstance(given, str) else given
        own = _format_of(example, place)
        if own == "text":
            whole = _encode_text(example["text"], tokenizer)
            pieces = [whole[i : i + max_length] for i in range(0, len(whole), max_length)]
            found = [Sample(tuple(piece), (True,) * len(piece)) for piece in pieces]
        else:
            if own == "chat":
                found = list(_encode_chat(example["messages"], example.get("tools"), tokenizer, place))
            elif own == "tokens":
                found = [_sample_of(example, place)]
            else:
                found = [_encode_completion(example["prompt"], example["completion"], tokenizer)]
            if not completion_only:
                found = [Sample(sample.ids, (True,) * len(sample)) for sample in found]
            cut += any(len(sample) > max_length for sample in found)
            found = [Sample(sample.ids[:max_length], sample.learnt[:max_length]) for sample in found]
        kept = [sample for sample in found if sample.targets]
        dropped += not kept
        samples += kept
    if not samples:
        reason = "there is none" if not number else f"of {number} examples nothing is left to learn"
        raise DataError(f"{where}: {reason} (max_length={max_length}); expected {_SHAPES}.")
    return Encoded(samples, cut, dropped)


def _format_of(example: Any, place: str) -> str:
    if not isinstance(example, Mapping):
        raise DataError(f"{place}: {_kind(example)}, expected {_SHAPES}.")
    found = [name for name, keys in FORMATS.items() if all(key in example for key in keys)]
    if len(found) != 1:
        problem = f"could be {' or '.join(found)}" if found else f"has the keys {sorted(map(str, example))}"
        raise DataError(f"{place}: {problem}; expected exactly one of {_SHAPES}.")
    if found[0] in ("text", "prompt and completion"):
        for key in FORMATS[found[0]]:
            if not isinstance(example[key], str):
                raise DataError(f'{place}: "{key}" is {_kind(example[key])}, expected a string.')
    return found[0]


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _encode_text(text: str, tokenizer: Any) -> list[int]:
    return _ended(_ids(tokenizer, text, special=True), tokenizer)


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """Some tokenizers add the end themselves; without one, a text just stops."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _sample_of(example: Mapping[str, Any], place: str) -> Sample:
    """Tokens as a tokenizer and a collator leave them: what the mask hides is left out."""
    columns: dict[str, list[int]] = {}
    for key in ("input_ids", "labels", "attention_mask"):
        column = example.get(key)
        column = column.tolist() if hasattr(column, "tolist") else column  # type: ignore[union-attr]
        if column is None and key != "input_ids":
            column = columns["input_ids"] if key == "labels" else [1] * len(columns["input_ids"])
        if not isinstance(column, Sequence) or not all(type(i) is int for i in column):
            raise DataError(f'{place}: "{key}" is {column!r:.60}, expected a list of integers.')
        columns[key] = list(column)
    if len(set(map(len, columns.values()))) > 1:
        lengths = {key: len(column) for key, column in columns.items()}
        raise DataError(f"{place}: {lengths} entries, expected as many of each.")
    rows = [row for row in zip(*columns.values(), strict=True) if row[2]]
    if wrong := next((label for i, label, _ in rows if label not in (i, IGNORED)), None):
        raise DataError(
            f"{place}: a label is {wrong}, expected the id in its place (labels are not shifted) or {IGNORED}."
        )
    return Sample(tuple(row[0] for row in rows), tuple(row[1] != IGNORED for row in rows))


def _encode_completion(prompt: str, completion: str, tokenizer: Any) -> Sample:
    text = prompt + completion
    ids, learnt = _encode_spans(text, [(len(prompt), len(text))], tokenizer, special=True)
    ended = _ended(ids, tokenizer)
    return Sample(tuple(ended), (*learnt, *[True] * (len(ended) - len(ids))))


def _encode_chat(messages: Any, tools: Any, tokenizer: Any, place: str) -> Iterator[Sample]:
    """Yields one sample; or, if the template rewrites earlier turns, one for each of the assistant's."""
    _check_messages(messages, place)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{place}: a chat, but the tokenizer has no chat template; use a base whose tokenizer has one, or "
            'write {"prompt": ..., "completion": ...}.'
        )

    def written(count: int, *, answering: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages[:count], tools=tools, tokenize=False, add_generation_prompt=answering
            )
        except Exception as error:  # jinja's own, which say what the template's author wrote
            raise DataError(f"{place}: the chat template refuses these messages: {error}") from error

    def chat_sample(text: str, spans: list[tuple[int, int]]) -> Sample:
        ids, learnt = _encode_spans(text, spans, tokenizer, special=False)  # the template writes its own
        return Sample(tuple(ids), tuple(learnt))

    spans: list[tuple[int, int, str]] = []  # of each assistant turn, in the text up to its end
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            asked, answered = written(i, answering=True), written(i + 1)
            start = _common_length(asked, answered)
            spans.append((start, len(answered), answered))
    whole = spans[-1][2]
    if all(whole.startswith(text) for _, _, text in spans):
        yield chat_sample(whole, [(start, end) for start, end, _ in spans])
    else:
        for start, end, text in spans:
            yield chat_sample(text, [(start, end)])


def _encode_spans(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Any, *, special: bool
) -> tuple[list[int], list[bool]]:
    """Returns the ids of a text, and which belong to the spans, which are disjoint and in order.

    What comes before a span has the tokens that it has alone, since that is what the model will be
    asked with. Where a token would reach over a border, the pieces are encoded apart.
    """
    whole = _ids(tokenizer, text, special=special)
    learnt = [False] * len(whole)
    for start, end in spans:
        borders = []
        for border in (start, end):
            before = whole if border == len(text) else _ids(tokenizer, text[:border], special=special)
            if border < len(text) and before[-1:] == [tokenizer.eos_token_id] != whole[len(before) - 1 : len(before)]:
                before = before[:-1]  # from a tokenizer that ends every text
            if whole[: len(before)] != before:
                return _encode_apart(text, spans, tokenizer, special=special)
            borders.append(len(before))
        learnt[slice(*borders)] = [True] * (borders[1] - borders[0])
    return whole, learnt


def _encode_apart(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Any, *, special: bool
) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    learnt: list[bool] = []
    borders = [0, *(border for span in spans for border in span), len(text)]
    for i, (start, end) in enumerate(itertools.pairwise(borders)):
        own = _ids(tokenizer, text[start:end], special=special and i == 0) if start < end or i == 0 else []
        if special and i == 0 and own[-1:] == [tokenizer.eos_token_id]:
            own = own[:-1]
        ids += own
        learnt += [i % 2 == 1] * len(own)
    return ids, learnt


def _common_length(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _check_messages(messages: Any, place: str) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f'{place}: "messages" is {_kind(messages)}, expected a list that is not empty.')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(
                f'{place}: message {number} is {message!r:.80}, expected {{"role": "user", "content": "..."}}.'
            )
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant":
        raise DataError(f"{place}: the first message is the assistant's; expected one of the user or system before it.")
    if "assistant" not in roles:
        raise DataError(
            f'{place}: no message has the role "assistant" (there are {roles}), so there is nothing to learn.'
        )


# --- Rows and batches -----------------------------------------------------------------------------


def pack(samples: Iterable[Sample], length: int) -> list[Row]:
    """Returns rows of at most ``length`` tokens, each of whole samples; every sample is in exactly one.

    Best fit, longest first: each sample goes to the fullest row that still has room for it.

    Args:
        samples: None longer than ``length``.
        length: Most tokens in a row.

    Raises:
        ValueError: A sample is longer.

    Example:
        >>> sample = lambda n: Sample((7,) * n, (True,) * n)
        >>> [[len(s) for s in row] for row in pack([sample(2), sample(5), sample(3)], 5)]
        [[5], [3, 2]]
    """
    rows: list[list[Sample]] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows
    rooms = 0  # its keys as bits, so that the least room that is enough is found at once
    for sample in sorted(samples, key=len, reverse=True):
        if len(sample) > length:
            raise ValueError(f"pack(length={length}): a sample has {len(sample)} tokens; encode with that max_length.")
        enough = rooms >> len(sample)
        if enough:
            room = len(sample) + (enough & -enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
            rows[row].append(sample)
        else:
            room, row = length, len(rows)
            rows.append([sample])
        left = room - len(sample)
        if left:
            by_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return [tuple(row) for row in rows]


def split_off(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Returns the samples to train on and those held out, both in order; a function of the seed.

    Args:
        samples: All of them.
        fraction: How many to hold out, in ``(0, 1)``; at least one is, and at least one is not.
        seed: Chooses them.

    Raises:
        ValueError: Fewer than two samples, or a fraction out of range.

    Example:
        >>> samples = [Sample((i,), (True,)) for i in range(10)]
        >>> [len(part) for part in split_off(samples, 0.2, seed=0)]
        [8, 2]
    """
    if not 0 < fraction < 1:
        raise ValueError(f"split_off(fraction={fraction}): expected a number between 0 and 1, both excluded.")
    if len(samples) < 2:
        raise ValueError(f"split_off: {len(samples)} samples cannot be divided; hold out another file instead.")
    count = min(max(1, round(fraction * len(samples))), len(samples) - 1)
    held_out = set(_shuffled(len(samples), _random.fold_in(_random.key(seed), -1))[:count])
    parts = ([], [])
    for i, sample in enumerate(samples):
        parts[i in held_out].append(sample)
    return parts


def rows_at(rows: Sequence[Row], step: int, batch_size: int, *, seed: int, total: int | None = None) -> list[Row]:
    """Returns the rows of one step: a function of its arguments, so that there is no position to save.

    The rows are shuffled anew in each epoch; a batch may reach over into the next.

    Args:
        rows: All rows of a dataset.
        step: Which step, from 0.
        batch_size: Rows in a step.
        seed: Decides the order.
        total: Rows in all steps together; the last step has fewer than ``batch_size`` if it is reached.

    Example:
        >>> rows = [("a",), ("b",), ("c",)]
        >>> epoch = [row for step in range(3) for row in rows_at(rows, step, 1, seed=0)]
        >>> sorted(epoch) == rows
        True
    """
    first, last = step * batch_size, (step + 1) * batch_size
    last = last if total is None else min(last, total)
    places = (divmod(position, len(rows)) for position in range(first, last))
    return [rows[_order(len(rows), seed, epoch)[place]] for epoch, place in places]


@lru_cache(maxsize=256)  # a step needs one or two for each adapter, again and again
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return _shuffled(count, _random.fold_in(_random.key(seed), epoch))


def _shuffled(count: int, key: Tensor) -> list[int]:
    return torch.argsort(_random.uniform(key, (count,)), stable=True).tolist()


def collate(rows: Sequence[Sequence[Row]], *, pad_id: int = 0) -> Batch:
    """Returns the batch ``(N, B, T)`` of N adapters, each with its own rows.

    B is the most rows and T the most tokens that any adapter has; what is missing is padded with rows
    and tokens that are not learnt.

    Args:
        rows: For each adapter, its rows.
        pad_id: Any id that the model knows; in a causal model nothing depends on it.

    Raises:
        ValueError: No adapters, or none of them has a row.

    Example:
        >>> sample = Sample((5, 6, 7), (False, True, True))
        >>> batch = collate([[(sample,)], [(sample, sample)]])
        >>> batch.labels.tolist()
        [[[-100, 6, 7, -100, -100, -100]], [[-100, 6, 7, -100, 6, 7]]]
    """
    batch = max((len(own) for own in rows), default=0)
    if not batch:
        raise ValueError("collate: no adapter has a row.")
    length = max(sum(map(len, row)) for own in rows for row in own)
    shape = (len(rows), batch, length)
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORED)
    position_ids = torch.arange(length).repeat(len(rows), batch, 1)
    for n, own in enumerate(rows):
        for b, row in enumerate(own):
            start = 0
            for sample in row:
                end = start + len(sample)
                ids = torch.tensor(sample.ids)
                input_ids[n, b, start:end] = ids
                # A first token would be predicted from the sample before it.
                labels[n, b, start + 1 : end] = torch.where(torch.tensor(sample.learnt), ids, IGNORED)[1:]
                position_ids[n, b, start:end] = torch.arange(len(sample))
                start = end
            position_ids[n, b, start:] = torch.arange(length - start)  # the padding is a sample of its own
    return Batch(input_ids, labels, position_ids)
