"""A whole training step as one pure function, and on a GPU as one CUDA graph.

An eager step of a large model asks the host for thousands of kernels, and on a fast GPU the host is the slower of the
two. A CUDA graph records them once and replays them at one request. What is recorded is the step's own code: the
graph reads its inputs from buffers of its own, and its outputs are copied out of them, so that the step
stays a pure function.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from finetuna_func import optim
from finetuna_func._transforms import stacked_value_and_grad, value_and_grad
from finetuna_func._types import Finetuned
from finetuna_func.optim._layout import Layout, layout_of

logger = logging.getLogger(__name__)

Step = Callable[..., tuple[Finetuned, Any, Any]]


def compile_step(
    loss_fn: Callable[..., Any],
    tx: optim.GradientTransformation,
    *,
    has_aux: bool = False,
    cuda_graph: bool | None = None,
    compile_optimizer: bool | None = None,
    donate: bool = False,
) -> Step:
    """Returns ``step(tuned, state, *batch) -> (tuned, state, losses)``: gradients, optimizer and update in one.

    For a single finetune the loss is a scalar, for a stack it is ``(N,)``, as for `value_and_grad` and
    `stacked_value_and_grad`. The step is pure; ``state`` is ``tx.init(tuned)`` at first. On a GPU it is recorded as a
    CUDA graph, once for each structure and shape of its inputs (pad batches to a few lengths), and holds the memory of
    a step as long as it lives. To compile the model's blocks as well, let ``loss_fn`` call
    `causal_lm_loss` or `apply_stacked` with ``compile="blocks"``.

    Args:
        loss_fn: ``loss_fn(tuned, *batch)``; no step of it may wait for the GPU (``.item()``, a branch on a value).
        tx: An optimizer of ``ft.optim``. Under `optim.flatten`, parameters, gradients and state are a few flat tensors
            for the whole step, and the finetunes that come out are views of them: a few kernels instead of thousands.
        has_aux: Whether ``loss_fn`` returns ``(loss, aux)``; the third result is then that pair.
        cuda_graph: Whether to record; by default where every tensor is on a CUDA device.
        compile_optimizer: Whether to run the optimizer through ``torch.compile``, which makes one pass over parameters
            and state where an eager one makes a dozen; by default if ``tx`` is an `optim.flatten` and every tensor is
            on a CUDA device. For hundreds of leaves that are not flat, the compiler takes minutes.
        donate: Whether the finetunes and the state that a recorded step is given are its own to overwrite, as in JAX:
            it saves copying them in and out. Use the results, and never again what was given, nor results of an
            earlier step.

    Raises:
        RuntimeError: ``loss_fn`` waits for the GPU; the message says what to do.

    Example:
        >>> base, tuned = new_finetuned(tiny_model())
        >>> def loss_fn(stacked, ids):
        ...     return apply_stacked(base, stacked, ids).square().mean(dim=(1, 2))
        >>> tx = optim.flatten(optim.adamw(1e-2))
        >>> stacked = stack([tuned, tuned])
        >>> step = compile_step(loss_fn, tx)
        >>> stacked, state, losses = step(stacked, tx.init(stacked), torch.zeros(2, 3, dtype=torch.long))
        >>> losses.shape
        torch.Size([2])
    """

    # Params go in and come out apart from the rest of a finetune; those of `optim.flatten` as the flat leaves that they
    # are views of, so that a recording has few tensors to copy.
    def update(grads: Any, state: Any, tuned: Finetuned) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, tuned)
        return dict(optim.apply_updates(tuned, updates).params), state

    inner = tx.inner if isinstance(tx, optim.Flattened) else None

    def flat_update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        assert inner is not None
        updates, state = inner.update(grads, state, params)
        return optim.apply_updates(params, updates), state

    def step_with(update: Callable[..., Any]) -> Callable[..., Any]:
        def step(layout: Layout | None, params: Any, state: Any, rest: Finetuned, *batch: Any) -> tuple[Any, Any, Any]:
            leaves = params if layout is None else layout.split(params)
            tuned = Finetuned(leaves, rest.consts, rest.spec)
            differentiate = value_and_grad if tuned.stack_size is None else stacked_value_and_grad
            losses, grads = differentiate(loss_fn, has_aux=has_aux)(tuned, *batch)
            if layout is None:
                return *update(grads, state, tuned), losses
            params, inner_state = update(layout.join(grads), state.inner, params)
            return params, state._replace(inner=inner_state), losses

        return step

    @functools.cache
    def made(compiles: bool) -> tuple[Callable[..., Any], _Recorded]:
        own = update if inner is None else flat_update
        step = step_with(torch.compile(own, fullgraph=True) if compiles else own)
        recorded = step
        if compiles and donate and inner is not None:
            # The compiler computes each result where it belongs, where one of its own would be copied there.
            recorded = step_with(torch.compile(_in_place(own), fullgraph=True))
        return step, _Recorded(recorded, donate)

    running: list[_Running] = []

    def compiled_step(tuned: Finetuned, state: Any, *batch: Any) -> tuple[Finetuned, Any, Any]:
        if running and tuned is running[0].tuned and state is running[0].state:
            losses = running[0].recorded.again(batch)
            if losses is not _ANEW:
                return tuned, state, losses
        running.clear()
        if not isinstance(tuned, Finetuned):
            raise TypeError(f"compile_step: the first argument is a {type(tuned).__name__}; expected a Finetuned.")
        on_gpu = _is_on_gpu((tuned, state, batch))
        if cuda_graph and not on_gpu:
            raise ValueError("compile_step(cuda_graph=True): not all tensors are on a CUDA device; move them there.")
        layout, params = None, {name: tuned.params[name] for name in sorted(tuned.params)}
        if inner is not None:
            if not isinstance(state, optim.FlattenState):
                raise TypeError(
                    f"compile_step: tx is optim.flatten(...) but the state is a {type(state).__name__}; pass the one "
                    "that tx.init(tuned) made, or an earlier step."
                )
            layout = layout_of("compile_step(tuned)", params, tuned.stack_size)
            params = layout.join(params)
        compiles = on_gpu and inner is not None if compile_optimizer is None else compile_optimizer
        step, recorded = made(compiles)
        run = recorded if on_gpu and cuda_graph is not False else step
        rest = Finetuned({}, tuned.consts, tuned.spec)
        params, state, losses = run(layout, params, state, rest, *batch)
        tuned = tuned.replace(params=params if layout is None else layout.split(params))
        if donate and run is recorded:
            running.append(_Running(recorded, tuned, state))
        return tuned, state, losses

    return compiled_step


def _in_place(update: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """An update of params and state that overwrites them."""

    def updated(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        new_params, new_state = update(grads, state, params)
        given = torch_pytree.tree_leaves((params, state))
        news, spec = torch_pytree.tree_flatten((new_params, new_state))
        if len(given) != len(news):
            return new_params, new_state  # which `_check_donated` refuses, as it does another structure
        pairs = list(zip(given, news, strict=True))
        for own, new in pairs:
            if isinstance(own, Tensor) and own is not new:
                own.copy_(new)
        kept = [own if isinstance(own, Tensor) else new for own, new in pairs]
        return torch_pytree.tree_unflatten(kept, spec)

    return updated


def _is_on_gpu(tree: Any) -> bool:
    return all(leaf.is_cuda for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


_ANEW = object()


class _Running(NamedTuple):
    """What a step that owns its inputs has returned: if it is given the same again, that is in its place already."""

    recorded: _Recorded
    tuned: Finetuned
    state: Any


@dataclass
class _Recording:
    """A graph with the tensors that it reads and writes.

    Attributes:
        graph: The graph.
        inputs: What it reads.
        outputs: What it writes.
        others: The leaves of the results that are no tensors, ``None`` for each that is one.
        spec: The structure of the results.
        donated: How many of the outputs, at the beginning, are also inputs.
        batch: What kind of batch it was last run with.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]
    others: list[Any]
    spec: Any
    donated: int
    batch: Any = None


class _Recorded:
    """A pure function that is recorded as a CUDA graph for each structure and shape of its inputs."""

    def __init__(self, function: Callable[..., Any], donate: bool):
        self._function = function
        self._donate = donate
        self._recordings: dict[Any, _Recording] = {}
        self._last: _Recording | None = None

    def __call__(self, *args: Any) -> Any:
        leaves, spec = torch_pytree.tree_flatten(args)
        key = _kind(leaves, spec)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(leaves, spec)
        self._last = recording
        recording.batch = _kind(*torch_pytree.tree_flatten(args[4:]))
        return self._run(recording, leaves)

    def again(self, batch: tuple[Any, ...]) -> Any:
        """Returns the last of the results of another batch, all other inputs being what the last call has returned.

        And `_ANEW`, doing nothing, if this is not a batch like that call's. The host does next to nothing here: it is
        the graph that a GPU waits for.
        """
        leaves, spec = torch_pytree.tree_flatten(batch)
        if self._last is None or _kind(leaves, spec) != self._last.batch:
            return _ANEW
        return self._run(self._last, leaves)[-1]

    def _run(self, recording: _Recording, leaves: list[Any]) -> Any:
        """Runs a graph on inputs; if they are fewer than its own, they are its last, and the others in their place."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = recording.inputs[len(recording.inputs) - len(tensors) :]
        with torch.no_grad():
            news = [(own, new) for own, new in zip(inputs, tensors, strict=True) if not _is_same(own, new)]
            if news:
                torch._foreach_copy_([own for own, _ in news], [new for _, new in news])
            recording.graph.replay()
            kept = recording.outputs[: recording.donated]  # which are the inputs
            copied = [torch.empty_like(out) for out in recording.outputs[recording.donated :]]
            torch._foreach_copy_(copied, recording.outputs[recording.donated :])
        tensors_out = iter([*kept, *copied])
        filled = [next(tensors_out) if other is None else other[0] for other in recording.others]
        return torch_pytree.tree_unflatten(filled, recording.spec)

    def _record(self, leaves: list[Any], spec: Any) -> _Recording:
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = [leaf for leaf in own if isinstance(leaf, Tensor)]
        args = torch_pytree.tree_unflatten(own, spec)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, tunes and fills caches, none of which can be recorded
                out = self._function(*args)
                if self._donate:
                    _check_donated(args[1:3], out[:2])
                del out
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                out = self._function(*args)
                out_leaves, out_spec = torch_pytree.tree_flatten(out)
                outputs = [leaf for leaf in out_leaves if isinstance(leaf, Tensor)]
                donated = 0
                if self._donate:  # what goes in first comes out first: finetunes and state
                    donated = sum(isinstance(leaf, Tensor) for leaf in torch_pytree.tree_leaves(out[:2]))
                    pairs = zip(inputs, outputs[:donated], strict=False)
                    news = [(own, new) for own, new in pairs if not _is_same(own, new)]
                    if news:
                        with torch.no_grad():
                            torch._foreach_copy_([own for own, _ in news], [new for _, new in news])
                    outputs[:donated] = inputs[:donated]
        except Exception as error:
            raise RuntimeError(
                "compile_step: the step could not be recorded as a CUDA graph, most likely because loss_fn waits for "
                "the GPU (.item(), a branch on a value, copying from the host), or because the model takes another way "
                "while it is recorded, so that its blocks would be compiled anew (without a mask, some form one then). "
                "Take that out of loss_fn, give the model a mask (1, 1, T, T), or pass cuda_graph=False. "
                f"The error was: {error}"
            ) from error
        others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in out_leaves]
        return _Recording(graph, inputs, outputs, others, out_spec, donated)


def _check_donated(given: Any, returned: Any) -> None:
    """Checks that params and state come out in the form in which they go in, so that one can overwrite the other."""
    before, after = (torch_pytree.tree_structure(tree) for tree in (given, returned))
    if before != after:
        raise TypeError(
            f"compile_step(donate=True): params and state go in as {before} and come out as {after}; tx.update must "
            "return a state of the form that tx.init makes. Mend that, or pass donate=False."
        )


def _is_same(own: Tensor, given: Tensor) -> bool:
    """Whether what is given is a donated tensor, perhaps taken apart and put together again."""
    return own is given or (own.data_ptr() == given.data_ptr() and own.stride() == given.stride())


def _kind(leaves: list[Any], spec: Any) -> Any:
    """What a recording holds for: of tensors all but their numbers; of anything else itself, True not being 1."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    of_leaves = (
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves
    )
    return spec, autocast, *of_leaves
