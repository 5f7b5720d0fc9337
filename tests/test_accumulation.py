"""Gradients in micro-batches are those of the batch, at the memory of one."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from models import Everything, Mlp, assert_close, finetunes, llama, randomized
from test_transforms import LiveBytes, assert_gradients_close, ids_for, scaled
from torch import Tensor
from torch.func import grad, vmap

import finetuna_func as ft
from finetuna_func import Finetuned, LinearAdapterConfig

FP32 = 1e-5


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return ft.quantize_base_model(Everything().eval())


def mean_square(base: ft.Base):
    return lambda t, x: ft.apply(base, t, x).square().mean()


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7])
def test_a_mean_over_examples(base, parts):
    tuned, ids = finetunes(base, 1)[0], ids_for(7, 5)
    loss, grads = ft.value_and_grad(mean_square(base))(tuned, ids)
    sizes: list[int] = []

    def loss_fn(t: Finetuned, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return mean_square(base)(t, x)

    found, found_grads = ft.accumulate_gradients(ft.value_and_grad(loss_fn), parts)(tuned, ids)
    assert sum(sizes) == 7 and len(sizes) == parts and max(sizes) - min(sizes) <= 1
    assert_close(found, loss, FP32, unlike=1.01 * loss)
    assert_gradients_close(found_grads, grads, FP32, unlike=scaled(grads))
    if parts in (2, 3, 5):  # an unweighted mean would not do
        losses = [mean_square(base)(tuned, x) for x in ids.split(sizes)]
        assert abs(sum(losses) / parts - loss) > 1e-4 * loss


def test_a_mean_over_tokens_needs_their_number(base):
    tuned, ids, labels = finetunes(base, 1)[0], ids_for(6, 5), ids_for(6, 5).roll(1, 1)
    labels[0, 1:], labels[1, 3:], labels[5] = -100, -100, -100

    def loss_fn(t: Finetuned, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(ft.apply(base, t, x).flatten(0, 1), labels.flatten())

    loss, grads = ft.value_and_grad(loss_fn)(tuned, ids, labels)
    for counted in (lambda t, x, y: (y != -100).sum(), lambda t, x, y: int((y != -100).sum())):
        for parts in (2, 6):  # in six, the last part has no token, and its loss is NaN
            in_parts = ft.accumulate_gradients(ft.value_and_grad(loss_fn), parts, weight=counted)
            found, found_grads = in_parts(tuned, ids, labels)
            assert_close(found, loss, FP32, unlike=1.01 * loss)
            assert_gradients_close(found_grads, grads, FP32, unlike=scaled(grads))
    assert loss_fn(tuned, ids[5:], labels[5:]).isnan()
    by_examples, _ = ft.accumulate_gradients(ft.value_and_grad(loss_fn), 2)(tuned, ids, labels)
    assert abs(by_examples - loss) > 1e-3 * loss
    nothing = torch.full_like(labels, -100)  # the mean of nothing, as in the batch
    empty, _ = ft.accumulate_gradients(ft.value_and_grad(loss_fn), 2, weight=counted)(tuned, ids, nothing)
    assert empty.isnan() and loss_fn(tuned, ids, nothing).isnan()


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_stacks_with_a_weight_for_each_finetune(base, chunk_size):
    stacked, ids, labels = ft.stack(finetunes(base)), ids_for(3, 4, 5), ids_for(3, 4, 5).roll(1, 2)
    labels[0, 0, 1:], labels[1, 3], labels[2, 2:, 2:] = -100, -100, -100

    def loss_fn(t: Finetuned, x: Tensor, labels: Tensor) -> Tensor:
        logits = ft.apply_stacked(base, t, x)
        losses = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").reshape(labels.shape)
        return losses.sum((1, 2)) / (labels != -100).sum((1, 2))

    loss, grads = ft.stacked_value_and_grad(loss_fn)(stacked, ids, labels)
    in_parts = ft.accumulate_gradients(
        ft.stacked_value_and_grad(loss_fn, chunk_size=chunk_size),
        4,
        in_dims=(None, 1, 1),
        weight=lambda t, x, y: (y != -100).sum((1, 2)),
    )
    found, found_grads = in_parts(stacked, ids, labels)
    assert_close(found, loss, FP32, unlike=loss.roll(1, 0))
    assert_gradients_close(found_grads, grads, FP32, unlike={name: g.roll(1, 0) for name, g in grads.items()})


def test_structures_shared_arguments_keywords_and_aux(base):
    tuned, ids = finetunes(base, 1)[0], ids_for(4, 5)
    shared = torch.linspace(0, 1, 20)

    def loss_fn(batch: dict[str, Tensor], t: Finetuned, scale: Tensor, *, power: float):
        out = ft.apply(base, t, batch["ids"]) * scale
        return out.abs().pow(power).mean(), {"out": out, "n": len(batch["ids"])}

    with_aux = ft.value_and_grad(loss_fn, has_aux=True)
    (loss, aux), grads = with_aux({"ids": ids}, tuned, shared, power=3.0)
    in_parts = ft.accumulate_gradients(with_aux, 2, in_dims=({"ids": 0}, None, None))
    (found, found_aux), found_grads = in_parts({"ids": ids}, tuned, shared, power=3.0)
    assert_close(found, loss, FP32, unlike=1.01 * loss)
    assert_gradients_close(found_grads, grads, FP32, unlike=scaled(grads))
    out = torch.cat([part["out"] for part in found_aux])
    assert_close(out, aux["out"], FP32, unlike=aux["out"].flip(0))
    assert [part["n"] for part in found_aux] == [2, 2]


def test_each_part_has_a_key_of_its_own(base):
    tuned = randomized(ft.new_finetuned(base, linear_config=LinearAdapterConfig(dropout=0.5)))
    ids, key = ids_for(1, 5).expand(4, 5), ft.random.key(0)

    def loss_fn(t: Finetuned, x: Tensor, key: Tensor):
        out = ft.apply(base, t, x, train=True, rng=key)
        return out.square().mean(), out

    def outputs(entry):
        in_parts = ft.accumulate_gradients(ft.value_and_grad(loss_fn, has_aux=True), 2, in_dims=(0, 0, entry))
        (_, aux), _ = in_parts(tuned, ids, key)
        return aux

    first, second = outputs("key")
    assert not torch.equal(first, second)
    assert torch.equal(first, ft.apply(base, tuned, ids[:2], train=True, rng=ft.random.fold_in(key, 0)))
    first, second = outputs(None)
    assert torch.equal(first, second)


def test_inside_other_transforms():
    torch.manual_seed(0)
    base = ft.quantize_base_model(Mlp(3, 4, 2).double())
    tuned, x = finetunes(base, 1)[0], torch.randn(5, 3, dtype=torch.float64)
    plain = ft.value_and_grad(lambda t, x: ft.apply(base, t, x).square().mean())
    in_parts = ft.accumulate_gradients(plain, 2)

    def norm(call):
        return lambda p: sum(g.square().sum() for g in call(tuned.replace(params=p), x)[1].values())

    expected = grad(norm(plain))(dict(tuned.params))
    assert_gradients_close(grad(norm(in_parts))(dict(tuned.params)), expected, 1e-12, unlike=scaled(expected))
    xs = torch.stack([x, x + 1])
    losses, grads = vmap(in_parts, in_dims=(None, 0))(tuned, xs)
    for i in range(2):
        loss, one = plain(tuned, xs[i])
        assert_close(losses[i], loss, 1e-12, unlike=losses[1 - i])
        assert_gradients_close({n: g[i] for n, g in grads.items()}, one, 1e-12, unlike=scaled(one))


def test_sums_are_in_float32(base):
    """A hundred bfloat16 gradients, summed in bfloat16, would stop growing."""
    tuned = finetunes(base, 1)[0]
    tuned = tuned.replace(params={name: p.bfloat16() for name, p in tuned.params.items()})
    one = {name: torch.ones_like(p) for name, p in tuned.params.items()}

    def grad_fn(t: Finetuned, x: Tensor):
        return torch.ones((), dtype=torch.bfloat16), dict(one)

    loss, grads = ft.accumulate_gradients(grad_fn, 600)(tuned, torch.zeros(600))
    assert loss == 1 and loss.dtype == torch.bfloat16
    assert all((g == 1).all() and g.dtype == torch.bfloat16 for g in grads.values())
    assert all((p == 1).all() for p in one.values())
    total = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(600):
        total = total + torch.ones((), dtype=torch.bfloat16)
    assert total / 600 != 1


def test_only_a_part_is_alive():
    torch.manual_seed(0)
    base = ft.quantize_base_model(llama(hidden_size=64, intermediate_size=128))
    tuned, ids = finetunes(base, 1, plain_layers=())[0], ids_for(16, 24)

    def loss_fn(t: Finetuned, x: Tensor) -> Tensor:
        return ft.apply(base, t, x).logits.square().mean()

    whole = ft.value_and_grad(loss_fn)
    peaks, grads = [], []
    for call in (whole, ft.accumulate_gradients(whole, 8)):
        call(tuned, ids)
        with LiveBytes() as live:
            _, found = call(tuned, ids)
        peaks.append(live.peak)
        grads.append(found)
    assert_gradients_close(grads[1], grads[0], FP32, unlike=scaled(grads[0]))
    kept = sum(g.nbytes for g in grads[0].values())
    assert peaks[1] < 0.15 * peaks[0] + 3 * kept < 0.35 * peaks[0], (peaks, kept)


def test_errors(base):
    tuned, ids = finetunes(base, 1)[0], ids_for(4, 5)
    grad_fn = ft.value_and_grad(mean_square(base))

    def raises(kind, text, *args, parts=2, **options):
        with pytest.raises(kind, match=re.escape(text)):
            ft.accumulate_gradients(grad_fn, parts, **options)(*args)

    for parts in (0, -1, 2.0, True):
        raises(
            ValueError, f"accumulate_gradients(micro_batches={parts!r}): expected an integer of at least 1", parts=parts
        )
    raises(ValueError, "(micro_batches=5): the batch has 4 examples along the axes", tuned, ids, parts=5)
    raises(ValueError, "the batch has no examples", tuned)
    raises(TypeError, "expected exactly one Finetuned among the positional arguments", ids)
    raises(
        ValueError,
        "has shape () and no axis 0. Give in_dims: for each argument its batch axis",
        tuned,
        ft.random.key(0),
    )
    raises(TypeError, "argument 2 holds a float, which has no axis", tuned, ids, 1.5)
    raises(ValueError, "argument 2 has shape (3,), so 3 along axis 0; expected 4", tuned, ids, torch.zeros(3))
    raises(ValueError, "(in_dims=(0,)): 1 entries for 2 positional arguments", tuned, ids, in_dims=(0,))
    raises(ValueError, "the entry of argument 1 has another structure", tuned, ids, in_dims=(0, {"ids": 0}))
    raises(ValueError, "'batch' is not an axis", tuned, ids, in_dims=(0, "batch"))
    raises(TypeError, '(in_dims="key"): argument 2 is no key', tuned, ids, 3, in_dims=(0, 0, "key"))
    for weight in (-1, float("nan"), "3", None):
        raises(ValueError, f"(weight=...): it returned {weight!r}", tuned, ids, weight=lambda *args, w=weight: w)
    raises(
        ValueError, "it returned a tensor of shape (2,), expected () or ()", tuned, ids, weight=lambda *a: torch.ones(2)
    )
