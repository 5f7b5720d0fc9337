"""Fine-tune many models on one frozen 8-bit base, the functional way.

    base = ft.quantize_base_model(model)              # int8, immutable, shared
    tuned = ft.new_finetuned(base)                    # a few MB: LoRA and plain layers
    logits = ft.apply(base, tuned, input_ids).logits  # a pure function of the two

See `apply` for the forward, `value_and_grad` and `stacked_value_and_grad` for training, `stack` for
many finetunes at once, and the README for a whole run.
"""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

from finetuna_func import _random as random
from finetuna_func import optim
from finetuna_func._accumulation import accumulate_gradients
from finetuna_func._adapters import new_finetuned
from finetuna_func._base import quantize_base_model
from finetuna_func._batches import stack_batches
from finetuna_func._functional import apply, apply_stacked
from finetuna_func._layers import embedding, linear, register_layer, register_subclass
from finetuna_func._losses import causal_lm_loss
from finetuna_func._memory import MemoryReport, memory_report
from finetuna_func._remat import remat
from finetuna_func._state import load_state_dict, merge, state_dict, to_module
from finetuna_func._step import compile_step
from finetuna_func._transforms import stacked_value_and_grad, value_and_grad
from finetuna_func._trees import combine, index, partition, stack, tree_at, unstack
from finetuna_func._types import Base, EmbeddingAdapterConfig, Finetuned, LinearAdapterConfig, Params
from finetuna_func.checkpoint import load_base, save_base
from finetuna_func.io import load, save
from finetuna_func.store import Store

try:
    __version__ = _version("finetuna_func")
except PackageNotFoundError:  # used from a source tree that is not installed
    __version__ = "0"

__all__ = [
    "Base",
    "EmbeddingAdapterConfig",
    "Finetuned",
    "LinearAdapterConfig",
    "MemoryReport",
    "Params",
    "Store",
    "accumulate_gradients",
    "apply",
    "apply_stacked",
    "causal_lm_loss",
    "combine",
    "compile_step",
    "embedding",
    "index",
    "linear",
    "load",
    "load_base",
    "load_state_dict",
    "memory_report",
    "merge",
    "new_finetuned",
    "optim",
    "partition",
    "quantize_base_model",
    "random",
    "register_layer",
    "register_subclass",
    "remat",
    "save",
    "save_base",
    "stack",
    "stack_batches",
    "stacked_value_and_grad",
    "state_dict",
    "to_module",
    "tree_at",
    "unstack",
    "value_and_grad",
]
