"""Small models, float references and checks that tests share.

The references are computed here by hand, never through the code under test.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finetuna_func as ft


class Tiny(nn.Module):
    """Ids in, logits out: a table, a layer without bias, a norm, a head with bias."""

    def __init__(self, vocab: int = 16, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.fc = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.norm(torch.tanh(self.fc(self.embed(ids)))))


class Mlp(nn.Module):
    """Floats in, floats out."""

    def __init__(self, width: int = 6, hidden: int = 10, out: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, hidden, bias=False)
        self.lm_head = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


class Gain(nn.Module):
    """A class that the library has never heard of, with a parameter of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Everything(nn.Module):
    """Every kind of module: registered, unregistered, with buffers, dropout and positions of shape (1, T)."""

    def __init__(self, vocab: int = 20, width: int = 8, length: int = 12, p: float = 0.25) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width, padding_idx=0)
        self.pos = nn.Embedding(length, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(p)
        self.fc2 = nn.Linear(2 * width, width, bias=False)
        self.gain = Gain(width)
        self.lm_head = nn.Linear(width, vocab)
        self.register_buffer("shift", torch.linspace(-0.5, 0.5, width))
        self.register_buffer("temperature", torch.tensor(1.25), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        x = self.embed(ids) + self.pos(positions)
        x = x + self.conv(x.mT).mT
        x = self.norm(x) + self.shift
        x = x + self.fc2(self.drop(F.gelu(self.fc1(x))))
        return self.lm_head(self.gain(x)) / self.temperature


class TiedLm(nn.Module):
    """A head that is the table, in either order of registration."""

    def __init__(self, vocab: int = 12, width: int = 6, *, head_first: bool = False) -> None:
        super().__init__()
        if head_first:
            self.lm_head = nn.Linear(width, vocab, bias=False)
        self.embed = nn.Embedding(vocab, width)
        self.fc = nn.Linear(width, width)
        if not head_first:
            self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.fc(self.embed(ids))))


class Residual(nn.Module):
    """A block: with one activation or another."""

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return x + self.activation(self.fc(x))


class Body(nn.Module):
    """A table and blocks, each with its activation."""

    def __init__(self, vocab: int, width: int, activations: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList([Residual(width, activation) for activation in activations])

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x)
        return (x,)


class SmallLm(nn.Module):
    """The least that has blocks, a body and a head; with a scale and a cap of its own after the head."""

    base_model_prefix = "inner"

    def __init__(
        self, *activations: Callable[[Tensor], Tensor], vocab: int = 32, width: int = 8, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner = Body(vocab, width, activations or (torch.sin, torch.sin))
            self.top = nn.Sequential(nn.Linear(width, vocab))

    def get_output_embeddings(self) -> nn.Module:
        return self.top[0]

    def forward(self, input_ids: Tensor) -> Tensor:
        return 3 * self.top(self.inner(input_ids)[0]).tanh()


def llama(*, tied: bool = False, seed: int = 0, **overrides: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = dict(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return _seeded(seed, lambda: LlamaForCausalLM(LlamaConfig(**config | overrides)))


def gpt2(seed: int = 0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _seeded(
        seed, lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=32))
    )


def opt(seed: int = 0) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = dict(vocab_size=32, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4)
    config |= dict(max_position_embeddings=32, word_embed_proj_dim=16)
    return _seeded(seed, lambda: OPTForCausalLM(OPTConfig(**config)))


def t5(seed: int = 0) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = dict(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return _seeded(seed, lambda: T5ForConditionalGeneration(T5Config(**config)))


def bert(seed: int = 0) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    return _seeded(seed, lambda: BertForMaskedLM(BertConfig(**config, max_position_embeddings=32, type_vocab_size=6)))


HF_MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama_tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "opt": opt,
    "t5": t5,
    "bert": bert,
}


def hf_inputs(name: str, ids: Tensor) -> dict[str, Tensor]:
    """Keyword inputs of a model of `HF_MODELS`."""
    return {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}


def randomized(tuned: ft.Finetuned, seed: int = 0, scale: float = 0.3) -> ft.Finetuned:
    """The finetune with noise on every parameter, so that nothing is zero or equal to the base."""
    generator = torch.Generator().manual_seed(seed)
    noise = {
        name: torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for name, leaf in tuned.params.items()
    }
    return tuned.replace(params={name: leaf + scale * noise[name].to(leaf) for name, leaf in tuned.params.items()})


def finetunes(base: ft.Base, n: int = 3, scale: float = 0.3, **arguments: Any) -> list[ft.Finetuned]:
    """N different finetunes, the same ones each time."""
    generator = torch.Generator().manual_seed(n)
    made = [ft.new_finetuned(base, generator=generator, **arguments) for _ in range(n)]
    return [randomized(tuned, seed=100 + i, scale=scale) for i, tuned in enumerate(made)]


def twin(model: nn.Module, base: ft.Base, tuned: ft.Finetuned | None = None) -> nn.Module:
    """A float module with ``codes * scale + lora_scale * B @ A`` as its weights, by hand: what to expect.

    Only for the int8 scheme and finetunes without dropout. A tied alias follows the adapter of the
    parameter it is tied to, unless it is plain or adapted itself.
    """
    out = copy.deepcopy(model).eval()
    stored = {id(leaf): name for name, leaf in model.named_parameters(remove_duplicate=False) if name in base.params}
    adapters = {} if tuned is None else {a.path: a for a in tuned.spec.adapters}
    plain = {} if tuned is None else tuned.params
    originals = dict(model.named_parameters(remove_duplicate=False))

    def value_of(path: str, own: str, *, conv1d: bool = False) -> Tensor:
        name = _join(path, own)
        canonical = stored[id(originals[name])] if name in originals else name
        value = plain[name] if name in plain else base.params[canonical]
        if not value.is_floating_point():
            value = value.double() * base.params[canonical + "_scale"].double().unsqueeze(-1)
            value = value.T if conv1d else value
        owner = path if path in adapters or name in plain else canonical.rpartition(".")[0]
        adapter = adapters.get(owner)
        if adapter is not None and own == "weight" and tuned is not None:
            value = _updated(value.double().T if conv1d else value.double(), adapter, tuned)
            value = value.T if conv1d else value
        own_bias = plain.get(_join(owner, "lora_bias"))
        if adapter is not None and own == "bias" and own_bias is not None:
            value = value.double() + _scale(adapter) * own_bias.double()
        return value

    for path, module in out.named_modules():
        for own, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if own.startswith("in_proj_"):  # of torch's MultiheadAttention, which the base holds as three layers
                value = torch.cat(
                    [value_of(_join(path, f"{part}_proj"), own.removeprefix("in_proj_")) for part in "qkv"]
                )
            else:
                value = value_of(path, own, conv1d=type(module).__name__ == "Conv1D")
            module._parameters[own] = nn.Parameter(value.detach().to(parameter.dtype))
    for path, adapter in adapters.items():
        bias = plain.get(_join(path, "lora_bias"))
        if bias is not None and out.get_submodule(path).bias is None:  # the layer has none to add it to
            module = out.get_submodule(path)
            module.bias = nn.Parameter((_scale(adapter) * bias.double()).to(module.weight.dtype))
    return out


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected number."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.detach().double() - expected.detach().double()).abs().max()
    return float(difference / expected.detach().double().abs().max())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, *, unlike: Tensor) -> None:
    """Checks closeness, and that the tolerance could have told: ``unlike`` is at least 20 tolerances away."""
    assert actual.isfinite().all()
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g}"
    away = relative_error(actual, unlike)
    assert away > 20 * tolerance, f"the partner is only {away:.3g} away, which {tolerance:.3g} can hardly tell"


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Same names, types and bits."""
    assert list(actual) == list(expected)
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert torch.equal(actual[name], expected[name]), name


def assert_same_finetune(actual: ft.Finetuned, expected: ft.Finetuned) -> None:
    """Same spec, names, dtypes and bits."""
    assert actual.spec == expected.spec
    assert_trees_equal(actual.params, expected.params)
    assert_trees_equal(actual.consts, expected.consts)


def assert_same_base(actual: ft.Base, expected: ft.Base) -> None:
    """Same names, dtypes, strides, numbers, formats and fingerprint."""
    assert actual.params.keys() == expected.params.keys()
    for name, leaf in expected.params.items():
        other = actual.params[name]
        assert (other.dtype, other.shape, other.stride()) == (leaf.dtype, leaf.shape, leaf.stride()), name
        assert torch.equal(other, leaf), name
    assert actual.skeleton.architecture == expected.skeleton.architecture
    assert actual.skeleton.ties == expected.skeleton.ties
    formats = [{path: (x.scheme, x.dtype) for path, x in base.skeleton.layers.items()} for base in (actual, expected)]
    assert formats[0] == formats[1]
    assert actual.skeleton.default_scheme == expected.skeleton.default_scheme
    assert actual.fingerprint == expected.fingerprint


def gradients_by_autograd(loss_of: Callable[[dict[str, Tensor]], Tensor], params: Any) -> dict[str, Tensor]:
    """Plain ``torch.autograd.grad``, the reference for every other way."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in params.items()}
    with torch.enable_grad():
        found = torch.autograd.grad(loss_of(leaves), list(leaves.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Bytes, storage and version of every tensor of a value, to be compared later."""

    tensors: dict[str, tuple[Tensor, int, int]]
    facts: dict[str, Any]


def snapshot(value: ft.Base | ft.Finetuned | nn.Module) -> Snapshot:
    """Records everything of a value that a pure function must leave alone."""
    facts: dict[str, Any] = {}
    if isinstance(value, nn.Module):
        tensors = dict(value.named_parameters(remove_duplicate=False))
        tensors.update(value.named_buffers(remove_duplicate=False))
        facts = {
            "training": [m.training for m in value.modules()],
            "classes": [type(m) for m in value.modules()],
            "attributes": [sorted(vars(m)) for m in value.modules()],
            "hooks": [
                (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in value.modules()
            ],
            "requires_grad": {name: leaf.requires_grad for name, leaf in tensors.items()},
            "grad": {name: leaf.grad is None for name, leaf in tensors.items()},
            "config": value.config.to_dict() if hasattr(value, "config") else None,
        }
    elif isinstance(value, ft.Base):
        tensors = dict(value.params)
        facts = {"fingerprint": value.fingerprint}
    else:
        tensors = {**value.params, **value.consts}
        facts = {"spec": value.spec}
    recorded = {n: (leaf.detach().clone(), leaf.data_ptr(), leaf._version) for n, leaf in tensors.items()}
    return Snapshot(recorded, facts)


def assert_unchanged(value: ft.Base | ft.Finetuned | nn.Module, before: Snapshot) -> None:
    """Bitwise the same, in the same storage, never written to."""
    after = snapshot(value)
    assert after.facts == before.facts
    assert list(after.tensors) == list(before.tensors)
    for name, (old, pointer, version) in before.tensors.items():
        new, new_pointer, new_version = after.tensors[name]
        assert torch.equal(*(leaf.reshape(-1).contiguous().view(torch.uint8) for leaf in (new, old))), name
        assert (new_pointer, new_version) == (pointer, version), name


def _scale(adapter: Any) -> float:
    config = adapter.config
    return config.alpha / (config.r**0.5 if config.rank_stabilized else config.r)


def _updated(matrix: Tensor, adapter: Any, tuned: ft.Finetuned) -> Tensor:
    """A matrix ``(out, in)``, or a table, with an adapter's update, from the formulas of the papers."""
    own = {name: leaf.double() for name, leaf in (*tuned.params.items(), *tuned.consts.items())}
    product = own[_join(adapter.path, "lora_b")] @ own[_join(adapter.path, "lora_a")]
    if _join(adapter.path, "lora_a0") in own:  # PiSSA, OLoRA: the frozen part lacks what the factors started from
        product = product - own[_join(adapter.path, "lora_b0")] @ own[_join(adapter.path, "lora_a0")]
    matrix = matrix + _scale(adapter) * (product.T if adapter.kind == "embedding" else product)
    if _join(adapter.path, "lora_magnitude") in own:  # DoRA
        matrix = matrix * (own[_join(adapter.path, "lora_magnitude")] / matrix.norm(dim=1)).unsqueeze(1)
    return matrix


def _join(path: str, own: str) -> str:
    return f"{path}.{own}" if path else own


def _seeded(seed: int, make: Callable[[], Any]) -> Any:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        return make().eval()
    finally:
        torch.set_rng_state(state)
