"""The conformance suite: every check on every family of `families.py`, whose table is `docs/models.md`."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import CHECKS, DOCUMENT, FAMILIES, Family, Inputs
from models import (
    assert_close,
    assert_same_finetune,
    assert_unchanged,
    finetunes,
    gradients_by_autograd,
    randomized,
    relative_error,
    snapshot,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import finetuna_func as ft

N, BATCH = 3, 2
BF16 = 2**-7  # two roundings of a number in bfloat16
Outputs = dict[str, Tensor]
Gradients = dict[str, Tensor]


class Case:
    """What the checks of one family share, made on first use."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.generator = torch.Generator().manual_seed(1)
        self.inputs = family.inputs((N, BATCH), self.generator)
        self.masks = {name: left_padded(length) for name, length in family.masks.items()}

    @property
    def mappable(self) -> dict[str, Tensor]:
        """The masks that ``vmap`` takes, so that a gap there is not one of everything."""
        return {} if "mask_vmap" in self.family.gaps else self.masks

    @functools.cached_property
    def model(self) -> nn.Module:
        return self.family.make()

    @functools.cached_property
    def base(self) -> ft.Base:
        return ft.quantize_base_model(self.model)

    @functools.cached_property
    def default(self) -> list[ft.Finetuned]:
        return some_finetunes(self.base)

    @functools.cached_property
    def custom(self) -> list[ft.Finetuned]:
        return some_finetunes(self.base, **self.family.custom)

    def apply(self, tuned: ft.Finetuned | None, inputs: Inputs, base: ft.Base | None = None) -> Outputs:
        return self.read(ft.apply(base or self.base, tuned, **inputs), inputs)

    def stacked(self, stacked: ft.Finetuned, inputs: Inputs) -> Outputs:
        return self.read(ft.apply_stacked(self.base, stacked, **inputs), inputs)

    def loop(self, tuned: list[ft.Finetuned], inputs: Inputs) -> Outputs:
        with torch.no_grad():
            each = [self.apply(t, row(inputs, i)) for i, t in enumerate(tuned)]
        return {name: torch.stack([out[name] for out in each]) for name in each[0]}

    def expected(self, tuned: ft.Finetuned | None, inputs: Inputs) -> Outputs:
        with torch.no_grad():
            return self.read(float_model(self.model, self.base, tuned)(**inputs), inputs)

    def read(self, out: Any, inputs: Inputs) -> Outputs:
        """The outputs to compare, zero where the mask is."""
        chosen: Outputs = {}
        for name, mask in self.family.outputs.items():
            leaf = out[name] if name else out
            if mask in inputs and leaf.shape[:-1] == inputs[mask].shape:
                leaf = torch.where((inputs[mask] == 1).unsqueeze(-1), leaf, 0)
            chosen[name] = leaf
        return chosen

    def loss(self, tuned: ft.Finetuned, inputs: Inputs) -> Tensor:
        return self.squares(inputs)(ft.apply(self.base, tuned, **inputs))

    def squares(self, inputs: Inputs) -> Callable[[Any], Tensor]:
        """A loss of the model's output."""
        return lambda out: sum(leaf.square().mean() for leaf in self.read(out, inputs).values())

    def with_labels(self, masks: Inputs) -> dict[str, Tensor]:
        """The inputs with masks and labels.

        Padding has no label, nor has the first token after it: models predict that from padding, of which there is
        no right output. A decoder's inputs are made from the labels.
        """
        assert self.family.labels is not None
        labels = self.family.labels(self.inputs)
        for mask in masks.values():
            if mask.shape == labels.shape:
                labels = torch.where(mask.roll(1, -1) * mask == 1, labels, -100)
        given = {name: leaf for name, leaf in self.inputs.items() if name != "decoder_input_ids"}
        return given | masks | {"labels": labels}

    def hf_loss(self, tuned: ft.Finetuned, inputs: Inputs) -> Tensor:
        """The loss that the model computes itself."""
        return ft.apply(self.base, tuned, **inputs).loss

    def float_gradient(self, tuned: ft.Finetuned, inputs: Inputs, loss_of: Callable[[Any], Tensor]) -> Gradients:
        """The gradient of a loss of the float model's output, by autograd through its weights."""
        module = float_model(self.model, self.base, tuned)

        def loss(params: Gradients) -> Tensor:
            weights = float_weights(self.model, self.base, tuned.replace(params=params))
            return loss_of(functional_call(module, weights, kwargs=inputs, tie_weights=False))

        return gradients_by_autograd(loss, tuned.params)

    def close(self, actual: Outputs, expected: Outputs, unlike: Outputs) -> None:
        """All outputs are close, and those that ``unlike`` has are far from it."""
        assert list(actual) == list(expected)
        for name in expected:
            if name in unlike:
                assert_close(actual[name], expected[name], self.family.tolerance, unlike=unlike[name])
            else:
                assert relative_error(actual[name], expected[name]) <= self.family.tolerance

    def close_gradients(self, actual: Gradients, expected: Gradients, unlike: Gradients) -> None:
        """Close leaf by leaf, small leaves by the size of the whole; and far from the gradients of another."""
        assert actual.keys() == expected.keys()
        whole = max(float(leaf.abs().max()) for leaf in expected.values())
        for name, leaf in expected.items():
            assert actual[name].shape == leaf.shape, name
            size = max(float(leaf.abs().max()), 0.01 * whole)
            error = float((actual[name] - leaf).abs().max())
            assert error <= 2 * self.family.tolerance * size, f"{name}: relative error {error / size:.3g}"
        away = max(float((actual[name] - unlike[name]).abs().max()) for name in expected)
        assert away > 100 * self.family.tolerance * whole


INVERTED = ("AriaExperts", "GptOssExperts", "Llama4TextExperts")  # whose fused weights are (experts, in, out)


def float_weights(model: nn.Module, base: ft.Base, tuned: ft.Finetuned | None) -> Gradients:
    """Weights of the float model, ``codes * scale + alpha / r * B @ A``, by hand: what to expect."""
    params = {} if tuned is None else tuned.params
    adapters = {} if tuned is None else {adapter.path: adapter for adapter in tuned.spec.adapters}
    ties = base.skeleton.ties

    def value(name: str) -> Tensor:
        canonical = ties.get(name, name)
        path, _, own = (name if name.rpartition(".")[0] in adapters else canonical).rpartition(".")
        plain = params.get(name, params.get(canonical))
        leaf = base.params[canonical] if plain is None else plain
        if not leaf.is_floating_point():
            leaf = leaf.double() * base.params[f"{canonical}_scale"].double().unsqueeze(-1)
            leaf = leaf.T if f"{path}.weight" in transposed else leaf
        if path in adapters and plain is None:
            config = adapters[path].config
            if own == "weight":
                update = params[f"{path}.lora_b"].double() @ params[f"{path}.lora_a"].double()
                swapped = adapters[path].kind == "embedding" or f"{path}.weight" in transposed
                leaf = leaf + config.alpha / config.r * (update.T if swapped else update)
            elif f"{path}.lora_bias" in params:
                leaf = leaf + config.alpha / config.r * params[f"{path}.lora_bias"].double()
        return leaf

    def whole(name: str, like: Tensor) -> Tensor:
        if name in base.params or name in ties:
            return value(name)
        path, _, own = name.rpartition(".")
        if own in ("in_proj_weight", "in_proj_bias"):  # of nn.MultiheadAttention, taken apart
            return torch.cat([value(f"{path}.{part}_proj.{own.removeprefix('in_proj_')}") for part in "qkv"])
        parts = f"{name.removesuffix('_bias')}.{{}}.{'bias' if name.endswith('_bias') else 'weight'}"
        whole = torch.stack([value(parts.format(expert)) for expert in range(len(like))])
        return whole.mT if path in inverted and whole.ndim == 3 else whole

    transposed = {f"{path}.weight" for path, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    inverted = {path for path, module in model.named_modules() if type(module).__name__ in INVERTED and path}
    named = dict(model.named_parameters(remove_duplicate=False))
    weights = {name: whole(name, leaf).to(leaf.dtype) for name, leaf in named.items()}
    for path in adapters:  # an adapter's bias on a layer that has none
        if f"{path}.lora_bias" in params and f"{path}.bias" not in weights:
            config = adapters[path].config
            weights[f"{path}.bias"] = config.alpha / config.r * params[f"{path}.lora_bias"]
    return weights


def float_model(model: nn.Module, base: ft.Base, tuned: ft.Finetuned | None) -> nn.Module:
    """The float model with those weights."""
    out = copy.deepcopy(model)
    for name, leaf in float_weights(model, base, tuned).items():
        path, _, own = name.rpartition(".")
        setattr(out.get_submodule(path), own, nn.Parameter(leaf.detach()))
    return out


def some_finetunes(base: ft.Base, **arguments: Any) -> list[ft.Finetuned]:
    """Different finetunes, the same ones each time.

    The adapter of a padding row is zero: it starts at zero and gets no gradient.
    """
    module = base.skeleton.module()
    made = finetunes(base, N, **arguments)
    for tuned in made:
        for adapter in tuned.spec.adapters:
            padding = getattr(module.get_submodule(adapter.path), "padding_idx", None)
            if padding is not None:
                tuned.params[f"{adapter.path}.lora_a"][:, padding] = 0
    return made


def row(inputs: Inputs, i: int) -> dict[str, Tensor]:
    return {name: leaf[i] for name, leaf in inputs.items()}


def left_padded(length: int) -> Tensor:
    """Masks (N, BATCH, length), every row but one with padding of its own length on the left."""
    lengths = length - torch.arange(N * BATCH).reshape(N, BATCH) % (length - 1)
    return (torch.arange(length) >= length - lengths.unsqueeze(-1)).long()


def gradient_of(loss: Callable[..., Tensor], tuned: ft.Finetuned, inputs: Inputs) -> Gradients:
    """The gradient by ``torch.func``."""
    return grad(lambda params: loss(tuned.replace(params=params), inputs))(dict(tuned.params))


def rolled(tree: Outputs) -> Outputs:
    """The outputs of the finetunes in another order."""
    return {name: leaf.roll(1, 0) for name, leaf in tree.items()}


def stack_of(each: list[Gradients]) -> Gradients:
    return {name: torch.stack([g[name] for g in each]) for name in each[0]}


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives every check the families that it applies to."""
    if "case" in metafunc.fixturenames:
        check = metafunc.function.__name__.removeprefix("test_")
        chosen = families.applicable(check)
        metafunc.parametrize("case", chosen, indirect=True, scope="module", ids=[family.name for family in chosen])


def check(function: Callable[[Any, Case], None]) -> Callable[[Any, Case], None]:
    """A check that must fail, with the declared error, where a family declares a gap."""
    name = function.__name__.removeprefix("test_")

    @functools.wraps(function)
    def run(self: Any, case: Case, **fixtures: Any) -> None:
        gap = case.family.gaps.get(name)
        if gap is None:
            return function(self, case, **fixtures)
        try:
            function(self, case, **fixtures)
        except Exception as error:
            assert re.search(gap.error, str(error)), f"the gap has another error than {gap.error!r}"
        else:
            pytest.fail(f"{case.family.name} now passes {name!r}: remove the gap and write the table again")

    return run


class TestFamily:
    @check
    def test_quantize(self, case: Case) -> None:
        before = snapshot(case.model)
        base = ft.quantize_base_model(case.model)
        assert_unchanged(case.model, before)
        for name, leaf in float_weights(case.model, base, None).items():
            original = case.model.get_parameter(name)
            step = original.abs().max() / 127
            assert (leaf - original).abs().max() <= 0.501 * step, name
        ties = base.skeleton.ties
        heads = {name for name in base.skeleton.shapes if "lm_head" in name.split(".")}
        heads |= {ties[name] for name in heads if name in ties}
        left = {name for name, leaf in base.params.items() if leaf.is_floating_point() and leaf.ndim > 1}
        left = sorted(left & base.skeleton.shapes.keys() - heads)
        assert not left, f"in float: {left}"

    @check
    def test_forward(self, case: Case) -> None:
        inputs = row(case.inputs, 0)
        with torch.no_grad():
            unlike = case.read(case.model(**inputs), inputs)
        case.close(case.apply(None, inputs), case.expected(None, inputs), unlike)

    @check
    def test_default(self, case: Case) -> None:
        self.computes_the_float_model(case, case.default)
        fresh = ft.new_finetuned(case.base)
        inputs = row(case.inputs, 0)
        before, after = case.apply(None, inputs), case.apply(fresh, inputs)
        assert all(torch.equal(after[name], before[name]) for name in before)

    @check
    def test_custom(self, case: Case) -> None:
        self.computes_the_float_model(case, case.custom)

    def computes_the_float_model(self, case: Case, tuned: list[ft.Finetuned]) -> None:
        for i, t in enumerate(tuned):
            inputs = row(case.inputs, i)
            case.close(case.apply(t, inputs), case.expected(t, inputs), case.apply(None, inputs))

    @check
    def test_bf16(self, case: Case) -> None:
        model = case.family.make().bfloat16()
        base = ft.quantize_base_model(model)
        tuned = some_finetunes(base)
        wide = case.inputs | case.mappable
        inputs = {name: leaf.bfloat16() if leaf.is_floating_point() else leaf for name, leaf in wide.items()}

        def floats(model: nn.Module, tuned: list[ft.Finetuned | None], inputs: Inputs) -> Outputs:
            each = [row(inputs, i) for i in range(N)]
            made = [float_model(model, base, t)(**x) for t, x in zip(tuned, each, strict=True)]
            return stack_of([case.read(out, x) for out, x in zip(made, each, strict=True)])

        def error(actual: Tensor, expected: Tensor) -> Tensor:
            if not case.family.routes:
                return (actual.float() - expected).norm() / expected.norm()
            # A rounding may send a token to other experts, which is no error of its own: the median token counts.
            each, size = (actual.float() - expected).norm(dim=-1), expected.norm(dim=-1)
            return (each[size > 0] / size[size > 0]).median()

        with torch.no_grad():
            mine = stack_of([case.apply(t, row(inputs, i), base) for i, t in enumerate(tuned)])
            mapped = vmap(lambda t, x: case.apply(t, x, base))(ft.stack(tuned), inputs)
            plain = floats(model, tuned, inputs)
            exact, unlike = floats(model.float(), tuned, wide), floats(model.float(), [None] * N, wide)
        for name, leaf in exact.items():
            for actual in (mine[name], mapped[name]):
                assert actual.dtype == plain[name].dtype
                assert error(actual, leaf) < 2 * error(plain[name], leaf) + BF16
                assert error(unlike[name], leaf) > 4 * error(actual, leaf)

    @check
    def test_grad(self, case: Case) -> None:
        inputs = row(case.inputs, 0)
        for tuned in (case.default, case.custom):
            expected = [case.float_gradient(t, inputs, case.squares(inputs)) for t in tuned[:2]]
            loss, lean = ft.value_and_grad(case.loss)(tuned[0], inputs)
            assert_close(loss, case.loss(tuned[0], inputs), case.family.tolerance, unlike=case.loss(tuned[1], inputs))
            case.close_gradients(lean, expected[0], unlike=expected[1])
            case.close_gradients(gradient_of(case.loss, tuned[0], inputs), expected[0], unlike=expected[1])

    @check
    def test_jvp(self, case: Case) -> None:
        tuned, stacked = case.custom, ft.stack(case.custom)
        tangents = [
            {name: leaf / 3 for name, leaf in randomized(t, seed=i).params.items()} for i, t in enumerate(tuned)
        ]

        def slope(t: ft.Finetuned, tangent: Gradients, inputs: Inputs) -> Tensor:
            return jvp(lambda params: case.loss(t.replace(params=params), inputs), (dict(t.params),), (tangent,))[1]

        mapped = vmap(slope)(stacked, stack_of(tangents), case.inputs)
        for i, t in enumerate(tuned):
            inputs = row(case.inputs, i)
            gradient = case.float_gradient(t, inputs, case.squares(inputs))
            parts = torch.cat([(gradient[name] * tangents[i][name]).flatten() for name in gradient])
            allowed = case.family.tolerance * parts.abs().sum()
            assert parts.sum().abs() > 20 * allowed
            assert (slope(t, tangents[i], inputs) - parts.sum()).abs() <= allowed
            assert (mapped[i] - parts.sum()).abs() <= allowed

    @check
    def test_vmap(self, case: Case) -> None:
        for tuned in (case.default, case.custom):
            expected = case.loop(tuned, case.inputs)
            case.close(vmap(case.apply)(ft.stack(tuned), case.inputs), expected, unlike=rolled(expected))

    @check
    def test_vmap_grad(self, case: Case) -> None:
        self.maps_gradients(case, case.default, case.loss, case.inputs)
        self.maps_gradients(case, case.custom, case.loss, case.inputs)

    def maps_gradients(self, case: Case, tuned: list[ft.Finetuned], loss: Any, inputs: Inputs) -> None:
        each = [ft.value_and_grad(loss)(t, row(inputs, i)) for i, t in enumerate(tuned)]
        expected = stack_of([gradient for _, gradient in each])
        stacked = ft.stack(tuned)
        mapped = vmap(lambda t, x: gradient_of(loss, t, x))(stacked, inputs)
        case.close_gradients(mapped, expected, unlike=rolled(expected))
        losses, lean = ft.stacked_value_and_grad(loss, in_dims=0)(stacked, inputs)
        case.close_gradients(lean, expected, unlike=rolled(expected))
        values = torch.stack([value for value, _ in each])
        assert_close(losses, values, case.family.tolerance, unlike=values.roll(1))

    @check
    def test_per_sample(self, case: Case) -> None:
        tuned, inputs = case.default[0], case.inputs | case.mappable
        samples = {name: leaf.flatten(0, 1).unsqueeze(1) for name, leaf in inputs.items()}  # batches of one
        expected = stack_of([ft.value_and_grad(case.loss)(tuned, row(samples, i))[1] for i in range(N * BATCH)])
        mapped = vmap(lambda x: gradient_of(case.loss, tuned, x))(samples)
        case.close_gradients(mapped, expected, unlike=rolled(expected))

    @check
    def test_stacked(self, case: Case) -> None:
        self.stacks(case, case.default, case.inputs)

    @check
    def test_stacked_custom(self, case: Case) -> None:
        self.stacks(case, case.custom, case.inputs)

    def stacks(self, case: Case, tuned: list[ft.Finetuned], inputs: Inputs) -> None:
        expected = case.loop(tuned, inputs)
        case.close(case.stacked(ft.stack(tuned), inputs), expected, unlike=rolled(expected))

    @check
    def test_stacked_grad(self, case: Case) -> None:
        def losses_of(stacked: ft.Finetuned) -> Tensor:
            return sum(leaf.square().flatten(1).mean(1) for leaf in case.stacked(stacked, case.inputs).values())

        losses, lean = ft.stacked_value_and_grad(losses_of)(ft.stack(case.custom))
        each = [ft.value_and_grad(case.loss)(t, row(case.inputs, i)) for i, t in enumerate(case.custom)]
        expected = stack_of([gradient for _, gradient in each])
        values = torch.stack([value for value, _ in each])
        assert_close(losses, values, case.family.tolerance, unlike=values.roll(1))
        case.close_gradients(lean, expected, unlike=rolled(expected))

    @check
    def test_mask(self, case: Case) -> None:
        for tuned in (case.default[1], case.custom[1]):
            inputs = row(case.inputs | case.masks, 1)
            unmasked = case.read(ft.apply(case.base, tuned, **row(case.inputs, 1)), inputs)
            unmasked = {name: leaf for name, leaf in unmasked.items() if case.family.outputs[name] in case.masks}
            case.close(case.apply(tuned, inputs), case.expected(tuned, inputs), unlike=unmasked)
            expected = case.float_gradient(tuned, inputs, case.squares(inputs))
            other = case.float_gradient(tuned, row(case.inputs, 1), case.squares(inputs))
            case.close_gradients(ft.value_and_grad(case.loss)(tuned, inputs)[1], expected, unlike=other)

    @check
    def test_mask_vmap(self, case: Case) -> None:
        inputs = case.inputs | case.masks
        for tuned in (case.default, case.custom):
            expected = case.loop(tuned, inputs)
            case.close(vmap(case.apply)(ft.stack(tuned), inputs), expected, unlike=rolled(expected))
        self.maps_gradients(case, case.default, case.loss, inputs)

    @check
    def test_mask_stacked(self, case: Case) -> None:
        self.stacks(case, case.custom, case.inputs | case.masks)

    @check
    def test_labels(self, case: Case) -> None:
        inputs = [row(case.with_labels(case.masks), i) for i in range(2)]
        for tuned in (case.default[1], case.custom[1]):
            with torch.no_grad():
                expected = [float_model(case.model, case.base, tuned)(**x).loss for x in inputs]
            loss, gradient = ft.value_and_grad(case.hf_loss)(tuned, inputs[1])
            assert_close(loss, expected[1], case.family.tolerance, unlike=expected[0])
            wanted = [case.float_gradient(tuned, x, lambda out: out.loss) for x in inputs]
            case.close_gradients(gradient, wanted[1], unlike=wanted[0])

    @check
    def test_labels_vmap(self, case: Case) -> None:
        self.maps_gradients(case, case.default, case.hf_loss, case.with_labels(case.mappable))
        self.maps_gradients(case, case.custom, case.hf_loss, case.with_labels(case.mappable))

    @check
    def test_labels_stacked(self, case: Case) -> None:
        stacked = ft.stack(case.custom)
        with pytest.raises(ValueError, match=r"output \['loss'\] has shape .*\(leave out labels=\)"):
            ft.apply_stacked(case.base, stacked, **case.with_labels(case.masks))
        self.stacks(case, case.custom, case.inputs | case.masks)

    @check
    def test_generate(self, case: Case) -> None:
        tuned = case.default[1]
        inputs = row(case.inputs, 1)
        start = inputs.pop("decoder_input_ids", None)
        arguments = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
        arguments["use_cache"] = True
        module, reference = ft.to_module(case.base, tuned), float_model(case.model, case.base, tuned)
        with torch.no_grad():
            out = module.generate(**inputs, **arguments)
            assert out.get("past_key_values", out.get("cache_params")) is not None
            text = {"input_ids" if start is None else "decoder_input_ids": out.sequences[:, :-1]}
            whole, unlike = (ft.apply(case.base, t, **inputs | text).logits[:, -4:] for t in (tuned, None))
            logits = torch.stack(out.logits, 1)
            assert_close(logits, whole, case.family.tolerance, unlike=unlike)
            assert torch.equal(logits.argmax(-1), out.sequences[:, -4:])
            if "attention_mask" in case.masks:
                mask = {"attention_mask": case.masks["attention_mask"][1]}
                mine, expected = (m.generate(**inputs, **mask, **arguments) for m in (module, reference))
                assert torch.equal(mine.sequences, expected.sequences)
                assert_close(
                    torch.stack(mine.logits, 1), torch.stack(expected.logits, 1), case.family.tolerance, unlike=logits
                )

    @check
    def test_save(self, case: Case, tmp_path: Path) -> None:
        again = ft.quantize_base_model(case.family.make())
        for i, tuned in enumerate((case.default[0], case.custom[0])):
            loaded = ft.load(ft.save(tmp_path / str(i), tuned), again)
            assert_same_finetune(loaded, tuned)
            inputs = row(case.inputs, 0)
            before, after = case.apply(tuned, inputs), case.apply(loaded, inputs, again)
            assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_class_has_the_checks_of_the_table() -> None:
    names = [name.removeprefix("test_") for name in vars(TestFamily) if name.startswith("test_")]
    assert names == list(CHECKS)


def test_gaps_are_of_checks_that_apply() -> None:
    for family in FAMILIES:
        assert all(family.lacks(name) is None for name in family.gaps), family.name


def test_what_does_not_apply_is_what_the_model_lacks(case: Case) -> None:
    """Masks, labels and generation are left out only where the model itself has none."""
    family, accepted = case.family, inspect.signature(case.model.forward).parameters
    assert family.masks.keys() <= accepted.keys()
    assert family.masks or not {"attention_mask", "input_ids"} <= accepted.keys()
    assert (family.labels is not None) == ("labels" in accepted)
    assert family.generates == (hasattr(case.model, "can_generate") and case.model.can_generate())


def test_the_document_is_what_is_declared() -> None:
    written = DOCUMENT.read_text("utf-8")
    ran_with = re.search(r"^Last run with (.*)\.$", written, re.MULTILINE)
    assert ran_with is not None
    assert written == families.render(ran_with[1]), "run: python tests/families.py --write"
