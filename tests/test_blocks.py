"""The repeated blocks of a model: which they are, and that running them as functions changes no number.

With ``remat="blocks"`` the same operations run on the same numbers, so values and first-order gradients are equal bit
by bit where the sums are in the same order; compared are they in float32 at 2e-6 of the largest number (a few
roundings of 6e-8), and at 1e-5 with a second derivative. The compiler fuses, so 1e-5 there as well.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch._dynamo.utils
import torch.utils._pytree as torch_pytree
from families import FAMILIES, Family
from live import Live
from models import SmallLm, Tiny, assert_close, bert, finetunes, gpt2, llama, relative_error, t5
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

import finetuna_func as ft
from finetuna_func._blocks import alike, block_paths

SAME, FP32 = 2e-6, 1e-5
FAMILY = {family.name: family for family in FAMILIES}
N = 3


def ids_for(*shape: int, seed: int = 0, vocab: int = 32) -> Tensor:
    return torch.randint(4, vocab, shape, generator=torch.Generator().manual_seed(seed))


def mixtral(**overrides: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**sizes | overrides)).eval()


def gpt2_by_number() -> nn.Module:
    """A GPT-2 whose blocks scale their attention by their number."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = dict(vocab_size=32, n_embd=16, n_layer=3, n_head=4, n_positions=32)
    return GPT2LMHeadModel(GPT2Config(**config, scale_attn_by_inverse_layer_idx=True)).eval()


def albert() -> nn.Module:
    """Two groups of shared layers, three and three runs."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    sizes: dict[str, Any] = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=4)
    torch.manual_seed(0)
    config = AlbertConfig(
        **sizes, embedding_size=16, num_hidden_layers=6, num_hidden_groups=2, max_position_embeddings=32
    )
    return AlbertForMaskedLM(config).eval()


def leaves_of(out: Any) -> list[Tensor]:
    return [leaf for leaf in torch_pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def loss_of(out: Any, per_row: bool = False) -> Tensor:
    leaves = [leaf.float().square() for leaf in leaves_of(out)]
    return torch.stack([leaf.flatten(1).mean(1) if per_row else leaf.mean() for leaf in leaves]).sum(0)


def assert_trees_close(actual: Any, expected: Any, tolerance: float, *, unlike: Any) -> None:
    """All leaves relative to the largest number of the tree, and the partner far in at least one of them."""
    actual, expected, unlike = (torch_pytree.tree_leaves(tree) for tree in (actual, expected, unlike))
    assert len(actual) == len(expected)
    scale = max(float(leaf.abs().max()) for leaf in expected)
    away = 0.0
    for a, e, u in zip(actual, expected, unlike, strict=True):
        assert a.shape == e.shape
        assert a.isfinite().all()
        assert float((a - e).abs().max()) <= tolerance * scale
        away = max(away, float((a - u).abs().max()))
    assert away > 20 * tolerance * scale


# --- which blocks there are


def paths(stem: str, n: int = 2) -> tuple[str, ...]:
    return tuple(f"{stem}.{i}" for i in range(n))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (llama, paths("model.layers")),
        (gpt2, paths("transformer.h")),
        (mixtral, paths("model.layers")),  # and not their experts
        (bert, paths("bert.encoder.layer")),
        (t5, paths("encoder.block") + paths("decoder.block")),
        (FAMILY["BART"].make, paths("model.encoder.layers") + paths("model.decoder.layers")),
        (FAMILY["nn.TransformerEncoder"].make, paths("encoder.layers")),
        (albert, paths("albert.encoder.albert_layer_groups")),
        (Tiny, ()),
        (FAMILY["ALBERT"].make, ()),  # one group, shared by all layers
        (lambda: llama(num_hidden_layers=1), ()),
    ],
)
def test_which_blocks(make: Callable[[], nn.Module], expected: tuple[str, ...]):
    base = ft.quantize_base_model(make())
    assert sorted(base.skeleton.blocks) == sorted(expected)


def test_lists_that_hold_no_blocks():
    model = nn.Module()
    model.leaves = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])  # no children: layers, not blocks
    model.different = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.TransformerEncoderLayer(4, 2)])
    model.mixed = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.ReLU(), nn.Sequential(nn.Linear(2, 2))])
    assert block_paths(model) == ["mixed.0", "mixed.2"]


@pytest.mark.parametrize("argument", ["remat", "compile"])
def test_a_model_without_blocks(argument: str):
    base = ft.quantize_base_model(Tiny())
    tuned = ft.new_finetuned(base)
    ids = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"apply\({argument}='blocks'\): Tiny has no repeated blocks"):
        ft.apply(base, tuned, ids, **{argument: "blocks"})
    with pytest.raises(ValueError, match=rf"apply_stacked\({argument}='blocks'\): Tiny has no repeated blocks"):
        ft.apply_stacked(base, ft.stack([tuned]), ids[None], **{argument: "blocks"})
    with pytest.raises(ValueError, match=rf"apply\({argument}=True\): expected 'blocks' or None"):
        ft.apply(base, tuned, ids, **{argument: True})


# --- recomputed


class Case:
    """A family, its base, N custom finetunes and inputs."""

    def __init__(self, family: Family, batch: int = 2) -> None:
        self.family = family
        self.base = ft.quantize_base_model(family.make())
        self.tuned = finetunes(self.base, N, **family.custom)
        self.stacked = ft.stack(self.tuned)
        self.inputs = family.inputs((N, batch), torch.Generator().manual_seed(1))

    @property
    def first(self) -> dict[str, Tensor]:
        return {name: leaf[0] for name, leaf in self.inputs.items()}

    def loss(self, tuned: ft.Finetuned, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        return loss_of(ft.apply(self.base, tuned, **inputs, **options))

    def of_params(self, **options: Any) -> Callable[..., Tensor]:
        return lambda params, inputs: self.loss(self.tuned[0].replace(params=params), inputs, **options)


# One of each kind of block; ``slow`` has the others.
IN_CI = {"GPT-2", "Mixtral", "Gemma 2", "T5", "BART", "nn.TransformerEncoder"}
WITH_BLOCKS = [
    pytest.param(family.name, marks=() if family.name in IN_CI else pytest.mark.slow)
    for family in FAMILIES
    if family.name not in ("ALBERT", "Jamba", "MLP", "CNN and Linear", "nn.MultiheadAttention", "nn.EmbeddingBag")
]


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_recomputed_blocks_change_no_number(name: str):
    case = Case(FAMILY[name])
    other = case.tuned[1]
    for tuned, unlike in ((case.tuned[0], other), (None, other)):
        with torch.no_grad():
            out, expected, away = (
                torch_pytree.tree_leaves(leaves_of(ft.apply(case.base, t, **case.first, **options)))
                for t, options in ((tuned, {"remat": "blocks"}), (tuned, {}), (unlike, {}))
            )
        assert_trees_close(out, expected, SAME, unlike=away)
    found = ft.value_and_grad(case.loss)(case.tuned[0], case.first, remat="blocks")
    expected = ft.value_and_grad(case.loss)(case.tuned[0], case.first)
    assert_trees_close(found, expected, SAME, unlike=ft.value_and_grad(case.loss)(other, case.first))


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_recomputed_blocks_in_a_stack(name: str):
    family = FAMILY[name]
    if {"stacked", "stacked_custom"} & family.gaps.keys():
        pytest.skip("apply_stacked does not serve this family: docs/models.md")
    case = Case(family)

    def loss(stacked: ft.Finetuned, **options: Any) -> Tensor:
        return loss_of(ft.apply_stacked(case.base, stacked, **case.inputs, **options), per_row=True)

    found = ft.stacked_value_and_grad(loss)(case.stacked, remat="blocks")
    expected = ft.stacked_value_and_grad(loss)(case.stacked)
    unlike = torch_pytree.tree_map(lambda leaf: leaf.roll(1, 0), expected)
    assert_trees_close(found, expected, SAME, unlike=unlike)


HIGHER: dict[str, Callable[[Callable[..., Tensor], Any, Any, Any], Any]] = {
    "vmap grad": lambda f, p, ps, x: vmap(grad(f))(ps, x),
    "jvp grad": lambda f, p, ps, x: jvp(lambda p: grad(f)(p, first(x)), (p,), (p,))[1],
    "vjp grad": lambda f, p, ps, x: vjp(lambda p: grad(f)(p, first(x)), p)[1](p),
    "vmap jvp grad": lambda f, p, ps, x: vmap(lambda p, x: jvp(lambda p: grad(f)(p, x), (p,), (p,))[1])(ps, x),
}


def first(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf[0] for name, leaf in inputs.items()}


@pytest.mark.parametrize("transform", HIGHER)
@pytest.mark.parametrize(
    "name", [pytest.param("GPT-2", marks=pytest.mark.slow), "Mixtral", pytest.param("BART", marks=pytest.mark.slow)]
)
def test_recomputed_blocks_under_transforms(name: str, transform: str):
    case = Case(FAMILY[name])
    run = HIGHER[transform]
    arguments = dict(case.tuned[0].params), dict(case.stacked.params), case.inputs
    others = dict(case.tuned[1].params), {k: v.roll(1, 0) for k, v in case.stacked.params.items()}, case.inputs
    expected = run(case.of_params(), *arguments)
    found = run(case.of_params(remat="blocks"), *arguments)
    assert_trees_close(found, expected, FP32, unlike=run(case.of_params(), *others))


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT"])
def test_left_padded_masks(name: str):
    case = Case(FAMILY[name])
    mask = torch.ones(N, 2, 7, dtype=torch.long)
    mask[:, 0, :3] = 0
    masked = {**case.inputs, "attention_mask": mask}

    def real(out: Any, mask: Tensor) -> Tensor:
        return out.logits * mask.unsqueeze(-1)

    def stacked(t: ft.Finetuned, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        out = ft.apply_stacked(case.base, t, **inputs, **options)
        return real(out, mask).square().mean((1, 2, 3))

    def one(t: ft.Finetuned, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        return real(ft.apply(case.base, t, **inputs, **options), inputs["attention_mask"]).square().mean()

    found = ft.stacked_value_and_grad(stacked)(case.stacked, masked, remat="blocks")
    expected = ft.stacked_value_and_grad(stacked)(case.stacked, masked)
    unlike = ft.stacked_value_and_grad(stacked)(case.stacked, case.inputs)
    assert_trees_close(found, expected, SAME, unlike=unlike)
    mapped = vmap(grad(lambda p, x: one(case.tuned[0].replace(params=p), x, remat="blocks")))
    assert_trees_close(mapped(dict(case.stacked.params), masked), expected[1], FP32, unlike=unlike[1])


def gpt2_with_dropout() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)).eval()


@pytest.mark.parametrize("make", [gpt2_with_dropout, albert], ids=["GPT-2", "ALBERT: each block runs three times"])
def test_dropout_is_replayed(make: Callable[[], nn.Module]):
    base = ft.quantize_base_model(make())
    config = ft.LinearAdapterConfig(r=3, alpha=3.0, dropout=0.4)
    tuned = finetunes(base, N, linear_config=config)
    stacked, ids = ft.stack(tuned), ids_for(N, 2, 5)

    def loss(t: ft.Finetuned, ids: Tensor, key: Tensor, **options: Any) -> Tensor:
        return loss_of(ft.apply(base, t, ids, train=True, rng=key, **options))

    def whole(t: ft.Finetuned, key: Tensor, **options: Any) -> Tensor:
        return loss_of(ft.apply_stacked(base, t, ids, train=True, rng=key, **options), per_row=True)

    key, other_key = ft.random.key(1), ft.random.key(2)
    found = ft.value_and_grad(loss)(tuned[0], ids[0], key, remat="blocks")
    expected = ft.value_and_grad(loss)(tuned[0], ids[0], key)
    assert_trees_close(found, expected, SAME, unlike=ft.value_and_grad(loss)(tuned[0], ids[0], other_key))
    found = ft.stacked_value_and_grad(whole)(stacked, key, remat="blocks")
    expected = ft.stacked_value_and_grad(whole)(stacked, key)
    assert_trees_close(found, expected, SAME, unlike=ft.stacked_value_and_grad(whole)(stacked, other_key))
    keys = ft.random.split(key, N)
    mapped = vmap(lambda p, ids, k: grad(lambda p: loss(tuned[0].replace(params=p), ids, k, remat="blocks"))(p))
    assert_trees_close(
        mapped(dict(stacked.params), ids, keys),
        expected[1],
        FP32,
        unlike=mapped(dict(stacked.params), ids, keys.roll(1, 0)),
    )


def test_blocks_that_read_their_number():
    """GPT-2's option to scale by it: each block sees its own, though all run through the first."""
    base = ft.quantize_base_model(gpt2_by_number())
    tuned, ids = finetunes(base, 1)[0], ids_for(2, 5)

    def loss(t: ft.Finetuned, **options: Any) -> Tensor:
        return loss_of(ft.apply(base, t, ids, **options))

    found, expected = (ft.value_and_grad(loss)(tuned, remat=remat) for remat in ("blocks", None))
    module = base.skeleton._checkout(False, True)
    assert [block.attn.layer_idx for block in module.transformer.h] == [0, 1, 2]
    assert module.transformer.h[2]._ft_block.representative.attn.layer_idx == 0

    def as_if_first(t: ft.Finetuned) -> Tensor:
        for block in module.transformer.h:
            block.attn.layer_idx, block.attn.scaling = 0, module.transformer.h[0].attn.scaling
        return loss(t)

    assert_trees_close(found, expected, SAME, unlike=ft.value_and_grad(as_if_first)(tuned))


def test_a_finetune_of_some_blocks_and_of_different_ranks():
    base = ft.quantize_base_model(llama(num_hidden_layers=3))
    configs = {
        r"model\.layers\.0\.self_attn\.q_proj": ft.LinearAdapterConfig(r=2, alpha=1.0, bias=True),
        r"model\.layers\.2\.mlp\.up_proj": ft.LinearAdapterConfig(r=5, alpha=2.0, dora=True),
    }
    plain = {r"model\.layers\.1\.input_layernorm"}
    tuned = finetunes(base, N, adapt_layers=set(configs), plain_layers=plain, linear_config=configs)
    stacked, ids = ft.stack(tuned), ids_for(N, 2, 5)

    def whole(t: ft.Finetuned, **options: Any) -> Tensor:
        return loss_of(ft.apply_stacked(base, t, ids, **options), per_row=True)

    found, expected = (ft.stacked_value_and_grad(whole)(stacked, remat=remat) for remat in ("blocks", None))
    assert_trees_close(found, expected, SAME, unlike=torch_pytree.tree_map(lambda leaf: leaf.roll(1, 0), expected))


def test_each_block_runs_twice():
    """Once forward and once for the backward pass, through the one representative of its kind; without remat, never."""
    base = ft.quantize_base_model(llama(num_hidden_layers=3))
    tuned, ids = finetunes(base, 1)[0], ids_for(2, 5)
    ft.apply(base, tuned, ids)
    module = base.skeleton._checkout(False, True)
    representatives = {
        id(block._ft_block.representative): block._ft_block.representative for block in module.model.layers
    }
    assert len(representatives) == 1
    calls: list[str] = []
    (representative,) = representatives.values()
    representative.register_forward_hook(lambda *_: calls.append("block"))
    ft.value_and_grad(lambda t, **options: loss_of(ft.apply(base, t, ids, **options)))(tuned, remat="blocks")
    assert len(calls) == 6
    ft.value_and_grad(lambda t, **options: loss_of(ft.apply(base, t, ids, **options)))(tuned)
    assert len(calls) == 6


@pytest.mark.parametrize("route", ["stacked", "lean", "vmap grad"])
def test_recomputed_blocks_keep_less(route: str):
    """With 8 blocks, at most half of what is kept otherwise (an eighth, and inputs, outputs and gradients)."""
    base = ft.quantize_base_model(llama(num_hidden_layers=8))
    tuned, ids = finetunes(base, N, adapt_layers={"q_proj"}, plain_layers=set()), ids_for(N, 2, 32)
    stacked = ft.stack(tuned)

    def run(remat: Any) -> None:
        if route == "stacked":
            ft.stacked_value_and_grad(lambda t: loss_of(ft.apply_stacked(base, t, ids, remat=remat), per_row=True))(
                stacked
            )
        elif route == "lean":
            ft.value_and_grad(lambda t: loss_of(ft.apply(base, t, ids[0], remat=remat)))(tuned[0])
        else:
            vmap(grad(lambda p, x: loss_of(ft.apply(base, tuned[0].replace(params=p), x, remat=remat))))(
                dict(stacked.params), ids
            )

    peaks = {}
    for remat in (None, "blocks"):
        run(remat)
        with Live() as live:
            run(remat)
        peaks[remat] = live.peak
    assert peaks["blocks"] < 0.5 * peaks[None], peaks


def test_caches_go_by():
    """A block that is given a cache, which it changes, runs as it is."""
    base = ft.quantize_base_model(llama())
    tuned, ids = finetunes(base, 1)[0], ids_for(2, 6)
    with torch.no_grad():
        expected = ft.apply(base, tuned, ids).logits
        for options in ({"remat": "blocks"}, {"compile": "blocks"}):
            start = ft.apply(base, tuned, ids[:, :4], use_cache=True, **options)
            assert start.past_key_values.get_seq_length() == 4
            rest = ft.apply(base, tuned, ids[:, 4:], past_key_values=start.past_key_values, use_cache=True, **options)
            assert rest.past_key_values.get_seq_length() == 6
            found = torch.cat([start.logits, rest.logits], dim=1)
            assert_close(found, expected, SAME, unlike=expected.roll(1, 1))


def test_what_is_recorded_inside_of_blocks():
    """transformers' hooks collect attentions and router logits, and blocks run as they are where they do."""
    model = llama()
    model.set_attn_implementation("eager")
    base, ids = ft.quantize_base_model(model), ids_for(2, 5)
    for options in ({"output_attentions": True}, {"output_hidden_states": True}):
        found, expected = (ft.apply(base, None, ids, **options, remat=remat) for remat in ("blocks", None))
        name = next(iter(options)).removeprefix("output_")
        assert len(found[name]) == len(expected[name]) >= 2
        for a, e in zip(found[name], expected[name], strict=True):
            assert torch.equal(a, e)
    base = ft.quantize_base_model(mixtral())
    found, expected = (ft.apply(base, None, ids, output_router_logits=True, remat=remat) for remat in ("blocks", None))
    assert torch.equal(found.aux_loss, expected.aux_loss)
    assert not torch.equal(found.aux_loss, ft.apply(base, None, ids.flip(1), output_router_logits=True).aux_loss)


def test_a_router_loss_that_the_config_asks_for():
    """Its mask is that of the tokens; the causal mask that saves a question is not given to it."""
    base, ids = ft.quantize_base_model(mixtral(output_router_logits=True)), ids_for(2, 5)
    found = ft.apply(base, None, ids).aux_loss
    assert_close(
        found,
        ft.apply(base, None, ids, attention_mask=torch.ones_like(ids)).aux_loss,
        SAME,
        unlike=ft.apply(base, None, ids.flip(1)).aux_loss,
    )


# --- nothing is left behind


def state_of(base: ft.Base) -> Any:
    """All that a call sets on this thread's modules."""
    call = base.skeleton._checkout(False, True)._ft_call
    modules = [base.skeleton._checkout(False, True)]
    modules += [m._ft_block.representative for m in modules[0].modules() if hasattr(m, "_ft_block")]
    attributes = [
        (path, name, value if isinstance(value, (bool, int, float, str, type(None))) else id(value))
        for module in modules
        for path, child in module.named_modules()
        for name, value in vars(child).items()
        if name not in ("_forward_hooks", "_ft_compiled", "_is_hf_initialized")
    ]
    tensors = [(n, id(t)) for m in modules for n, t in (*m.named_parameters(), *m.named_buffers())]
    return repr(call), attributes, tensors


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("stacked", [False, True])
def test_an_exception_inside_of_a_block(when: str, stacked: bool):
    base = ft.quantize_base_model(gpt2_by_number())
    tuned = finetunes(base, N)
    ids = ids_for(N, 2, 5)

    def run() -> Any:
        if stacked:
            return ft.stacked_value_and_grad(
                lambda t: loss_of(ft.apply_stacked(base, t, ids, remat="blocks"), per_row=True)
            )(ft.stack(tuned))
        return ft.value_and_grad(lambda t: loss_of(ft.apply(base, t, ids[0], remat="blocks")))(tuned[0])

    expected = run()
    before = state_of(base)
    representative = base.skeleton._checkout(False, True).transformer.h[0]._ft_block.representative
    calls = []

    def fail(*_: Any) -> None:
        calls.append(representative.attn.layer_idx)
        if len(calls) == (2 if when == "forward" else 5):
            raise KeyboardInterrupt  # not an Exception, even

    handle = representative.mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run()
    handle.remove()
    assert calls == ([0, 1] if when == "forward" else [0, 1, 2, 2, 1])
    assert state_of(base) == before
    assert_trees_close(run(), expected, SAME, unlike=torch_pytree.tree_map(lambda leaf: 2 * leaf, expected))


@pytest.mark.parametrize("name", ["Gemma", "Gemma 3", "StarCoder 2", "Llama", "GPT-2", "BERT", "Mamba"])
def test_blocks_that_are_alike_share_a_representative(name: str):
    """Also where their activation is an object made for each, as in Gemma."""
    module = ft.quantize_base_model(FAMILY[name].make()).skeleton._module
    blocks = [child._ft_block for child in module.modules() if hasattr(child, "_ft_block")]
    norms = [own for own in blocks if not list(own.representative.children())]
    assert len(blocks) == 2 + len(norms) and len(norms) == (name != "BERT")
    first, second = (own for own in blocks if own not in norms)
    assert first.representative is second.representative


def test_blocks_that_differ_do_not():
    tanh, again, none = (functools.partial(nn.functional.gelu, approximate=how) for how in ("tanh", "tanh", "none"))
    base = ft.quantize_base_model(SmallLm(tanh, torch.sin, again, none, torch.sin))
    one, *others = [block._ft_block.representative for block in base.skeleton._module.inner.blocks]
    assert others[1] is one
    assert others[3] is others[0] is not one
    assert others[2] is not one
    tuned, ids = finetunes(base, 1)[0], ids_for(2, 5)
    found, expected = (ft.apply(base, tuned, ids, remat=remat) for remat in ("blocks", None))
    assert_close(found, expected, SAME, unlike=ft.apply(base, None, ids))


def test_two_threads():
    base = ft.quantize_base_model(gpt2_by_number())
    tuned, ids = finetunes(base, 2), ids_for(2, 2, 5)

    def run(i: int, remat: Any) -> Any:
        return ft.value_and_grad(lambda t: loss_of(ft.apply(base, t, ids[i], remat=remat)))(tuned[i])

    expected = [run(i, None) for i in range(2)]
    found: list[list[Any]] = [[], []]
    barrier = threading.Barrier(2)

    def work(i: int) -> None:
        barrier.wait()
        for _ in range(8):
            found[i].append(run(i, "blocks"))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(found[i]) == 8
        for one in found[i]:
            assert_trees_close(one, expected[i], SAME, unlike=expected[1 - i])


def test_other_calls_between_forward_and_backward():
    """The recomputation sets up its own call: another one of the same thread, stacked even, does not disturb it."""
    base = ft.quantize_base_model(gpt2_with_dropout())
    tuned, ids = finetunes(base, N, linear_config=ft.LinearAdapterConfig(r=2, alpha=1.0, dropout=0.3)), ids_for(N, 2, 5)
    key = ft.random.key(0)

    def run(other_calls: bool, remat: Any) -> list[Tensor]:
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in tuned[0].params.items()}
        out = ft.apply(base, tuned[0].replace(params=leaves), ids[0], train=True, rng=key, remat=remat)
        loss = loss_of(out)
        if other_calls:
            ft.apply_stacked(base, ft.stack(tuned), ids, remat=remat)
            ft.apply(base, tuned[1], ids[1, :, :3], train=True, rng=ft.random.key(5))
        return list(torch.autograd.grad(loss, list(leaves.values())))

    expected = run(False, None)
    assert_trees_close(run(True, "blocks"), expected, SAME, unlike=[2 * leaf for leaf in expected])


# --- compiled


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch.compiler.reset()


@pytest.fixture
def fast_compiler(fresh_compiler: Any, monkeypatch: pytest.MonkeyPatch):
    """Captures graphs and their derivatives as usual and runs them without making kernels, which takes longest."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    return fresh_compiler


NORM = 1
"""The graph of the norm after the last block, which most models have."""


def graphs(counters: Any) -> int:
    return counters["stats"]["unique_graphs"]


def train(base: ft.Base, tuned: ft.Finetuned, ids: Tensor, **options: Any) -> Any:
    if tuned.stack_size is None:
        return ft.value_and_grad(lambda t: loss_of(ft.apply(base, t, ids, **options)))(tuned)
    return ft.stacked_value_and_grad(lambda t: loss_of(ft.apply_stacked(base, t, ids, **options), per_row=True))(tuned)


def test_compiled_blocks(fresh_compiler: Any):
    """One graph for all blocks; in a stack, with gradients, by the compiler that is used in earnest."""
    base = ft.quantize_base_model(llama(num_hidden_layers=3))
    tuned = ft.stack(finetunes(base, N))
    ids = ids_for(N, 2, 6)
    found = train(base, tuned, ids, compile="blocks")
    assert graphs(fresh_compiler) == 1 + NORM
    expected = train(base, tuned, ids)
    unlike = torch_pytree.tree_map(lambda leaf: leaf.roll(1, 0), expected)
    assert_trees_close(found, expected, FP32, unlike=unlike)


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REST = dict.fromkeys(PROJECTIONS, ft.LinearAdapterConfig(r=4))
DORA = ft.LinearAdapterConfig(r=4, dora=True)
MIXED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alike": ({}, {}),
    "a float one first": ({"modules_not_to_quantize": {"q_proj", "gate_proj"}}, {}),
    "a float one after": ({"modules_not_to_quantize": {"k_proj", "up_proj"}}, {}),
    "formats": ({"scheme": {"k_proj": "nf4", "*": "int8"}}, {}),
    "one trained in float": ({}, {"plain_layers": {"k_proj"}}),
    "dora first": ({}, {"linear_config": REST | {"q_proj": DORA, "gate_proj": DORA}}),
    "dora after": ({}, {"linear_config": REST | {"v_proj": DORA, "up_proj": DORA}}),
    "ranks": ({}, {"linear_config": REST | {"k_proj": ft.LinearAdapterConfig(r=2)}}),
    "biases": ({}, {"linear_config": ft.LinearAdapterConfig(r=4, bias=True)}),
    "some": ({}, {"adapt_layers": {"q_proj", "v_proj", "up_proj"}}),
    "from the weight": ({}, {"linear_config": ft.LinearAdapterConfig(r=2, init="pissa")}),
}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", MIXED)
def test_compiled_blocks_whose_layers_of_one_input_differ(name: str, stacked: bool, fast_compiler: Any):
    """Those that are alike are one product; whatever the others are, no number changes."""
    of_base, of_tuned = MIXED[name]
    base = ft.quantize_base_model(llama(attention_bias=True), **of_base)
    options = {"adapt_layers": set(PROJECTIONS), "plain_layers": set()} | of_tuned
    options["adapt_layers"] = options["adapt_layers"] - options["plain_layers"]
    tuned, ids = finetunes(base, N, **options), ids_for(N, 2, 5)
    given = (ft.stack(tuned), ids) if stacked else (tuned[0], ids[0])
    other = (ft.stack([*tuned[1:], tuned[0]]), ids) if stacked else (tuned[1], ids[0])
    found = train(base, *given, compile="blocks")
    assert graphs(fast_compiler) == 1 + NORM
    assert_trees_close(found, train(base, *given), FP32, unlike=train(base, *other))


LAYERS = {SmallLm: {"fc"}, llama: {"q_proj", "down_proj"}}


@pytest.mark.parametrize("make", [SmallLm, pytest.param(llama, marks=pytest.mark.slow)])
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("remat", [None, "blocks"])
def test_one_graph_whether_or_not_the_embedding_is_adapted(
    remat: Any, stacked: bool, table: bool, make: Callable[[], nn.Module], fast_compiler: Any
):
    """Without, what comes into the first block needs no derivative, unlike what comes into the others.

    Evaluation has one of its own, for a stack whose leaves need derivatives or do not.
    """
    base = ft.quantize_base_model(make())
    layers = LAYERS[make] | ({"table" if make is SmallLm else "embed_tokens"} if table else set())
    tuned, ids = finetunes(base, N, adapt_layers=layers, plain_layers=set()), ids_for(N, 2, 5)
    each: Any = (ft.stack(tuned), ids) if stacked else (tuned[0], ids[0])
    found = train(base, *each, compile="blocks", remat=remat)
    norm = NORM * (make is llama)
    assert graphs(fast_compiler) == 1 + norm
    other = (each[0], ids_for(*each[1].shape, seed=1))
    assert_trees_close(found, train(base, *each), FP32, unlike=train(base, *other))
    with torch.no_grad():
        apply = ft.apply_stacked if stacked else ft.apply
        found, expected, unlike = (
            leaves_of(apply(base, *inputs, **options))
            for inputs, options in ((each, {"compile": "blocks", "remat": remat}), (each, {}), (other, {}))
        )
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in each[0].params.items()}
        apply(base, each[0].replace(params=leaves), each[1], compile="blocks", remat=remat)
    assert_trees_close(found, expected, FP32, unlike=unlike)
    assert graphs(fast_compiler) == 2 * (1 + norm)
    train(base, *each, compile="blocks", remat=remat)
    assert graphs(fast_compiler) == 2 * (1 + norm)


@pytest.mark.parametrize("remat", [None, "blocks"])
@pytest.mark.parametrize("make", [SmallLm, llama, gpt2_with_dropout])
def test_what_blocks_are_given_changes_no_number(
    make: Callable[[], nn.Module], remat: Any, monkeypatch: pytest.MonkeyPatch
):
    """Up to the order of sums, if the compiler does nothing; and what needs no derivative still needs none."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    base = ft.quantize_base_model(make())
    layers = {"fc"} if make is SmallLm else {"q_proj"} if make is llama else {"c_fc"}
    tuned, ids = finetunes(base, N, adapt_layers=layers, plain_layers=set()), ids_for(2, 5)
    found = train(base, tuned[0], ids, compile="blocks", remat=remat)
    expected = train(base, tuned[0], ids, remat=remat)
    assert_trees_close(found, expected, FP32, unlike=train(base, tuned[1], ids, remat=remat))
    trained = tuned[0].replace(params={k: v.clone().requires_grad_() for k, v in tuned[0].params.items()})
    for given, needed in ((None, False), (tuned[0], False), (trained, True)):
        (out,) = leaves_of(ft.apply(base, given, ids, compile="blocks", remat=remat))
        assert out.requires_grad == needed
        with torch.no_grad():
            (out,) = leaves_of(ft.apply(base, given, ids, compile="blocks", remat=remat))
            assert not out.requires_grad
    with torch.inference_mode():
        ids = ids.clone()
        ft.apply(base, trained, ids, compile="blocks", remat=remat)


def test_what_needs_a_derivative():
    x, flag, leaf = torch.ones(2), torch.ones(2, dtype=torch.long), torch.ones(1, requires_grad=True)
    plain = {"w": torch.ones(1)}
    for args, kwargs in (((x, 3), {}), ((), {"hidden_states": x, "other": x})):
        (own, *rest) = [v for v in torch_pytree.tree_leaves(alike({"w": leaf}, args, kwargs)[1:])]
        assert own.requires_grad and own.is_leaf and own.data_ptr() == x.data_ptr() and not x.requires_grad
        assert all(not getattr(value, "requires_grad", False) for value in rest)
        assert alike(plain, args, kwargs)[1:] == (args, kwargs)
    assert alike({"w": leaf}, (flag, x), {})[1] == (flag, x)
    assert alike({"w": leaf}, (), {"mask": x})[2] == {"mask": x}
    assert alike({"w": leaf}, (leaf,), {})[1][0] is leaf
    with torch.no_grad():
        leaves, (y, number), kwargs = alike({"w": leaf}, (leaf * 1, 3), {"z": (leaf, x)})
        assert not leaves["w"].requires_grad and not y.requires_grad and number == 3
        assert not kwargs["z"][0].requires_grad and kwargs["z"][1] is x
    with torch.inference_mode():
        made_there = torch.ones(2)
    assert alike({"w": leaf}, (made_there,), {})[1][0] is made_there
    grad(lambda x: (alike({"w": leaf}, (x,), {})[1][0] is x) * x.sum())(x)


@pytest.mark.parametrize("make", [SmallLm, pytest.param(llama, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("remat", [None, "blocks"])
def test_compiled_blocks_of_many_lengths(remat: Any, stacked: bool, make: Callable[[], nn.Module], fast_compiler: Any):
    """The second length makes graphs in which it is a symbol, and the others need none; torch's limit is eight.

    Two, since the first block of all may get a view where the others do not.
    """
    base = ft.quantize_base_model(make())
    tuned = finetunes(base, N)
    ids = ids_for(N, 2, 20)
    each: Any = (ft.stack(tuned), ids) if stacked else (tuned[0], ids[0])
    counts = []
    for length in (6, 7, *range(9, 18)):  # six is as long as there are rows
        found = train(base, each[0], each[1][..., :length], compile="blocks", remat=remat)
        expected = train(base, each[0], each[1][..., :length])
        unlike = train(base, each[0], each[1][..., -length:])
        assert_trees_close(found, expected, FP32, unlike=unlike)
        counts.append(graphs(fast_compiler))
    norm = NORM * (make is llama)
    assert counts[0] == 1 + norm
    assert counts[-1] == counts[2] <= 3 + 2 * norm


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_a_norm_beside_the_blocks(trained: bool, stacked: bool, fast_compiler: Any):
    """Is compiled with them, trained or not, and with ``remat`` alone stays as it is."""
    base = ft.quantize_base_model(llama())
    module = base.skeleton._module.get_submodule("model.norm")
    assert hasattr(module, "_ft_block") and "model.norm" not in base.skeleton.blocks
    tuned, ids = finetunes(base, N, plain_layers={"norm"} if trained else ()), ids_for(N, 2, 5)
    assert ("model.norm.weight" in tuned[0].params) == trained
    given = (ft.stack(tuned), ids) if stacked else (tuned[0], ids[0])
    other = (ft.stack([*tuned[1:], tuned[0]]), ids) if stacked else (tuned[1], ids[0])
    expected, unlike = train(base, *given), train(base, *other)
    assert_trees_close(train(base, *given, remat="blocks"), expected, SAME, unlike=unlike)
    assert graphs(fast_compiler) == 0
    assert_trees_close(train(base, *given, compile="blocks"), expected, FP32, unlike=unlike)
    assert graphs(fast_compiler) == 1 + NORM


def test_compiled_blocks_with_windows_and_without(fast_compiler: Any):
    """Gemma 2: layers with a window and without, which their masks say, so that all four share a graph."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes: dict[str, Any] = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4, sliding_window=4)
    torch.manual_seed(0)
    base = ft.quantize_base_model(Gemma2ForCausalLM(Gemma2Config(**sizes)).eval())
    tuned, ids = finetunes(base, 2), ids_for(2, 2, 7)
    found = train(base, tuned[0], ids[0], compile="blocks")
    expected = train(base, tuned[0], ids[0])
    assert_trees_close(found, expected, FP32, unlike=train(base, tuned[1], ids[0]))
    assert graphs(fast_compiler) == 1 + NORM


def test_compiled_blocks_that_read_their_number(fast_compiler: Any):
    """Each number is another constant of its graph."""
    base = ft.quantize_base_model(gpt2_by_number())
    tuned, ids = finetunes(base, 2), ids_for(2, 2, 5)
    found = train(base, tuned[0], ids[0], compile="blocks")
    assert_trees_close(found, train(base, tuned[0], ids[0]), FP32, unlike=train(base, tuned[1], ids[0]))
    assert 2 <= graphs(fast_compiler) - NORM <= 3


def test_compiled_blocks_with_dropout(fast_compiler: Any):
    base = ft.quantize_base_model(gpt2_with_dropout())
    tuned, ids = finetunes(base, 1, linear_config=ft.LinearAdapterConfig(r=2, alpha=1.0, dropout=0.3))[0], ids_for(2, 5)
    options = {"train": True, "rng": ft.random.key(0)}
    found = train(base, tuned, ids, compile="blocks", remat="blocks", **options)
    unlike = train(base, tuned, ids, train=True, rng=ft.random.key(1))
    assert_trees_close(found, train(base, tuned, ids, **options), FP32, unlike=unlike)
    assert graphs(fast_compiler) == 1 + NORM


def test_blocks_compiled_to_be_computed_again_keep_their_inputs_alone(fast_compiler: Any):
    """What autograd keeps beside tensors of the base and the finetunes: of 8 blocks as much as one input each."""
    base = ft.quantize_base_model(SmallLm(*[torch.sin] * 8, width=16))
    stacked, ids = ft.stack(finetunes(base, N, adapt_layers={"fc"}, plain_layers=set())), ids_for(N, 2, 32)
    given = {leaf.untyped_storage()._cdata for leaf in (*base.params.values(), *stacked.consts.values())}
    one = N * 2 * 32 * 16 * 4
    assert max(leaf.nbytes for leaf in stacked.params.values()) < one
    kept = {}
    for options in ({}, {"compile": "blocks"}, {"remat": "blocks"}, {"compile": "blocks", "remat": "blocks"}):
        found: dict[int, int] = {}

        def note(leaf: Tensor, found: dict[int, int] = found) -> Tensor:
            storage = leaf.untyped_storage()
            if storage._cdata not in given and storage.nbytes() >= one:  # activations: params are smaller
                found[storage._cdata] = storage.nbytes()
            return leaf

        leaves = {name: leaf.clone().requires_grad_() for name, leaf in stacked.params.items()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda leaf: leaf):
            out = ft.apply_stacked(base, stacked.replace(params=leaves), ids, **options)
        kept["compile" in options, "remat" in options] = sum(found.values())
        del out
    assert 8 * one <= kept[True, True] <= kept[False, True] <= 11 * one  # and the last one's output, for the head
    assert min(kept[False, False], kept[True, False]) >= 16 * one


def test_under_transforms_the_compiler_stands_aside(fresh_compiler: Any):
    base = ft.quantize_base_model(llama())
    tuned, ids = finetunes(base, N), ids_for(N, 2, 5)

    def loss(p: Any, x: Tensor, **options: Any) -> Tensor:
        return loss_of(ft.apply(base, tuned[0].replace(params=p), x, **options))

    p = dict(tuned[0].params)
    samples = ids[0].unsqueeze(1)
    found = vmap(grad(lambda p, x: loss(p, x, compile="blocks", remat="blocks")), in_dims=(None, 0))(p, samples)
    expected = vmap(grad(loss), in_dims=(None, 0))(p, samples)
    assert_trees_close(found, expected, FP32, unlike={k: v.roll(1, 0) for k, v in expected.items()})
    found = jvp(lambda p: loss(p, ids[0], compile="blocks"), (p,), (p,))
    assert relative_error(found[1], jvp(lambda p: loss(p, ids[0]), (p,), (p,))[1]) <= FP32
    assert graphs(fresh_compiler) == 0


@pytest.mark.parametrize("options", [{"remat": "blocks"}, {}])
def test_inside_of_a_compiled_function(options: dict[str, Any], fresh_compiler: Any):
    base = ft.quantize_base_model(SmallLm())
    tuned, ids = finetunes(base, 2), ids_for(2, 5)

    @torch.compile(backend="aot_eager")
    def step(params: dict[str, Tensor]) -> Tensor:
        return ft.apply(base, tuned[0].replace(params=params), ids, **options).square().mean()

    def gradient(params: Any) -> Any:
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        return torch.autograd.grad(step(leaves), list(leaves.values()))

    def eager(t: ft.Finetuned) -> list[Tensor]:
        return list(ft.value_and_grad(lambda t: ft.apply(base, t, ids).square().mean())(t)[1].values())

    assert_trees_close(gradient(tuned[0].params), eager(tuned[0]), FP32, unlike=eager(tuned[1]))
