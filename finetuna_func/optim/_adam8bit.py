"""Adam whose two means are kept in 8 bits: 2 bytes a parameter instead of 8.

The format is that of bitsandbytes' optimizers: blocks of 256 numbers, each with its largest
magnitude, and 8-bit codes of a *dynamic map*, whose values are dense near zero and reach over seven
powers of ten. A step takes the means out of the codes, computes as Adam does in float32, and puts
them back. It is plain torch: nothing has to be compiled, and it maps, compiles and runs anywhere.

Source: `8-bit optimizers via block-wise quantization <https://arxiv.org/abs/2110.02861>`_.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finetuna_func._types import Finetuned, Params
from finetuna_func.optim._base import GradientTransformation, Result, Tree, checked_leaves, wide_dtype, zeros
from finetuna_func.optim._checks import DECAY, POSITIVE, check_like, check_number, check_steps
from finetuna_func.optim._combinators import chain
from finetuna_func.optim._transforms import (
    LearningRate,
    adam_direction,
    adam_leaves,
    add_decayed_weights,
    corrections,
    in_order,
    scale_by_learning_rate,
)

BLOCK = 256
ZEROS = (127, 0)  # the codes of zero in the two maps
_CHUNK = 1 << 22  # numbers out of their codes at a time, so that large leaves cost few bytes beside themselves


class ScaleByAdam8bitState(NamedTuple):
    """Steps taken and the running means, in 8 bits where a leaf is large.

    Attributes:
        step: Steps taken, ``()`` or ``(N,)`` int64.
        mu: Means of gradients by name: uint8 codes in the shape of the leaf, or float32 for a small one.
        nu: Means of squared gradients, likewise.
        mu_absmax: Largest magnitude of each block of ``mu``, ``(blocks,)`` or ``(N, blocks)`` float32, for
            the leaves in codes.
        nu_absmax: Of ``nu``, likewise.
        code: What the codes mean, ``(2, 256)`` or ``(N, 2, 256)`` float32: for ``mu``, and for ``nu``.
    """

    step: Tensor
    mu: dict[str, Tensor]
    nu: dict[str, Tensor]
    mu_absmax: dict[str, Tensor]
    nu_absmax: dict[str, Tensor]
    code: Tensor


def adamw8bit(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Tensor = 0.01,
    min_size: int = 4096,
) -> GradientTransformation:
    """Returns `adamw` with its means in 8 bits, as in ``bitsandbytes.optim.AdamW8bit``.

    Args:
        learning_rate: Size of a step; see `scale_by_learning_rate`.
        b1: Decay of the mean of gradients, in ``[0, 1)``.
        b2: Decay of the mean of squared gradients, in ``[0, 1)``.
        eps: Added to the root of the mean square; above 0.
        weight_decay: Decoupled decay, at least 0. A number or ``(N,)``.
        min_size: See `scale_by_adam8bit`.

    Raises:
        ValueError: A value is out of range.

    Source: `8-bit optimizers via block-wise quantization <https://arxiv.org/abs/2110.02861>`_.

    Example:
        >>> params = {"w": torch.ones(100, 100)}
        >>> tx, tx32 = ft.optim.adamw8bit(1e-3), ft.optim.adamw(1e-3)
        >>> size = lambda state: sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(state))
        >>> size(tx.init(params)), size(tx32.init(params))  # a map of 2048 bytes included
        (22384, 80016)
    """
    return chain(
        scale_by_adam8bit(b1, b2, eps, min_size),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(learning_rate),
    )


def scale_by_adam8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, min_size: int = 4096
) -> GradientTransformation:
    """Returns the transformation of `scale_by_adam`, which keeps its means in 8 bits.

    A block never spans two leaves, nor two adapters of a stack: the slices of a stack's state are the
    states of its adapters (of equal rank; zero padding to a larger one moves the blocks). Map and
    blocks are those of bitsandbytes. It differs in one point, for the sake of elements whose gradient
    is zero for long, such as the rows of an embedding: a mean square above zero keeps a code above
    zero, where bitsandbytes rounds it to zero and then divides the mean by ``eps``.

    Args:
        b1: Decay of the mean of gradients, in ``[0, 1)``.
        b2: Decay of the mean of squared gradients, in ``[0, 1)``.
        eps: Above 0.
        min_size: Leaves with fewer numbers, those of one adapter counted, stay in float32.

    Raises:
        ValueError: A value is out of range; or, at ``update``, names or shapes are not those of init.

    Source: `8-bit optimizers via block-wise quantization <https://arxiv.org/abs/2110.02861>`_.

    Example:
        >>> tx = ft.optim.scale_by_adam8bit(min_size=2)
        >>> state = tx.init({"w": torch.zeros(300)})
        >>> state.mu["w"].dtype, state.mu["w"].shape, state.mu_absmax["w"].shape
        (torch.uint8, torch.Size([300]), torch.Size([2]))
        >>> updates, state = tx.update({"w": torch.full((300,), -3.0)}, state)
        >>> updates["w"].unique()
        tensor([-1.])
    """
    check_number("scale_by_adam8bit", "b1", b1, DECAY)
    check_number("scale_by_adam8bit", "b2", b2, DECAY)
    check_number("scale_by_adam8bit", "eps", eps, POSITIVE)
    check_steps("scale_by_adam8bit", "min_size", min_size, 0)

    def init(params: Tree) -> ScaleByAdam8bitState:
        leaves = checked_leaves("scale_by_adam8bit.init", params)
        size = params.stack_size if isinstance(params, Finetuned) else None
        lead = () if size is None else (size,)
        means: dict[str, Tensor] = {}
        absmax: dict[str, Tensor] = {}
        for name in sorted(leaves):
            leaf, wide = leaves[name], wide_dtype(leaves[name])
            numbers = leaf.numel() // (size or 1)
            if numbers < max(min_size, 1):
                means[name] = torch.zeros_like(leaf, dtype=wide)
            else:
                means[name] = torch.zeros_like(leaf, dtype=torch.uint8, memory_format=torch.contiguous_format)
                absmax[name] = leaf.new_zeros((*lead, -(-numbers // BLOCK)), dtype=wide)
        step = zeros(params, torch.int64)
        # As a sum, so that under vmap it is one for each adapter; and in the state, so that no step sends it
        # to the device.
        code = step.to(torch.float32).reshape(*lead, 1, 1) + dynamic_maps().to(step.device)
        return ScaleByAdam8bitState(step, means, _copies(means), absmax, _copies(absmax), code)

    def update(
        updates: Params, state: ScaleByAdam8bitState, params: Tree | None = None
    ) -> Result[ScaleByAdam8bitState]:
        check_like("scale_by_adam8bit.update", updates, state.mu, "the params given to init")
        step = state.step + 1
        small_mu, small_nu = (
            {name: leaf for name, leaf in means.items() if name not in state.mu_absmax}
            for means in (state.mu, state.nu)
        )
        directions, mu, nu = adam_leaves(updates, small_mu, small_nu, step, b1, b2, eps)
        mu_absmax, nu_absmax = {}, {}
        maps = state.code[0] if step.ndim else state.code  # the same for all adapters
        for name in state.mu_absmax:
            dtype, shape = state.mu_absmax[name].dtype, state.mu[name].shape
            means = [(state.mu[name], state.mu_absmax[name]), (state.nu[name], state.nu_absmax[name])]
            numbers = shape[step.ndim :].numel()
            rows = updates[name].reshape(*step.shape, numbers)
            flat = [(codes.reshape(*step.shape, numbers), absmax) for codes, absmax in means]
            both = corrections(b1, b2, step, dtype)
            whole = max(1, _CHUNK // (BLOCK * max(1, step.numel())))  # blocks at a time
            parts: list[tuple[Tensor, ...]] = []
            for start in range(0, numbers, whole * BLOCK):
                here, there = slice(start, start + whole * BLOCK), slice(start // BLOCK, start // BLOCK + whole)
                # All of it in blocks, the last one filled up with zeros, for which Adam's results are zeros too.
                g = to_blocks(rows[..., here].to(dtype))
                m, v = (
                    dequantize_blocks(to_blocks(codes[..., here], zero), absmax[..., there], code)
                    for (codes, absmax), code, zero in zip(flat, maps, ZEROS, strict=True)
                )
                m, v = torch.lerp(m, g, 1 - b1), torch.addcmul(v * b2, g, g, value=1 - b2)
                (direction,) = adam_direction([m], [v], *both, eps, 0.0)
                m_codes, m_absmax = quantize_blocks(m, maps[0])
                v_codes, v_absmax = quantize_blocks(v, maps[1], above_zero=True)
                count = min(numbers - start, whole * BLOCK)
                unblocked = [from_blocks(blocks, count) for blocks in (direction, m_codes, v_codes)]
                parts.append((*unblocked, m_absmax, v_absmax))
            joined = [part[0] if len(part) == 1 else torch.cat(part, dim=-1) for part in zip(*parts, strict=True)]
            directions[name], mu[name], nu[name] = (leaf.reshape(shape) for leaf in joined[:3])
            mu_absmax[name], nu_absmax[name] = joined[3:]
        new = ScaleByAdam8bitState(
            step, in_order(mu), in_order(nu), in_order(mu_absmax), in_order(nu_absmax), state.code
        )
        return in_order(directions), new

    return GradientTransformation(init, update)


def dynamic_maps() -> Tensor:
    """Returns the values of the 256 codes, ascending, ``(2, 256)`` float32: with a sign, and without.

    Seven powers of ten, each cut into equal cells with a code for the middle of each; twice as many
    cells in each larger power; and codes for exactly 0 and 1.
    """
    maps = []
    for signed in (True, False):
        values = [torch.tensor([0.0, 1.0])]
        for power in range(7):
            edges = torch.linspace(0.1, 1, 2 ** (power + (not signed)) + 1)
            middles = 10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)
            values += [middles, -middles] if signed else [middles]
        maps.append(torch.cat(values).sort().values)
    return torch.stack(maps)


def to_blocks(x: Tensor, filling: int = 0) -> Tensor:
    """Returns ``(..., numbers)`` as ``(..., blocks, 256)``, the last block filled up."""
    missing = -x.shape[-1] % BLOCK
    if missing:
        x = torch.cat([x, x.new_full((*x.shape[:-1], missing), filling)], dim=-1)
    return x.unflatten(-1, (-1, BLOCK))


def from_blocks(blocks: Tensor, numbers: int) -> Tensor:
    """Returns the first numbers of ``(..., blocks, 256)``, ``(..., numbers)``, in memory of their own."""
    if torch.compiler.is_compiling() and numbers % BLOCK:
        # Inductor (torch 2.13, on the CPU) reads a scale of the wrong block where a loop over `numbers` computes the
        # blocks by the way: as_strided makes it compute them before.
        blocks = torch.as_strided(blocks, blocks.shape, blocks.stride())
    return blocks.flatten(-2)[..., :numbers].contiguous()


def quantize_blocks(blocks: Tensor, code: Tensor, above_zero: bool = False) -> tuple[Tensor, Tensor]:
    """Returns the nearest codes, uint8 in the shape of ``blocks``, and the largest magnitude of each block.

    Args:
        blocks: ``(..., 256)``, each with a scale of its own.
        code: ``(256,)``, ascending.
        above_zero: Whether what is above zero keeps a code above zero; ``code[0]`` is then 0.
    """
    absmax = blocks.abs().amax(-1)
    normed = blocks / absmax.masked_fill(absmax == 0, 1).unsqueeze(-1)
    code = code.to(blocks.dtype)
    codes = torch.bucketize(normed, (code[1:] + code[:-1]) / 2, out_int32=True)
    if above_zero:
        codes = codes + ((codes == 0) & (blocks > 0))
    return codes.to(torch.uint8), absmax


def dequantize_blocks(codes: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """Returns the numbers that `quantize_blocks` put into codes, in the dtype of ``absmax``."""
    return F.embedding(codes.int(), code.to(absmax.dtype).unsqueeze(-1)).squeeze(-1) * absmax.unsqueeze(-1)


def _copies(tree: Params) -> dict[str, Tensor]:
    return {name: leaf.clone() for name, leaf in tree.items()}
