"""Functional optimizers in the manner of optax: pure, out of place, for one finetune or a stack of them.

A `GradientTransformation` is a pair of pure functions, ``init`` and ``update``; an optimizer is a
chain of them. Nothing is hidden: what a step remembers is a value that goes in and comes out.

    tx = chain(clip_by_global_norm(1.0), adamw(1e-3))
    state = tx.init(tuned)
    updates, state = tx.update(grads, state, tuned)     # grads, updates: {name: tensor}, keys sorted
    tuned = apply_updates(tuned, updates)

**Stacks.** ``init`` takes a flat mapping ``{name: tensor}``, which is one finetune, or a `Finetuned`.
Given a stack of N, it makes counters and norms of shape ``(N,)`` instead of ``()``, and ``update``
goes by that shape: no number of one adapter ever reaches another. Every tensor of a stack's state
has the leading axis N, slice i is the state of adapter i, and ``torch.func.vmap(tx.update)`` over
the same state gives the same values. (To map ``init`` itself, map it over ``tuned.params``.)

**Precision.** Moments and updates are float32 for float32, bfloat16 and float16 params, and float64
for float64; `apply_updates` adds in that precision and only then rounds to the dtype of the param,
to the nearest or stochastically. `with_master_params` keeps float32 copies of bfloat16 params, and
`adamw8bit` its moments in 8 bits.

**Transforms.** Steps are counted in tensors and no tensor's value is ever read by Python, so
``vmap``, ``grad`` with respect to a learning rate and ``torch.compile`` all apply, and no step
waits for the device. Outermost, small leaves are computed together (``torch._foreach_*``), since
starting hundreds of kernels takes longer than their arithmetic. `flatten` makes one leaf of all, for which
a step is some thirty kernels, or one or two if it is compiled, as `compile_step` does. The values are the same.

**torch.optim.** Params are plain tensors, so ``torch.optim`` takes them too, on leaves of one's own that it
changes in place; what it has trained is a finetune again with ``tuned.replace(params=own)``:

    >>> base, tuned = new_finetuned(tiny_model(), plain_layers=())
    >>> own = {name: leaf.clone().requires_grad_() for name, leaf in tuned.params.items()}
    >>> optimizer = torch.optim.AdamW(own.values(), lr=1e-3)
    >>> apply(base, tuned.replace(params=own), torch.arange(3)).square().mean().backward()
    >>> optimizer.step()

Source of the design: `optax <https://github.com/google-deepmind/optax>`_.
"""

from finetuna_func.optim._adam8bit import ScaleByAdam8bitState, adamw8bit, scale_by_adam8bit
from finetuna_func.optim._base import EmptyState, GradientTransformation
from finetuna_func.optim._combinators import (
    Flattened,
    FlattenState,
    MaskedState,
    MultiStepsState,
    chain,
    flatten,
    masked,
    multi_steps,
)
from finetuna_func.optim._optimizers import adam, adamw, sgd
from finetuna_func.optim._rounding import MasterParamsState, with_master_params
from finetuna_func.optim._schedules import Schedule, constant_schedule, linear_schedule, warmup_cosine_schedule
from finetuna_func.optim._transforms import (
    ClipByGlobalNormState,
    LearningRate,
    ScaleByAdamState,
    ScaleByLearningRateState,
    TraceState,
    add_decayed_weights,
    clip_by_global_norm,
    identity,
    scale,
    scale_by_adam,
    scale_by_learning_rate,
    set_to_zero,
    trace,
)
from finetuna_func.optim._updates import apply_updates, global_norm

__all__ = [
    "ClipByGlobalNormState",
    "EmptyState",
    "FlattenState",
    "Flattened",
    "GradientTransformation",
    "LearningRate",
    "MaskedState",
    "MasterParamsState",
    "MultiStepsState",
    "ScaleByAdam8bitState",
    "ScaleByAdamState",
    "ScaleByLearningRateState",
    "Schedule",
    "TraceState",
    "adam",
    "adamw",
    "adamw8bit",
    "add_decayed_weights",
    "apply_updates",
    "chain",
    "clip_by_global_norm",
    "constant_schedule",
    "flatten",
    "global_norm",
    "identity",
    "linear_schedule",
    "masked",
    "multi_steps",
    "scale",
    "scale_by_adam",
    "scale_by_adam8bit",
    "scale_by_learning_rate",
    "set_to_zero",
    "sgd",
    "trace",
    "warmup_cosine_schedule",
    "with_master_params",
]
