"""Lazy tensors: what is recorded and evaluated equals what torch computes, and as little as possible is read."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from finetuna_func import _lazy
from finetuna_func._lazy import LazyTensor, blocks, evaluate, lazy, sources


class Held:
    """A source that notes what is read of it."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.shape, self.dtype = values, tuple(values.shape), values.dtype
        self.reads: list[tuple[tuple[int, int], ...]] = []

    def read(self, box):
        self.reads.append(box)
        return self.values[tuple(slice(a, b) for a, b in box)].clone()


def held(*shape: int, dtype: torch.dtype = torch.float32) -> Held:
    return Held(torch.arange(math.prod(shape)).reshape(shape).to(dtype))


def test_a_tensor_is_read_when_it_is_evaluated_and_not_before():
    source = held(4, 3)
    x = lazy(source)
    assert x.shape == (4, 3) and x.dtype == torch.float32 and x.device.type == "cpu" and source.reads == []
    assert type(evaluate(x)) is Tensor and torch.equal(evaluate(x), source.values)
    assert len(source.reads) == 2


def test_a_parameter_of_it_is_lazy():
    parameter = nn.Parameter(lazy(held(2, 2)), requires_grad=True)
    assert isinstance(parameter, nn.Parameter) and isinstance(parameter, LazyTensor)
    assert torch.equal(evaluate(parameter), held(2, 2).values)
    assert torch.empty_like(parameter, device="meta").is_meta


CHANGES = {
    "slice": lambda x, i: x[i % x.shape[0] :],
    "slice of columns": lambda x, i: x[:, : max(1, i % x.shape[1])],
    "step": lambda x, i: x[:: 1 + i % 2],
    "transpose": lambda x, i: x.mT,
    "cat rows": lambda x, i: torch.cat([x, x[:1], x]),
    "cat columns": lambda x, i: torch.cat([x, x], dim=-1),
    "stack and select": lambda x, i: torch.stack([x, x + 1, x], dim=i % 3).select(i % 3, 1),
    "split": lambda x, i: x.split(1 + i % x.shape[0])[0],
    "chunk": lambda x, i: x.chunk(2, dim=1)[0],
    "unbind": lambda x, i: torch.stack(list(x.unbind(i % 2)), dim=i % 2),
    "unsqueeze": lambda x, i: x.unsqueeze(i % 3).squeeze(i % 3),
    "reshape": lambda x, i: x.reshape(x.shape[1], x.shape[0]),
    "dtype": lambda x, i: x.to([torch.float64, torch.float32, torch.bfloat16][i % 3]),
    "arithmetic": lambda x, i: -(x * 2 + x),
    "permuted heads": lambda x, i: x.reshape(x.shape[0], x.shape[1], 1).swapaxes(1, 2).reshape(x.shape),
    "ellipsis": lambda x, i: x[...].detach().clone().contiguous(),
}


@settings(max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    steps=st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 5)), max_size=5),
    numbers=st.integers(1, 40),
)
def test_recorded_operations_are_torchs(shape, steps, numbers):
    source = held(*shape)
    x, expected = lazy(source), source.values
    for name, i in steps:
        x, expected = CHANGES[name](x, i), CHANGES[name](expected, i)
    assert isinstance(x, LazyTensor) and source.reads == []
    assert x.shape == expected.shape and x.dtype == expected.dtype
    assert torch.equal(evaluate(x), expected)
    parts = list(blocks(x, numbers))
    assert torch.equal(torch.cat([rows for _, rows in parts]), expected)
    assert [start for start, _ in parts] == [sum(len(rows) for _, rows in parts[:i]) for i in range(len(parts))]
    assert all(rows.numel() <= max(numbers, rows[:1].numel()) for _, rows in parts)


def test_one_expert_of_fused_ones_reads_that_expert():
    gates, ups = [held(4, 3) for _ in range(5)], [held(4, 3) for _ in range(5)]
    fused = torch.cat([torch.stack([lazy(s) for s in gates]), torch.stack([lazy(s) for s in ups])], dim=1)
    assert fused.shape == (5, 8, 3)
    third = list(fused)[3]
    assert torch.equal(evaluate(third), torch.cat([gates[3].values, ups[3].values]))
    assert [len(s.reads) for s in gates] == [len(s.reads) for s in ups] == [0, 0, 0, 1, 0]


def test_blocks_read_each_row_once_whatever_is_stacked():
    sources_ = [held(6, 4) for _ in range(3)]
    stacked = torch.stack([lazy(s) for s in sources_])
    rows = torch.cat([part for _, part in blocks(stacked[1].to(torch.float64), 8)])
    assert torch.equal(rows, sources_[1].values.double())
    assert sources_[1].reads == [((0, 2), (0, 4)), ((2, 4), (0, 4)), ((4, 6), (0, 4))]
    assert sources_[0].reads == sources_[2].reads == []


def test_blocks_of_a_transpose_read_the_file_once():
    source = held(6, 4)
    assert torch.equal(torch.cat([part for _, part in blocks(lazy(source).mT, 6)]), source.values.mT)
    assert source.reads == [((0, 6), (0, 4))]


def test_a_large_tensor_is_put_together_from_blocks(monkeypatch):
    monkeypatch.setattr(_lazy, "BLOCK", 8)
    source = held(6, 4)
    assert torch.equal(evaluate(lazy(source).to(torch.bfloat16)), source.values.bfloat16())
    assert len(source.reads) == 3


def test_a_part_does_not_keep_the_whole():
    part = evaluate((lazy(held(8, 8)) + 0)[:1])
    assert part.untyped_storage().nbytes() == part.numel() * part.itemsize


def test_what_needs_numbers_gets_them():
    source = held(3, 2)
    x = lazy(source)
    assert torch.equal(x, lazy(held(3, 2))) and not torch.equal(x, lazy(held(3, 2)) + 1)
    assert not torch.equal(x, lazy(held(2, 3)))
    assert x.sum().item() == 15
    target = torch.zeros(3, 2)
    target.copy_(x)
    assert torch.equal(target, source.values)


@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: x.zero_(), lambda x: x.copy_(torch.ones(2))])
def test_nothing_is_written_to_a_file(write):
    source = held(2)
    with pytest.raises(RuntimeError, match="still in its file"):
        write(lazy(source))
    assert torch.equal(source.values, held(2).values)


def test_new_tensors_of_its_shape_are_ordinary_ones():
    source = held(2, 3, dtype=torch.bfloat16)
    x = lazy(source)
    for made in (
        torch.empty_like(x).uniform_(),
        torch.zeros_like(x).add_(1),
        x.new_full((4,), 2.0),
        torch.ones_like(x),
    ):
        assert type(made) is Tensor and made.dtype == torch.bfloat16 and made.is_contiguous()
    assert torch.zeros_like(x, dtype=torch.int8).shape == (2, 3) and source.reads == []


def test_sources_are_found_through_operations():
    a, b = held(2, 2), held(2, 2)
    assert sources(torch.cat([lazy(a), lazy(b) * 2])[1:]) == [a, b]
    assert sources(torch.ones(2)) == []


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (1,)])
def test_small_shapes(shape):
    source = held(*shape)
    assert torch.equal(evaluate(lazy(source) + 1), source.values + 1)
    assert torch.equal(torch.cat([rows.reshape(-1) for _, rows in blocks(lazy(source), 1)]), source.values.reshape(-1))
