"""The README does what it says: its code runs, its names exist, its files are there."""

from __future__ import annotations

import doctest
import re
from typing import Any

import pages
import pytest
import torch
from pages import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

import finetuna_func as ft

README = (ROOT / "README.md").read_text("utf-8")
VOCABULARY = 256


def tiny_model(name: str) -> Any:
    """A model with random weights, in place of the one on the hub."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    if "opt" in name:
        return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32, num_attention_heads=4)).eval()
    config = LlamaConfig(**sizes, intermediate_size=64, num_attention_heads=4, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Every character is a token, its number the code point."""
    characters = Tokenizer(models.WordLevel({chr(i): i for i in range(VOCABULARY)}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters)


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_model("").save_pretrained("checkpoints/SmolLM2")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", tiny_model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tiny_tokenizer)
    names = pages.run(pages.blocks(ROOT / "README.md", "python"))
    assert {"adapters", "full.safetensors", "adapter.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert names["losses"].shape == (3,)
    assert names["sample_losses"].shape == (4,)
    assert all(grad.shape[0] == 4 for grad in names["sample_grads"].values())
    assert names["hessian_times_direction"].keys() == names["tuned"].params.keys()
    assert "times smaller" in capsys.readouterr().out


def test_the_first_block_stands_alone_and_is_short():
    first = pages.blocks(ROOT / "README.md", "python")[0]
    statements = [line for line in first.code.splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(statements) <= 15
    assert len(README[: README.index("```python")].splitlines()) <= 8


def test_it_names_only_what_exists():
    for path in sorted(set(re.findall(r"\bft((?:\.[A-Za-z_]+)+)", README))):
        value: Any = ft
        for attribute in path.removeprefix(".").split("."):
            assert hasattr(value, attribute), f"ft{path}"
            value = getattr(value, attribute)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)[^):]*\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_the_plot_is_small():
    assert (ROOT / "docs/images/demo_losses.png").stat().st_size < 150_000


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in set(re.findall(r"(?:^|`|DEMO_STEPS=\d+ )make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_seed_example():
    import seed_example

    outcome = doctest.testmod(seed_example, optionflags=doctest.ELLIPSIS)
    assert outcome.attempted > 20
    assert outcome.failed == 0
