"""How much memory will a training step take? Asked before it starts, answered by running it without numbers.

The step's own code runs on the meta device, where tensors have shapes and no storage, while every tensor that
comes to life and dies is counted. So whatever is in the step (recomputation, pieces of a loss, a plain head) is
in the answer.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from finetuna_func import optim
from finetuna_func._functional import is_stack
from finetuna_func._losses import causal_lm_loss, piece_tokens
from finetuna_func._transforms import stacked_value_and_grad, value_and_grad
from finetuna_func._types import Base, Finetuned, tree_bytes

_GRANULE = 512  # the CUDA caching allocator rounds to it


@dataclass(frozen=True)
class MemoryReport:
    """The bytes of a training step on one device.

    Attributes:
        base: The frozen base.
        adapters: The finetunes: parameters and constants.
        optimizer: What the optimizer remembers.
        gradients: One for each trained parameter.
        activations: What forward and backward hold beside these at the worst moment.
        logits: Of these, the largest piece of fp32 logits.
        peak: The most that is held at once, in all.
    """

    base: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    peak: int

    def __str__(self) -> str:
        rows = [(name, getattr(self, name)) for name in ("base", "adapters", "optimizer", "gradients", "activations")]
        lines = [f"{name:<12}{_size(size):>12}" for name, size in rows]
        lines.insert(5, f"{'  of logits':<12}{_size(self.logits):>12}")
        return "\n".join([*lines, f"{'peak':<12}{_size(self.peak):>12}"])

    def check(self, device: torch.device | str | None = None, available: int | None = None) -> None:
        """Raises if the step cannot fit.

        Args:
            device: A CUDA device, to ask for its free memory; the base and the finetunes may be there already.
            available: Bytes that may be used, instead.

        Raises:
            MemoryError: The peak is larger.
        """
        if available is None:
            if device is None:
                raise ValueError("MemoryReport.check: pass a CUDA device to ask, or available=bytes.")
            free, _ = torch.cuda.mem_get_info(device)
            available = free + torch.cuda.memory_reserved(device)
        if self.peak > available:
            raise MemoryError(
                f"this step needs {_size(self.peak)} at its peak, and {_size(available)} are there:\n{self}\n"
                "Less of it: remat='blocks', fewer or shorter rows, a smaller chunk_tokens, stacked_value_and_grad("
                "chunk_size=...), an 8-bit optimizer, scheme='nf4'."
            )


def memory_report(
    base: Base,
    tuned: Finetuned,
    batch_shape: tuple[int, ...],
    *,
    tx: optim.GradientTransformation | None = None,
    loss_fn: Callable[..., Any] | None = None,
    **options: Any,
) -> MemoryReport:
    """Returns the bytes that a training step will take, from shapes alone, before it runs.

    Predicts an eager step on a GPU with fused attention (``torch.cuda.max_memory_allocated``); a compiled one takes
    somewhat less. Not counted: the CUDA context, workspaces of kernels, fragmentation.

    Args:
        base: The frozen base, on any device.
        tuned: A finetune or a stack.
        batch_shape: Of the token ids: ``(B, T)``, or ``(N, B, T)`` for a stack.
        tx: The optimizer; ``None`` for forward and backward alone.
        loss_fn: ``loss_fn(base, tuned, input_ids)``; `causal_lm_loss` if ``None``.
        **options: For `causal_lm_loss`: ``remat``, ``chunk_tokens``. (``compile`` is left out.)

    Raises:
        ValueError: A shape that does not fit the finetunes.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> base, tuned = new_finetuned(LlamaForCausalLM(LlamaConfig(**sizes)))
        >>> report = memory_report(base, stack([tuned] * 4), (4, 1, 8), tx=optim.adamw(1e-3))
        >>> report.base == base.nbytes, report.peak > report.base + report.adapters
        (True, True)
    """
    options = torch_pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, options)
    options.pop("compile", None)
    meta_tuned = tuned.to("meta")
    meta_base = dataclasses.replace(base.to("meta"), skeleton=base.skeleton.within(_AsOnGpu))
    stacked = is_stack(base, tuned)
    ids = torch.zeros(batch_shape, dtype=torch.long, device="meta")

    def loss(tuned: Finetuned, ids: Tensor) -> Any:
        return (loss_fn or causal_lm_loss)(meta_base, tuned, ids, **options)

    step = (stacked_value_and_grad if stacked else value_and_grad)(loss)
    state = tx.init(meta_tuned) if tx is not None else ()
    state_bytes = sum(_bytes(leaf) for leaf in torch_pytree.tree_leaves(state) if isinstance(leaf, Tensor))
    with meta_base.skeleton.calling():
        pass  # makes this thread's copy of the skeleton, which is not to be counted
    with _Live() as live:
        _, grads = step(meta_tuned, ids)
        if tx is not None:
            updates, _ = tx.update(grads, state, meta_tuned)
            optim.apply_updates(meta_tuned, updates)
    adapters = tree_bytes({**tuned.params, **tuned.consts})
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in tuned.params.values())
    resident = base.nbytes + adapters + state_bytes
    return MemoryReport(
        base=base.nbytes,
        adapters=adapters,
        optimizer=state_bytes,
        gradients=gradients,
        activations=max(0, live.peak - gradients),
        logits=_logit_bytes(base, batch_shape, options.get("chunk_tokens")) if loss_fn is None else 0,
        peak=resident + live.peak,
    )


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[weakref.ref[Any], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage()._cdata
            for leaf in torch_pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in torch_pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        reference = weakref.ref(storage, self._forget)
        if reference in self._known:
            return
        self._known[reference] = _rounded(storage.nbytes())
        self.now += self._known[reference]
        self.peak = max(self.peak, self.now)

    def _forget(self, reference: weakref.ref[Any]) -> None:
        self.now -= self._known.pop(reference, 0)


class _AsOnGpu(TorchFunctionMode):
    """What the meta device cannot do: fused attention, without which the scores would be formed, and answers.

    Models ask whether a mask is all ones or a batch is not packed, to take the cheaper way; here it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        if func is Tensor.__bool__:
            return True
        return func(*args, **(kwargs or {}))


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _Attention.apply(query, key, value)[0]


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        return out, log_sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _logit_bytes(base: Base, batch_shape: tuple[int, ...], chunk_tokens: int | None) -> int:
    head = base.skeleton.head
    if head is None:
        return 0
    vocabulary = base.skeleton.shapes[f"{head}.weight"][0]
    at_once = piece_tokens(vocabulary, chunk_tokens, torch.device("meta"))
    return 4 * vocabulary * min(math.prod(batch_shape), at_once)


def _bytes(leaf: Tensor) -> int:
    return leaf.numel() * leaf.element_size()


def _rounded(size: int) -> int:
    return -(-size // _GRANULE) * _GRANULE


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
