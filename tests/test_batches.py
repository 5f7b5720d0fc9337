"""Batches from loaders of their own, as the batch of a stack: each adapter sees what its loader gave."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

import finetuna_func as ft
from finetuna_func.data import IGNORED, Batch

TOKENIZER = tiny.tokenizer()


def batch_of(rows: int, length: int, start: int = 0) -> dict[str, Tensor]:
    ids = torch.arange(start, start + rows * length).view(rows, length) % 200 + 1
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=4), st.integers(0, 271))
def test_what_went_in_is_there_and_the_rest_is_not_learnt(sizes: list[tuple[int, int]], pad: int) -> None:
    given_ = [batch_of(*size, start=i) for i, size in enumerate(sizes)]
    stacked = ft.stack_batches(given_, pad_id=pad)
    shape = (len(sizes), max(rows for rows, _ in sizes), max(length for _, length in sizes))
    assert {name: tuple(leaf.shape) for name, leaf in stacked.items()} == dict.fromkeys(given_[0], shape)
    inside = torch.zeros(shape, dtype=torch.bool)
    for i, (rows, length) in enumerate(sizes):
        inside[i, :rows, :length] = True
        for name, leaf in given_[i].items():
            assert torch.equal(stacked[name][i, :rows, :length], leaf)
    for name, fill in (("input_ids", pad), ("labels", IGNORED), ("attention_mask", 0)):
        assert (stacked[name][~inside] == fill).all()
        assert stacked[name].dtype == given_[0][name].dtype


def test_kinds_are_kept() -> None:
    ids = [torch.arange(6).view(2, 3) + i for i in range(2)]
    assert torch.equal(ft.stack_batches(ids), torch.stack(ids))
    for kind in (tuple, list):
        out = ft.stack_batches([kind([x, x.float()]) for x in ids])
        assert type(out) is kind and torch.equal(out[0], torch.stack(ids)) and out[1].dtype == torch.float32
    out = ft.stack_batches([Batch(x, x, x) for x in ids])
    assert type(out) is Batch and torch.equal(out.labels, torch.stack(ids))
    assert torch.equal(ft.stack_batches([UserDict(a=x) for x in ids])["a"], torch.stack(ids))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "no batches"),
        ([torch.ones(1, 2), torch.ones(1, 3)], ValueError, r"batch has the shapes \[\(1, 2\), \(1, 3\)\]"),
        ([{"input_ids": torch.ones(1, 2)}, {"input_ids": torch.ones(1, 3)}], ValueError, "with labels or a mask"),
        (
            [{"a": torch.ones(1)}, {"b": torch.ones(1)}],
            ValueError,
            r"have \[\['a'\], \['b'\]\]; expected the same names",
        ),
        ([{"a": torch.ones(1)}, torch.ones(1)], ValueError, "expected the same names"),
        ([(torch.ones(1),), [torch.ones(1)]], ValueError, "differ in kind"),
        (
            [{"input_ids": [[1, 2]]}],
            TypeError,
            r'input_ids is a list, expected a tensor; use dataset.with_format\("torch"',
        ),
        ([{"text": ["a"]}], TypeError, "text is a list"),
        (
            [
                {"labels": torch.ones(1, 2), "other": torch.ones(1, 2)},
                {"labels": torch.ones(1, 2), "other": torch.ones(3)},
            ],
            ValueError,
            "other has the shapes",
        ),
        ([{"labels": torch.ones(1, 2)}, {"labels": torch.ones(3)}], ValueError, "labels has the shapes"),
    ],
)
def test_what_is_refused(batches: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ft.stack_batches(batches)


def loaders(kind: str) -> list[DataLoader[Any]]:
    """Two, of different texts and lengths, on real datasets; what a user has."""
    import datasets

    texts = [[f"the {i} abc" * (1 + i % 3) for i in range(8)], [f"12 {i}" for i in range(8)]]
    made = []
    for own in texts:
        dataset = datasets.Dataset.from_dict({"text": own})
        dataset = dataset.map(lambda row: TOKENIZER(row["text"]), remove_columns=["text"])
        dataset = dataset.select_columns(["input_ids", "attention_mask"])
        collator = (
            DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
            if kind == "language modelling"
            else DataCollatorForSeq2Seq(TOKENIZER)
        )
        if kind == "labels":
            dataset = dataset.map(lambda row: {"labels": row["input_ids"]})
        order = torch.Generator().manual_seed(0)
        made.append(DataLoader(dataset, batch_size=3, shuffle=True, generator=order, collate_fn=collator))
    return made


@pytest.mark.parametrize("kind", ["language modelling", "labels"])
def test_training_from_loaders_equals_each_alone(kind: str) -> None:
    """Also the last batch, of two rows; losses and gradients, on right-padded rows with a mask."""
    base = ft.quantize_base_model(tiny.model(), modules_not_to_quantize=())
    made = [ft.new_finetuned(base, plain_layers=(), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    stacked = ft.stack(made)
    step = ft.stacked_value_and_grad(lambda s, ids, labels: ft.causal_lm_loss(base, s, ids, labels))
    alone = ft.value_and_grad(lambda t, ids, labels: ft.causal_lm_loss(base, t, ids, labels))
    seen = 0
    for batches in zip(*loaders(kind), strict=True):
        batch = ft.stack_batches(batches, pad_id=TOKENIZER.pad_token_id)
        losses, grads = step(stacked, batch["input_ids"], batch["labels"])
        others = losses.flip(0)
        for i, own in enumerate(batches):
            loss, grad = alone(made[i], own["input_ids"], own["labels"])
            torch.testing.assert_close(losses[i], loss, rtol=1e-5, atol=0)
            assert abs(others[i] - loss) > 1e-3
            for name, leaf in grad.items():
                torch.testing.assert_close(grads[name][i], leaf, rtol=1e-4, atol=1e-6)
        seen += len(batches[0]["input_ids"])
    assert seen == 8
