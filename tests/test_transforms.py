"""Gradients: plain autograd, torch.func and finite differences agree, in every nesting, and the lean path is lean."""

from __future__ import annotations

import re

import pytest
import torch
from models import (
    Everything,
    Mlp,
    TiedLm,
    Tiny,
    assert_close,
    finetunes,
    gradients_by_autograd,
    llama,
    randomized,
    relative_error,
    twin,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

import finetuna_func as ft
from finetuna_func import Finetuned, LinearAdapterConfig

FP32 = 1e-5


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return ft.quantize_base_model(Everything().eval())


@pytest.fixture(scope="module")
def double():
    """A small float64 model of floats, and a finetune with biases and a plain head."""
    torch.manual_seed(0)
    model = Mlp(3, 4, 2).double()
    base = ft.quantize_base_model(model)
    tuned = randomized(ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=2, bias=True)))
    return model, base, tuned


def ids_for(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 20, shape, generator=generator)


def loss_on(base: ft.Base):
    def loss_fn(tuned: Finetuned, x: Tensor, power: float = 2.0) -> Tensor:
        return ft.apply(base, tuned, x).abs().pow(power).mean()

    return loss_fn


def assert_gradients_close(mine, expected, tolerance: float, *, unlike) -> None:
    """Every leaf; and the whole differs from another gradient."""
    assert list(mine) == list(expected)
    for name in expected:
        assert mine[name].dtype == expected[name].dtype and mine[name].shape == expected[name].shape, name
        scale = expected[name].abs().max()
        assert (mine[name] - expected[name]).abs().max() <= tolerance * scale + 1e-12, name
    flat = [torch.cat([g[name].reshape(-1) for name in expected]) for g in (mine, expected, unlike)]
    assert_close(flat[0], flat[1], tolerance, unlike=flat[2])


def func_gradient(loss_fn, tuned: Finetuned, *args):
    return grad_and_value(lambda params: loss_fn(tuned.replace(params=params), *args))(dict(tuned.params))


def scaled(grads):
    return {name: 1.01 * leaf for name, leaf in grads.items()}


# --- value_and_grad


@pytest.mark.parametrize("model_class", [Everything, Tiny, TiedLm])
@pytest.mark.filterwarnings("ignore:plain_layers")
def test_lean_equals_torch_func_and_a_float_model(model_class, seed):
    model = model_class().eval()
    base = ft.quantize_base_model(model, modules_not_to_quantize=())
    config = LinearAdapterConfig(bias=True)
    tuned = randomized(ft.new_finetuned(base, adapt_layers={"embed", r"fc\d?"}, plain_layers=(), linear_config=config))
    ids = ids_for(4, 5) % 12
    loss_fn = loss_on(base)
    value, grads = ft.value_and_grad(loss_fn)(tuned, ids)
    func_grads, func_value = func_gradient(loss_fn, tuned, ids)
    assert_close(value, func_value, 1e-6, unlike=2 * value)
    assert_gradients_close(grads, func_grads, FP32, unlike=scaled(grads))

    reference = twin(model, base, tuned)
    for path in ("fc", "fc1"):
        if hasattr(model, path):
            # d loss / d bias of the layer is that of the adapter's bias over its scale
            reference.zero_grad()
            reference(ids).abs().pow(2.0).mean().backward()
            weight = reference.get_submodule(path)
            lora_b = tuned.params[f"{path}.lora_b"]
            expected = 0.25 * lora_b.T @ weight.weight.grad
            assert_close(grads[f"{path}.lora_a"], expected, FP32, unlike=1.01 * expected)
            if weight.bias is not None:
                bias = 0.25 * weight.bias.grad
                assert_close(grads[f"{path}.lora_bias"], bias, FP32, unlike=1.01 * bias)
            expected = 0.25 * weight.weight.grad @ tuned.params[f"{path}.lora_a"].T
            assert_close(grads[f"{path}.lora_b"], expected, FP32, unlike=1.01 * expected)


def test_finite_differences(double):
    _, base, tuned = double
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss_fn = loss_on(base)
    value, grads = ft.value_and_grad(loss_fn)(tuned, x)
    assert value == loss_fn(tuned, x)
    step = 1e-6
    for name, leaf in tuned.params.items():
        flat = torch.zeros(leaf.numel(), dtype=torch.float64)
        for i in range(leaf.numel()):
            nudge = torch.zeros(leaf.numel(), dtype=torch.float64)
            nudge[i] = step
            nudge = nudge.reshape(leaf.shape)
            up, down = (
                loss_fn(tuned.replace(params={**tuned.params, name: leaf + sign * nudge}), x) for sign in (1, -1)
            )
            flat[i] = (up - down) / (2 * step)
        # Central differences: rounding 1e-16 / 1e-6 and truncation 1e-12.
        assert_close(grads[name], flat.reshape(leaf.shape), 1e-7, unlike=1.001 * grads[name])


def test_position_kwargs_and_other_arguments(base):
    tuned, ids = finetunes(base, 1)[0], ids_for(2, 5)
    loss_fn = loss_on(base)
    value, grads = ft.value_and_grad(loss_fn)(tuned, ids, power=3.0)
    same_value, same = ft.value_and_grad(lambda x, scale, t: loss_fn(t, x, 3.0) * scale)(ids, 1.0, tuned)
    assert value == same_value and all(torch.equal(same[name], grads[name]) for name in grads)
    other, _ = ft.value_and_grad(loss_fn)(tuned, ids)
    assert value != other
    by_keyword, _ = ft.value_and_grad(lambda t, **batch: loss_fn(t, batch["ids"]))(tuned, ids=ids)
    assert by_keyword == other


def test_has_aux(base):
    tuned, ids = finetunes(base, 1)[0], ids_for(2, 5)

    def loss_fn(t: Finetuned, x: Tensor):
        out = ft.apply(base, t, x)
        return out.square().mean(), {"logits": out, "step": 3, "params": t.params["fc1.lora_a"], "none": [None]}

    (loss, aux), grads = ft.value_and_grad(loss_fn, has_aux=True)(tuned, ids)
    plain_loss, plain_grads = ft.value_and_grad(lambda t, x: loss_fn(t, x)[0])(tuned, ids)
    assert loss == plain_loss and all(torch.equal(grads[name], plain_grads[name]) for name in grads)
    assert torch.equal(aux["logits"], ft.apply(base, tuned, ids)) and aux["step"] == 3 and aux["none"] == [None]
    assert not aux["logits"].requires_grad and not aux["params"].requires_grad and not loss.requires_grad
    nested = vmap(lambda x: ft.value_and_grad(loss_fn, has_aux=True)(tuned, x)[0][1]["logits"])(ids_for(3, 2, 5))
    expected = torch.stack([ft.apply(base, tuned, x) for x in ids_for(3, 2, 5)])
    assert_close(nested, expected, FP32, unlike=expected.roll(1, 0))


def test_nothing_carries_a_graph_and_nothing_is_marked(base):
    tuned = finetunes(base, 1)[0]
    loss, grads = ft.value_and_grad(loss_on(base))(tuned, ids_for(2, 5))
    assert not loss.requires_grad and not any(g.requires_grad for g in grads.values())
    assert not any(p.requires_grad or p.grad is not None for p in tuned.params.values())
    required = tuned.replace(params={name: p.clone().requires_grad_() for name, p in tuned.params.items()})
    loss, again = ft.value_and_grad(loss_on(base))(required, ids_for(2, 5))
    assert all(torch.equal(again[name], grads[name]) and not again[name].requires_grad for name in grads)
    assert all(p.grad is None for p in required.params.values())


def test_parameters_that_the_loss_ignores_get_zeros(base):
    tuned, ids = finetunes(base, 1)[0], ids_for(2, 5)
    _, grads = ft.value_and_grad(lambda t: t.params["fc1.lora_a"].square().sum())(tuned)
    assert torch.equal(grads["fc1.lora_a"], 2 * tuned.params["fc1.lora_a"])
    assert all((g == 0).all() for name, g in grads.items() if name != "fc1.lora_a")
    value, grads = ft.value_and_grad(lambda t: torch.tensor(3.0))(tuned)
    assert value == 3 and all((g == 0).all() for g in grads.values()) and grads.keys() == tuned.params.keys()
    _, grads = ft.value_and_grad(loss_on(base))(finetunes(base, 1, adapt_layers=(), plain_layers=())[0], ids)
    assert grads == {}


def test_under_no_grad(base):
    tuned, ids = finetunes(base, 1)[0], ids_for(2, 5)
    value, grads = ft.value_and_grad(loss_on(base))(tuned, ids)
    with torch.no_grad():
        inside, inside_grads = ft.value_and_grad(loss_on(base))(tuned, ids)
        _, stacked_grads = ft.stacked_value_and_grad(loss_on(base), in_dims=(0, None))(ft.stack([tuned] * 2), ids)
    assert value == inside and all(torch.equal(inside_grads[name], grads[name]) for name in grads)
    assert grads["fc1.lora_a"].any()
    assert_gradients_close({n: g[1] for n, g in stacked_grads.items()}, grads, FP32, unlike=scaled(grads))


def test_under_inference_mode_right_or_refused(base):
    """Inference mode records nothing: the gradients may not come out as zeros."""
    tuned, ids = finetunes(base, 1)[0], ids_for(2, 5)
    _, grads = ft.value_and_grad(loss_on(base))(tuned, ids)
    for call in (
        lambda: ft.value_and_grad(loss_on(base))(tuned, ids)[1],
        lambda: ft.stacked_value_and_grad(loss_on(base), in_dims=(0, None))(ft.stack([tuned]), ids)[1],
    ):
        with torch.inference_mode():
            try:
                inside = call()
            except RuntimeError as error:
                assert "inference" in str(error)
                continue
        for name in grads:
            assert relative_error(inside[name].reshape(grads[name].shape), grads[name]) < FP32


def test_under_autocast(base):
    tuned, ids = finetunes(base, 1)[0], ids_for(2, 5)
    _, exact = ft.value_and_grad(loss_on(base))(tuned, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, grads = ft.value_and_grad(loss_on(base))(tuned, ids)
    for name, g in grads.items():
        assert g.dtype == torch.float32 and 0 < relative_error(g, exact[name]) < 0.15, name


# --- nested in torch.func


def test_nested_in_grad(double):
    """grad through value_and_grad: the gradient of a gradient's norm, as for meta-learning."""
    _, base, tuned = double
    x = torch.randn(4, 3, dtype=torch.float64)
    loss_fn = loss_on(base)

    def norm_of_gradient(params):
        _, grads = ft.value_and_grad(loss_fn)(tuned.replace(params=params), x)
        return sum(g.square().sum() for g in grads.values())

    def reference(params):
        g = grad(lambda p: loss_fn(tuned.replace(params=p), x))(params)
        return sum(leaf.square().sum() for leaf in g.values())

    mine = grad(norm_of_gradient)(dict(tuned.params))
    expected = grad(reference)(dict(tuned.params))
    assert_gradients_close(mine, expected, 1e-12, unlike=scaled(expected))
    assert all(g.any() for name, g in mine.items())

    def by_autograd(params):
        found = torch.autograd.grad(loss_fn(tuned.replace(params=params), x), list(params.values()), create_graph=True)
        return sum(leaf.square().sum() for leaf in found)

    assert_gradients_close(mine, gradients_by_autograd(by_autograd, tuned.params), 1e-12, unlike=scaled(expected))


def test_nested_in_vmap_over_finetunes(base):
    tuned, ids = finetunes(base), ids_for(3, 2, 5)
    losses, grads = vmap(ft.value_and_grad(loss_on(base)))(ft.stack(tuned), ids)
    for i, t in enumerate(tuned):
        value, expected = ft.value_and_grad(loss_on(base))(t, ids[i])
        assert_close(losses[i], value, FP32, unlike=losses[i - 1])
        unlike = {name: g[i - 1] for name, g in grads.items()}
        assert_gradients_close({name: g[i] for name, g in grads.items()}, expected, FP32, unlike=unlike)


def test_per_sample_gradients(base):
    tuned, ids = finetunes(base, 1)[0], ids_for(6, 5)
    losses, grads = vmap(ft.value_and_grad(lambda t, x: loss_on(base)(t, x[None])), in_dims=(None, 0))(tuned, ids)
    for i, x in enumerate(ids):
        _, expected = ft.value_and_grad(loss_on(base))(tuned, x[None])
        unlike = {name: g[i - 1] for name, g in grads.items()}
        assert_gradients_close({name: g[i] for name, g in grads.items()}, expected, FP32, unlike=unlike)
    value, whole = ft.value_and_grad(loss_on(base))(tuned, ids)
    assert_close(losses.mean(), value, FP32, unlike=losses.max())
    averaged = {name: g.mean(0) for name, g in grads.items()}
    assert_gradients_close(averaged, whole, FP32, unlike=scaled(whole))


def test_per_sample_gradients_of_every_finetune(base):
    """vmap over finetunes of vmap over samples of grad."""
    tuned, ids = finetunes(base), ids_for(3, 4, 5)
    per_sample = vmap(ft.value_and_grad(lambda t, x: loss_on(base)(t, x[None])), in_dims=(None, 0))
    losses, grads = vmap(per_sample)(ft.stack(tuned), ids)
    assert losses.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            _, expected = ft.value_and_grad(loss_on(base))(tuned[i], ids[i, j][None])
            unlike = {name: g[i - 1, j] for name, g in grads.items()}
            assert_gradients_close({name: g[i, j] for name, g in grads.items()}, expected, FP32, unlike=unlike)


def test_nested_in_jvp(double):
    _, base, tuned = double
    x = torch.randn(4, 3, dtype=torch.float64)
    tangents = {name: torch.randn_like(leaf) for name, leaf in tuned.params.items()}

    def gradient(params):
        return ft.value_and_grad(loss_on(base))(tuned.replace(params=params), x)[1]

    _, mine = jvp(gradient, (dict(tuned.params),), (tangents,))
    step = 1e-6
    up, down = (
        gradient({name: leaf + sign * step * tangents[name] for name, leaf in tuned.params.items()}) for sign in (1, -1)
    )
    expected = {name: (up[name] - down[name]) / (2 * step) for name in up}
    assert_gradients_close(mine, expected, 1e-6, unlike=scaled(expected))


def test_lean_and_nested_are_chosen_by_what_is_active(base, monkeypatch):
    import finetuna_func._transforms as transforms

    calls: list[str] = []
    lean = transforms._first_order
    monkeypatch.setattr(transforms, "_first_order", lambda *a: calls.append("lean") or lean(*a))
    tuned, ids = finetunes(base, 2), ids_for(2, 2, 5)
    ft.value_and_grad(loss_on(base))(tuned[0], ids[0])
    ft.stacked_value_and_grad(loss_on(base), in_dims=0)(ft.stack(tuned), ids)
    assert calls == ["lean", "lean"]
    vmap(ft.value_and_grad(loss_on(base)))(ft.stack(tuned), ids)
    grad(lambda p: ft.value_and_grad(loss_on(base))(tuned[0].replace(params=p), ids[0])[0])(dict(tuned[0].params))
    assert calls == ["lean", "lean"]
    ft.value_and_grad(loss_on(base))(tuned[0], ids[0])
    assert len(calls) == 3  # and nothing was left active


# --- how much the lean path keeps


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of tensors made inside that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        import weakref

        out = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.storages:
                    self.storages[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.storages.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.storages.values()))
        return out


def test_the_lean_path_needs_less_memory():
    """Not time, but bytes alive at the peak, counted: torch.func.grad keeps what a second derivative would need."""
    torch.manual_seed(0)
    base = ft.quantize_base_model(llama(hidden_size=64, intermediate_size=128))
    tuned, ids = randomized(ft.new_finetuned(base)), ids_for(4, 24)

    def loss_fn(t: Finetuned) -> Tensor:
        return ft.apply(base, t, ids).logits.square().mean()

    ft.value_and_grad(loss_fn)(tuned)
    with LiveBytes() as lean:
        _, grads = ft.value_and_grad(loss_fn)(tuned)
    with LiveBytes() as full:
        expected, _ = func_gradient(loss_fn, tuned)
    assert_gradients_close(grads, expected, FP32, unlike=scaled(expected))
    assert lean.peak < 0.75 * full.peak, (lean.peak, full.peak)


def test_the_graph_keeps_no_float_copy_of_the_base(base):
    tuned, ids = finetunes(base, 1)[0], ids_for(2, 5)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ft.value_and_grad(loss_on(base))(tuned, ids)
    quantized = {name: leaf for name, leaf in base.params.items() if leaf.dtype == torch.int8}
    dequantized = [leaf * base.params[name + "_scale"].unsqueeze(-1) for name, leaf in quantized.items()]
    for matrix in dequantized:
        for leaf in saved:
            for same in (leaf, leaf.mT) if leaf.ndim == 2 else ():
                assert same.shape != matrix.shape or not torch.allclose(same.float(), matrix, rtol=0.01, atol=0.01)
    pointers = {t.data_ptr() for t in saved}
    assert quantized["fc1.weight"].data_ptr() in pointers  # the codes themselves are what backward reads


# --- stacked_value_and_grad


@pytest.mark.parametrize("shape", [(3, 2, 5), (3, 2, 6), (3, 1, 3)])
def test_three_routes_to_stacked_gradients(base, shape):
    tuned, ids = finetunes(base), ids_for(*shape)
    stacked = ft.stack(tuned)

    def whole(t: Finetuned, x: Tensor) -> Tensor:
        return ft.apply_stacked(base, t, x).abs().pow(2.0).mean(dim=(1, 2, 3))

    routes = [
        ft.stacked_value_and_grad(whole)(stacked, ids),
        ft.stacked_value_and_grad(loss_on(base), in_dims=(0, 0))(stacked, ids),
        ft.stacked_value_and_grad(loss_on(base), in_dims=0)(stacked, ids),
        vmap(ft.value_and_grad(loss_on(base)))(stacked, ids),
    ]
    loop = [ft.value_and_grad(loss_on(base))(t, x) for t, x in zip(tuned, ids, strict=True)]
    expected = {name: torch.stack([g[name] for _, g in loop]) for name in loop[0][1]}
    values = torch.stack([value for value, _ in loop])
    unlike = {name: g.roll(1, 0) for name, g in expected.items()}
    for losses, grads in routes:
        assert losses.shape == (3,) and not losses.requires_grad
        assert_close(losses, values, FP32, unlike=values.roll(1, 0))
        assert_gradients_close(grads, expected, FP32, unlike=unlike)
        assert not any(g.requires_grad for g in grads.values())


def test_stacked_with_a_shared_input_kwargs_and_order(base):
    tuned, ids = finetunes(base), ids_for(2, 5)
    stacked = ft.stack(tuned)
    losses, grads = ft.stacked_value_and_grad(loss_on(base), in_dims=(0, None))(stacked, ids, power=3.0)
    other, other_grads = ft.stacked_value_and_grad(lambda x, t: loss_on(base)(t, x, 3.0), in_dims=(None, 0))(
        ids, stacked
    )
    assert torch.equal(losses, other) and all(torch.equal(grads[n], other_grads[n]) for n in grads)
    for i, t in enumerate(tuned):
        value, expected = ft.value_and_grad(loss_on(base))(t, ids, power=3.0)
        assert_close(losses[i], value, FP32, unlike=losses[i - 1])
        unlike = {name: g[i - 1] for name, g in grads.items()}
        assert_gradients_close({name: g[i] for name, g in grads.items()}, expected, FP32, unlike=unlike)


def test_stacked_has_aux(base):
    tuned, ids = finetunes(base), ids_for(3, 2, 5)
    stacked = ft.stack(tuned)

    def whole(t, x):
        out = ft.apply_stacked(base, t, x)
        return out.square().mean(dim=(1, 2, 3)), out

    def single(t, x):
        out = ft.apply(base, t, x)
        return out.square().mean(), out

    expected = torch.stack([ft.apply(base, t, x) for t, x in zip(tuned, ids, strict=True)])
    for loss_fn, dims in ((whole, None), (single, 0)):
        (losses, aux), grads = ft.stacked_value_and_grad(loss_fn, in_dims=dims, has_aux=True)(stacked, ids)
        assert losses.shape == (3,) and not aux.requires_grad and grads.keys() == stacked.params.keys()
        assert_close(aux, expected, FP32, unlike=expected.roll(1, 0))


def test_stacked_nested_in_torch_func(double):
    """The gradient of a gradient through the stack."""
    _, base, tuned = double
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    stacked = ft.stack([tuned, randomized(tuned, 5)])

    def norm(params, one):
        value = ft.stacked_value_and_grad(loss_on(base), in_dims=0)(stacked.replace(params=params), x)
        return sum(g.square().sum() for g in value[1].values())

    mine = grad(lambda p: norm(p, x))(dict(stacked.params))
    for i, t in enumerate(ft.unstack(stacked)):

        def single(params, t=t, i=i):
            _, grads = ft.value_and_grad(loss_on(base))(t.replace(params=params), x[i])
            return sum(g.square().sum() for g in grads.values())

        expected = grad(single)(dict(t.params))
        assert_gradients_close({n: g[i] for n, g in mine.items()}, expected, 1e-12, unlike=scaled(expected))


def test_one_finetunes_loss_does_not_reach_another(base):
    """Even if one of them is not finite."""
    tuned, ids = finetunes(base), ids_for(3, 2, 5)
    bad = tuned[1].replace(
        params={**tuned[1].params, "fc1.lora_a": torch.full_like(tuned[1].params["fc1.lora_a"], torch.nan)}
    )
    _, clean = ft.stacked_value_and_grad(loss_on(base), in_dims=0)(ft.stack(tuned), ids)

    def whole(t: Finetuned, x: Tensor) -> Tensor:
        return ft.apply_stacked(base, t, x).abs().pow(2.0).mean(dim=(1, 2, 3))

    stacked = ft.stack([tuned[0], bad, tuned[2]])
    for losses, grads in (
        ft.stacked_value_and_grad(loss_on(base), in_dims=0)(stacked, ids),
        ft.stacked_value_and_grad(whole)(stacked, ids),
    ):
        assert losses.isnan().tolist() == [False, True, False]
        assert grads["fc2.lora_b"][1].isnan().any()
        for name, g in grads.items():
            assert g[[0, 2]].isfinite().all(), name
            assert relative_error(g[[0, 2]], clean[name][[0, 2]]) < FP32, name


# --- error texts


def message_of(kind, call) -> str:
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


def test_value_and_grad_error_texts(base):
    tuned, ids = finetunes(base, 2), ids_for(2, 5)
    loss_fn = loss_on(base)
    no_finetune = (
        "value_and_grad: expected exactly one Finetuned among the positional arguments, to differentiate with respect "
        "to; got {} in ({}). Close over the others."
    )
    assert message_of(TypeError, lambda: ft.value_and_grad(loss_fn)(ids)) == no_finetune.format(0, "Tensor")
    assert message_of(TypeError, lambda: ft.value_and_grad(loss_fn)()) == no_finetune.format(0, "nothing")
    assert message_of(TypeError, lambda: ft.value_and_grad(loss_fn)(*tuned, ids)) == no_finetune.format(
        2, "Finetuned, Finetuned, Tensor"
    )
    assert message_of(TypeError, lambda: ft.value_and_grad(loss_fn)(tuned=tuned[0], x=ids)) == no_finetune.format(
        0, "nothing"
    )
    assert message_of(ValueError, lambda: ft.value_and_grad(lambda t: ft.apply(base, t, ids))(tuned[0])) == (
        "value_and_grad: loss_fn returned a tensor of shape (2, 5, 20); expected a scalar. Reduce it, or use "
        "stacked_value_and_grad for one loss per finetune."
    )
    assert message_of(TypeError, lambda: ft.value_and_grad(lambda t: 3.0)(tuned[0])) == (
        "value_and_grad: loss_fn must return a tensor, got float."
    )
    one = ft.value_and_grad(loss_fn, has_aux=True)
    assert message_of(TypeError, lambda: one(tuned[0], ids)) == (
        "value_and_grad(has_aux=True): loss_fn must return (loss, aux), got Tensor."
    )
    integer = tuned[0].replace(params={**tuned[0].params, "lm_head.bias": torch.zeros(20, dtype=torch.int32)})
    assert message_of(TypeError, lambda: ft.value_and_grad(loss_fn)(integer, ids)) == (
        "params: lm_head.bias is torch.int32; trainable parameters are floating point. Keep integers in consts."
    )


def test_stacked_value_and_grad_error_texts(base):
    tuned, ids = finetunes(base), ids_for(3, 2, 5)
    stacked = ft.stack(tuned)
    assert message_of(ValueError, lambda: ft.stacked_value_and_grad(loss_on(base))(tuned[0], ids)) == (
        "stacked_value_and_grad: expected a stack made by ft.stack([...]); for one finetune use value_and_grad."
    )
    shape_message = (
        "stacked_value_and_grad: the losses have shape {}, expected (3,), one per finetune. With in_dims=None loss_fn "
        "gets the whole stack and must not average over its axis; give in_dims to map a loss of one finetune."
    )
    averaged = ft.stacked_value_and_grad(lambda t, x: ft.apply_stacked(base, t, x).mean())
    assert message_of(ValueError, lambda: averaged(stacked, ids)) == shape_message.format("()")
    rows = ft.stacked_value_and_grad(lambda t, x: ft.apply(base, t, x).mean((1, 2)), in_dims=0)
    assert message_of(ValueError, lambda: rows(stacked, ids)) == shape_message.format("(3, 2)")
    assert "expected exactly one Finetuned" in message_of(
        TypeError, lambda: ft.stacked_value_and_grad(loss_on(base))(ids)
    )
    assert (
        message_of(TypeError, lambda: ft.stacked_value_and_grad(lambda t, x: [1.0], in_dims=None)(stacked, ids))
        == "stacked_value_and_grad: loss_fn must return a tensor, got list."
    )


def test_a_failing_loss_leaves_nothing_active(base):
    tuned, ids = finetunes(base, 1)[0], ids_for(2, 5)

    def fail(t):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ft.value_and_grad(fail)(tuned)
    with pytest.raises(KeyError, match="mine"):
        vmap(ft.value_and_grad(fail))(ft.stack([tuned]))
    _, grads = ft.value_and_grad(loss_on(base))(tuned, ids)
    assert grads["fc1.lora_a"].any()


# --- every transform of the forward itself, against a plain float model


def as_function(base: ft.Base, tuned: Finetuned, x: Tensor):
    names = list(tuned.params)
    return names, lambda *leaves: ft.apply(base, tuned.replace(params=dict(zip(names, leaves, strict=True))), x)


def float_function(model: nn.Module, base: ft.Base, tuned: Finetuned, x: Tensor):
    """The same function of the same leaves, on plain float weights: B @ A added, through functional_call."""
    plain = {name: leaf.detach() for name, leaf in twin(model, base).named_parameters()}
    names = list(tuned.params)

    def function(*leaves):
        given = dict(zip(names, leaves, strict=True))
        weights = dict(plain)
        for adapter in tuned.spec.adapters:
            path, s = adapter.path, adapter.config.scale
            delta = s * (given[f"{path}.lora_b"] @ given[f"{path}.lora_a"])
            weights[f"{path}.weight"] = plain[f"{path}.weight"] + (delta.T if adapter.kind == "embedding" else delta)
            if f"{path}.lora_bias" in given and f"{path}.bias" in plain:
                weights[f"{path}.bias"] = plain[f"{path}.bias"] + s * given[f"{path}.lora_bias"]
        weights.update({name: given[name] for name in tuned.spec.plain})
        return torch.func.functional_call(model, weights, (x,))

    return function


@pytest.fixture(scope="module")
def second_order():
    """float32: a model of ids and one of floats, adapters without bias on layers that have none."""
    torch.manual_seed(1)
    tiny = Tiny(10, 4, 3)
    tiny_base = ft.quantize_base_model(tiny)
    return tiny, tiny_base, finetunes(tiny_base, 1)[0], ids_for(2, 3) % 10


def test_hessian_against_a_float_model(second_order):
    model, base, tuned, ids = second_order
    names, mine = as_function(base, tuned, ids)
    reference = float_function(model, base, tuned, ids)
    chosen = names.index("fc.lora_a"), names.index("embed.lora_b"), names.index("lm_head.bias")
    leaves = list(tuned.params.values())

    def scalar(function):
        def loss(*some):
            given = list(leaves)
            for i, leaf in zip(chosen, some, strict=True):
                given[i] = leaf
            return function(*given).square().mean()

        return loss

    some = [leaves[i] for i in chosen]
    expected = torch.autograd.functional.hessian(scalar(reference), tuple(some))
    for of in (
        lambda f: hessian(f, argnums=(0, 1, 2)),
        lambda f: jacrev(jacrev(f, argnums=(0, 1, 2)), argnums=(0, 1, 2)),
        # Not jacfwd(jacfwd): torch's jvp of layer_norm is not differentiable again; see the next test for that.
    ):
        found = of(scalar(mine))(*some)
        for i in range(3):
            for j in range(3):
                want = expected[i][j]
                # float32 second derivatives, sums of at most 16 terms a few layers deep
                assert_close(found[i][j], want, 2e-5, unlike=1.001 * want + 1e-3 * want.abs().max())


def test_every_order_of_hessian_without_a_norm(double):
    model, base, tuned = double
    x = torch.randn(2, 3, dtype=torch.float64)
    names, mine = as_function(base, tuned, x)
    at = names.index("fc1.lora_a")
    leaves = list(tuned.params.values())

    def loss(leaf):
        return mine(*leaves[:at], leaf, *leaves[at + 1 :]).square().mean()

    merged = twin(model, base, tuned)
    frozen = {name: leaf.detach() for name, leaf in merged.named_parameters()}
    low = leaves[names.index("fc1.lora_b")]

    def reference(leaf):
        weight = frozen["fc1.weight"] + 0.5 * low @ (leaf - leaves[at])
        return torch.func.functional_call(model, {**frozen, "fc1.weight": weight}, (x,)).square().mean()

    # fc2 has no bias to merge its adapter's bias into, so the reference has it as one
    model.fc2.bias = merged.fc2.bias
    try:
        expected = torch.autograd.functional.hessian(reference, leaves[at])
    finally:
        model.fc2.bias = None
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            assert_close(outer(inner(loss))(leaves[at]), expected, 1e-11, unlike=1.01 * expected)


def test_jvp_and_hvp_against_a_float_model(second_order):
    model, base, tuned, ids = second_order
    names, mine = as_function(base, tuned, ids)
    reference = float_function(model, base, tuned, ids)
    leaves = tuple(tuned.params.values())
    generator = torch.Generator().manual_seed(3)
    tangents = tuple(torch.randn(leaf.shape, generator=generator) for leaf in leaves)
    out, tangent = jvp(mine, leaves, tangents)
    want, want_tangent = torch.autograd.functional.jvp(reference, leaves, tangents)
    assert_close(out, want, FP32, unlike=-want)
    assert_close(tangent, want_tangent, FP32, unlike=1.01 * want_tangent)

    def scalar(function):
        return lambda *leaves: function(*leaves).square().mean()

    everything = tuple(range(len(leaves)))
    _, hvp = jvp(grad(scalar(mine), argnums=everything), leaves, tangents)
    _, want_hvp = torch.autograd.functional.hvp(scalar(reference), leaves, tangents)
    for name, one, other in zip(names, hvp, want_hvp, strict=True):
        assert (one - other).abs().max() <= 2e-5 * other.abs().max() + 1e-7, name
        assert other.any(), name


def test_vjp_and_jacobians_agree(second_order):
    _, base, tuned, ids = second_order
    _, mine = as_function(base, tuned, ids)
    leaves = tuple(tuned.params.values())
    everything = tuple(range(len(leaves)))
    forward, backward = jacfwd(mine, argnums=everything)(*leaves), jacrev(mine, argnums=everything)(*leaves)
    for one, other in zip(forward, backward, strict=True):
        assert_close(one, other, FP32, unlike=1.01 * other)
    out, pull = vjp(mine, *leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    for one, jacobian in zip(pull(cotangent), backward, strict=True):
        want = torch.tensordot(cotangent, jacobian, dims=out.ndim)
        assert_close(one, want, FP32, unlike=1.01 * want)


def test_gradcheck_of_apply(double):
    """float64, through ft.apply: forward mode, reverse mode, both batched, and second order both ways."""
    _, base, tuned = double
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    names = list(tuned.params)

    def function(x, *leaves):
        return ft.apply(base, tuned.replace(params=dict(zip(names, leaves, strict=True))), x)

    inputs = (x, *(leaf.detach().clone().requires_grad_() for leaf in tuned.params.values()))
    assert gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )
    assert gradgradcheck(
        function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True, fast_mode=True
    )


@pytest.mark.parametrize("scheme", ["int8", "blockwise8", "nf4"])
def test_gradcheck_of_apply_on_ids(scheme, seed):
    model = Tiny(6, 3, 2).double()
    base = ft.quantize_base_model(model, scheme=scheme)
    tuned = randomized(
        ft.new_finetuned(
            base,
            adapt_layers={"embed", "fc"},
            linear_config=LinearAdapterConfig(r=1),
            embedding_config=ft.EmbeddingAdapterConfig(r=1),
        )
    )
    _, function = as_function(base, tuned, torch.tensor([[1, 4], [1, 0]]))
    inputs = tuple(leaf.detach().clone().requires_grad_() for leaf in tuned.params.values())
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_apply_stacked_is_differentiable_in_every_way(double):
    _, base, tuned = double
    stacked = ft.stack([tuned, randomized(tuned, 9)])
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    names = list(stacked.params)

    def function(*leaves):
        return ft.apply_stacked(base, stacked.replace(params=dict(zip(names, leaves, strict=True))), x)

    inputs = tuple(leaf.detach().clone().requires_grad_() for leaf in stacked.params.values())
    assert gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


def test_gradients_with_respect_to_inputs_and_soft_prompts(double):
    model, base, tuned = double
    x = torch.randn(4, 3, dtype=torch.float64)
    mine = grad(lambda x: ft.apply(base, tuned, x).square().sum())(x)
    reference = float_function(model, base, tuned, x)
    leaf = x.clone().requires_grad_()
    with_bias = twin(model, base, tuned)
    (expected,) = torch.autograd.grad(with_bias(leaf).square().sum(), leaf)
    assert reference(*tuned.params.values()).shape == (4, 2)
    assert_close(mine, expected, 1e-12, unlike=1.01 * expected)


@pytest.mark.parametrize("padding", [None, 0])
def test_padding_rows_get_no_gradient(padding, seed):
    """As nn.Embedding(padding_idx): neither the plain table nor the adapter learns from it."""
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=padding))
    base = ft.quantize_base_model(model, modules_not_to_quantize={"0"})
    ids = torch.tensor([[0, 0, 1], [2, 0, 5]])
    weight = torch.randn(2, 3, 4)
    plain = finetunes(base, 2, adapt_layers=(), plain_layers={"0"})
    adapted = finetunes(base, 2, embedding_config=ft.EmbeddingAdapterConfig(r=2))

    def loss_fn(t):
        return (ft.apply(base, t, ids) * weight).sum()

    def whole(t):
        return (ft.apply_stacked(base, t, ids.expand(2, 2, 3)) * weight).sum((1, 2, 3))

    _, grads = ft.value_and_grad(loss_fn)(plain[0])
    (expected,) = torch.autograd.grad((model(ids) * weight).sum(), model[0].weight)
    assert_close(grads["0.weight"], expected, 1e-6, unlike=1.01 * expected)
    assert bool(grads["0.weight"][0].any()) == (padding is None)
    _, lora = ft.value_and_grad(loss_fn)(adapted[0])
    assert bool(lora["0.lora_a"][:, 0].any()) == (padding is None) and lora["0.lora_a"][:, 1].any()
    for tuned, name, single in ((plain, "0.weight", grads), (adapted, "0.lora_a", lora), (adapted, "0.lora_b", lora)):
        for _, g in (
            ft.stacked_value_and_grad(whole)(ft.stack(tuned)),
            ft.stacked_value_and_grad(loss_fn, in_dims=0)(ft.stack(tuned)),
            vmap(ft.value_and_grad(loss_fn))(ft.stack(tuned)),
        ):
            assert_close(g[name][0], single[name], FP32, unlike=1.01 * single[name])


@pytest.mark.parametrize("by_frequency", [False, True])
def test_scale_grad_by_freq(by_frequency, seed):
    model = nn.Sequential(nn.Embedding(6, 4, scale_grad_by_freq=by_frequency))
    base = ft.quantize_base_model(model, modules_not_to_quantize={"0"})
    tuned = finetunes(base, 1, adapt_layers=(), plain_layers={"0"})[0]
    ids, weight = torch.tensor([[1, 1, 2]]), torch.randn(1, 3, 4)
    _, grads = ft.value_and_grad(lambda t: (ft.apply(base, t, ids) * weight).sum())(tuned)
    (expected,) = torch.autograd.grad((model(ids) * weight).sum(), model[0].weight)
    assert_close(grads["0.weight"], expected, 1e-6, unlike=1.01 * expected)
    stacked = ft.stack([tuned, tuned])

    def single(t, x):
        return (ft.apply(base, t, x) * weight).sum()

    def whole(t, x):
        return (ft.apply_stacked(base, t, x) * weight).sum((1, 2, 3))

    both = ids.expand(2, 1, 3)
    for _, found in (
        ft.stacked_value_and_grad(whole)(stacked, both),
        ft.stacked_value_and_grad(single, in_dims=0)(stacked, both),
        ft.stacked_value_and_grad(single, in_dims=(0, None))(stacked, ids),
        vmap(ft.value_and_grad(single))(stacked, both),
    ):
        assert_close(found["0.weight"][1], expected, 1e-6, unlike=1.01 * expected)


def test_llama_every_transform():
    """Attention has traps of its own: fused kernels lack forward mode and batched backward.

    The model is float64, but its norms compute in float32 whatever the dtype: 1e-6.
    """
    model = llama().double()
    base = ft.quantize_base_model(model)
    tuned = finetunes(base, 2)
    ids = ids_for(2, 2, 4)
    generator = torch.Generator().manual_seed(0)
    tangents = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in tuned[0].params.items()}

    def loss_fn(t: Finetuned, x: Tensor) -> Tensor:
        return ft.apply(base, t, x).logits.square().mean()

    def of(x):
        return lambda p: loss_fn(tuned[0].replace(params=p), x)

    params = dict(tuned[0].params)
    _, grads = ft.value_and_grad(loss_fn)(tuned[0], ids[0])
    _, forward = jvp(of(ids[0]), (params,), (tangents,))
    inner = sum((g * tangents[n]).sum() for n, g in grads.items())
    assert_close(forward, inner, 1e-6, unlike=1.01 * inner)
    _, hvp = jvp(grad(of(ids[0])), (params,), (tangents,))
    step = 1e-3  # float32 norms: rounding 1e-7 / 1e-3
    up, down = (
        ft.value_and_grad(loss_fn)(
            tuned[0].replace(params={n: p + sign * step * tangents[n] for n, p in params.items()}), ids[0]
        )[1]
        for sign in (1, -1)
    )
    differences = {n: (up[n] - down[n]) / (2 * step) for n in up}
    assert_gradients_close(hvp, differences, 1e-2, unlike={n: 1.5 * g for n, g in differences.items()})
    # Reverse over reverse: torch's fused attention has no second derivative of that kind, eager attention has.
    eager = ft.quantize_base_model(llama(attn_implementation="eager").double())
    again = Finetuned(tuned[0].params, tuned[0].consts, finetunes(eager, 1)[0].spec)

    def through_eager(p):
        return ft.apply(eager, again.replace(params=p), ids[0]).logits.square().mean()

    reverse = grad(lambda p: sum((g * tangents[n]).sum() for n, g in grad(through_eager)(p).items()))(params)
    assert_gradients_close(reverse, hvp, 1e-5, unlike=scaled(hvp))
    losses, stacked = ft.stacked_value_and_grad(loss_fn, in_dims=0)(ft.stack(tuned), ids)
    mapped_losses, mapped = vmap(ft.value_and_grad(loss_fn))(ft.stack(tuned), ids)
    assert_close(mapped_losses, losses, 1e-6, unlike=losses.flip(0))
    assert_gradients_close(mapped, stacked, 1e-5, unlike={n: g.flip(0) for n, g in stacked.items()})


def test_value_and_grad_compiles(base):
    torch._dynamo.reset()
    tuned, ids = finetunes(base, 1)[0], ids_for(2, 5)
    value, grads = ft.value_and_grad(loss_on(base))(tuned, ids)
    compiled = torch.compile(lambda t, x: ft.apply(base, t, x).abs().pow(2.0).mean(), backend="aot_eager")
    found_value, found = ft.value_and_grad(compiled)(tuned, ids)
    assert_close(found_value, value, FP32, unlike=2 * value)
    assert_gradients_close(found, grads, FP32, unlike=scaled(grads))
    torch._dynamo.reset()
    whole = torch.compile(lambda t, x: ft.value_and_grad(loss_on(base))(t, x), backend="aot_eager")
    found_value, found = whole(tuned, ids)
    assert_gradients_close(found, grads, FP32, unlike=scaled(grads))
    torch._dynamo.reset()


def test_error_of_an_unknown_base_in_a_loss(base):
    other = ft.quantize_base_model(Everything())
    with pytest.raises(ValueError, match=re.escape(f"belongs to base {base.fingerprint!r}")):
        ft.value_and_grad(loss_on(other))(finetunes(base, 1)[0], ids_for(2, 5))
