"""The next-token loss of a language model, without its logits ever existing as a whole.

For ``N * B * T`` tokens the logits in fp32 are often the largest tensor of a step: 8192 tokens with 128,000 words
are 4 GiB, and their gradient as much again. Here the body of the model runs once, and its head a piece of the
tokens at a time, computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetuna_func import kernels
from finetuna_func._blocks import can_compile, compiled
from finetuna_func._body import with_hidden_states
from finetuna_func._fold import fold
from finetuna_func._functional import Blocks, bind, check_blocks, check_types, is_stack, keys_of_stack, run, run_stacked
from finetuna_func._layers import Call
from finetuna_func._remat import remat as rematerialized
from finetuna_func._sums import sum_of_pieces
from finetuna_func._swap import call_on
from finetuna_func._types import Base, Finetuned, Params

_PIECE_BYTES = 2**28  # of logits; large enough to keep a GPU busy
_PIECE_BYTES_CPU = 2**25  # larger tensors get memory from the system each time, and touching it anew takes longer
_AT_ONCE = 4  # pieces in a compiled graph, which dequantizes a frozen head once for all of them


def causal_lm_loss(
    base: Base,
    tuned: Finetuned | None,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk_tokens: int | None = None,
    train: bool = False,
    rng: Tensor | None = None,
    remat: Blocks = None,
    compile: Blocks = None,
    **kwargs: Any,
) -> Tensor:
    """Returns the next-token cross-entropy of a finetune, ``()``, or of each finetune of a stack, ``(N,)``, in fp32.

    Equals ``F.cross_entropy(logits[..., :-1, :].float(), labels[..., 1:])`` over each finetune's own tokens, with
    every derivative of it, in less memory: logits exist for ``chunk_tokens`` tokens at a time. What the model does
    after its head (a soft cap, a scale) is the model's own code. A model that has no body apart from its head
    computes its logits as a whole. (Of a float64 model the loss is float64.)

    Args:
        base: The frozen base of a causal language model.
        tuned: A finetune, a stack, or ``None`` for the base model. Inside ``torch.func.vmap`` over a stack: one.
        input_ids: ``(B, T)``; ``(N, B, T)`` for a stack.
        labels: Like ``input_ids``, not shifted: the loss at position t is that of ``labels[t + 1]``. By default the
            ``input_ids``, without those that ``attention_mask`` hides and those that follow on a hidden one.
        attention_mask: Like ``input_ids``, 1 where a token is real.
        ignore_index: The label of tokens that do not count.
        reduction: ``"mean"`` over the tokens that count (0 if there are none), ``"sum"``, or ``"none"`` for
            ``(..., B, T - 1)``.
        chunk_tokens: Tokens whose logits exist at a time, over all finetunes; by default as many as have 256 MiB
            (on a CPU 32) of them at most, in fp32 or, compiled, in the model's dtype, but 128 at least.
        train: As for `apply`.
        rng: As for `apply` and `apply_stacked`.
        remat: As for `apply`.
        compile: As for `apply`; the head is compiled as well.
        **kwargs: Further inputs of the model.

    Raises:
        ValueError: Shapes that do not fit, or a finetune of another base.
        TypeError: ``input_ids`` or ``labels`` are not tensors of integers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> base, tuned = new_finetuned(LlamaForCausalLM(LlamaConfig(**sizes)))
        >>> causal_lm_loss(base, stack([tuned, tuned]), torch.arange(24).reshape(2, 2, 6)).shape
        torch.Size([2])
    """
    check_types("causal_lm_loss", base, tuned, rng)
    n = tuned.stack_size if tuned is not None and is_stack(base, tuned) else None
    _check_inputs(n, input_ids, labels, attention_mask, reduction, chunk_tokens)
    if n is not None:
        rng = keys_of_stack("causal_lm_loss", n, rng)
    fields = check_blocks("causal_lm_loss", base, remat, compile)
    if attention_mask is not None:
        kwargs["attention_mask"] = attention_mask
    part = "all" if base.skeleton.body is None else "body"

    def compute(n: int | None, tuned: Finetuned | None, rng: Tensor | None, inputs: Any) -> Tensor:
        of_model, labels = inputs
        targets = _targets(of_model["input_ids"], labels, of_model.get("attention_mask"), ignore_index)
        leaves = bind(base, tuned, train=train, rng=rng)
        if n is None or tuned is None:
            out = run(base, leaves, (), of_model, part=part, **fields)
        else:
            out = run_stacked(base, tuned, n, leaves, (), of_model, part=part, **fields)
        if part == "all":
            losses = _cross_entropy(_logits(out), targets, ignore_index)
            total = losses.sum((-2, -1))
        else:
            hidden, kind = out
            own = (base, leaves, hidden, kind, targets, n, ignore_index, chunk_tokens, fields["compile"])
            losses = total = _losses_in_pieces(*own, summed=reduction != "none")
        if reduction == "none":
            return losses[..., :-1]
        if reduction == "sum":
            return total
        return total / (targets != ignore_index).sum((-2, -1)).clamp(min=1)

    of_model = {"input_ids": input_ids, **kwargs}
    if n is not None:
        return compute(n, tuned, rng, (of_model, labels))
    return fold("causal_lm_loss", compute, base, tuned, rng, (of_model, labels), ((), of_model))


def _losses_in_pieces(
    base: Base,
    leaves: Params,
    hidden: Tensor,
    kind: type,
    targets: Tensor,
    n: int | None,
    ignore_index: int,
    chunk_tokens: int | None,
    compile: bool,
    *,
    summed: bool,
) -> Tensor:
    """Losses like ``targets``, or their sums, of hidden states, which the body returned in a ``kind``."""
    of_head = {name: leaf for name, leaf in leaves.items() if not name.startswith(f"{base.skeleton.body}.")}
    with base.skeleton.calling() as (module, call):
        pass  # this thread's, which the backward pass uses as well, in whatever thread it runs

    def within_call(run: Callable[..., Any], *args: Any) -> Any:
        before = call.begin(stack=n, rows=0, inputs=((1,),), part="head", body_output=kind)  # rows: see `_head_logits`
        try:
            return run(module, call, *args, ignore_index)
        finally:
            call.restore(before)

    def piece(leaves: dict[str, Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
        run = compiled(module, _head_losses) if compile and can_compile() else _head_losses
        return within_call(run, hidden, leaves, targets)

    def gradients(
        constants: dict[str, Tensor], leaves: dict[str, Tensor], hidden: Tensor, targets: Tensor, of_hidden: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        run, leaves = compiled(module, _head_gradients), {name: leaf.detach() for name, leaf in leaves.items()}
        use_kernels = kernels.available(hidden.device)  # which the compiler cannot ask
        return within_call(run, hidden.detach(), constants, leaves, targets, size, of_hidden, use_kernels)

    compiles = compile and can_compile()
    # Of a trained head, the compiler would keep the logits of all pieces for the gradient of its weight.
    several = compiles and kernels.available(hidden.device) and not any(leaf.requires_grad for leaf in of_head.values())
    # Eager, logits are there in fp32; compiled, in the model's dtype alone.
    of_logit = hidden.element_size() if compiles and not several else 4
    size = _piece_size(base, of_head, targets, n, chunk_tokens, of_logit)
    hidden, listed = hidden.flatten(-3, -2), targets.flatten(-2)
    if summed:
        of_graph = gradients if compiles else None
        return sum_of_pieces(piece, of_head, hidden, listed, size, n, of_graph, _AT_ONCE if several else 1)
    pieces = zip(hidden.split(size, dim=-2), listed.split(size, dim=-1), strict=True)
    losses = [rematerialized(piece)(of_head, own, own_targets) for own, own_targets in pieces]
    return torch.cat(losses, dim=-1).reshape(targets.shape)


def _head_logits(module: nn.Module, call: Call, hidden: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    """Logits ``(tokens, V)`` of hidden states ``(..., width)``, of each token by itself."""
    rows = hidden.flatten(0, -2).unsqueeze(1)  # a row each, of one token
    call.rows = rows.shape[0]
    kind = call.body_output
    call.body_output = with_hidden_states(kind, rows)
    ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)  # nobody looks at them
    logits = _logits(call_on(module, leaves, (), {"input_ids": ids}))
    call.body_output = kind  # or, compiled, a tensor of a derivative that is over would be there
    return logits.flatten(0, -2)


def _head_losses(
    module: nn.Module, call: Call, hidden: Tensor, leaves: dict[str, Tensor], targets: Tensor, ignore_index: int
) -> Tensor:
    return _cross_entropy(_head_logits(module, call, hidden, leaves), targets, ignore_index)


def _head_gradients(
    module: nn.Module,
    call: Call,
    hidden: Tensor,
    constants: dict[str, Tensor],
    leaves: dict[str, Tensor],
    targets: Tensor,
    size: int,
    of_hidden: bool,
    use_kernels: bool,
    ignore_index: int,
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """What `gradients_of` returns of a few pieces, of ``size`` tokens each, as one graph."""
    total, d_leaves, d_hidden = [], {}, []
    for own, own_targets in zip(hidden.split(size, dim=-2), targets.split(size, dim=-1), strict=True):

        def logits_of(leaves: dict[str, Tensor], own: Tensor) -> Tensor:
            return _head_logits(module, call, own, constants | leaves)

        logits, pull = torch.func.vjp(logits_of, leaves, own)[:2]
        losses, d_logits = _losses_and_gradients(logits, own_targets, ignore_index, use_kernels)
        found, d_own = pull(d_logits)
        d_leaves = {name: d_leaves[name] + found[name] for name in leaves} if d_leaves else found
        total.append(losses.sum(-1))
        d_hidden.append(d_own)  # which the compiler does not compute if it is not returned
    return torch.stack(total).sum(0), d_leaves, torch.cat(d_hidden, dim=-2) if of_hidden else None


def _losses_and_gradients(
    logits: Tensor, targets: Tensor, ignore_index: int, use_kernels: bool
) -> tuple[Tensor, Tensor]:
    """Losses like ``targets``, and what each is differentiated by with respect to its logits."""
    if use_kernels and kernels.takes_logits(logits):
        from finetuna_func.kernels.cross_entropy import cross_entropy_

        logits = logits.clone()  # one that the compiler leaves out: nobody else reads them
        return cross_entropy_(logits, targets.flatten(), ignore_index).view(targets.shape), logits
    losses, pull = torch.func.vjp(lambda logits: _cross_entropy(logits, targets, ignore_index), logits)[:2]
    return losses, pull(torch.ones_like(losses))[0]


def _piece_size(
    base: Base, of_head: Params, targets: Tensor, n: int | None, chunk_tokens: int | None, of_logit: int
) -> int:
    """Tokens of one finetune in a piece. If one size fits, all pieces have it: a compiler makes code for each."""
    tokens = targets.shape[-2] * targets.shape[-1]
    if any(name.endswith("dropout_key") for name in of_head):
        return tokens  # a mask is drawn for all tokens together
    vocabulary = base.skeleton.shapes[f"{base.skeleton.head}.weight"][0]
    most = max(1, piece_tokens(vocabulary, chunk_tokens, targets.device, of_logit) // (n or 1))
    fewest = -(-tokens // most)
    count = next((count for count in range(fewest, 2 * fewest) if tokens % count == 0), fewest)
    return -(-tokens // count)


def piece_tokens(vocabulary: int, chunk_tokens: int | None, device: torch.device, of_logit: int = 4) -> int:
    """Returns how many tokens have logits at a time, of ``of_logit`` bytes each."""
    if chunk_tokens is not None:
        return chunk_tokens
    return max(128, (_PIECE_BYTES_CPU if device.type == "cpu" else _PIECE_BYTES) // (of_logit * vocabulary))


def _cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction="none")
    return losses.reshape(targets.shape)


def _logits(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    return out["logits"] if "logits" in out else out[0]


def _targets(input_ids: Tensor, labels: Tensor | None, attention_mask: Tensor | None, ignore_index: int) -> Tensor:
    """What each position has to predict: the label that follows, and nothing at the last."""
    following = (input_ids if labels is None else labels)[..., 1:].long()
    if labels is None and attention_mask is not None:
        real = attention_mask.bool()
        following = torch.where(real[..., 1:] & real[..., :-1], following, ignore_index)
    return F.pad(following, (0, 1), value=ignore_index)


def _check_inputs(
    n: int | None,
    input_ids: Tensor,
    labels: Tensor | None,
    attention_mask: Tensor | None,
    reduction: str,
    chunk_tokens: int | None,
) -> None:
    for name, given in (("input_ids", input_ids), ("labels", labels), ("attention_mask", attention_mask)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"causal_lm_loss: {name} is a {type(given).__name__}; expected a tensor.")
        if given is not None and name != "attention_mask" and (given.is_floating_point() or given.dtype == torch.bool):
            raise TypeError(f"causal_lm_loss: {name} are {given.dtype}; expected token ids, torch.long.")
    expected = "(B, T)" if n is None else f"({n}, B, T)"
    if input_ids.ndim != (2 if n is None else 3) or (n is not None and input_ids.shape[0] != n):
        raise ValueError(
            f"causal_lm_loss: input_ids have shape {tuple(input_ids.shape)}; expected {expected} for "
            f"{'one finetune' if n is None else f'a stack of {n} finetunes'}."
        )
    for name, given in (("labels", labels), ("attention_mask", attention_mask)):
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(
                f"causal_lm_loss: {name} have shape {tuple(given.shape)}; expected that of input_ids, "
                f"{tuple(input_ids.shape)}, not shifted."
            )
    if not input_ids.numel():
        raise ValueError(f"causal_lm_loss: input_ids of shape {tuple(input_ids.shape)} hold no tokens.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"causal_lm_loss(reduction={reduction!r}): expected 'mean', 'sum' or 'none'.")
    if chunk_tokens is not None and (type(chunk_tokens) is not int or chunk_tokens < 1):
        raise ValueError(f"causal_lm_loss(chunk_tokens={chunk_tokens!r}): expected a positive number of tokens.")
