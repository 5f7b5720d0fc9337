"""A gated MLP with adapters as one function, for blocks that are compiled.

``down(act(gate(x)) * up(x))`` is most of a decoder layer. Between its three frozen products lie tensors four times as
wide as x, and layer by layer each of an adapter's products reads one of them anew. As one function all that lies
between is a pass forward and a pass backward (`kernels.gated`), and nothing that wide is kept but what gate and up
put out: what goes into down is made again from it.

The models of the field write this one line alike, over and over, so it is known by its code and not by its class.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetuna_func import kernels
from finetuna_func._layers import Call, divided_by_rows, fused_parts, has_hooks, int8_codes, is_plain_linear
from finetuna_func._ops import compute_dtype
from finetuna_func._products import Codes, added, by_rows, contracted, summed

_CHILDREN = ("gate_proj", "up_proj", "down_proj")
_ACTIVATIONS = {  # whether it is GELU, in its tanh form
    "torch.nn.modules.activation.SiLU": False,
    "transformers.activations.SiLUActivation": False,
    "transformers.activations.GELUTanh": True,
}


def mark_gated(skeleton: nn.Module, call: Call) -> None:
    """Makes the gated MLPs of a skeleton ones that run as one function in a compiled block, where that fits."""
    for module in skeleton.modules():
        if is_gated(module):
            module._ft_call = call  # type: ignore[assignment]
            module.__class__ = _as_one(type(module))


def is_gated(module: nn.Module) -> bool:
    """Returns whether a module of a skeleton computes ``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` and no more."""
    code = getattr(type(module).forward, "__code__", None)
    known = code is not None and any(_same(code, own.__code__) for own in (_in_two_lines, _in_one_line))
    if not known or _activation(module) not in _ACTIVATIONS:
        return False
    return all(is_plain_linear(getattr(module, name, None)) for name in _CHILDREN)


def _in_two_lines(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _in_one_line(self: Any, x: Any) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _same(one: Any, other: Any) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("co_code", "co_names", "co_argcount"))


def _activation(module: nn.Module) -> str:
    cls = type(getattr(module, "act_fn", None))
    return f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def _as_one(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        call: Call = self._ft_call  # type: ignore[assignment]
        y = _run(self, x) if call.fused else None
        return cls.forward(self, x) if y is None else y

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _run(module: nn.Module, x: Tensor) -> Tensor | None:
    """What the module computes, or None if one of its layers does not run as a function of its codes and adapter."""
    layers = [module.get_submodule(name) for name in _CHILDREN]
    if any(map(has_hooks, (*layers, module.get_submodule("act_fn")))):
        return None
    x = x.to(compute_dtype(x))
    gate, up, down = (fused_parts(layer, x) for layer in layers)
    if gate is None or up is None or down is None:
        return None
    for layer in layers:  # what goes into down has the rows of x
        x = divided_by_rows(layer, x)
    (w_g, a_g, b_g), (w_u, a_u, b_u), (w_d, a_d, b_d) = gate, up, down
    call: Call = module._ft_call  # type: ignore[assignment]
    use_kernels = call.kernels and kernels.fits(x, (b_g.shape[-1], b_u.shape[-1], a_d.shape[-2]))
    gelu = _ACTIVATIONS[_activation(module)]
    a, weight = torch.cat([a_g, a_u], dim=-2), torch.cat([w_g, w_u])
    codes = [int8_codes(layer) for layer in layers[:2]]
    return gated_mlp(x, a, b_g, b_u, a_d, b_d, weight, w_d, codes, gelu=gelu, use_kernels=use_kernels)


def gated_mlp(
    x: Tensor,
    a: Tensor,
    b_gate: Tensor,
    b_up: Tensor,
    a_down: Tensor,
    b_down: Tensor,
    weight: Tensor,
    down: Tensor,
    codes: Sequence[Codes | None] = (None, None),
    *,
    gelu: bool = False,
    use_kernels: bool = False,
) -> Tensor:
    """Returns ``down(act(gate(x)) * up(x))``, each of the three with its adapter, ``(N * rows, ..., out)``.

    First derivatives in reverse mode alone, which is all that a compiled block has; none for the frozen weights.

    Args:
        x: ``(N * rows, ..., in)``.
        a: The A of gate on top of that of up, ``(N, r + r, in)``; of a single finetune this and the others without N.
        b_gate: ``(N, F, r)``, with the scale of the adapter in it, like the other B's.
        b_up: Likewise.
        a_down: ``(N, r, F)``.
        b_down: ``(N, out, r)``.
        weight: That of gate on top of that of up, ``(2 F, in)``, frozen.
        down: ``(out, F)``, frozen.
        codes: Those of gate and of up with their scales, if ``weight`` is made of int8. With kernels each is then made
            again in the backward pass by itself, for the time of its product.
        gelu: Whether ``act`` is GELU in its tanh form, and not SiLU.
        use_kernels: Whether what lies between is computed by `kernels.gated`, and adapters' products elsewhere by
            `kernels.low_rank`.

    Example:
        >>> x, w, zero = torch.ones(2, 3), torch.ones(8, 3), torch.zeros
        >>> gated_mlp(x, zero(2, 3), zero(4, 1), zero(4, 1), zero(1, 4), zero(5, 1), w, torch.ones(5, 4)).shape
        torch.Size([2, 5])
    """
    factors = [a, b_gate, b_up, a_down, b_down]
    if a.ndim == 2:
        factors = [factor.unsqueeze(0) for factor in factors]
    known = [own for own in codes if own is not None] if use_kernels else []
    of_both = [leaf for own in known for leaf in own] if len(known) == 2 else []
    return _GatedMlp.apply(x, *factors, weight, down, gelu, use_kernels, *of_both)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b_g: Tensor,
        b_u: Tensor,
        a_d: Tensor,
        b_d: Tensor,
        weight: Tensor,
        down: Tensor,
        gelu: bool,
        use_kernels: bool,
        *codes: Tensor,
    ) -> Tensor:
        n = a.shape[0]
        low = by_rows(x, n, a.mT)
        gu = x.reshape(-1, x.shape[-1]) @ weight.mT
        h, low_h = _between(gu, low.reshape(-1, low.shape[-1]), b_g, b_u, a_d, gelu, use_kernels)
        y = added([h.view(*x.shape[:-1], h.shape[-1])], [down.mT], low_h, [b_d], use_kernels)
        ctx.save_for_backward(x, a, b_g, b_u, a_d, b_d, down, low, gu, low_h, *(codes or weight.chunk(2)))
        ctx.how = gelu, use_kernels
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b_g, b_u, a_d, b_d, down, low, gu, low_h, *saved = ctx.saved_tensors
        weights = saved if len(saved) == 2 else [(saved[0], saved[1]), (saved[2], saved[3])]  # or codes and scales
        (dy,), n = grads, a.shape[0]
        d_low_h, (d_bd,) = contracted(dy, low_h.view(*dy.shape[:-1], -1), [b_d], ctx.how[1])
        d_low_h = d_low_h.reshape(low_h.shape)
        d_h = dy.reshape(-1, dy.shape[-1]) @ down
        low_rows = low.reshape(-1, low.shape[-1])
        d_g, d_u, d_low, d_bg, d_bu, d_ad = _between_backward(gu, low_rows, b_g, b_u, a_d, d_h, d_low_h, *ctx.how)
        d_x = None
        if ctx.needs_input_grad[0]:
            wide = [own.view(*x.shape[:-1], -1) for own in (d_g, d_u)]
            d_x = added(wide, weights, d_low, [a], ctx.how[1], upright=True)
        return d_x, summed(d_low, x, n), d_bg, d_bu, d_ad, d_bd, *([None] * (len(ctx.needs_input_grad) - 6))


def _between(
    gu: Tensor, low: Tensor, b_g: Tensor, b_u: Tensor, a: Tensor, gelu: bool, use_kernels: bool
) -> tuple[Tensor, Tensor]:
    """Returns ``h = act(gate) * up`` and ``h @ A.T``, of rows; see `kernels.gated`, whose definition this is."""
    if use_kernels:
        from finetuna_func.kernels.gated import gated

        h, parts = gated(gu, low, b_g.contiguous(), b_u.contiguous(), a.contiguous(), gelu)
        return h, parts.sum(0).to(gu.dtype)
    g, u = _gate_and_up(gu, low, b_g, b_u)
    z, _ = _slope(g, gelu)
    h = (g * torch.sigmoid(z) * u).to(gu.dtype)
    return h.flatten(0, 1), torch.bmm(h, a.mT).flatten(0, 1)


def _between_backward(
    gu: Tensor,
    low: Tensor,
    b_g: Tensor,
    b_u: Tensor,
    a: Tensor,
    d_h: Tensor,
    d_low_h: Tensor,
    gelu: bool,
    use_kernels: bool,
) -> tuple[Tensor, ...]:
    """Returns the cotangents of gate and up, and of what else `_between` is given; d_h may be used up."""
    n, rank_g = b_g.shape[0], b_g.shape[-1]
    if use_kernels:
        from finetuna_func.kernels.gated import gated_backward_

        factors = (b_g.contiguous(), b_u.contiguous(), a.contiguous())
        d_g, d_low, *d_factors = gated_backward_(gu, low, *factors, d_h, d_low_h.contiguous(), gelu)
        return d_g, d_h, d_low, *(part.sum(1).to(gu.dtype) for part in d_factors)
    g, u = _gate_and_up(gu, low, b_g, b_u)
    low, d_low_h = low.view(n, -1, low.shape[-1]), d_low_h.view(n, -1, d_low_h.shape[-1])
    z, dz = _slope(g, gelu)
    s = torch.sigmoid(z)
    act = g * s
    d_h = d_h.view(u.shape) + torch.bmm(d_low_h, a)
    h = (act * u).to(gu.dtype)
    d_g = (d_h * u * (s + act * (1 - s) * dz)).to(gu.dtype)
    d_u = (d_h * act).to(gu.dtype)
    d_low = torch.cat([torch.bmm(d_g, b_g), torch.bmm(d_u, b_u)], dim=-1)
    d_bg, d_bu = torch.bmm(d_g.mT, low[..., :rank_g]), torch.bmm(d_u.mT, low[..., rank_g:])
    return (
        d_g.flatten(0, 1),
        d_u.flatten(0, 1),
        d_low.flatten(0, 1),
        d_bg,
        d_bu,
        torch.bmm(d_low_h.mT, h),
    )


def _gate_and_up(gu: Tensor, low: Tensor, b_g: Tensor, b_u: Tensor) -> tuple[Tensor, Tensor]:
    """What gate and up put out, adapters included, ``(N, rows, F)`` in float32 at least."""
    n, rank_g, wide = b_g.shape[0], b_g.shape[-1], torch.promote_types(gu.dtype, torch.float32)
    low = low.view(n, -1, low.shape[-1])
    g, u = gu.view(n, -1, gu.shape[-1]).to(wide).chunk(2, dim=-1)
    return g + torch.bmm(low[..., :rank_g], b_g.mT), u + torch.bmm(low[..., rank_g:], b_u.mT)


def _slope(g: Tensor, gelu: bool) -> tuple[Tensor, Tensor | float]:
    """What the sigmoid in ``act(g) = g * sigmoid(z(g))`` is of, and its derivative."""
    if not gelu:
        return g, 1.0
    c = 2 * (2 / torch.pi) ** 0.5  # (1 + tanh z) / 2 = sigmoid(2 z)
    return c * g * (1 + 0.044715 * g * g), c * (1 + 3 * 0.044715 * g * g)
