"""`ft.memory_report` against bytes counted while the same step runs on real tensors, on the CPU.

The model's attention is made of plain operations, which the CPU and the meta device both run, so that the arithmetic
is the same; the report rounds each tensor up to 512 bytes, as the CUDA allocator does. Both count what PyTorch's
dispatcher sees, so they are within 1 % here; on a GPU, kernels have workspaces of their own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from live import Live
from models import Tiny, assert_unchanged, finetunes, gpt2, llama, snapshot
from torch import Tensor
from torch.func import vmap

import finetuna_func as ft

VOCAB, B, T = 512, 2, 48
COUNTED = 0.01


@functools.cache
def base() -> ft.Base:
    model = llama(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    model.set_attn_implementation("eager")
    return ft.quantize_base_model(model)


def some(n: int | None, **arguments: Any) -> ft.Finetuned:
    tuned = finetunes(base(), n or 1, **arguments)
    return tuned[0] if n is None else ft.stack(tuned)


def shape_of(n: int | None, batch: int = B, length: int = T) -> tuple[int, ...]:
    return (batch, length) if n is None else (n, batch, length)


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def measured(
    base: ft.Base, tuned: ft.Finetuned, shape: tuple[int, ...], tx: Any, loss_fn: Any = None, **options: Any
) -> int:
    """What is alive at the worst moment of the step on real tensors, the step's inputs included."""
    ids = torch.randint(4, 16, shape, generator=torch.Generator().manual_seed(0))
    transform = ft.value_and_grad if tuned.stack_size is None else ft.stacked_value_and_grad
    loss = transform(lambda t: (loss_fn or ft.causal_lm_loss)(base, t, ids, **options))
    state = tx.init(tuned) if tx else ()

    def step() -> None:
        _, grads = loss(tuned)
        if tx:
            updates, _ = tx.update(grads, state, tuned)
            ft.optim.apply_updates(tuned, updates)

    step()  # the first call copies the skeleton
    with Live() as live:
        step()
    return base.nbytes + nbytes([dict(tuned.params), dict(tuned.consts)]) + nbytes(state) + live.peak


# --- what is measured


ADAM = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-3))
OPTIONS: list[dict[str, Any]] = [{}, {"remat": "blocks"}, {"chunk_tokens": 16}, {"remat": "blocks", "chunk_tokens": 16}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options) or "plain")
@pytest.mark.parametrize(
    "n", [None, 2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_the_measured_peak(n: int | None, options: dict[str, Any]):
    # Few parameters, so that the worst moment is not the optimizer's
    tuned, tx = some(n, adapt_layers={"q_proj"}, plain_layers=set()), ft.optim.adamw(1e-3)
    found = ft.memory_report(base(), tuned, shape_of(n), tx=tx, **options).peak
    expected = measured(base(), tuned, shape_of(n), tx, **options)
    assert abs(found - expected) <= COUNTED * expected
    longer = ft.memory_report(base(), tuned, shape_of(n, length=T + T // 4), tx=tx, **options).peak
    assert longer - expected > 5 * COUNTED * expected


@pytest.mark.parametrize(
    "tx",
    [None, ft.optim.sgd(0.1), ADAM, ft.optim.flatten(ADAM)],
    ids=["no optimizer", "sgd", "clipped adamw", "flat"],
)
def test_other_optimizers(tx: Any):
    tuned = some(2)
    # Little text, so that the optimizer counts
    found = ft.memory_report(base(), tuned, shape_of(2, 1, 4), tx=tx)
    expected = measured(base(), tuned, shape_of(2, 1, 4), tx)
    assert abs(found.peak - expected) <= 3 * COUNTED * expected  # tensors of a few bytes are rounded up to 512
    assert found.optimizer == (nbytes(tx.init(tuned)) if tx else 0)
    other = ft.memory_report(base(), tuned, shape_of(2, 1, 4), tx=ft.optim.adamw(1e-3) if tx is None else None)
    assert abs(other.peak - expected) > 10 * COUNTED * expected


@pytest.mark.parametrize("make", [Tiny, gpt2, lambda: llama(hidden_size=64).bfloat16()], ids=["Tiny", "GPT-2", "bf16"])
def test_other_models(make: Callable[[], Any]):
    """With a loss of one's own where a model is no language model."""
    model = make()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    base = ft.quantize_base_model(model)
    stacked = ft.stack(finetunes(base, 2))

    def loss(base: ft.Base, stacked: ft.Finetuned, ids: Tensor) -> Tensor:
        return ft.apply_stacked(base, stacked, ids).square().mean((1, 2, 3))

    loss_fn = loss if make is Tiny else None
    shape = shape_of(2, 8, 24)
    found = ft.memory_report(base, stacked, shape, loss_fn=loss_fn)
    expected = measured(base, stacked, shape, None, loss_fn)
    assert abs(found.peak - expected) <= 3 * COUNTED * expected
    assert found.logits == (0 if loss_fn else 4 * 32 * 2 * 8 * 24)
    longer = ft.memory_report(base, stacked, shape_of(2, 8, 30), loss_fn=loss_fn).peak
    assert longer - expected > 10 * COUNTED * expected


def test_losses_of_ones_own():
    """Any route: mapped, per finetune, with blocks computed again; fused attention is counted under ``vmap`` too."""
    fused = ft.quantize_base_model(llama(vocab_size=VOCAB, hidden_size=64))
    stacked, shape = ft.stack(finetunes(fused, 2)), (2, B, T)

    def mapped(base: ft.Base, stacked: ft.Finetuned, ids: Tensor) -> Tensor:
        return vmap(lambda t, ids: ft.causal_lm_loss(base, t, ids))(stacked, ids)

    def again(base: ft.Base, stacked: ft.Finetuned, ids: Tensor) -> Tensor:
        return ft.apply_stacked(base, stacked, ids, remat="blocks").logits.square().mean((1, 2, 3))

    def whole(base: ft.Base, stacked: ft.Finetuned, ids: Tensor) -> Tensor:
        return ft.apply_stacked(base, stacked, ids).logits.square().mean((1, 2, 3))

    peaks = {loss: ft.memory_report(fused, stacked, shape, loss_fn=loss).peak for loss in (None, mapped, again, whole)}
    assert abs(peaks[mapped] - peaks[None]) <= 0.02 * peaks[None]
    assert peaks[again] < 0.9 * peaks[whole]


def test_fused_attention_forms_no_scores():
    """The report is of a GPU: with as many tokens again, it grows as much again, where scores would grow fourfold."""
    eager = base()
    fused = ft.quantize_base_model(llama(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=3))

    def activations(base: ft.Base, length: int) -> int:
        return ft.memory_report(base, finetunes(base, 1)[0], (1, length), chunk_tokens=64).activations

    growth = {b: (activations(b, 1024) - activations(b, 512)) / activations(b, 512) for b in (eager, fused)}
    assert growth[eager] > 1.5
    assert 0.9 < growth[fused] < 1.1


def test_dropout_and_masks():
    config = ft.LinearAdapterConfig(r=2, alpha=1.0, dropout=0.1)
    tuned = finetunes(base(), 1, adapt_layers={"q_proj"}, linear_config=config)[0]
    without = ft.memory_report(base(), tuned, (B, T))
    with_dropout = ft.memory_report(base(), tuned, (B, T), train=True, rng=ft.random.key(0))
    assert with_dropout.peak > without.peak
    masked = ft.memory_report(base(), tuned, (B, T), attention_mask=torch.ones(B, T, dtype=torch.long))
    assert masked.peak >= without.peak


# --- what it says


def test_its_parts():
    tuned, tx = some(2), ft.optim.adamw(1e-3)
    report = ft.memory_report(base(), tuned, shape_of(2), tx=tx, chunk_tokens=16)
    assert report.base == base().nbytes
    assert report.adapters == nbytes([dict(tuned.params), dict(tuned.consts)])
    assert report.gradients == nbytes(dict(tuned.params))
    assert report.optimizer == nbytes(tx.init(tuned))
    assert report.logits == 16 * VOCAB * 4
    assert report.logits < report.activations
    parts = report.base + report.adapters + report.gradients + report.optimizer + report.activations
    assert parts == report.peak
    text = str(report)
    for name in ("base", "adapters", "optimizer", "gradients", "activations", "of logits", "peak"):
        assert name in text
    assert f"{report.peak / 2**20:.1f} MiB" in text
    assert "4.00 GiB" in str(dataclasses.replace(report, peak=2**32))


def test_each_finetune_brings_its_own():
    """Parameters, gradients, optimizer state and the activations of its rows; the base is there once."""
    tx = ft.optim.adamw(1e-3)
    one, two, four = (ft.memory_report(base(), some(n), shape_of(n), tx=tx) for n in (1, 2, 4))
    assert one.base == two.base == four.base
    for name in ("adapters", "gradients"):
        assert getattr(four, name) == 2 * getattr(two, name) == 4 * getattr(one, name)
    own = two.peak - one.peak
    assert abs((four.peak - two.peak) - 2 * own) <= 0.05 * own
    assert own > one.adapters + one.gradients + one.optimizer


def test_recomputed_blocks_and_pieces_take_less():
    tuned, shape = some(2), shape_of(2, 4, 64)
    plain, remat, pieces, both = (ft.memory_report(base(), tuned, shape, **options) for options in OPTIONS)
    assert remat.activations < 0.6 * plain.activations
    assert pieces.logits < plain.logits
    assert pieces.peak < plain.peak
    assert both.peak <= min(remat.peak, pieces.peak)
    assert ft.memory_report(base(), tuned, shape, compile="blocks").peak == plain.peak


def test_nothing_is_touched_or_made():
    tuned = some(2)
    before = [snapshot(base()), snapshot(tuned)]
    expected = ft.causal_lm_loss(base(), tuned, torch.zeros(2, B, T, dtype=torch.long))
    with Live() as live:
        ft.memory_report(base(), tuned, (2, 64, 512), tx=ft.optim.adamw(1e-3))
    made = {device for device in live.devices if device != "meta"}
    assert not made, made
    assert live.peak > 100 * base().nbytes
    assert_unchanged(base(), before[0])
    assert_unchanged(tuned, before[1])
    assert torch.equal(ft.causal_lm_loss(base(), tuned, torch.zeros(2, B, T, dtype=torch.long)), expected)


def test_check():
    report = ft.memory_report(base(), some(2), shape_of(2))
    report.check(available=report.peak)
    with pytest.raises(MemoryError, match=r"this step needs .* MiB at its peak, and .* MiB are there") as info:
        report.check(available=report.peak - 1)
    for word in ("activations", "remat='blocks'", "chunk_tokens", "8-bit optimizer"):
        assert word in str(info.value)
    with pytest.raises(ValueError, match="pass a CUDA device to ask, or available=bytes"):
        report.check()


def test_refusals():
    with pytest.raises(ValueError, match=r"expected \(2, B, T\) for a stack of 2 finetunes"):
        ft.memory_report(base(), some(2), (3, B, T))
    with pytest.raises(ValueError, match=r"expected \(B, T\) for one finetune"):
        ft.memory_report(base(), some(None), (T,))
    with pytest.raises(ValueError, match=r"causal_lm_loss\(remat='all'\)"):
        ft.memory_report(base(), some(None), (B, T), remat="all")
    with pytest.raises(TypeError, match="unexpected keyword argument 'input_ids'"):
        other = ft.quantize_base_model(Tiny())
        ft.memory_report(other, ft.new_finetuned(other), (B, T))
