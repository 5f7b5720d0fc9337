"""A call on one finetune, mapped over many, as one stacked call.

Under ``torch.func.vmap`` over finetunes, ``apply`` computes what ``apply_stacked`` does, operation by mapped operation:
more kernels, more memory, without fused attention and compiled blocks. Where the two are surely the same function, the
rule of ``vmap`` for the whole call, stated here, is the stacked call on the tensors beneath. A first derivative inside
the ``vmap`` is then that of the stacked call, by plain autograd, and any other that of the mapped call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, unwrap_if_dead  # type: ignore[import-not-found]

from finetuna_func._hf import is_divided_by_rows
from finetuna_func._levels import is_mapped, is_recorded_outside, only_vmap, without_gradient
from finetuna_func._types import Base, Finetuned

logger = logging.getLogger(__name__)

Compute = Callable[[int | None, Finetuned | None, Tensor | None, Any], Any]
"""Of how many finetunes (``None``: of one, without a leading axis), a finetune or stack, keys, further inputs."""
ModelInputs = tuple[tuple[Any, ...], dict[str, Any]]


def fold(
    function: str,
    compute: Compute,
    base: Base,
    tuned: Finetuned | None,
    rng: Tensor | None,
    inputs: Any,
    of_model: ModelInputs,
) -> Any:
    """Returns ``compute(None, tuned, rng, inputs)``, by ``compute(N, ...)`` if a ``vmap`` over N finetunes is active.

    That is done where it is surely the same: nothing else is active but perhaps one ``grad`` inside the ``vmap``, all
    trained leaves are mapped, and the model is a known one whose rows never meet. A model that turns out to have no
    stacked form is not asked again.

    Args:
        function: Whose call it is.
        compute: A pure function.
        base: The base; ``compute`` closes over it.
        tuned: A finetune.
        rng: Its key.
        inputs: A pytree.
        of_model: The arguments among ``inputs`` that the model gets.
    """
    level = None if tuned is None else _level(base, tuned, rng, inputs, of_model)
    if tuned is None or level is None:
        return compute(None, tuned, rng, inputs)
    kind = (function, len(of_model[0]), frozenset(of_model[1]), frozenset(tuned.params))
    if kind in base.skeleton.unfolded:
        return compute(None, tuned, rng, inputs)
    try:
        return _folded(compute, level, tuned, rng, inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error)
    out = compute(None, tuned, rng, inputs)  # raises the error that a user expects, if it is the input's fault
    logger.info("%s is mapped over finetunes without a stacked call: %s", base.skeleton.name, reason)
    base.skeleton.unfolded.add(kind)
    return out


def _level(base: Base, tuned: Finetuned, rng: Tensor | None, inputs: Any, of_model: ModelInputs) -> int | None:
    """The level of the ``vmap`` over finetunes that this call can be folded under, if there is one."""
    active = only_vmap()
    if active is None or not base.skeleton.rows_apart:
        return None
    level, differentiated = active
    if not tuned.params or not all(is_mapped(leaf, level) for leaf in tuned.params.values()):
        return None
    if any(is_functorch_wrapped_tensor(leaf) for leaf in base.params.values()) or not is_divided_by_rows(*of_model):
        return None
    tensors = [leaf for leaf in torch_pytree.tree_leaves((tuned, rng, inputs)) if isinstance(leaf, Tensor)]
    if differentiated and (torch.is_inference_mode_enabled() or is_recorded_outside([*base.params.values(), *tensors])):
        return None
    return level


def _folded(compute: Compute, level: int, tuned: Finetuned, rng: Tensor | None, inputs: Any) -> Any:
    leaves, spec = torch_pytree.tree_flatten((tuned, rng, inputs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    given = [leaves[place] for place in places]
    leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    structure: list[Any] = []

    def of_tensors(n: int | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        out_leaves, out_spec = torch_pytree.tree_flatten(compute(n, *torch_pytree.tree_unflatten(filled, spec)))
        if not all(leaf is None or isinstance(leaf, (Tensor, bool, int, float, str)) for leaf in out_leaves):
            raise TypeError(f"an output is neither a tensor nor a number: {[type(leaf) for leaf in out_leaves]}.")
        structure[:] = [out_spec, [None if isinstance(leaf, Tensor) else (leaf,) for leaf in out_leaves]]
        return tuple(leaf for leaf in out_leaves if isinstance(leaf, Tensor))

    tracked = [without_gradient(tensor) is not tensor and tensor.requires_grad for tensor in given]
    wanted = [i for i, own in enumerate(tracked) if own and torch.is_grad_enabled()]
    found = iter(_Fold.apply(_Tape(of_tensors, level, wanted), *given))
    out_spec, around = structure
    return torch_pytree.tree_unflatten([next(found) if leaf is None else leaf[0] for leaf in around], out_spec)


@dataclass
class _Tape:
    """A call under a ``vmap``, and what plain autograd recorded of it if a ``grad`` inside the ``vmap`` will ask.

    Attributes:
        function: The call as a function of its tensors: of those of one finetune, after ``None``, or of N, after N.
        level: The level of the ``vmap``.
        wanted: Which of the tensors are differentiated.
        inputs: Those, of N finetunes, where the record starts.
        outputs: Where it ends.
    """

    function: Callable[..., tuple[Tensor, ...]]
    level: int
    wanted: list[int]
    inputs: list[Tensor] = field(default_factory=list)
    outputs: tuple[Tensor, ...] = ()

    def take(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Returns both ends of the record, which serves once, so that it is given up as it is read."""
        ends = self.inputs, self.outputs
        self.inputs, self.outputs = [], ()
        return ends


class _Fold(torch.autograd.Function):
    """``tape.function(None, *tensors)``, whose rule for ``vmap`` is ``tape.function(N, *tensors)``."""

    @staticmethod
    def forward(tape: _Tape, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tape.function(None, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.tape, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(out for out in output if not out.is_floating_point()))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tape: _Tape = ctx.tape
        tensors = [unwrap_if_dead(tensor) for tensor in ctx.saved_tensors]
        used = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        grads: list[Tensor | None] = [None] * len(tensors)
        if used:
            operands = (*tensors, *(cotangent for cotangent in cotangents if cotangent is not None))
            active = only_vmap()
            same = active is not None and active[0] == tape.level and not is_recorded_outside(operands)
            found = _Pull.apply(tape, used, *operands) if tape.outputs and same else _pull(tape, used, *operands)
            for i, grad in zip(tape.wanted, found, strict=True):
                grads[i] = grad
        return None, *grads

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        tape, *tensors = args
        stacked = _with_leading_axis(info.batch_size, tensors, in_dims[1:])
        if not tape.wanted:
            out = tape.function(info.batch_size, *stacked)
            return out, (0,) * len(out)
        with torch.inference_mode(False), torch.enable_grad():
            for i in tape.wanted:
                stacked[i] = stacked[i].detach().requires_grad_()
            tape.inputs = [stacked[i] for i in tape.wanted]
            tape.outputs = tape.function(info.batch_size, *stacked)
        if not any(out.requires_grad for out in tape.outputs):
            raise RuntimeError("plain autograd records nothing")  # and zeros would be a wrong answer
        return tuple(out.detach() for out in tape.outputs), (0,) * len(tape.outputs)


class _Pull(torch.autograd.Function):
    """The derivative of `_Fold`, whose rule for ``vmap`` is plain autograd's on what was recorded."""

    @staticmethod
    def forward(tape: _Tape, used: list[int], *operands: Tensor) -> tuple[Tensor, ...]:
        return _pull(tape, used, *operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.tape, ctx.used, *operands = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        operands = [unwrap_if_dead(tensor) for tensor in ctx.saved_tensors]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]

        def of_wanted(*some: Tensor) -> tuple[Tensor, ...]:
            filled = list(operands)
            for i, tensor in zip(wanted, some, strict=True):
                filled[i] = tensor
            return _pull(ctx.tape, ctx.used, *filled)

        found = torch.func.vjp(of_wanted, *(operands[i] for i in wanted))[1](cotangents)
        grads: list[Tensor | None] = [None] * len(operands)
        for i, grad in zip(wanted, found, strict=True):
            grads[i] = grad
        return None, None, *grads

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        tape, used, *operands = args
        cotangents = _with_leading_axis(info.batch_size, operands[-len(used) :], in_dims[-len(used) :])
        inputs, outputs = tape.take()
        pairs = [(outputs[i], own) for i, own in zip(used, cotangents, strict=True) if outputs[i].requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(own) for own in inputs), (0,) * len(inputs)
        ends, given = zip(*pairs, strict=True)
        with torch.inference_mode(False):
            found = torch.autograd.grad(ends, inputs, given, allow_unused=True, materialize_grads=True)
        return found, (0,) * len(found)


def _pull(tape: _Tape, used: list[int], *operands: Tensor) -> tuple[Tensor, ...]:
    """The cotangents of the wanted tensors, from all tensors and then the cotangents of the outputs that are used."""
    tensors, cotangents = operands[: -len(used)], operands[-len(used) :]

    def of_wanted(*some: Tensor) -> tuple[Tensor, ...]:
        filled = list(tensors)
        for i, tensor in zip(tape.wanted, some, strict=True):
            filled[i] = tensor
        out = tape.function(None, *filled)
        return tuple(out[i] for i in used)

    return torch.func.vjp(of_wanted, *(tensors[i] for i in tape.wanted))[1](cotangents)


def _with_leading_axis(n: int, tensors: Iterable[Tensor], dims: Iterable[int | None]) -> list[Tensor]:
    return [
        tensor.expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0) if dim else tensor
        for tensor, dim in zip(tensors, dims, strict=True)
    ]
