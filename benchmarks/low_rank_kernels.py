"""How long do the kernels of adapters' products take by themselves, against torch's batched products?

In bfloat16 on one GPU, for square layers of each width: `added`, ``x @ W + low @ B^T``, where a kernel forms the second
product and the first is added to it in place, against two products and a sum; and `contract`, ``dy @ B`` and ``dy^T
low`` (both cotangents), from one reading of dy, against two products. All are compiled as a block is, and the kernel's
sums over parts are counted. "Least" is the time of ``x @ W`` alone for the former, and for the latter that in which
as many bytes are copied as it reads and writes, parts of sums left out. Times are medians, from CUDA events, with
nothing in the L2 cache; results are compared with those in float32, and one that is off by more than 2**-6 ends the
program.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from gated_kernels import TOLERANCE, copy_rate, number_from, timed, what_lacks
from torch import Tensor

from finetuna_func import kernels
from finetuna_func._kept import compile_block
from finetuna_func._products import added, contracted

LINE = "{:>6s}  {:9s}  {:>10s}  {:>10s}  {:>12s}  {:>8s}"
HEADER = LINE.format("width", "product", "least, us", "torch, us", "kernel, us", "ratio")


def checked(run: Callable[..., tuple[Tensor, ...]], given: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """Raises if results are not those in float32, but for rounding."""
    for found, expected in zip(run(*given), exact, strict=True):
        error = float((found.float() - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            raise SystemExit(f"a result is off by {error:.3f} of its norm")


def measured(adapters: int, rows: int, width: int, rank: int, rate: float, repeats: int) -> None:
    """Prints the lines of a width."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    x, low, b = draw(adapters * rows, width), draw(adapters * rows, rank), draw(adapters, width, rank)
    weight = draw(width, width) / width**0.5

    def both(use_kernels: bool) -> Callable[..., tuple[Tensor, ...]]:
        return lambda x, weight, low, b: (added([x], [weight.mT], low, [b], use_kernels),)

    def contract(use_kernels: bool) -> Callable[..., tuple[Tensor, ...]]:
        def run(dy: Tensor, low: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            d_low, d_bs = contracted(dy, low, [b], use_kernels)
            return d_low, *d_bs

        return run

    for name, product, given in (("added", both, (x, weight, low, b)), ("contract", contract, (x, low, b))):
        exact = product(False)(*(leaf.float() for leaf in given))
        least = (sum(leaf.nbytes for leaf in given) + sum(leaf.nbytes // 2 for leaf in exact)) / rate
        if product is both:
            least = timed(lambda: x @ weight.mT, repeats)
        times = []
        for use_kernels in (False, True):
            torch.compiler.reset()  # or the next width would be compiled for all widths
            run = compile_block(product(use_kernels), remat=False)
            checked(run, given, exact)
            times.append(timed(lambda run=run, given=given: run(*given), repeats))
        cells = (f"{time * 1e6:.1f}" for time in (least, *times))
        print(LINE.format(str(width), name, *cells, f"{times[1] / times[0]:.2f}"), flush=True)


def main() -> None:
    """Measures each width and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = number_from(1)
    parser.add_argument("--adapters", type=count, default=4, metavar="N", help="default %(default)s")
    parser.add_argument("--rows", type=count, default=2048, metavar="N", help="of each adapter, default %(default)s")
    parser.add_argument("--widths", type=count, nargs="+", default=[512, 2048, 3072], help="default 512 2048 3072")
    of_rank = f"of each adapter, 1 to {kernels.MAX_RANK}, default %(default)s"
    parser.add_argument("--rank", type=number_from(1, kernels.MAX_RANK), default=16, metavar="R", help=of_rank)
    parser.add_argument("--repeats", type=count, default=20, metavar="N", help="of each time, default %(default)s")
    args = parser.parse_args()
    if lacking := what_lacks():
        parser.exit(2, f"{parser.prog}: error: {lacking}\n")

    rate = copy_rate(args.repeats)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {rate / 1e12:.2f} TB/s copy; "
        f"{args.adapters} adapters x {args.rows} rows, rank {args.rank}"
    )
    torch.cuda.empty_cache()
    print(HEADER)
    for width in args.widths:
        measured(args.adapters, args.rows, width, args.rank, rate, args.repeats)


if __name__ == "__main__":
    main()
