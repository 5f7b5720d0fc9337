"""8-bit and 4-bit formats: how a float matrix becomes codes and scales, and back.

A scheme is a frozen value without tensors. It turns a float matrix ``(out, in)`` into plain
tensors that sit side by side in the base's flat tree, under the parameter's own name and suffixes
of it:

    int8        weight: int8 (out, in)    weight_scale: fp32 (out,)       w ~ codes * scale
    blockwise8  weight: uint8 (out, in)   weight_scale: fp32 (blocks,)    w ~ code[codes] * scale
                                          weight_code: fp32 (256,)
    nf4         weight: uint8 (out, in / 2)           w ~ code[nibble] * absmax, in blocks of 64 along a row
                weight_code: fp32 (16,)
                weight_scale: uint8 (out, blocks)     absmax ~ blockwise8 of these, plus weight_scale_offset: fp32 ()
                weight_scale_scale, weight_scale_code: fp32, as in blockwise8

`int8` is the row-wise absmax format of LLM.int8() (arXiv 2208.07339): bitsandbytes'
``int8_vectorwise_quant``, bit for bit where that is defined. We state the two lines ourselves,
since bitsandbytes' CUDA kernel takes fp16 alone (codes would then depend on the device, and an
error could exceed half a step) and its CPU code divides by zero on an all-zero row.
`blockwise8` is the dynamic-tree code of arXiv 2110.02861, through bitsandbytes. `nf4` is QLoRA's
NormalFloat with double quantization (arXiv 2305.14314): bitsandbytes' ``quantize_4bit``, bit for bit
where rows are whole blocks. Elsewhere we let every row start a block of its own, so that a row can be
looked up alone; a row of odd width has one code a byte (dtype int8), which no language model needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from finetuna_func._levels import inside_transform
from finetuna_func._types import Params

_SMALLEST, _LARGEST = 1e-30, 3e38  # what a float32 scale times 127 holds with full precision
_CHUNK = 1 << 22  # numbers quantized at a time, so that temporaries stay small beside the model
_SLOW_INTEGERS = torch.backends.cpu.get_cpu_capability() != "AVX512"  # torch._int_mm is a scalar loop there

SUFFIXES = ("", "_scale", "_code", "_scale_scale", "_scale_code", "_scale_offset")
"""What the leaves of all schemes are called beside the parameter's name."""


class Scheme(Protocol):
    """What the layers need of a format. ``leaves`` are its tensors, keyed by suffix."""

    @property
    def name(self) -> str:
        """Its public name."""
        ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What its leaves are called beside the parameter's name, in order."""
        ...

    def quantize(self, weight: Tensor) -> Params:
        """Returns the leaves of a finite float matrix ``(out, in)``."""
        ...

    def dequantize(self, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        """Returns the float matrix ``(out, in)``."""
        ...

    def rows(self, ids: Tensor, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        """Returns the dequantized rows ``ids.shape + (in,)``."""
        ...

    def matmul(self, x: Tensor, *leaves: Tensor) -> Tensor:
        """Returns ``x @ W.T``; the result is a new tensor."""
        ...

    def matmul_transposed(self, x: Tensor, *leaves: Tensor) -> Tensor:
        """Returns ``x @ W``, the adjoint of `matmul`'s linearisation."""
        ...

    @property
    def linearised(self) -> Scheme:
        """The scheme whose `matmul` is the derivative of this one's."""
        ...


SchemeChoice: TypeAlias = "str | Scheme | Mapping[str, str | Scheme | None] | None"
"""A scheme or its name, ``None`` for float, or one of them for each of several selectors."""


@dataclass(frozen=True, slots=True)
class Int8:
    """Row-wise absmax int8. The activations stay in float (W8A16)."""

    name: str = "int8"
    suffixes: tuple[str, ...] = ("", "_scale")

    def quantize(self, weight: Tensor) -> Params:
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
        step = max(1, _CHUNK // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], step):
            rows = weight[start : start + step].float()
            codes[start : start + step], scale[start : start + step] = absmax_quantize(rows)
        return {"": codes, "_scale": scale}

    def dequantize(self, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        codes, scale = leaves
        wide = _at_least_float32(dtype)
        return (codes.to(wide) * scale.to(wide).unsqueeze(-1)).to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        codes, scale = leaves
        wide = _at_least_float32(dtype)
        # F.embedding rather than indexing: a negative id is an error, not a row from the end
        found, scales = F.embedding(ids, codes), F.embedding(ids, scale.to(wide).unsqueeze(-1))
        if inside_transform() or torch.compiler.is_compiling():  # a map takes no `out`, and a compiler finds it itself
            return (found.to(wide) * scales).to(dtype)
        return torch.mul(found, scales, out=torch.empty_like(found, dtype=dtype))  # one pass, without temporaries

    def matmul(self, x: Tensor, *leaves: Tensor) -> Tensor:
        codes, scale = leaves
        if _dequantize_first(x, codes):
            return F.linear(x, self._in_one_pass(x.dtype, codes, scale))
        # Integers up to 127 are exact in bfloat16, so the product sees no dequantization rounding.
        y = F.linear(x, codes.to(x.dtype))
        return y.mul_(scale)  # in place: computed in fp32, stored in y's dtype, no temporary

    def matmul_transposed(self, x: Tensor, *leaves: Tensor) -> Tensor:
        codes, scale = leaves
        if _dequantize_first(x, codes):
            return torch.matmul(x, self._in_one_pass(x.dtype, codes, scale))
        return torch.matmul(x * scale.to(x.dtype), codes.to(x.dtype))

    def _in_one_pass(self, dtype: torch.dtype, codes: Tensor, scale: Tensor) -> Tensor:
        """`dequantize` as one kernel without temporaries, for what needs no derivative."""
        wide = scale.to(_at_least_float32(dtype)).unsqueeze(-1)
        return torch.mul(codes, wide, out=torch.empty_like(codes, dtype=dtype))

    @property
    def linearised(self) -> Scheme:
        return self


@dataclass(frozen=True, slots=True)
class Int8Dynamic(Int8):
    """Int8 weights and int8 activations (W8A8): LLM.int8() with threshold 0.

    Each row of ``x`` is quantized by its own absmax, so that a row never depends on the others
    (``vmap`` equals the loop), and the derivative is that of W8A16 (straight through).
    """

    name: str = "int8"

    def matmul(self, x: Tensor, *leaves: Tensor) -> Tensor:
        codes, scale = leaves
        rows = x.reshape(-1, x.shape[-1])
        x_codes, x_scale = absmax_quantize(rows.float())
        y = _integer_product(x_codes, codes).to(_at_least_float32(x.dtype))
        y = y.mul_(x_scale.unsqueeze(-1)).mul_(scale)  # in place: y is as large as the result
        return y.to(x.dtype).reshape(*x.shape[:-1], codes.shape[0])

    @property
    def linearised(self) -> Scheme:
        return Int8()


@dataclass(frozen=True, slots=True)
class Blockwise8:
    """Blocks of 256 numbers, each with its absmax, coded by the dynamic tree of 8-bit optimizers."""

    name: str = "blockwise8"
    suffixes: tuple[str, ...] = ("", "_scale", "_code")
    block: int = 256

    def quantize(self, weight: Tensor) -> Params:
        import bitsandbytes.functional as bnb

        code = bnb.create_dynamic_map().to(weight.device)
        step = max(1, _CHUNK // self.block) * self.block
        flat = weight.reshape(-1)
        codes = torch.empty(flat.shape, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(-(-flat.numel() // self.block), dtype=torch.float32, device=weight.device)
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step].float()
            part_codes, state = bnb.quantize_blockwise(part, code=code, blocksize=self.block)
            codes[start : start + step] = part_codes
            scale[start // self.block : start // self.block + state.absmax.numel()] = state.absmax
        return {"": codes.reshape(weight.shape), "_scale": scale, "_code": code}

    def dequantize(self, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        codes, scale, code = leaves
        wide = _at_least_float32(dtype)
        values = code.to(wide).index_select(0, codes.reshape(-1).int())
        whole = codes.numel() // self.block * self.block
        blocks = values[:whole].reshape(-1, self.block) * scale[: whole // self.block].to(wide).unsqueeze(-1)
        flat = blocks.reshape(-1)
        if whole < codes.numel():
            flat = torch.cat([flat, values[whole:] * scale[-1].to(wide)])
        return flat.reshape(codes.shape).to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        codes, scale, code = leaves
        wide = _at_least_float32(dtype)
        width = codes.shape[1]
        numbers = ids.unsqueeze(-1) * width + torch.arange(width, device=ids.device)
        return (code[F.embedding(ids, codes).long()].to(wide) * scale[numbers // self.block].to(wide)).to(dtype)

    def matmul(self, x: Tensor, *leaves: Tensor) -> Tensor:
        return F.linear(x, self._by_kernel(x.dtype, *leaves))

    def matmul_transposed(self, x: Tensor, *leaves: Tensor) -> Tensor:
        return torch.matmul(x, self._by_kernel(x.dtype, *leaves))

    @property
    def linearised(self) -> Scheme:
        return self

    def _by_kernel(self, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        """`dequantize` in bitsandbytes' kernel: the same numbers, faster and without temporaries."""
        if dtype == torch.float64 or not leaves[0].numel():  # on a GPU the kernel fails on nothing
            return self.dequantize(dtype, *leaves)
        import bitsandbytes  # noqa: F401  (registers the torch.ops used below)

        codes, scale, code = (leaf.contiguous() for leaf in leaves)
        return torch.ops.bitsandbytes.dequantize_blockwise(codes, scale, code, self.block, dtype)


@dataclass(frozen=True, slots=True)
class Nf4:
    """Blocks of 64 numbers of a row, each with its absmax in 8 bits, coded by 16 quantiles of the normal distribution.

    Everything is computed alike on every device, so that a base is the same wherever it was made.
    """

    name: str = "nf4"
    suffixes: tuple[str, ...] = ("", "_code", "_scale", "_scale_scale", "_scale_code", "_scale_offset")
    block: int = 64

    def quantize(self, weight: Tensor) -> Params:
        height, width = weight.shape
        code = torch.tensor(_NF4, device=weight.device)
        bounds = (code[1:] + code[:-1]) / 2
        odd = width % 2 == 1
        codes = torch.empty(
            (height, width) if odd else (height, width // 2),
            dtype=torch.int8 if odd else torch.uint8,
            device=weight.device,
        )
        absmax = torch.empty(height, -(-width // self.block), device=weight.device)
        step = max(1, _CHUNK // max(1, width))
        for start in range(0, height, step):
            rows = self._blocks(weight[start : start + step].float().contiguous())
            largest = rows.abs().amax(-1)
            inverse = 1.0 / largest.clamp_min(1e-38)
            nearest = torch.bucketize((rows * inverse.unsqueeze(-1)).clamp_(-1, 1), bounds, out_int32=True)
            nearest = nearest.to(codes.dtype).flatten(-2)[:, :width]
            codes[start : start + step] = nearest if odd else (nearest[:, ::2] << 4) | nearest[:, 1::2]
            absmax[start : start + step] = largest
        # On the CPU, whatever the device, and the mean in float64, whose rounding does not depend on the order.
        absmax = absmax.cpu()
        offset = absmax.double().mean().float() if absmax.numel() else torch.zeros(())
        nested = Blockwise8().quantize(absmax - offset)
        scales = (nested[""], nested["_scale"], nested["_code"], offset)
        return dict(zip(self.suffixes, (codes, code, *(leaf.to(weight.device) for leaf in scales)), strict=True))

    def dequantize(self, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        codes, code, *_ = leaves
        return self._scaled(codes, code, self._absmax(*leaves), dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        codes, code, scale, nested_scale, nested_code, offset = leaves
        absmax = Blockwise8().rows(ids, torch.float32, scale, nested_scale, nested_code) + offset
        return self._scaled(F.embedding(ids, codes), code, absmax, dtype)

    def matmul(self, x: Tensor, *leaves: Tensor) -> Tensor:
        return F.linear(x, self._by_kernel(x.dtype, *leaves))

    def matmul_transposed(self, x: Tensor, *leaves: Tensor) -> Tensor:
        return torch.matmul(x, self._by_kernel(x.dtype, *leaves))

    @property
    def linearised(self) -> Scheme:
        return self

    def _absmax(self, *leaves: Tensor) -> Tensor:
        """The absmax of each block, fp32 ``(out, blocks)``."""
        _, _, scale, nested_scale, nested_code, offset = leaves
        return Blockwise8().dequantize(torch.float32, scale, nested_scale, nested_code) + offset

    def _scaled(self, codes: Tensor, code: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of codes as numbers; ``codes (..., bytes)``, ``absmax (..., blocks)``."""
        wide = _at_least_float32(dtype)
        table = code.to(wide).unsqueeze(-1)
        if codes.dtype == torch.uint8:  # two numbers a byte, looked up together
            byte = torch.arange(256, device=codes.device)
            table = torch.cat([table[byte >> 4], table[byte & 15]], -1)
        values = F.embedding(codes.int(), table).flatten(-2)
        width = values.shape[-1]
        scaled = self._blocks(values) * absmax.to(wide).unsqueeze(-1)
        return scaled.flatten(-2)[..., :width].to(dtype).contiguous()

    def _blocks(self, rows: Tensor) -> Tensor:
        """``(..., in)`` as ``(..., blocks, 64)``, the last block filled up with zeros."""
        missing = -rows.shape[-1] % self.block
        return (F.pad(rows, (0, missing)) if missing else rows).unflatten(-1, (-1, self.block))

    def _by_kernel(self, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        """`dequantize` in bitsandbytes' kernel, several times as fast, where the layout is its own."""
        codes = leaves[0]
        height, width = codes.shape[0], 2 * codes.shape[1]
        if codes.dtype != torch.uint8 or width % self.block or dtype == torch.float64 or not codes.numel():
            return self.dequantize(dtype, *leaves)
        import bitsandbytes  # noqa: F401  (registers the torch.ops used below)

        absmax = self._absmax(*leaves).reshape(-1)
        return torch.ops.bitsandbytes.dequantize_4bit(
            codes.contiguous(), absmax, self.block, "nf4", (height, width), dtype
        )


# bitsandbytes' table; its CUDA and CPU kernels have it built in.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def scheme_named(name: str, matmul: str = "w8a16") -> Scheme:
    """Returns the scheme for the public names, e.g. ``("int8", "w8a16")``.

    Raises:
        ValueError: An unknown name, or a pair that does not exist.
    """
    schemes: dict[tuple[str, str], Scheme] = {
        ("int8", "w8a16"): Int8(),
        ("int8", "w8a8"): Int8Dynamic(),
        ("blockwise8", "w8a16"): Blockwise8(),
        ("nf4", "w8a16"): Nf4(),
    }
    if (name, matmul) not in schemes:
        choices = ", ".join(f"scheme={s!r} with matmul={m!r}" for s, m in schemes)
        raise ValueError(f"scheme={name!r}, matmul={matmul!r}: no such format; there are {choices}.")
    return schemes[name, matmul]


def schemes_by_selector(scheme: SchemeChoice, matmul: str = "w8a16") -> dict[str, Scheme | None]:
    """Returns the scheme of each selector, ``None`` for float; ``"*"``, always there, stands for all other layers.

    Args:
        scheme: One scheme for all layers, or ``{selector: scheme}``, without ``"*"`` int8 for all others.
        matmul: For the entries ``"int8"``; the other schemes have one form only.

    Raises:
        TypeError: Something other than names and schemes.
        ValueError: An unknown name, or a ``matmul`` that none of the schemes has.
    """
    table = {"*": "int8", **scheme} if isinstance(scheme, Mapping) else {"*": scheme}
    dynamic = not isinstance(scheme, Mapping) or "int8" not in table.values()
    chosen: dict[str, Scheme | None] = {}
    for selector, value in table.items():
        if not isinstance(selector, str):
            raise TypeError(f"scheme: expected names of modules as keys, got {selector!r}.")
        if isinstance(value, str):
            chosen[selector] = scheme_named(value, matmul if dynamic or value == "int8" else "w8a16")
        elif value is None or hasattr(value, "linearised"):
            chosen[selector] = value
        else:
            raise TypeError(f"scheme: expected the name of a format or None, got {value!r} of {type(value).__name__}.")
    return chosen


def absmax_quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 codes ``(n, m)`` and fp32 scales ``(n,)`` of a float32 matrix, each row by its absmax.

    ``|row - codes * scale| <= scale / 2``; a row that is zero, or below 1e-30 throughout, gets zero
    codes and scale 0, since the scale itself would lose its precision there.
    """
    absmax = torch.maximum(-rows.amin(-1), rows.amax(-1))  # eight times as fast as the infinity norm on a CPU
    absmax = torch.where(absmax > _SMALLEST, absmax, 0.0)
    inverse = torch.where(absmax > 0, 127.0 / absmax, 0.0)
    return (rows * inverse.unsqueeze(-1)).round_().to(torch.int8), absmax / 127.0


def _integer_product(x_codes: Tensor, codes: Tensor) -> Tensor:
    """``x_codes @ codes.T`` of int8 matrices, int32 where integers are fast."""
    if x_codes.device.type == "cpu" and _SLOW_INTEGERS:
        # Float32 sums are exact up to 1040 columns, and round like any beyond.
        return F.linear(x_codes.float(), codes.float())
    import bitsandbytes  # noqa: F401  (registers the torch.ops used below)

    return torch.ops.bitsandbytes.int8_linear_matmul(x_codes, codes)


def check_quantizable(name: str, weight: Tensor) -> None:
    """Raises unless ``weight`` is a finite, real, floating-point matrix.

    Raises:
        TypeError: Not floating point.
        ValueError: Not a matrix, on the meta device, or it holds NaN or infinity.
    """
    if not weight.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating-point weight to quantize, got {weight.dtype}. Load the model in "
            "float32, bfloat16 or float16, or keep this layer as it is with modules_not_to_quantize."
        )
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no numbers; load the weights first.")
    if weight.ndim != 2:
        raise ValueError(f"{name}: expected a matrix to quantize, got shape {tuple(weight.shape)}.")
    if not bool(torch.isfinite(weight.sum())) and not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(
            f"{name}: {bad} of {weight.numel()} weights are NaN or infinite, which no quantized format holds; "
            "repair the checkpoint, or keep this layer in float with modules_not_to_quantize."
        )
    if weight.numel() and max(abs(float(end)) for end in torch.aminmax(weight)) > _LARGEST:
        raise ValueError(
            f"{name}: weights beyond {_LARGEST:g}, which a float32 scale cannot hold; keep this layer in float with "
            "modules_not_to_quantize."
        )


def _dequantize_first(x: Tensor, codes: Tensor) -> bool:
    """Whether a product with ``W`` is better one with the float matrix than one with the codes that is scaled.

    With many rows, scaling the codes costs less than scaling those. In float16 sums of up to 127 * |x| would overflow
    before the scale comes, and small gradients times small scales underflow.
    """
    return x.dtype == torch.float16 or x.shape[:-1].numel() >= codes.shape[1]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
