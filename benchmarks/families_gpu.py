"""Do all causal model families compute the same in bfloat16, on a GPU, under every transformation?

Every causal family of `tests/families.py` (tiny random models of real configurations), three default finetunes, and a
left-padded attention mask for each. What is right is a loop in float32, on a base with the same 8-bit codes, which is
itself compared with the float model on merged weights (1e-4 of the root mean square; TF32 is off). Against it:

* **plain**: the ordinary bfloat16 model on merged weights. Its error is what bfloat16 costs, about 2**-9 for each
  of the roundings that a number goes through, amplified by the model.
* **apply** (a loop), **vmap** and **stacked** (`apply_stacked`), on the bfloat16 base.
* the gradients of a loss of the logits: **plain** through the merged weights, **lean** (`value_and_grad`, a loop),
  **vmap** (`vmap(grad)`) and **stacked** (`stacked_value_and_grad` through `apply_stacked`).

A number is the root mean square of the difference relative to that of what is right, at positions without padding.
It may be twice that of the plain model plus 2**-7, which is two steps of bfloat16 (2**-8 each); for gradients, whose
chain is twice as long, plus 2**-6. **other** is how far away another finetune is: at least four times what is allowed.

Routers make it harder: a rounding may send a token to other experts, in the plain model as well, and such a token is no
nearer to what is right than any. So with experts it is the median token that counts. Tokens that are off by more than
allowed, in whatever run, have no part in the loss whose gradient is compared; their share is printed as **moved**, and
may be at most a third.

    python benchmarks/families_gpu.py [--device cpu] [--family NAME ...]

Prints a table in markdown; the exit status is 1 if a number is too large or a call fails.
"""

from __future__ import annotations

import argparse
import copy
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from families import FAMILIES, LENGTH, Family, tokens

import finetuna_func as ft

N, BATCH = 3, 2
OUTPUT_STEP, GRADIENT_STEP = 2**-7, 2**-6
Gradients = dict[str, Tensor]


class Subject:
    """One family: its models, bases and finetunes in bfloat16 and, with the same numbers, in float32."""

    def __init__(self, family: Family, device: torch.device) -> None:
        self.family = family
        self.narrow = family.make().to(device, torch.bfloat16)
        self.wide = copy.deepcopy(self.narrow).float()
        for model in (self.narrow, self.wide):
            if hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("eager")
        self.base, self.wide_base = ft.quantize_base_model(self.narrow), ft.quantize_base_model(self.wide)
        for name, leaf in self.base.params.items():
            assert torch.equal(leaf.float(), self.wide_base.params[name].float()), f"{name} differs between the bases"
        generator = torch.Generator().manual_seed(1)
        self.tuned = [self.finetune(generator) for _ in range(N)]
        self.wide_tuned = [
            ft.Finetuned(
                {name: leaf.float() for name, leaf in tuned.params.items()},
                tuned.consts,
                replace(tuned.spec, base=self.wide_base.fingerprint),
            )
            for tuned in self.tuned
        ]
        self.ids = tokens((N, BATCH), generator)["input_ids"].to(device)
        lengths = LENGTH - torch.arange(N * BATCH).reshape(N, BATCH) % (LENGTH - 1)
        self.mask = self.counts = (torch.arange(LENGTH) >= LENGTH - lengths.unsqueeze(-1)).long().to(device)

    def finetune(self, generator: torch.Generator) -> ft.Finetuned:
        """A default finetune with noise on every parameter; padding has no row in a table's adapter."""
        tuned = ft.new_finetuned(self.base, generator=generator)
        module = self.base.skeleton.module()
        params = {}
        for name, leaf in tuned.params.items():
            noise = torch.randn(leaf.shape, generator=generator).to(leaf)
            params[name] = leaf + 0.3 * noise
            padding = getattr(module.get_submodule(name.rpartition(".")[0]), "padding_idx", None)
            if padding is not None and name.endswith("lora_a"):
                params[name][:, padding] = 0
        return tuned.replace(params=params)

    def real(self, logits: Tensor, mask: Tensor) -> Tensor:
        """The logits in float32, zero where the mask is."""
        return torch.where(mask.unsqueeze(-1) == 1, logits.float(), 0)

    def logits(self, base: ft.Base, tuned: ft.Finetuned, ids: Tensor, mask: Tensor) -> Tensor:
        return self.real(ft.apply(base, tuned, ids, attention_mask=mask).logits, mask)

    def loss(self, base: ft.Base, tuned: ft.Finetuned, ids: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
        return self.real(self.logits(base, tuned, ids, mask), counts).square().mean()

    def loop(self, base: ft.Base, tuned: list[ft.Finetuned]) -> Tensor:
        with torch.no_grad():
            return torch.stack([self.logits(base, t, self.ids[i], self.mask[i]) for i, t in enumerate(tuned)])

    def lean(self, base: ft.Base, tuned: list[ft.Finetuned]) -> Gradients:
        step = ft.value_and_grad(lambda t, *x: self.loss(base, t, *x))
        return stacked([step(t, self.ids[i], self.mask[i], self.counts[i])[1] for i, t in enumerate(tuned)])

    def plain_logits(self, model: nn.Module, base: ft.Base, tuned: ft.Finetuned, i: int) -> Tensor:
        weights = ft.merge(base, tuned)
        inputs = dict(input_ids=self.ids[i], attention_mask=self.mask[i], use_cache=False)
        return self.real(functional_call(model, weights, kwargs=inputs, tie_weights=False).logits, self.mask[i])

    def plain(self, model: nn.Module, base: ft.Base, tuned: list[ft.Finetuned]) -> Tensor:
        """The ordinary model on merged weights."""
        with torch.no_grad():
            return torch.stack([self.plain_logits(model, base, t, i) for i, t in enumerate(tuned)])

    def plain_gradients(self) -> Gradients:
        """By autograd through the merged weights of the ordinary bfloat16 model."""
        each = []
        for i, tuned in enumerate(self.tuned):
            leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in tuned.params.items()}
            logits = self.plain_logits(self.narrow, self.base, tuned.replace(params=leaves), i)
            loss = self.real(logits, self.counts[i]).square().mean()
            found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
            each.append(dict(zip(leaves, found, strict=True)))
        return stacked(each)

    def mapped(self) -> Tensor:
        with torch.no_grad():
            return vmap(lambda t, *x: self.logits(self.base, t, *x))(ft.stack(self.tuned), self.ids, self.mask)

    def stack(self, tuned: ft.Finetuned) -> Tensor:
        return self.real(ft.apply_stacked(self.base, tuned, self.ids, attention_mask=self.mask).logits, self.mask)

    def mapped_gradients(self) -> Gradients:
        def one(tuned: ft.Finetuned, *x: Tensor) -> Gradients:
            return grad(lambda params: self.loss(self.base, tuned.replace(params=params), *x))(dict(tuned.params))

        return vmap(one)(ft.stack(self.tuned), self.ids, self.mask, self.counts)

    def stacked_gradients(self) -> Gradients:
        losses = ft.stacked_value_and_grad(lambda t: self.real(self.stack(t), self.counts).square().flatten(1).mean(1))
        return losses(ft.stack(self.tuned))[1]

    def errors(self, actual: Tensor, right: Tensor) -> Tensor:
        """Relative errors of the tokens ``(N, B, T)``, 0 where the mask is; all the same where no router is."""
        if not actual.isfinite().all():
            raise FloatingPointError("an output is not finite")
        if not self.family.routes:
            return self.mask * (actual - right).norm() / right.norm()
        return self.mask * (actual - right).norm(dim=-1) / right.norm(dim=-1).clamp_min(1e-30)

    def error(self, actual: Tensor, right: Tensor) -> float:
        return float(self.errors(actual, right)[self.mask == 1].median())

    def gradient_error(self, actual: Gradients, right: Gradients) -> float:
        """Relative error of the whole gradient."""
        if actual.keys() != right.keys() or not all(leaf.isfinite().all() for leaf in actual.values()):
            raise FloatingPointError("a gradient is missing or not finite")
        apart = torch.stack([(actual[name].float() - leaf.float()).norm() for name, leaf in right.items()])
        return float(apart.norm() / torch.stack([leaf.float().norm() for leaf in right.values()]).norm())


def stacked(each: list[Gradients]) -> Gradients:
    return {name: torch.stack([gradients[name] for gradients in each]) for name in each[0]}


COLUMNS = ("plain", "apply", "vmap", "stacked", "other", "moved", "∇ plain", "∇ lean", "∇ vmap", "∇ stacked", "∇ other")


def check(family: Family, device: torch.device) -> tuple[dict[str, str], list[str]]:
    """Returns the cells of a family and what is wrong."""
    cells: dict[str, str] = dict.fromkeys(COLUMNS, "")
    wrong: list[str] = []

    def show(name: str, value: float) -> float:
        cells[name] = f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"
        return value

    def attempt(name: str, measure: Callable[[], float], allowed: float) -> None:
        try:
            if show(name, measure()) > allowed or cells[name] == "nan":
                wrong.append(f"{name}: {cells[name]} is more than the {allowed:.4f} allowed")
        except Exception as error:  # a family that fails is a result, and the others are still of interest
            traceback.print_exc()
            cells[name] = type(error).__name__
            wrong.append(f"{name}: {error!r}"[:300])

    def tell(name: str, away: float, allowed: float) -> None:
        if show(name, away) < 4 * allowed:
            wrong.append(f"{name}: another finetune is only {away:.4f} away, which {allowed:.4f} can hardly tell")

    try:
        subject = Subject(family, device)
        right = subject.loop(subject.wide_base, subject.wide_tuned)
        merged = subject.plain(subject.wide, subject.wide_base, subject.wide_tuned)
        if (error := subject.error(merged, right)) > 1e-4:
            wrong.append(f"in float32, apply and the merged model are {error:.1e} apart")
        plain = subject.plain(subject.narrow, subject.base, subject.tuned)
        noise = show("plain", subject.error(plain, right))
    except Exception as error:
        traceback.print_exc()
        return cells, [f"the reference: {error!r}"[:300]]
    allowed = 2 * noise + OUTPUT_STEP
    settled = subject.mask == 1
    outputs: dict[str, Callable[[], Tensor]] = {
        "apply": lambda: subject.loop(subject.base, subject.tuned),
        "vmap": subject.mapped,
        "stacked": lambda: subject.stack(ft.stack(subject.tuned)).detach(),
    }
    if family.routes:
        settled &= subject.errors(plain, right) <= allowed
    for name, compute in outputs.items():

        def measure(compute: Callable[[], Tensor] = compute) -> float:
            actual = compute()
            if family.routes:
                settled.logical_and_(subject.errors(actual, right) <= allowed)
            return subject.error(actual, right)

        attempt(name, measure, allowed)
    if family.routes:
        attempt("moved", lambda: 1 - float(settled.sum() / subject.mask.sum()), 1 / 3)
    subject.counts = settled.long()
    try:
        right_gradients = subject.lean(subject.wide_base, subject.wide_tuned)
        gradient_noise = show("∇ plain", subject.gradient_error(subject.plain_gradients(), right_gradients))
    except Exception as error:
        traceback.print_exc()
        return cells, [*wrong, f"the gradient's reference: {error!r}"[:300]]
    gradient_allowed = 2 * gradient_noise + GRADIENT_STEP
    gradients: dict[str, Callable[[], Gradients]] = {
        "∇ lean": lambda: subject.lean(subject.base, subject.tuned),
        "∇ vmap": subject.mapped_gradients,
        "∇ stacked": subject.stacked_gradients,
    }
    for name, differentiate in gradients.items():
        attempt(name, lambda d=differentiate: subject.gradient_error(d(), right_gradients), gradient_allowed)
    tell("other", subject.error(right.roll(1, 0), right), allowed)
    rolled = {name: leaf.roll(1, 0) for name, leaf in right_gradients.items()}
    tell("∇ other", subject.gradient_error(rolled, right_gradients), gradient_allowed)
    return cells, wrong


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    causal = [family for family in FAMILIES if family.inputs is tokens and family.generates]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--family", action="append", choices=[family.name for family in causal])
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    warnings.filterwarnings("ignore")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    chosen = [family for family in causal if not arguments.family or family.name in arguments.family]
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}; {len(chosen)} families\n")
    print(f"|  | {' | '.join(COLUMNS)} |\n| :-- |{' --: |' * len(COLUMNS)}", flush=True)
    failures: dict[str, list[Any]] = {}
    for family in chosen:
        cells, wrong = check(family, device)
        print(f"| {family.name}{' ✗' if wrong else ''} | {' | '.join(cells.values())} |", flush=True)
        if wrong:
            failures[family.name] = wrong
    print()
    for family_name, wrong in failures.items():
        print(f"{family_name}:", *wrong, sep="\n    ")
    print(f"{len(chosen) - len(failures)} of {len(chosen)} families pass.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
