"""The frozen 8-bit product under every transform of torch.func and autograd, against plain float products."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from models import assert_close, relative_error
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from finetuna_func import _ops
from finetuna_func._ops import _FrozenMatmul, dequantized_matmul, frozen_matmul
from finetuna_func._quant import Blockwise8, Int8, Int8Dynamic, Nf4

SCHEMES = [Int8(), Int8Dynamic(), Blockwise8(), Nf4()]
LINEAR = [
    Int8(),
    Blockwise8(),
    Nf4(),
]  # whose product is linear in x; W8A8 rounds x and is differentiated straight through
IN, OUT = 5, 4


def name_of(scheme) -> str:
    return type(scheme).__name__


@pytest.fixture(params=SCHEMES, ids=name_of)
def scheme(request):
    return request.param


@pytest.fixture(params=LINEAR, ids=name_of)
def linear_scheme(request):
    return request.param


def made(scheme, out: int = OUT, inner: int = IN) -> tuple[tuple[Tensor, ...], Tensor]:
    """The leaves of a random matrix, and the float64 matrix that they stand for."""
    leaves = tuple(scheme.quantize(torch.randn(out, inner)).values())
    return leaves, scheme.dequantize(torch.float64, *leaves)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# --- derivatives


@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, IN)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(linear_scheme, shape, transposed, seed):
    leaves, _ = made(linear_scheme)
    x = double(*shape[:-1], OUT if transposed else IN)

    def product(x):
        return _FrozenMatmul.apply(x, linear_scheme, transposed, *leaves)

    for function in (product, lambda x: product(x.tanh()).sin()):
        assert gradcheck(
            function,
            (x,),
            check_forward_ad=True,
            check_backward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            check_undefined_grad=True,
        )
        assert gradgradcheck(function, (x,), check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


def test_the_function_is_used_where_something_records_and_nowhere_else(linear_scheme, seed, monkeypatch):
    """Its `apply` costs the host more than starting a product; the numbers are the same without."""
    leaves, matrix = made(linear_scheme)
    x = torch.randn(3, IN, requires_grad=True)
    calls: list[bool] = []
    apply, record = _FrozenMatmul.apply, _ops._record
    monkeypatch.setattr(_FrozenMatmul, "apply", lambda *args: calls.append(args[2]) or apply(*args))
    monkeypatch.setattr(_ops, "_record", lambda *args: calls.append(args[2]) or record(*args))

    def count(run) -> tuple[list[bool], Tensor]:
        calls.clear()
        out = run()
        return list(calls), out

    def product() -> Tensor:
        return frozen_matmul(x, linear_scheme, *leaves)

    assert count(product)[0] == [False]
    with torch.no_grad():
        found, y = count(product)
        assert found == [] and torch.equal(y, product())
    first, g = count(lambda: torch.autograd.grad(product().sum(), x)[0])
    again, h = count(lambda: torch.autograd.grad(product().sum(), x, create_graph=True)[0])
    assert (first, again) == ([False], [False, True])
    assert torch.equal(g, h)
    assert_close(g, matrix.sum(0).expand(3, IN).float(), 1e-6, unlike=matrix.sum(0).roll(1).expand(3, IN).float())
    found, _ = count(lambda: grad(lambda x: frozen_matmul(x, linear_scheme, *leaves).sum())(x))
    assert True in found and False in found
    with torch.no_grad():
        found, mapped = count(lambda: vmap(lambda x: frozen_matmul(x, linear_scheme, *leaves))(x))
        assert found and torch.allclose(mapped, y, rtol=1e-6)
    # what a vjp recorded may be pulled when its level is gone
    with torch.no_grad():
        _, pull = vjp(lambda x: frozen_matmul(x, linear_scheme, *leaves), x)
        assert torch.equal(pull(torch.ones(3, OUT))[0], g)


def test_gradcheck_would_notice(seed):
    leaves, _ = made(Int8())

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return frozen_matmul(x, Int8(), *leaves)

        @staticmethod
        def backward(ctx, gradient):
            return 1.01 * dequantized_matmul(gradient, Int8(), True, *leaves)

    assert not gradcheck(Wrong.apply, (double(3, IN),), raise_exception=False)


def test_w8a8_is_differentiated_as_w8a16(seed):
    """Straight through: any derivative at any order is that of the product without rounding of x."""
    leaves, matrix = made(Int8())
    x, v, w = (torch.randn(3, IN, dtype=torch.float64) for _ in range(3))

    def product(scheme):
        return lambda x: frozen_matmul(x.sin(), scheme, *leaves)

    assert torch.equal(grad(lambda x: product(Int8Dynamic())(x).sum())(x), grad(lambda x: product(Int8())(x).sum())(x))
    assert torch.equal(jvp(product(Int8Dynamic()), (x,), (v,))[1], jvp(product(Int8()), (x,), (v,))[1])
    second = [
        jvp(grad(lambda x, s=s: (product(s)(x) * (matrix @ w.T).T).sum()), (x,), (v,))[1]
        for s in (Int8Dynamic(), Int8())
    ]
    assert torch.equal(*second)
    assert not torch.equal(product(Int8Dynamic())(x), product(Int8())(x))


@pytest.mark.parametrize("order", ["grad_grad", "vmap_grad_vmap", "jvp_grad", "grad_jvp", "vjp_vjp", "jvp_jvp"])
def test_nestings_equal_those_of_a_float_product(linear_scheme, order, seed):
    leaves, matrix = made(linear_scheme)
    x, v = torch.randn(3, IN, dtype=torch.float64), torch.randn(3, IN, dtype=torch.float64)

    def nested(product):
        def loss(x):
            return product(x.sin()).tanh().square().sum()

        if order == "grad_grad":
            return grad(lambda x: (grad(loss)(x) * v).sum())(x)
        if order == "vmap_grad_vmap":
            return vmap(grad(lambda x: vmap(lambda row: product(row.sin()).tanh())(x).square().sum()))(
                torch.stack([x, v])
            )
        if order == "jvp_grad":
            return jvp(grad(loss), (x,), (v,))[1]
        if order == "grad_jvp":
            return grad(lambda x: jvp(loss, (x,), (v,))[1])(x)
        if order == "vjp_vjp":
            _, pull = vjp(lambda x: vjp(lambda y: product(y.sin()).tanh(), x)[1](torch.ones(3, OUT).double())[0], x)
            return pull(v)[0]
        return jvp(lambda x: jvp(lambda y: product(y.sin()).tanh(), (x,), (v,))[1], (x,), (v,))[1]

    mine = nested(lambda x: frozen_matmul(x, linear_scheme, *leaves))
    # float64, sums of 5 terms a few deep: 1e-13 is a hundred roundings.
    assert_close(
        mine,
        nested(lambda x: F.linear(x, matrix)),
        1e-13,
        unlike=nested(lambda x: F.linear(x, 1.001 * matrix)),
    )


def test_hessian(linear_scheme, seed):
    leaves, matrix = made(linear_scheme)
    x = torch.randn(IN, dtype=torch.float64)

    def loss(product):
        return lambda x: product(product(x.sin()).tanh() @ other).square().sum()

    other = torch.randn(OUT, IN, dtype=torch.float64)
    mine, reference = (
        loss(lambda x: frozen_matmul(x, linear_scheme, *leaves)),
        loss(lambda x: F.linear(x, matrix)),
    )
    expected = torch.autograd.functional.hessian(reference, x)
    unlike = torch.eye(IN, dtype=torch.float64)
    for of in (hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))):
        assert_close(of(mine)(x), expected, 1e-12, unlike=unlike)
    assert_close(torch.autograd.functional.hessian(mine, x), expected, 1e-12, unlike=unlike)
    assert_close(torch.autograd.functional.hessian(mine, x, vectorize=True), expected, 1e-12, unlike=unlike)


def test_forward_mode_by_hand(linear_scheme, seed):
    leaves, matrix = made(linear_scheme)
    x, v = torch.randn(2, IN, dtype=torch.float64), torch.randn(2, IN, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        out = torch.autograd.forward_ad.unpack_dual(frozen_matmul(dual, linear_scheme, *leaves))
    assert_close(out.tangent, F.linear(v, matrix), 1e-13, unlike=F.linear(x, matrix))


# --- vmap


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("shape", [(IN,), (3, IN)])
def test_vmap_over_each_dim_of_x(scheme, dim, shape, seed):
    if dim in (1, 2) and dim > len(shape):
        dim = len(shape)
    leaves, _ = made(scheme)
    x = torch.randn(6, *shape)
    moved = x.movedim(0, dim)
    mine = vmap(lambda x: frozen_matmul(x, scheme, *leaves), in_dims=dim)(moved)
    loop = torch.stack([frozen_matmul(one, scheme, *leaves) for one in x])
    assert_close(mine, loop, 1e-6, unlike=loop.roll(1, 0))  # one float32 sum of 5 terms in another order


def test_nested_vmap(scheme, seed):
    leaves, _ = made(scheme)
    x = torch.randn(2, 3, 4, IN)
    mine = vmap(vmap(lambda x: frozen_matmul(x, scheme, *leaves), in_dims=1), in_dims=0)(x)
    expected = frozen_matmul(x, scheme, *leaves).transpose(1, 2)
    assert_close(mine, expected, 1e-6, unlike=expected.roll(1, 0))


def test_vmap_folds_a_batch_of_x_into_one_product(scheme, seed, monkeypatch):
    leaves, _ = made(scheme)
    calls = []
    original = type(scheme).matmul
    monkeypatch.setattr(type(scheme), "matmul", lambda self, x, *ls: calls.append(x.shape) or original(self, x, *ls))
    vmap(lambda x: frozen_matmul(x, scheme, *leaves))(torch.randn(7, 3, IN))
    assert calls == [(7, 3, IN)]


@pytest.mark.parametrize("batched_x", [False, True])
def test_vmap_over_several_bases(linear_scheme, batched_x, seed):
    pairs = [made(linear_scheme) for _ in range(3)]
    stacked = [torch.stack(leaf) for leaf in zip(*(leaves for leaves, _ in pairs), strict=True)]
    x = torch.randn(3, 2, IN, dtype=torch.float64)
    given = x if batched_x else x[0]
    dims = (0 if batched_x else None, *[0] * len(stacked))

    def product(x, *leaves):
        return frozen_matmul(x, linear_scheme, *leaves)

    mine = vmap(product, in_dims=dims)(given, *stacked)
    expected = torch.stack([F.linear(x[i if batched_x else 0], m) for i, (_, m) in enumerate(pairs)])
    assert_close(mine, expected, 1e-13, unlike=expected.roll(1, 0))

    def gradient(x, *leaves):
        return grad(lambda x: product(x, *leaves).tanh().sum())(x)

    mine = vmap(gradient, in_dims=dims)(given, *stacked)
    expected = torch.stack(
        [grad(lambda x, m=m: F.linear(x, m).tanh().sum())(x[i if batched_x else 0]) for i, (_, m) in enumerate(pairs)]
    )
    assert_close(mine, expected, 1e-13, unlike=expected.roll(1, 0))


def test_vmap_over_bases_whose_leaves_have_the_batch_last(seed):
    pairs = [made(Int8()) for _ in range(3)]
    codes = torch.stack([leaves[0] for leaves, _ in pairs], dim=2)
    scale = torch.stack([leaves[1] for leaves, _ in pairs], dim=1)
    x = torch.randn(2, IN, dtype=torch.float64)
    mine = vmap(lambda c, s: frozen_matmul(x, Int8(), c, s), in_dims=(2, 1))(codes, scale)
    expected = torch.stack([F.linear(x, m) for _, m in pairs])
    assert_close(mine, expected, 1e-13, unlike=expected.roll(1, 0))


def test_vmap_over_several_bases_of_w8a8(seed):
    """The composite for several bases must be the same operation: W8A8, not W8A16."""
    pairs = [made(Int8Dynamic()) for _ in range(3)]
    stacked = [torch.stack(leaf) for leaf in zip(*(leaves for leaves, _ in pairs), strict=True)]
    x = torch.randn(2, IN)
    mine = vmap(lambda *leaves: frozen_matmul(x, Int8Dynamic(), *leaves))(*stacked)
    expected = torch.stack([frozen_matmul(x, Int8Dynamic(), *leaves) for leaves, _ in pairs])
    unlike = torch.stack([frozen_matmul(x, Int8(), *leaves) for leaves, _ in pairs])
    assert_close(mine, expected, 1e-6, unlike=unlike)


def test_vmapped_derivatives_of_vmapped_inputs(linear_scheme, seed):
    """Per-sample Jacobians: vmap(jacrev) and vmap(jacfwd), which nest vmap in vmap."""
    leaves, matrix = made(linear_scheme)
    x = torch.randn(3, IN, dtype=torch.float64)

    def mine(x):
        return frozen_matmul(x.sin(), linear_scheme, *leaves).tanh()

    expected = torch.stack(
        [torch.autograd.functional.jacobian(lambda x: F.linear(x.sin(), matrix).tanh(), r) for r in x]
    )
    for jacobian in (jacrev, jacfwd):
        assert_close(vmap(jacobian(mine))(x), expected, 1e-13, unlike=expected.roll(1, 0))


# --- the base is a constant

MESSAGE = (
    "a derivative with respect to the codes or scales of a frozen 8-bit base was asked for; the base is a constant. "
    "Differentiate with respect to tuned.params, and put a layer that should be trained directly in plain_layers."
)


def test_derivatives_of_the_base_are_refused(scheme, seed):
    (codes, scale, *rest), _ = made(scheme)
    x = torch.randn(2, IN)

    def loss(scale):
        return frozen_matmul(x, scheme, codes, scale, *rest).sum()

    wanted = scale.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=re.escape(MESSAGE)):
        torch.autograd.grad(loss(wanted), [wanted])
    with pytest.raises(RuntimeError, match=re.escape(MESSAGE)):
        grad(loss)(scale)
    with pytest.raises(RuntimeError, match=re.escape(MESSAGE)):
        jvp(loss, (scale,), (torch.ones_like(scale),))
    with pytest.raises(RuntimeError, match=re.escape(MESSAGE)):
        grad(lambda scale: vmap(lambda x: frozen_matmul(x, scheme, codes, scale, *rest))(x).sum())(scale)
    assert torch.isfinite(loss(scale))


def test_derivatives_of_several_bases_are_refused_too(seed):
    pairs = [made(Int8()) for _ in range(3)]
    codes, scales = (torch.stack(leaf) for leaf in zip(*(leaves for leaves, _ in pairs), strict=True))
    x = torch.randn(2, IN)
    with pytest.raises(RuntimeError, match=re.escape(MESSAGE)):
        vmap(lambda codes, scale: grad(lambda s: frozen_matmul(x, Int8(), codes, s).sum())(scale))(codes, scales)


# --- memory


def saved_by(function) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = function()
    assert out.requires_grad
    return saved


def test_backward_keeps_codes_and_scales_only(scheme, seed):
    leaves, _ = made(scheme, 64, 96)
    x = torch.randn(10, 96, requires_grad=True)
    saved = saved_by(lambda: frozen_matmul(x, scheme, *leaves))
    assert {t.data_ptr() for t in saved} == {leaf.data_ptr() for leaf in leaves}  # the base's own memory, no copy
    assert sum(t.nbytes for t in saved) == sum(leaf.nbytes for leaf in leaves)
    floats = [t for t in saved_by(lambda: dequantized_matmul(x, scheme, False, *leaves)) if t.is_floating_point()]
    assert sum(t.nbytes for t in floats) >= 64 * 96 * 4  # what the composite would keep


def test_the_graph_through_many_layers_keeps_no_float_weight(scheme, seed):
    bases = [made(scheme, 32, 32)[0] for _ in range(4)]
    x = torch.randn(3, 32, requires_grad=True)

    def forward():
        y = x
        for leaves in bases:
            y = torch.tanh(frozen_matmul(y, scheme, *leaves))
        return y

    owned = {leaf.data_ptr() for leaves in bases for leaf in leaves}
    beside = [t for t in saved_by(forward) if t.data_ptr() not in owned]
    assert all(t.shape == (3, 32) for t in beside)  # activations for tanh, nothing else
    assert sum(t.nbytes for t in beside) <= 4 * 3 * 32 * 4


# --- dtypes and autocast


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_result_and_gradient_have_the_dtype_of_x(scheme, dtype, seed):
    leaves, _ = made(scheme)
    x = torch.randn(3, IN).to(dtype).requires_grad_()
    y = frozen_matmul(x, scheme, *leaves)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == gradient.dtype == dtype and y.shape == (3, OUT)
    assert jvp(lambda x: frozen_matmul(x, scheme, *leaves), (x.detach(),), (x.detach(),))[1].dtype == dtype


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_acts_as_on_linear(scheme, low, seed):
    leaves, matrix = made(scheme)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(3, IN).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=low):
            like = F.linear(x, matrix.to(dtype))
            y = frozen_matmul(x, scheme, *leaves)
            (inside,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        (outside,) = torch.autograd.grad(y.sum(), x)
        assert y.dtype == like.dtype
        assert inside.dtype == outside.dtype == dtype
        # Roundings of the low precision (2**-8 for bfloat16) to sums of 5 terms; W8A8 rounds x to 1/127 as well.
        assert_close(y, F.linear(x.double(), matrix), 0.03, unlike=-like)
        assert_close(outside, matrix.sum(0).expand(3, IN), 0.03, unlike=-outside)
    with torch.autocast("cpu", dtype=low):
        y = vmap(grad(lambda x: frozen_matmul(x, scheme, *leaves).sum()))(torch.randn(3, IN))
    assert_close(y, matrix.sum(0).expand(3, IN), 0.03, unlike=-y)


def test_empty_batches(scheme, seed):
    leaves, _ = made(scheme)
    x = torch.randn(0, 2, IN, requires_grad=True)
    y = frozen_matmul(x, scheme, *leaves)
    assert y.shape == (0, 2, OUT)
    assert torch.autograd.grad(y.sum(), x)[0].shape == (0, 2, IN)


def test_a_transposed_and_an_expanded_input(scheme, seed):
    leaves, _ = made(scheme)
    x = torch.randn(IN, 7).mT
    assert_close(
        frozen_matmul(x, scheme, *leaves),
        frozen_matmul(x.contiguous(), scheme, *leaves),
        1e-6,
        unlike=frozen_matmul(x.roll(1, 0), scheme, *leaves),
    )
    row = torch.randn(1, IN)
    expanded = frozen_matmul(row.expand(4, IN), scheme, *leaves)
    assert relative_error(expanded, frozen_matmul(row.repeat(4, 1), scheme, *leaves)) < 1e-6


# --- torch.compile


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def value_and_gradient(function, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    (gradient,) = torch.autograd.grad(y.sin().sum(), x)
    return y.detach(), gradient


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(scheme, backend, seed, fresh_dynamo):
    if backend == "inductor" and scheme.name == "blockwise8":
        backend = "aot_eager"  # one compilation by the C++ compiler is enough
    leaves, matrix = made(scheme, 24, 48)

    def function(x):
        return frozen_matmul(x.tanh(), scheme, *leaves)

    x = torch.randn(6, 48)
    y, gradient = value_and_gradient(function, x)
    compiled_y, compiled_gradient = value_and_gradient(torch.compile(function, fullgraph=True, backend=backend), x)
    wrong = F.linear(x.tanh(), 1.001 * matrix.float())
    # float32 sums of 48 terms in another order: 48 * 2**-24 = 3e-6. W8A8 differs from W8A16 by 1e-3 or more.
    assert_close(compiled_y, y, 1e-5, unlike=wrong)
    assert_close(compiled_gradient, gradient, 1e-5, unlike=1.001 * gradient)
    assert compiled_gradient.abs().max() > 0


def test_compiled_torch_func_keeps_the_derivative(linear_scheme, seed, fresh_dynamo):
    leaves, _ = made(linear_scheme, 8, 12)

    def gradient(x):
        return grad(lambda x: frozen_matmul(x.tanh(), linear_scheme, *leaves).sin().sum())(x)

    x = torch.randn(6, 12)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")(x)
    assert_close(compiled, gradient(x), 1e-5, unlike=1.001 * gradient(x))
