"""Generation by a whole stack: N adapters answer the same prompts in one run of the model a token.

The model runs through `apply_stacked` with one key-value cache for all rows. Rows of a call have the
same length, so that no padding and no mask is needed: prompts of different lengths go in calls of their
own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from finetuna_func import _random
from finetuna_func._functional import apply_stacked
from finetuna_func._types import Base, Finetuned


@torch.no_grad()
def generate(
    base: Base,
    stacked: Finetuned,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    stop_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[list[int]]]:
    """Returns the new tokens of each adapter for each prompt, ``[adapter][prompt]``, the stopping one included.

    Args:
        base: The base, a causal Hugging Face model with a key-value cache.
        stacked: The adapters.
        prompts: Token ids, each at least one.
        max_new_tokens: Most new tokens.
        stop_ids: Ids that end an answer.
        temperature: 0 always takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_p: Draw from the likeliest tokens only, that together have this probability.
        seed: Decides the draws. All adapters get the same random numbers, so an answer does not
            depend on which others are in the stack.

    Raises:
        ValueError: No prompt, an empty one, or an option out of range.
    """
    if not prompts or not all(prompts):
        raise ValueError("generate(prompts=...): expected at least one prompt, and no empty one.")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"generate(max_new_tokens={max_new_tokens!r}): expected an integer of at least 1.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"generate(temperature={temperature}): expected a number of at least 0.")
    if not 0 < top_p <= 1:
        raise ValueError(f"generate(top_p={top_p}): expected a number above 0 and at most 1.")
    n = stacked.stack_size
    if n is None:
        raise ValueError("generate: expected a stack; make one with ft.stack([tuned]).")
    answers: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(n)]
    for length in sorted({len(prompt) for prompt in prompts}):
        group = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        keys = torch.stack([_random.fold_in(_random.key(seed), i) for i in group])
        ids = torch.tensor([list(prompts[i]) for i in group])
        found = _generate_group(base, stacked, ids, keys, max_new_tokens, set(stop_ids), temperature, top_p)
        for own, rows in zip(answers, found, strict=True):
            for i, answer in zip(group, rows, strict=True):
                own[i] = answer
    return answers


def _generate_group(
    base: Base,
    stacked: Finetuned,
    prompts: Tensor,
    keys: Tensor,
    max_new_tokens: int,
    stop_ids: set[int],
    temperature: float,
    top_p: float,
) -> list[list[list[int]]]:
    """Answers to prompts of one length, ``(B, T)``."""
    from transformers import DynamicCache

    n, (batch, length) = len(stacked.spec.members), prompts.shape
    device = next(iter(base.params.values())).device
    # `apply_stacked` adds rows to a call in which another axis is as long as all rows together, but the
    # rows of a cache must stay as many as they are; so their number is made unlike any length here.
    lengths = {1, length, *(size for shape in base.skeleton.shapes.values() for size in shape)}
    spare = 0
    while n * (batch + spare) in lengths:
        spare += 1
    ids = torch.cat([prompts, prompts[-1:].expand(spare, length)]).expand(n, -1, length).to(device)
    module: Any = base.skeleton.module()
    cache: Any = DynamicCache(config=module.config)
    new: list[Tensor] = []
    done = torch.zeros(n, batch, dtype=torch.bool)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64)
    for count in range(max_new_tokens):
        logits = apply_stacked(base, stacked, input_ids=ids, past_key_values=cache, use_cache=True).logits
        last = logits[:, :batch, -1].float().cpu()
        step_keys = _random.fold_in(keys, count)
        chosen = _choose(last, step_keys, temperature, top_p)
        new.append(chosen)
        done |= torch.isin(chosen, stops)
        if bool(done.all()):
            break
        ids = torch.cat([chosen, chosen[:, -1:].expand(n, spare)], dim=1)[..., None].to(device)
    tokens = torch.stack(new, dim=-1)
    return [[_until_stop(answer, stop_ids) for answer in own] for own in tokens.tolist()]


def _choose(logits: Tensor, keys: Tensor, temperature: float, top_p: float) -> Tensor:
    """Returns a token for each row of ``(N, B, vocabulary)``, by inverting the distribution at one uniform number."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    sums = probabilities.cumsum(-1)
    kept = probabilities * (sums - probabilities < top_p)  # those before it do not have enough yet
    sums = kept.cumsum(-1)
    uniform = torch.stack([_random.uniform(key, ()) for key in keys]).double()
    place = torch.searchsorted(sums, (uniform * sums[..., -1])[..., None], right=True)
    return order.gather(-1, place.clamp_max(logits.shape[-1] - 1)).squeeze(-1)


def _until_stop(tokens: list[int], stop_ids: set[int]) -> list[int]:
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in stop_ids), tokens)
