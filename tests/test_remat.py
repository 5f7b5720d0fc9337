"""`ft.remat`: the same numbers as the function itself in every nesting, computed again once, and less kept.

Values and derivatives are compared in float64 at 1e-12 of the largest number: the same operations run on the same
numbers, so only the order of sums can differ.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from live import Live
from models import Tiny, assert_close, finetunes
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.gradcheck import GradcheckError
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import finetuna_func as ft

F64 = torch.float64
EXACT = 1e-12
N = 3
Fn = Callable[..., Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def fn(w: dict[str, Tensor], x: tuple[Tensor, Tensor], *, power: int = 2) -> Tensor:
    """Of pytrees, with an integer tensor among them."""
    values, places = x
    return (torch.tanh(w["a"] @ values[places]) * values.sin()).sum() * w["b"].pow(power).sum()


def other(w: dict[str, Tensor], x: tuple[Tensor, Tensor], *, power: int = 2) -> Tensor:
    """What ``fn`` must be told apart from."""
    return fn(w, x, power=power + 1)


PLACES = torch.tensor([2, 0, 1])
W = {"a": numbers(3, 3), "b": numbers(2, seed=1)}
X = (numbers(3, seed=2), PLACES)
WN = {"a": numbers(N, 3, 3, seed=3), "b": numbers(N, 2, seed=4)}
XN = (numbers(N, 3, seed=5), torch.stack([PLACES, PLACES.flip(0), PLACES.roll(1)]))


def of_values(h: Fn) -> Fn:
    return lambda w, x: h(w, (x, PLACES))


def nested_remats(h: Fn) -> Fn:
    """Remats below one another, with operations between them."""
    inner = ft.remat(lambda w, x: h(w, x).sin())
    middle = ft.remat(lambda w, x: inner(w, x) * inner({"a": w["a"].exp(), "b": w["b"]}, x))
    return ft.remat(lambda w, x: middle(w, x).exp() + inner(w, x))


def nested_plain(h: Fn) -> Fn:
    def inner(w: dict[str, Tensor], x: Any) -> Tensor:
        return h(w, x).sin()

    def middle(w: dict[str, Tensor], x: Any) -> Tensor:
        return inner(w, x) * inner({"a": w["a"].exp(), "b": w["b"]}, x)

    return lambda w, x: middle(w, x).exp() + inner(w, x)


def sums_of_gradients(h: Fn) -> Fn:
    def of_one(w: dict[str, Tensor], x: tuple[Tensor, Tensor]) -> Tensor:
        many = (torch.stack([x[0], 2 * x[0]]), torch.stack([x[1], x[1]]))
        return torch.stack([leaf.square().sum() for leaf in vmap(grad(h), in_dims=(None, 0))(w, many).values()]).sum()

    return of_one


def plain_autograd(h: Fn) -> Any:
    """Three derivatives, each through the graph of the one before."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in W.items()}
    first = torch.autograd.grad(h(leaves, X), list(leaves.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()), create_graph=True)
    return first, second, torch.autograd.grad(sum(g.sum() for g in second), list(leaves.values()))


def batched_cotangents(h: Fn) -> Any:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in W.items()}
    losses = torch.stack([h(leaves, X), 2 * h(leaves, X)])
    return torch.autograd.grad(losses, list(leaves.values()), torch.eye(2, dtype=F64), is_grads_batched=True)


NESTINGS: dict[str, Callable[[Fn], Any]] = {
    "value": lambda h: h(W, X),
    "grad": lambda h: grad(h)(W, X),
    "grad of both": lambda h: grad(of_values(h), argnums=(0, 1))(W, X[0]),
    "vmap": lambda h: vmap(h)(WN, XN),
    "vmap, one shared": lambda h: vmap(h, in_dims=(None, 0))(W, XN),
    "vmap, other axes": lambda h: vmap(h, in_dims=({"a": 2, "b": None}, (1, None)))(
        {"a": WN["a"].movedim(0, 2), "b": W["b"]}, (XN[0].T, PLACES)
    ),
    "vmap in chunks": lambda h: vmap(h, chunk_size=2)(WN, XN),
    "vmap grad": lambda h: vmap(grad(h))(WN, XN),
    "vmap grad, one shared": lambda h: vmap(grad(h), in_dims=(None, 0))(W, XN),
    "grad vmap": lambda h: grad(lambda w: vmap(h)(w, XN).sum())(WN),
    "grad vmap, one shared": lambda h: grad(lambda w: vmap(h, in_dims=(None, 0))(w, XN).sum())(W),
    "vmap vmap grad": lambda h: vmap(vmap(grad(h), in_dims=(None, 0)), in_dims=(0, None))(WN, XN),
    "vmap grad vmap grad": lambda h: vmap(grad(sums_of_gradients(h)))(WN, XN),
    "hessian": lambda h: hessian(h)(W, X),
    "vmap hessian": lambda h: vmap(hessian(h))(WN, XN),
    "jacrev grad": lambda h: jacrev(grad(h))(W, X),
    "jacfwd jacrev": lambda h: jacfwd(jacrev(h))(W, X),
    "jacrev jacfwd": lambda h: jacrev(jacfwd(h))(W, X),
    "jvp": lambda h: jvp(lambda w: h(w, X), (W,), ({"a": WN["a"][0], "b": WN["b"][0]},)),
    "vmap jvp": lambda h: vmap(lambda w, x: jvp(lambda w: h(w, x), (w,), (w,)))(WN, XN),
    "jvp grad": lambda h: jvp(lambda w: grad(h)(w, X), (W,), (W,)),
    "grad jvp": lambda h: grad(lambda w: jvp(lambda w: h(w, X), (w,), (W,))[1])(W),
    "vjp grad": lambda h: vjp(lambda w: grad(h)(w, X), W)[1](W),
    "vmap of a pull-back": lambda h: vmap(vjp(lambda w: h(w, X), W)[1])(numbers(4)),
    "jvp of a pull-back": lambda h: jvp(vjp(lambda w: h(w, X), W)[1], (numbers(),), (numbers(seed=1),)),
    "third": lambda h: grad(
        lambda w: grad(lambda w: grad(h)(w, X)["a"].square().sum())(w)["a"].sum()
    )(W),
    "plain autograd": plain_autograd,
    "batched cotangents": batched_cotangents,
}  # fmt: skip


def assert_same(actual: Any, expected: Any, unlike: Any) -> None:
    """Leaf by leaf; the partner is another function's result, and differs where the function has a say."""
    actual, expected, unlike = (torch_pytree.tree_leaves(tree) for tree in (actual, expected, unlike))
    assert len(actual) == len(expected)
    far = 0
    for a, e, u in zip(actual, expected, unlike, strict=True):
        assert (a.shape, a.dtype, a.requires_grad) == (e.shape, e.dtype, e.requires_grad)
        a, e, u = (leaf.detach() for leaf in (a, e, u))
        scale = float(e.abs().max())
        assert float((a - e).abs().max()) <= EXACT * max(scale, 1e-3)
        far += float((a - u).abs().max()) > 20 * EXACT * max(scale, 1e-3)
    assert far >= 1


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_every_nesting(nesting: str, depth: int):
    remats: Fn = fn
    for _ in range(depth):
        remats = ft.remat(remats)
    assert_same(NESTINGS[nesting](remats), NESTINGS[nesting](fn), NESTINGS[nesting](other))


@pytest.mark.parametrize("nesting", NESTINGS)
def test_remats_among_other_operations(nesting: str):
    run = NESTINGS[nesting]
    assert_same(run(nested_remats(fn)), run(nested_plain(fn)), run(nested_plain(other)))


def test_gradcheck():
    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b).tanh()

    inputs = numbers(3, 2).requires_grad_(), numbers(2, 3, seed=1).requires_grad_()
    fast = dict(check_batched_grad=True)
    assert torch.autograd.gradcheck(ft.remat(product), inputs, check_forward_ad=True, **fast)
    assert torch.autograd.gradgradcheck(ft.remat(product), inputs, check_fwd_over_rev=True, **fast)

    def wrong(a: Tensor, b: Tensor) -> Tensor:
        return ft.remat(product)(a, b.detach())

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(wrong, inputs)


def odd(x: Tensor, places: Tensor, *, label: str = "s", more: Any = None) -> dict[str, Any]:
    """Outputs of every kind."""
    return {
        "y": x[places].sin(),
        "integers": places + 1,
        "booleans": x > 0,
        "nothing": None,
        "text": label,
        "given": x,
        "given integers": places,
        "twice": (x.exp(),) * 2,
        "views": [x[0], x.reshape(1, -1), x.unbind(0)],
        "constant": torch.ones(2, dtype=x.dtype),
        "more": more,
    }


def sum_of_odd(out: dict[str, Any]) -> Tensor:
    floats = [leaf for leaf in torch_pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    weighed = [(i + 1.5) * leaf.sin().sum() for i, leaf in enumerate(floats)]
    return torch.stack(weighed).sum() * out["integers"].sum() + (out["booleans"] * out["given"]).sum()


def test_odd_inputs_and_outputs():
    x = X[0].clone().requires_grad_()
    out = ft.remat(odd)(x, PLACES, label="t", more={"k": [x, 3, None]})
    expected = odd(x, PLACES, label="t", more={"k": [x, 3, None]})
    leaves, spec = torch_pytree.tree_flatten(out)
    expected_leaves, expected_spec = torch_pytree.tree_flatten(expected)
    assert spec == expected_spec
    for leaf, wanted in zip(leaves, expected_leaves, strict=True):
        if not isinstance(wanted, Tensor):
            assert leaf == wanted
            continue
        assert torch.equal(leaf, wanted)
        if not wanted.is_floating_point():
            assert not leaf.requires_grad
    found, wanted = (torch.autograd.grad(sum_of_odd(o), x)[0] for o in (out, expected))
    assert_close(found, wanted, EXACT, unlike=x.detach().cos())


@pytest.mark.parametrize("nesting", ["grad", "vmap grad", "grad vmap", "hessian", "jvp grad", "jacrev grad"])
def test_odd_outputs_in_nestings(nesting: str):
    def run(f: Callable[..., Any]) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            return sum_of_odd(f(x, PLACES))

        many = torch.stack([X[0], 2 * X[0]])
        runs = {
            "grad": lambda: grad(loss)(X[0]),
            "vmap grad": lambda: vmap(grad(loss))(many),
            "grad vmap": lambda: grad(lambda x: vmap(loss)(torch.stack([x, x * x])).sum())(X[0]),
            "hessian": lambda: hessian(loss)(X[0]),
            "jvp grad": lambda: jvp(grad(loss), (X[0],), (X[0],))[1],
            "jacrev grad": lambda: jacrev(grad(loss))(X[0]),
        }
        return runs[nesting]()

    unlike = run(lambda x, places: odd(x * 1.01, places))
    assert_close(run(ft.remat(odd)), run(odd), EXACT, unlike=unlike)


def test_no_tensors_in_or_out():
    assert ft.remat(lambda a: a + 1)(3) == 4
    assert torch.equal(ft.remat(lambda: torch.ones(2))(), torch.ones(2))
    x = X[0].clone().requires_grad_()
    assert ft.remat(lambda x: ("a", None))(x) == ("a", None)
    assert ft.remat(lambda x: {})(x) == {}
    assert torch.equal(ft.remat(lambda i: i + 1)(PLACES), PLACES + 1)
    assert torch.equal(vmap(ft.remat(lambda i: i + 1))(PLACES), PLACES + 1)
    # An output of integers alone has no say in the gradient.
    loss = grad(lambda x: (ft.remat(odd)(x, PLACES)["integers"].sum() * x).sum())
    assert torch.equal(loss(X[0]), torch.full_like(X[0], 6.0))


def test_inputs_without_a_gradient_get_none():
    a, b = numbers(3).requires_grad_(), numbers(3, seed=1)
    out = ft.remat(lambda a, b: (a * b).sum())(a, b)
    out.backward()
    assert b.grad is None
    assert torch.equal(a.grad, b)
    assert not ft.remat(torch.sin)(b).requires_grad
    with torch.no_grad():
        assert not ft.remat(torch.sin)(a).requires_grad
    with torch.inference_mode():
        assert ft.remat(torch.sin)(a).is_inference()
    # What does not depend on an input: zero under torch.func, none (or zero) in plain autograd
    assert torch.equal(grad(lambda a: ft.remat(lambda a: a.detach() * 2)(a).sum() + a.sum())(b), torch.ones_like(b))
    out = ft.remat(lambda a: a.detach() * 2)(a).sum() + a.sum()
    assert torch.equal(torch.autograd.grad(out, a)[0], torch.ones_like(b))


def test_complex_numbers():
    def of_complex(z: Tensor) -> Tensor:
        return (z * z.exp()).abs().sum()

    z = torch.complex(numbers(3), numbers(3, seed=1)).requires_grad_()
    found, expected = (torch.autograd.grad(f(z), z)[0] for f in (ft.remat(of_complex), of_complex))
    assert torch.equal(found, expected)
    assert not torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_randomness_of_vmap(randomness: str):
    """The values; replayed in the backward pass are keys of ft.random alone."""

    def noisy(x: Tensor) -> Tensor:
        return x * torch.rand(3, dtype=F64)

    many = torch.stack([X[0], X[0]])
    torch.manual_seed(1)
    found = vmap(ft.remat(noisy), randomness=randomness)(many)
    torch.manual_seed(1)
    assert torch.equal(found, vmap(noisy, randomness=randomness)(many))
    assert torch.equal(found[0], found[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(ft.remat(noisy))(many)


def test_keys_are_replayed():
    def dropped(x: Tensor, key: Tensor) -> Tensor:
        return (ft.random.dropout(key, x, 0.5) * x).sum()

    x = numbers(64)
    keys = ft.random.split(ft.random.key(0), 2)
    expected = vmap(grad(dropped), in_dims=(None, 0))(x, keys)
    assert torch.equal(vmap(grad(ft.remat(dropped)), in_dims=(None, 0))(x, keys), expected)
    assert not torch.equal(expected[0], expected[1])


# --- once more, and less kept


class Counted:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.calls, self.function = 0, function

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


def test_computed_again_once_per_backward():
    x = X[0].clone().requires_grad_()
    counted = Counted(lambda x: x.sin().exp().sum())
    out = ft.remat(counted)(x)
    assert counted.calls == 1
    torch.autograd.grad(out, x, retain_graph=True)
    assert counted.calls == 2
    torch.autograd.grad(out, x)
    assert counted.calls == 3
    counted.calls = 0
    grad(ft.remat(counted))(X[0])
    assert counted.calls == 2
    counted.calls = 0
    vmap(grad(ft.remat(counted)))(torch.stack([X[0]] * 4))
    assert counted.calls == 2
    # A value alone, without gradients, is computed once.
    counted.calls = 0
    ft.remat(counted)(X[0])
    assert counted.calls == 1


def layer(x: Tensor) -> Tensor:
    for _ in range(8):
        x = x.sin()
    return x


def layers(one: Fn, n: int = 8) -> Fn:
    def run(x: Tensor) -> Tensor:
        for _ in range(n):
            x = one(x)
        return x.sum()

    return run


SIZE = 8 * 1000


def test_what_is_kept():
    """8 layers of 8 operations keep 64 tensors; with remat 8, and 8 (and a few) more while one is differentiated."""
    x = numbers(1000).requires_grad_()
    with Live() as live:
        out = layers(layer)(x)
        assert 63 * SIZE <= live.now <= 66 * SIZE
        del out
    with Live() as live:
        out = layers(ft.remat(layer))(x)
        assert 7 * SIZE <= live.now <= 10 * SIZE
        grads = torch.autograd.grad(out, x)
        assert live.peak <= 24 * SIZE
        del out
        assert live.now == SIZE
        del grads
        assert live.now == 0


@pytest.mark.parametrize("transform", ["grad", "vmap grad"])
def test_what_is_kept_under_transforms(transform: str):
    x = numbers(1, 1000) if transform == "vmap grad" else numbers(1000)
    peaks = []
    for one in (layer, ft.remat(layer)):
        run = grad(layers(one))
        run = vmap(run) if transform == "vmap grad" else run
        with Live() as live:
            run(x)
        peaks.append(live.peak)
    assert peaks[0] >= 64 * SIZE
    # 8 inputs and one layer, of which torch.func would keep some 20 tensors for a second derivative if it were recorded
    assert peaks[1] <= 30 * SIZE


def test_inputs_die_with_the_graph():
    kept = numbers(10).requires_grad_()
    inside = kept * 2
    alive = weakref.ref(inside)
    out = ft.remat(torch.sin)(inside).sum()
    del inside
    assert alive() is not None or out.grad_fn is not None
    del out
    assert alive() is None


# --- what goes on around it


@pytest.mark.parametrize("when", ["forward", "forward disabled", "both"])
def test_autocast_is_replayed(when: str):
    """The backward pass computes again under the autocast of the forward pass, or under none."""
    a, b = (torch.randn(4, 4, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (0, 1))

    def run(f: Fn, forward: bool, backward: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            out = f(a, b)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            return torch.autograd.grad(out, a)[0]

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b).sin().float().sum()

    modes = {"forward": (True, False), "forward disabled": (False, True), "both": (True, True)}[when]
    found = run(ft.remat(product), *modes)
    assert torch.equal(found, run(product, *modes))
    assert not torch.equal(found, run(product, not modes[0], modes[1]))
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("transform", ["plain", "grad", "vmap grad"])
def test_an_exception_in_the_recomputation_leaves_nothing(transform: str):
    def fails_the_second_time(x: Tensor) -> Tensor:
        if counted.calls == 2:
            raise ValueError("the second time")
        return x.sin().sum()

    counted = Counted(fails_the_second_time)
    x = X[0].clone().requires_grad_()
    with pytest.raises(ValueError, match="the second time"):
        if transform == "plain":
            torch.autograd.grad(ft.remat(counted)(x), x)
        elif transform == "grad":
            grad(ft.remat(counted))(X[0])
        else:
            vmap(grad(ft.remat(counted)))(torch.stack([X[0], X[0]]))
    assert torch.is_grad_enabled()
    assert peek_interpreter_stack() is None
    counted.calls = 2 + 1
    assert torch.equal(grad(ft.remat(counted))(X[0]), X[0].cos())


def test_inputs_changed_in_place_are_noticed():
    x = numbers(3).requires_grad_()
    inside = x * 1
    out = ft.remat(torch.sin)(inside).sum()
    inside.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, x)


def test_threads():
    found: dict[int, list[Any]] = {}

    def work(i: int) -> None:
        w = {name: leaf[i] for name, leaf in WN.items()}
        x = (XN[0][i], XN[1][i])
        found[i] = [grad(nested_remats(fn))(w, x)["a"] for _ in range(5)]
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in w.items()}
        found[i].append(torch.autograd.grad(nested_remats(fn)(leaves, x), leaves["a"])[0])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(N)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(N):
        expected = grad(nested_plain(fn))({k: v[i] for k, v in WN.items()}, (XN[0][i], XN[1][i]))["a"]
        other_one = grad(nested_plain(fn))(W, X)["a"]
        for one in found[i]:
            assert_close(one, expected, EXACT, unlike=other_one)


def test_backward_in_another_thread():
    x = X[0].clone().requires_grad_()
    out = ft.remat(lambda x: x.sin().sum())(x)
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.autograd.grad(out, x)[0]))
    thread.start()
    thread.join()
    assert torch.equal(found[0], X[0].cos())


def test_inside_torch_checkpoint():
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in W.items()}
    out = torch.utils.checkpoint.checkpoint(lambda w: ft.remat(fn)(w, X), leaves, use_reentrant=False)
    found = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values())), strict=True))
    assert_same(found, grad(fn)(W, X), grad(other)(W, X))


COMPILED: dict[str, Callable[[Fn], Fn]] = {
    "value": lambda h: h,
    "grad": grad,
    "vmap grad": lambda h: lambda x: vmap(grad(h))(torch.stack([x, 2 * x])),
}


@pytest.mark.parametrize("transform", COMPILED)
def test_compiled(transform: str):
    def wave(x: Tensor) -> Tensor:
        return (x.sin() * x.exp()).tanh().sum()

    torch.compiler.reset()
    run = COMPILED[transform]
    found = torch.compile(run(ft.remat(wave)), backend="aot_eager")(X[0])
    assert_close(found, run(wave)(X[0]), EXACT, unlike=run(lambda x: wave(1.01 * x))(X[0]))


def test_compiled_backward():
    """One graph; keywords of the function that torch's own checkpoint has too are the function's."""

    def wave(x: Tensor, *, debug: int, tree: dict[str, Tensor]) -> Tensor:
        return (x * debug).sin().sum() * tree["k"]

    def run(f: Fn) -> Fn:
        return lambda x: f(x, debug=3, tree={"k": X[0][0]}) + x.sum()

    torch.compiler.reset()
    x = X[0].clone().requires_grad_()
    out = torch.compile(run(ft.remat(wave)), backend="aot_eager", fullgraph=True)(x)
    assert_close(torch.autograd.grad(out, x)[0], grad(run(wave))(X[0]), EXACT, unlike=torch.ones_like(X[0]))


# --- errors


def test_not_a_function():
    with pytest.raises(TypeError, match="remat: expected a function, got int"):
        ft.remat(3)
    with pytest.raises(TypeError, match="Linear is a module, whose parameters would get no gradient"):
        ft.remat(nn.Linear(2, 2))


@pytest.mark.parametrize("transform", ["plain", "grad", "vmap", "in a pytree"])
def test_what_needs_a_derivative_must_be_an_argument(transform: str):
    """It would get none, and nobody would say so."""

    def closing(a: Any) -> Tensor:
        return ft.remat(lambda x: (torch_pytree.tree_leaves(a)[0] * x * x).sum())(X[0])

    constant = torch.tensor(2.0, dtype=F64)
    assert closing(constant) == (2 * X[0] * X[0]).sum()
    with pytest.raises(ValueError, match=r"closes over 'a', which needs a derivative .* Make it an argument"):
        if transform == "plain":
            closing(constant.clone().requires_grad_())
        elif transform == "grad":
            grad(closing)(constant)
        elif transform == "vmap":
            vmap(closing)(torch.stack([constant, constant]))
        else:
            grad(lambda a: closing({"k": [a]}))(constant)
    with torch.no_grad():  # no derivative is wanted
        closing(constant.clone().requires_grad_())


def test_a_finetune_is_an_argument():
    base = ft.quantize_base_model(Tiny())
    tuned, ids = finetunes(base, 1)[0], torch.arange(6)

    def closing(tuned: ft.Finetuned) -> Tensor:
        return ft.remat(lambda ids: ft.apply(base, tuned, ids).square().sum())(ids)

    with pytest.raises(ValueError, match="closes over 'tuned'"):
        ft.value_and_grad(closing)(tuned)

    def passing(tuned: ft.Finetuned) -> Tensor:
        return ft.remat(ft.apply)(base, tuned, ids).square().sum()

    loss, grads = ft.value_and_grad(passing)(tuned)
    expected_loss, expected = ft.value_and_grad(lambda t: ft.apply(base, t, ids).square().sum())(tuned)
    assert torch.equal(loss, expected_loss)
    for name, leaf in expected.items():
        assert torch.equal(grads[name], leaf), name
    assert any(leaf.any() for leaf in grads.values())
