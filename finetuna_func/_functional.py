"""The pure forward: a base and a finetune in, the model's own output out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from finetuna_func import _random
from finetuna_func._base import quantized_leaves
from finetuna_func._blocks import has_state
from finetuna_func._body import hidden_states
from finetuna_func._factors import ready_factors
from finetuna_func._filters import join_name, split_name
from finetuna_func._fold import fold
from finetuna_func._hf import causal_mask, has_mask, with_mappable_mask
from finetuna_func._layers import LEAF_NAMES, Call, inside_vmap
from finetuna_func._quant import SUFFIXES
from finetuna_func._reads import ReadWatch
from finetuna_func._swap import call_on
from finetuna_func._types import Base, Finetuned, Params

Blocks: TypeAlias = Literal["blocks"] | None


def apply(
    base: Base,
    tuned: Finetuned | None,
    *args: Any,
    train: bool = False,
    rng: Tensor | None = None,
    remat: Blocks = None,
    compile: Blocks = None,
    **kwargs: Any,
) -> Any:
    """Returns what the model returns, computed from ``base`` and ``tuned`` alone.

    A pure function of its arguments: it composes with ``torch.func`` (``grad``, ``vmap`` over
    adapters or samples, ``jvp``, ``hessian``) and ``torch.compile``. Mapped over finetunes, of the language models
    whose rows are known not to meet, it is one stacked call, and costs what `apply_stacked` does.

    Args:
        base: The frozen base.
        tuned: A finetune of it; ``None`` for the base model itself. A stack goes through
            ``torch.func.vmap(ft.apply, in_dims=(None, 0, ...))`` or `apply_stacked`.
        *args: Inputs of the model.
        train: Whether dropout is on: that of the adapters and the model's ``nn.Dropout`` layers.
            (Dropout inside fused attention stays off: it has no key.)
        rng: Key for the dropout masks, from ``ft.random.key``; required if there is any dropout.
        remat: ``"blocks"`` to keep only the inputs of the model's repeated blocks for the backward pass and compute
            each block again there: about half as much time again, and activations of one block instead of all.
        compile: ``"blocks"`` to run the repeated blocks through ``torch.compile``, one graph for all that are alike,
            where no ``torch.func`` transform is active, or none but a ``vmap`` over finetunes that is one stacked call.
        **kwargs: Keyword inputs of the model.

    Raises:
        ValueError: ``tuned`` belongs to another base, is a stack, ``rng`` is missing, or ``remat`` or ``compile`` is
            something else, or the model has no repeated blocks.

    Example:
        >>> base, tuned = new_finetuned(tiny_model())
        >>> apply(base, tuned, torch.zeros(3, dtype=torch.long)).shape
        torch.Size([3, 4])
    """
    check_types("apply", base, tuned, rng)
    check_unstacked("ft.apply", base, tuned)
    if rng is not None and rng.ndim:
        raise ValueError(f"apply: rng has shape {tuple(rng.shape)}; one finetune takes one key, of shape ().")
    fields = check_blocks("apply", base, remat, compile)

    def compute(n: int | None, tuned: Finetuned | None, rng: Tensor | None, inputs: Any) -> Any:
        leaves = bind(base, tuned, train=train, rng=rng)
        if n is None or tuned is None:
            return run(base, leaves, *inputs, **fields)
        return run_stacked(base, tuned, n, leaves, *inputs, **fields)

    return fold("apply", compute, base, tuned, rng, (args, kwargs), (args, kwargs))


def apply_stacked(
    base: Base,
    stacked: Finetuned,
    *args: Any,
    train: bool = False,
    rng: Tensor | None = None,
    remat: Blocks = None,
    compile: Blocks = None,
    **kwargs: Any,
) -> Any:
    """Returns the outputs of N finetunes on N batches, ``(N, B, ...)``, from one run of the model.

    Equals ``vmap(apply)`` over the stack, but the model runs once on ``(N * B, ...)`` with no ``vmap``
    inside: the frozen products see all rows at once, the adapters are batched products, and any
    mask, control flow or fused attention of the model works as usual.

    Args:
        base: The frozen base.
        stacked: A stack from `stack`.
        *args: Inputs; every tensor is ``(N, B, ...)``.
        train: As for `apply`.
        rng: One key, split into one per finetune, or ``(N,)`` keys.
        remat: As for `apply`.
        compile: As for `apply`.
        **kwargs: Keyword inputs; likewise.

    Raises:
        ValueError: Not a stack, a tensor without the two leading axes, or an output without a
            row per sample (such as a loss that averages over everything).

    Example:
        >>> base, tuned = new_finetuned(tiny_model())
        >>> apply_stacked(base, stack([tuned] * 5), torch.zeros(5, 3, dtype=torch.long)).shape
        torch.Size([5, 3, 4])
    """
    check_types("apply_stacked", base, stacked, rng)
    if stacked is None or stacked.stack_size is None:
        raise ValueError(f"apply_stacked: expected a stack made by ft.stack([...]), got {stacked!r}; use ft.apply.")
    fields = check_blocks("apply_stacked", base, remat, compile)
    n = stacked.stack_size
    leaves = bind(base, stacked, train=train, rng=keys_of_stack("apply_stacked", n, rng))
    return run_stacked(base, stacked, n, leaves, args, kwargs, **fields)


def run(base: Base, leaves: Params, args: tuple[Any, ...], kwargs: dict[str, Any], **fields: Any) -> Any:
    """Returns the model's output from the tensors of a call, or the first of its body's and what class they were in.

    ``fields`` are those of the `Call`.
    """
    masked = has_mask(kwargs)
    with base.skeleton.calling(masked=masked, on_cpu=_on_cpu(base), **fields) as (module, call):
        if masked and inside_vmap():
            kwargs = with_mappable_mask(module, kwargs, base.skeleton.dtype)
        kwargs = _with_causal_mask(base, module, call, args, kwargs)
        out = _call(base, module, call, dict(leaves), args, kwargs)
        return hidden_states(base.skeleton.name, call) if call.part == "body" else out


def run_stacked(
    base: Base, stacked: Finetuned, n: int, leaves: Params, args: tuple[Any, ...], kwargs: dict[str, Any], **fields: Any
) -> Any:
    """Returns the same for a stack of ``n``, ``(n, B, ...)``."""
    shape = _input_shape(n, args, kwargs)
    spare = _spare_rows(n, shape.batch, 0, {size for own in shape.inputs for size in own})
    out = _run_rows(base, stacked, n, leaves, shape, spare, args, kwargs, **fields)
    suspects = set() if torch.compiler.is_compiling() else _axes_like_rows(out, n * (shape.batch + spare))
    if suspects:
        taken = {size for leaf in torch_pytree.tree_leaves((out, args, kwargs)) for size in getattr(leaf, "shape", ())}
        another = _spare_rows(n, shape.batch, spare + 1, taken)
        _check_rows_do_not_mix(base, stacked, n, leaves, shape, another, args, kwargs, suspects, **fields)
    return _unfold_outputs(n, shape.batch, spare, out)


def is_stack(base: Base, tuned: Finetuned | None) -> bool:
    """Returns whether the leaves of a finetune have a leading axis; inside a ``vmap`` over a stack they have none."""
    if tuned is None or tuned.stack_size is None or not tuned.params:
        return False
    name, leaf = next(iter(tuned.params.items()))
    own = split_name(name)[1]
    expected = {"lora_a": 2, "lora_b": 2, "lora_bias": 1, "lora_magnitude": 1}.get(own)
    return leaf.ndim > (len(base.skeleton.shapes[name]) if expected is None else expected)


def keys_of_stack(function: str, n: int, rng: Tensor | None) -> Tensor | None:
    """Returns a key for each of ``n`` finetunes, from one or from as many."""
    if rng is None or rng.shape == (n,):
        return rng
    if rng.ndim == 0:
        return _random.split(rng, n)
    raise ValueError(f"{function}: rng has shape {tuple(rng.shape)}; expected () or ({n},), a key each.")


def _spare_rows(n: int, batch: int, least: int, lengths: set[int]) -> int:
    """Rows to add per finetune, and to drop again, so that no other axis is as long as all rows.

    Otherwise a layer could not tell them apart.
    """
    spare = least
    while n * (batch + spare) in lengths:
        spare += 1
    return spare


def _run_rows(
    base: Base,
    stacked: Finetuned,
    n: int,
    leaves: Params,
    shape: _InputShape,
    spare: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    **fields: Any,
) -> Any:
    args, kwargs = torch_pytree.tree_map(lambda leaf: _fold_input(leaf, spare), (args, kwargs))
    rows = n * (shape.batch + spare)
    with base.skeleton.calling(stack=n, rows=rows, inputs=shape.inputs, **fields) as (module, call):
        kwargs = _with_causal_mask(base, module, call, args, kwargs)
        out = _call(base, module, call, dict(leaves), args, kwargs)
        _check_plain_layers_ran(stacked, call)
        return hidden_states(base.skeleton.name, call) if call.part == "body" else out


def _with_causal_mask(
    base: Base, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    call.causal = causal_mask(module, args, kwargs) if base.skeleton.blocks else None
    return kwargs if call.causal is None else {**kwargs, "attention_mask": call.causal}


def _call(
    base: Base,
    module: nn.Module,
    call: Call,
    leaves: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Returns what the skeleton's module returns on these tensors, and raises if it passes an adapter by."""

    def compute() -> Any:
        return call_on(module, leaves, args, kwargs)

    if torch.compiler.is_compiling():
        return compute()
    if not call.compile:  # the compiler does it in passing
        leaves = ready_factors(base.skeleton, leaves)
    given = frozenset(name for name, value in kwargs.items() if value is not None)
    kind = (call.stack is not None, call.part, len(args), given)
    if kind in base.skeleton.reads:
        _check_reads(call, leaves, base.skeleton.reads[kind])
        return compute()
    # A watch does not see into blocks that are compiled or computed again, so the first such call runs twice; or,
    # where it would change a cache twice, without them.
    if (call.remat or call.compile) and has_state((args, kwargs)):
        call.remat = call.compile = False
    if not (call.remat or call.compile):
        with ReadWatch(leaves, base.skeleton.layers, call) as watch:
            out = compute()
        base.skeleton.reads[kind] = frozenset(watch.found)
        _check_reads(call, leaves, base.skeleton.reads[kind])
        return out
    before = call.without_blocks()
    try:
        with torch.no_grad(), ReadWatch(leaves, base.skeleton.layers, call) as watch:
            compute()
    finally:
        call.restore(before)
    base.skeleton.reads[kind] = frozenset(watch.found)
    return _call(base, module, call, leaves, args, kwargs)


def _check_reads(call: Call, leaves: Params, reads: frozenset[str]) -> None:
    wrong = [
        path
        for path in sorted(reads)
        if join_name(path, "lora_a") in leaves or not leaves[join_name(path, "weight")].is_floating_point()
    ]
    if wrong:
        raise NotImplementedError(
            f"{'apply' if call.stack is None else 'apply_stacked'}: the model computes with the weight of {wrong[:5]} "
            "itself instead of calling the layer, which passes by its 8 bits and its adapter. Keep it in float "
            "(quantize_base_model(modules_not_to_quantize=...)) and out of adapt_layers; plain_layers can train it."
        )


def check_blocks(function: str, base: Base, remat: Blocks, compile: Blocks) -> dict[str, bool]:
    """Returns the fields of a `Call` for these arguments, checked."""
    for name, value in (("remat", remat), ("compile", compile)):
        if value not in (None, "blocks"):
            raise ValueError(f"{function}({name}={value!r}): expected 'blocks' or None.")
        if value is not None and not base.skeleton.blocks:
            raise ValueError(
                f"{function}({name}='blocks'): {base.skeleton.name} has no repeated blocks (two or more modules of one "
                "class in an nn.ModuleList). Use ft.remat or torch.compile on your own functions."
            )
    return {"remat": remat is not None, "compile": compile is not None}


def bind(base: Base, tuned: Finetuned | None, *, train: bool = False, rng: Tensor | None = None) -> dict[str, Tensor]:
    """Returns every tensor of a call by its ``functional_call`` name: base, finetune, keys and ties.

    A tied alias is the canonical parameter, adapter included, unless the finetune has a plain
    parameter or an adapter of its own under the alias.
    """
    leaves = dict(base.params)
    adapted: dict[str, str] = {}
    if tuned is not None:
        if tuned.spec.base != base.fingerprint:
            raise ValueError(
                f"tuned: this finetune belongs to base {tuned.spec.base!r}, but the base given is "
                f"{base.fingerprint!r} ({base.skeleton.name}); pass the base it was made from."
            )
        for path in tuned.spec.quantized:
            leaves.update(quantized_leaves(base, path))
        leaves.update(tuned.params)
        leaves.update(tuned.consts)
        adapted = {adapter.path: adapter.kind for adapter in tuned.spec.adapters}
    if train:
        leaves.update(_dropout_keys(base, tuned, rng))
    for alias, canonical in base.skeleton.ties.items():
        if tuned is not None and alias in tuned.params:
            continue
        for suffix in SUFFIXES:
            if canonical + suffix in leaves:
                leaves[alias + suffix] = leaves[canonical + suffix]
        alias_path, own = split_name(alias)
        path, _ = split_name(canonical)
        if own == "weight" and path in adapted and alias_path not in adapted:
            _share_adapter(leaves, path, alias_path, adapted[path], base.skeleton.layers[alias_path].type.adapter)
    # Some CPU kernels read a meta tensor without complaint, so a gap is looked for here.
    missing = [name for name in base.skeleton.required if name not in leaves]
    if missing:
        raise RuntimeError(
            f"base: it lacks {sorted(missing)[:5]}, which the model needs (the skeleton has them on the meta device "
            "only); pass the whole base, or ft.combine its parts."
        )
    return leaves


def _share_adapter(leaves: dict[str, Tensor], path: str, alias: str, kind: str, alias_kind: str | None) -> None:
    a, b = leaves[join_name(path, "lora_a")], leaves[join_name(path, "lora_b")]
    if kind != alias_kind:  # a table (rows, width) used as a head (out, in), or the reverse: the update transposes
        a, b = b.mT, a.mT
    leaves[join_name(alias, "lora_a")], leaves[join_name(alias, "lora_b")] = a, b
    for own in LEAF_NAMES[LEAF_NAMES.index("lora_scale") :]:
        if join_name(path, own) in leaves:
            leaves[join_name(alias, own)] = leaves[join_name(path, own)]


def _dropout_keys(base: Base, tuned: Finetuned | None, rng: Tensor | None) -> dict[str, Tensor]:
    adapters = [] if tuned is None else list(enumerate(tuned.spec.adapters))
    adapters = [
        (i, a.path) for i, a in adapters if tuned is not None and join_name(a.path, "lora_dropout") in tuned.consts
    ]
    if not adapters and not base.skeleton.dropouts:
        return {}
    if rng is None:
        raise ValueError(
            "train=True with dropout needs rng, a key that decides the masks: pass rng=ft.random.key(seed), "
            "and ft.random.fold_in(key, step) at each step."
        )
    keys = {join_name(path, "dropout_key"): _random.fold_in(rng, i) for i, path in adapters}
    model_rng = _random.fold_in(rng, -1)
    keys.update(
        {join_name(path, "dropout_key"): _random.fold_in(model_rng, i) for i, path in enumerate(base.skeleton.dropouts)}
    )
    return keys


def check_unstacked(function: str, base: Base, tuned: Finetuned | None) -> None:
    """Raises if a finetune is a stack."""
    if tuned is not None and is_stack(base, tuned):
        raise ValueError(
            f"tuned: a stack of {tuned.stack_size} finetunes was given to {function}; use "
            "ft.apply_stacked(base, stacked, ...), torch.func.vmap(ft.apply, in_dims=(None, 0, ...)), or "
            "ft.index(stacked, i)."
        )


@dataclass(frozen=True)
class _InputShape:
    batch: int
    inputs: tuple[tuple[int, ...], ...]  # shapes after the batch


def _input_shape(n: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _InputShape:
    batch: int | None = None
    inputs: set[tuple[int, ...]] = set()
    for path, leaf in torch_pytree.tree_leaves_with_path((args, kwargs)):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.ndim < 2 or leaf.shape[0] != n or (batch is not None and leaf.shape[1] != batch):
            expected = f"({n}, {'B' if batch is None else batch}, ...)"
            raise ValueError(
                f"apply_stacked: input {torch_pytree.keystr(path)} has shape {tuple(leaf.shape)}; expected {expected}, "
                "one batch per finetune. Expand an input that all of them share."
            )
        batch = leaf.shape[1]
        inputs.add(tuple(leaf.shape[2:]))
    if not batch:
        raise ValueError("apply_stacked: no tensor with a batch among the inputs, so there is nothing to divide.")
    return _InputShape(batch, tuple(sorted(inputs)))


def _fold_input(leaf: Any, spare: int) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if spare:
        leaf = torch.cat([leaf, *[leaf[:, -1:]] * spare], dim=1)
    return leaf.flatten(0, 1)


def _axes_like_rows(out: Any, rows: int) -> set[str]:
    """The outputs with an axis, beside the first, as long as the rows."""
    leaves = torch_pytree.tree_leaves_with_path(out)
    return {torch_pytree.keystr(path) for path, leaf in leaves if isinstance(leaf, Tensor) and rows in leaf.shape[1:]}


def _check_rows_do_not_mix(
    base: Base,
    stacked: Finetuned,
    n: int,
    leaves: Params,
    shape: _InputShape,
    spare: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    suspects: set[str],
    **fields: Any,
) -> None:
    """Raises if an axis grows with the rows: such an output compares the rows of one finetune with those of others.

    A width that happens to equal the number of rows stays as it is when there is one row more.
    """
    with torch.no_grad():
        again = _run_rows(base, stacked, n, leaves, shape, spare, args, kwargs, **fields)
    mixing = suspects & _axes_like_rows(again, n * (shape.batch + spare))
    if mixing:
        raise ValueError(
            f"apply_stacked: output {sorted(mixing)[0]} compares the rows of the call with one another, those of other "
            "finetunes too. Use torch.func.vmap over ft.apply, or compute it from the other outputs."
        )


def _on_cpu(base: Base) -> bool:
    return next(iter(base.params.values())).device.type == "cpu" if base.params else False


def check_types(function: str, base: Any, tuned: Any, rng: Any) -> None:
    """Raises if the arguments that all calls have in common are of the wrong type."""
    if not isinstance(base, Base):
        raise TypeError(
            f"{function}: expected a Base first, made by ft.quantize_base_model(model), got {type(base).__name__}."
        )
    if tuned is not None and not isinstance(tuned, Finetuned):
        raise TypeError(f"{function}: expected a Finetuned second, got {type(tuned).__name__}; inputs come after it.")
    if rng is not None and not isinstance(rng, Tensor):
        raise TypeError(f"{function}: rng is a {type(rng).__name__}; expected a key from ft.random.key(seed).")


def _check_plain_layers_ran(stacked: Finetuned, call: Call) -> None:
    unseen = sorted({split_name(name)[0] for name in stacked.spec.plain} - call.seen)
    if unseen and not torch.compiler.is_compiling():
        raise NotImplementedError(
            f"apply_stacked: the plain modules {unseen[:5]} never ran their forward; the model reads their parameters "
            "itself (or not at all) and cannot know that they are one per finetune. Use torch.func.vmap over ft.apply."
        )


def _unfold_outputs(n: int, batch: int, spare: int, out: Any) -> Any:
    rows = n * (batch + spare)

    def unfold(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.ndim == 0 or leaf.shape[0] != rows:
            raise ValueError(
                f"apply_stacked: output {torch_pytree.keystr(path) or '(the output)'} has shape {tuple(leaf.shape)}, "
                f"not a row for each of the {n} x {batch} samples, so it cannot be divided among the finetunes. "
                "Compute losses per finetune from the outputs (leave out labels=), or use torch.func.vmap."
            )
        return leaf.reshape(n, batch + spare, *leaf.shape[1:])[:, :batch]

    return torch_pytree.tree_map_with_path(unfold, out)
