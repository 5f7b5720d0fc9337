"""From examples to batches: nothing lost, the right tokens learnt, every step the same each time."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuna_func.data import (
    IGNORED,
    Batch,
    DataError,
    Sample,
    collate,
    encode,
    file_digest,
    pack,
    read_examples,
    rows_at,
    split_off,
)

TOKENIZER = tiny.tokenizer()
END = TOKENIZER.eos_token_id
words = st.text("abct he12\n", max_size=12)
samples = st.integers(1, 9).flatmap(
    lambda n: st.builds(
        Sample,
        st.tuples(*[st.integers(0, 99)] * n),
        st.tuples(*[st.booleans()] * n),
    )
)


def learnt(sample: Sample) -> str:
    return TOKENIZER.decode([i for i, wanted in zip(sample.ids, sample.learnt, strict=True) if wanted])


def encode_one(example: dict[str, Any], **options: Any) -> Sample:
    (sample,) = encode([example], options.pop("tokenizer", TOKENIZER), **options).samples
    return sample


# --- reading --------------------------------------------------------------------------------------


def test_files_are_read(tmp_path):
    lines = [{"text": "a b"}, {"text": "c\u2028d"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    assert read_examples(path) == lines
    (tmp_path / "a.json").write_text(json.dumps(lines))
    assert read_examples(tmp_path / "a.json") == lines
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_examples(tmp_path / "a.txt") == [{"text": "one\n\ntwo\n"}]
    before = file_digest(path)
    path.write_bytes(path.read_bytes() + b" ")
    assert file_digest(path) != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]', r"example 2 is a list, expected an object"),
        ("a.jsonl", b"[" * 100_000, r"line 1: not JSON"),
        ("a.jsonl", b"\n \n", r"there is no example"),
        ("a.jsonl", b"\xff\xfe\x00", r"not UTF-8"),
        ("a.json", b'{"text": "x"}', r"holds an object, expected a list"),
        ("a.txt", b" \n", r"there is no example"),
        ("a.csv", b"text\nx", r"unknown suffix '.csv'; expected .jsonl, .json, .txt, .parquet, or"),
    ],
)
def test_files_that_are_not_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_examples(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        read_examples(tmp_path / "nothing.jsonl")


# --- formats --------------------------------------------------------------------------------------


def test_text_is_learnt_whole_and_ended():
    sample = encode_one({"text": "abc the"})
    assert sample.ids == (*TOKENIZER("abc the")["input_ids"], END)
    assert all(sample.learnt)


@given(text=st.text("abc the", min_size=1, max_size=60), length=st.integers(2, 9))
@settings(max_examples=50)
def test_a_long_text_is_divided_and_no_token_is_lost(text, length):
    whole = encode_one({"text": text}, max_length=1000)
    parts = encode([{"text": text}], TOKENIZER, max_length=length)
    assert all(len(sample) <= length for sample in parts.samples) and not parts.cut
    ids = [i for sample in parts.samples for i in sample.ids]
    # A last piece of one token has nothing before it to be predicted from, and is left out.
    assert ids == list(whole.ids[: len(ids)]) and len(whole) - len(ids) <= 1


@given(prompt=words, completion=words.filter(bool))
def test_a_prompt_has_the_tokens_it_has_alone(prompt, completion):
    sample = encode_one({"prompt": prompt, "completion": completion})
    alone = TOKENIZER(prompt)["input_ids"]
    assert sample.ids[: len(alone)] == tuple(alone) and sample.ids[-1] == END
    assert sample.learnt == (False,) * len(alone) + (True,) * (len(sample) - len(alone))
    assert TOKENIZER.decode(sample.ids[:-1]) == prompt + completion
    assert learnt(sample) == completion + "<|im_end|>"


def test_a_merge_over_the_border_is_not_made():
    assert TOKENIZER("abc")["input_ids"] != [*TOKENIZER("ab")["input_ids"], *TOKENIZER("c")["input_ids"]]
    sample = encode_one({"prompt": "ab", "completion": "c"})
    assert sample.ids == (*TOKENIZER("ab")["input_ids"], *TOKENIZER("c")["input_ids"], END)


def test_a_tokenizer_that_ends_every_text_itself():
    class Ending:
        eos_token_id = 0

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = [ord(letter) for letter in text]
            return {"input_ids": [1, *ids, 0] if add_special_tokens else ids}

    sample = encode_one({"prompt": "A", "completion": "B"}, tokenizer=Ending())
    assert sample == Sample((1, 65, 66, 0), (False, False, True, True))
    assert encode_one({"text": "A"}, tokenizer=Ending()).ids == (1, 65, 0)


USER, REPLY = {"role": "user", "content": "the 12"}, {"role": "assistant", "content": "\nabc"}


def test_a_chat_learns_the_replies():
    messages = [{"role": "system", "content": "a"}, USER, REPLY, USER, {"role": "assistant", "content": "the"}]
    sample = encode_one({"messages": messages})
    text = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert TOKENIZER.decode(sample.ids) == text
    assert learnt(sample) == "\nabc<|im_end|>\nthe<|im_end|>\n"
    asked = TOKENIZER.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=False)
    assert sample.ids[: len(asked)] == tuple(asked)  # though "\n" and "\nabc" would merge
    everything = encode_one({"messages": messages}, completion_only=False)
    assert everything.ids == sample.ids and all(everything.learnt)


def test_a_template_that_rewrites_earlier_turns_gives_a_sample_a_turn():
    template = (
        "{% for m in messages %}{{ m['role'][0] + ':' }}"
        "{% if m['role'] == 'assistant' and not loop.last %}-{% else %}{{ m['content'] }}{% endif %};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    other = tiny.tokenizer()
    other.chat_template = template
    turns = encode([{"messages": [USER, REPLY, USER, {"role": "assistant", "content": "he"}]}], other).samples
    assert [other.decode(sample.ids) for sample in turns] == ["u:the 12;a:\nabc;", "u:the 12;a:-;u:the 12;a:he;"]
    assert [learnt(sample) for sample in turns] == ["\nabc;", "he;"]


def test_tools_reach_the_template():
    other = tiny.tokenizer()
    other.chat_template = "{{ tools[0]['name'] }}" + tiny.CHATML
    example = {"messages": [USER, REPLY], "tools": [{"name": "abc"}]}
    assert other.decode(encode_one(example, tokenizer=other).ids).startswith("abc<|im_start|>user")


def test_examples_of_all_formats_together_and_from_any_iterable():
    examples = [{"text": "abc"}, {"prompt": "a", "completion": "b"}, {"messages": [USER, REPLY]}]
    assert len(encode((e for e in examples), TOKENIZER).samples) == 3


def test_long_examples_are_cut_or_dropped_and_counted():
    examples = [{"prompt": "a" * n, "completion": "b" * 4} for n in (2, 6, 20)]
    found = encode(examples, TOKENIZER, max_length=8)
    assert [len(sample) for sample in found.samples] == [7, 8]
    assert (found.cut, found.dropped) == (2, 1)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"txt": "a"}, r"has the keys \['txt'\]; expected exactly one of"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "could be text or prompt and completion"),
        ({"prompt": "b"}, r"keys \['prompt'\]"),
        ({"text": None}, '"text" is null, expected a string'),
        ({"prompt": "a", "completion": 3}, '"completion" is a number'),
        ({"messages": "hi"}, '"messages" is a string'),
        ({"messages": []}, "expected a list that is not empty"),
        ({"messages": [{"content": "a"}]}, "message 1 is"),
        ({"messages": [USER]}, 'no message has the role "assistant"'),
        ({"messages": [REPLY]}, "first message is the assistant's"),
        (["text"], "a list, expected"),
        ({"input_ids": "ab"}, "\"input_ids\" is 'ab', expected a list of integers"),
        ({"input_ids": [1.5]}, "expected a list of integers"),
        ({"input_ids": [True]}, "expected a list of integers"),
        ({"input_ids": [1, 2], "labels": [1]}, r"'labels': 1, 'attention_mask': 2} entries"),
        (
            {"input_ids": [5, 6, 7], "labels": [6, 7, -100]},
            r"a label is 6, expected the id in its place \(labels are not",
        ),
        ({"input_ids": [1], "text": "a"}, "could be text or tokens"),
    ],
)
def test_examples_that_are_refused(example, message):
    with pytest.raises(DataError, match=r"mine, example 2.*" + message):
        encode([{"text": "abc"}, example], TOKENIZER, where="mine")


def test_a_chat_without_a_template():
    other = tiny.tokenizer()
    other.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        encode([{"messages": [USER, REPLY]}], other)
    other.chat_template = "{{ raise_exception('no systems here') }}"
    with pytest.raises(DataError, match="refuses these messages: no systems here"):
        encode([{"messages": [USER, REPLY]}], other)


def test_nothing_to_learn():
    with pytest.raises(DataError, match="there is none"):
        encode([], TOKENIZER)
    with pytest.raises(DataError, match="of 1 examples nothing is left"):
        encode([{"prompt": "aaaa", "completion": "b"}], TOKENIZER, max_length=3)
    for length in (1, 2.5, True):
        with pytest.raises(ValueError, match="max_length"):
            encode([{"text": "a"}], TOKENIZER, max_length=length)  # type: ignore[arg-type]


# --- packing --------------------------------------------------------------------------------------


@given(own=st.lists(samples, max_size=40), length=st.integers(9, 30))
def test_packing_loses_nothing_and_is_not_wasteful(own, length):
    rows = pack(own, length)
    assert Counter(sample for row in rows for sample in row) == Counter(own)
    sizes = [sum(map(len, row)) for row in rows]
    assert all(0 < size <= length for size in sizes)
    # Any two rows together would not fit into one (else the later one would not have been begun).
    assert all(a + b > length for i, a in enumerate(sizes) for b in sizes[i + 1 :])
    assert pack(own, length) == rows


def test_packing_refuses_what_is_too_long():
    with pytest.raises(ValueError, match=r"length=3.*4 tokens"):
        pack([Sample((1,) * 4, (True,) * 4)], 3)
    with pytest.raises(ValueError, match="2 ids but 1 learnt"):
        Sample((1, 2), (True,))


@given(own=st.lists(st.lists(st.lists(samples, min_size=1, max_size=3), max_size=3), min_size=1, max_size=3))
def test_collating_puts_every_token_and_label_in_its_place(own):
    rows = [[tuple(row) for row in adapter] for adapter in own]
    if not any(rows):
        with pytest.raises(ValueError, match="no adapter has a row"):
            collate(rows)
        return
    batch = collate(rows, pad_id=7)
    longest = max(sum(map(len, row)) for adapter in rows for row in adapter)
    assert batch.input_ids.shape == (len(rows), max(map(len, rows)), longest)
    assert {leaf.dtype for leaf in batch} == {torch.int64}
    filled = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    for n, adapter in enumerate(rows):
        for b, row in enumerate(adapter):
            at = 0
            for sample in row:
                for t, (token, wanted) in enumerate(zip(sample.ids, sample.learnt, strict=True)):
                    assert batch.input_ids[n, b, at] == token
                    assert batch.labels[n, b, at] == (token if wanted and t else IGNORED)
                    assert batch.position_ids[n, b, at] == t
                    filled[n, b, at] = True
                    at += 1
            if at < longest:
                assert batch.position_ids[n, b, at] == 0
    assert (batch.input_ids[~filled] == 7).all() and (batch.labels[~filled] == IGNORED).all()
    assert batch.targets.tolist() == [sum(s.targets for row in adapter for s in row) for adapter in rows]
    assert isinstance(batch.to("cpu"), Batch)


# --- order ----------------------------------------------------------------------------------------


@given(count=st.integers(1, 12), batch=st.integers(1, 5), seed=st.integers(0, 9), epochs=st.integers(1, 3))
def test_steps_visit_every_row_once_an_epoch(count, batch, seed, epochs):
    rows: list[Any] = [(i,) for i in range(count)]
    total = epochs * count
    steps = [rows_at(rows, s, batch, seed=seed, total=total) for s in range(-(-total // batch))]
    assert all(len(step) == batch for step in steps[:-1]) and 1 <= len(steps[-1]) <= batch
    stream = [row for step in steps for row in step]
    for epoch in range(epochs):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == rows
    # Any step alone gives the same, which is all that resuming needs.
    assert [rows_at(rows, s, batch, seed=seed, total=total) for s in reversed(range(len(steps)))] == steps[::-1]
    assert rows_at(rows, len(steps), batch, seed=seed, total=total) == []


def test_order_depends_on_seed_and_epoch():
    rows: list[Any] = [(i,) for i in range(50)]
    a, b = (rows_at(rows, 0, 50, seed=seed) for seed in (0, 1))
    assert a != b and a != rows and rows_at(rows, 1, 50, seed=0) != a


@given(count=st.integers(2, 30), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_splitting_off_loses_nothing(count, fraction, seed):
    own = [Sample((i,), (True,)) for i in range(count)]
    kept, held_out = split_off(own, fraction, seed)
    assert sorted(kept + held_out, key=lambda s: s.ids) == own and kept and held_out
    assert abs(len(held_out) - fraction * count) <= 1
    assert (kept, held_out) == split_off(own, fraction, seed)


def test_splitting_errors():
    own = [Sample((i,), (True,)) for i in range(2)]
    with pytest.raises(ValueError, match="fraction=1"):
        split_off(own, 1, 0)
    with pytest.raises(ValueError, match="1 samples cannot be divided"):
        split_off(own[:1], 0.5, 0)


# --- examples and batches from elsewhere ----------------------------------------------------------


def test_strings_are_texts():
    assert encode(["the abc", "12"], TOKENIZER) == encode([{"text": "the abc"}, {"text": "12"}], TOKENIZER)
    assert encode(iter(["the abc"]), TOKENIZER).samples == [encode_one({"text": "the abc"})]


@pytest.mark.parametrize("given", ["the abc", {"train": [{"text": "a"}], "test": [{"text": "b"}]}, {"text": "a"}])
def test_what_holds_examples_is_not_one(given):
    with pytest.raises(TypeError, match=r"encode: mine is (a string|an object).*expected an iterable of examples"):
        encode(given, TOKENIZER, where="mine")


def test_tokens_are_taken_as_they_are():
    text = encode_one({"prompt": "abc", "completion": "the"})
    labels = [i if own else IGNORED for i, own in zip(text.ids, text.learnt, strict=True)]
    given = {"input_ids": [*text.ids, 0, 0], "labels": [*labels, IGNORED, IGNORED]}
    given["attention_mask"] = [1] * len(text) + [0, 0]
    assert encode_one(given) == encode_one({k: torch.tensor(v) for k, v in given.items()}) == text
    assert encode_one(given, completion_only=False) == Sample(text.ids, (True,) * len(text))
    everything = encode_one({"input_ids": list(text.ids)})
    assert everything == Sample(text.ids, (True,) * len(text)) != text
    assert encode([given, {"input_ids": [1, 2], "labels": [1, -100]}], TOKENIZER, max_length=len(text)) == (
        [text],
        0,
        1,
    )


@pytest.fixture(scope="module")
def dataset() -> Any:
    import datasets

    return datasets.Dataset.from_list([{"prompt": f"the {i} ", "completion": "abc" * (i % 3 + 1)} for i in range(12)])


def test_datasets_are_iterables(dataset, tmp_path):
    rows = [dict(row) for row in dataset]
    expected = encode(rows, TOKENIZER)
    assert encode(dataset, TOKENIZER) == encode(dataset.to_iterable_dataset(), TOKENIZER) == expected
    assert encode(dataset.select(range(3)), TOKENIZER) != expected
    chats = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}] for r in rows
    ]
    with_chats = type(dataset).from_list([{"messages": chat} for chat in chats])
    assert encode(with_chats, TOKENIZER) == encode([{"messages": chat} for chat in chats], TOKENIZER)

    def tokens(row: dict[str, Any]) -> dict[str, Any]:
        sample = encode_one(row)
        return {
            "input_ids": list(sample.ids),
            "labels": [i if own else IGNORED for i, own in zip(sample.ids, sample.learnt, strict=True)],
        }

    mapped = dataset.map(tokens, remove_columns=dataset.column_names)
    assert encode(mapped, TOKENIZER) == encode(mapped.with_format("torch"), TOKENIZER) == expected
    assert encode(mapped.with_format("numpy"), TOKENIZER) == expected


def test_datasets_on_disk(dataset, tmp_path):
    import datasets

    dataset.save_to_disk(tmp_path / "folder")
    dataset.to_parquet(tmp_path / "file.parquet")
    rows = [dict(row) for row in dataset]
    for name in ("folder", "file.parquet"):
        assert read_examples(tmp_path / name) == rows
    before = [file_digest(tmp_path / name) for name in ("folder", "file.parquet")]
    assert before == [file_digest(tmp_path / name) for name in ("folder", "file.parquet")]
    dataset.select(range(11)).save_to_disk(tmp_path / "other")
    assert file_digest(tmp_path / "other") != before[0]
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "splits")
    with pytest.raises(
        DataError, match=r"holds the splits \['test', 'train'\]; name one of them, such as .*splits/test"
    ):
        read_examples(tmp_path / "splits")
    assert read_examples(tmp_path / "splits/train") == rows
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty").mkdir()
    for name in ("broken.parquet", "empty"):
        with pytest.raises(DataError, match=f"{name}: datasets cannot read it"):
            read_examples(tmp_path / name)
