"""The comparison of quality, `benchmarks/quality.py`, on a tiny model: scorers, budgets, every method, the report."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

import finetuna_func as ft

FOLDER = Path(__file__).parents[1] / "benchmarks"
ANSWERS = {"sums": ["1"], "family": ["mother", "mother-in-law", "son"], "reviews": ["negative", "positive"]}


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("quality", FOLDER / "quality.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and items of two tasks: of one digit each, so that a tiny model can learn something of them."""
    path = tmp_path_factory.mktemp("quality")
    tiny.model_folder(path / "model")
    (path / "tasks").mkdir()
    kinds = (("good", "positive"), ("bad", "negative"))
    items = {
        "sums": [{"prompt": f"{i} + {j} =", "answer": str(i + j)} for i in range(6) for j in range(5)],
        "reviews": [{"prompt": f"{word} {i}", "answer": kind} for i in range(10) for word, kind in kinds],
    }
    for name, rows in items.items():
        rows = [{"split": "test" if i < 8 else "train", **row} for i, row in enumerate(rows)]
        tiny.write_jsonl(path / "tasks" / f"{name}.jsonl", rows)
    return path


@pytest.fixture(scope="module")
def corpora(script: Any, folder: Path) -> dict[str, Any]:
    tokenizer = tiny.tokenizer()
    files = {name: script._tasks.load(folder / "tasks" / f"{name}.jsonl") for name in ("sums", "reviews")}
    return {name: script.Corpus.of(name, items, tokenizer) for name, items in files.items()}


@pytest.fixture(scope="module")
def budget(script: Any) -> Any:
    return script.Budget(
        steps=8,
        batch=4,
        rank=4,
        alpha=8.0,
        lr=0.02,
        weight_decay=0.01,
        clip=1.0,
        test=8,
        new_tokens=3,
        model="",
        tasks={},
    )


# --- scorers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "reply", "answer", "right"),
    [
        ("sums", "17", "17", True),
        ("sums", "12 + 5 = 17.", "17", True),
        ("sums", "The answer is **1,017**", "1017", True),
        ("sums", "5 - 9 = -4", "-4", True),
        ("sums", "5 - 9 = 4", "-4", False),
        ("sums", "17 or 18", "17", False),
        ("sums", "171", "17", False),
        ("sums", "no idea", "17", False),
        ("sums", "", "0", False),
        ("family", "mother-in-law", "mother-in-law", True),
        ("family", "She is the Mother.", "mother", True),
        ("family", "mother-in-law", "mother", False),
        ("family", "mother", "mother-in-law", False),
        ("family", "mother or son", "mother", False),
        ("family", "grandmother", "mother", False),
        ("family", "Sonia", "son", False),
        ("family", "", "son", False),
    ],
)
def test_replies(script: Any, task: str, reply: str, answer: str, right: bool) -> None:
    assert script.TASKS[task].right(reply, answer, ANSWERS[task]) is right


def test_choices_go_by_the_likelier_answer(script: Any, corpora: Any, budget: Any) -> None:
    corpus = corpora["reviews"]
    [positive] = {tuple(corpus.encoder.row("", "positive").ids[-9:])}

    def losses(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Two finetunes: the first likes "positive" better, the second does not. Two nats a token, or one."""
        kept = (labels[:, 1:] != script.IGNORED).float()
        chosen = torch.tensor([tuple(row[row >= 0].tolist())[-9:] == positive for row in labels])[:, None]
        return torch.stack([kept * torch.where(chosen == liked, 1.0, 2.0) for liked in (True, False)])

    def generate(prompts: Any, most: int) -> Any:
        raise AssertionError("nothing is to be generated")

    wanted = "".join("01"[item.answer == "positive"] for item in corpus.items.test)
    assert 0 < wanted.count("1") < len(wanted)
    scores = script.evaluate(corpus, losses, generate, budget, "cpu", size=3)
    assert [right for right, _ in scores] == [wanted, wanted.translate({48: "1", 49: "0"})]
    # Both words have 8 letters, so the mean over tokens is that over items, of which half are right.
    assert [loss for _, loss in scores] == pytest.approx([1.5, 1.5])


def test_replies_are_those_of_their_prompts(script: Any, corpora: Any, budget: Any) -> None:
    corpus = corpora["sums"]
    encoder = corpus.encoder
    known = {tuple(encoder.prompt(item.prompt)): item.answer for item in corpus.items.test}

    def losses(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (labels[:, 1:] != script.IGNORED).float()[None].repeat(2, 1, 1)

    def generate(prompts: list[list[int]], most: int) -> list[list[list[int]]]:
        assert most == budget.new_tokens
        ends = [encoder.tokenizer.eos_token_id]
        said = [encoder.tokenizer(known[tuple(prompt)])["input_ids"] + ends for prompt in prompts]
        return [said, said[1:] + said[:1]]

    (right, loss), (wrong, _) = script.evaluate(corpus, losses, generate, budget, "cpu", size=3)
    assert right == "1" * 8 and loss == pytest.approx(1.0)
    assert wrong.count("1") < 8


# --- items and budgets ----------------------------------------------------------------------------


def test_only_the_answer_is_learnt(script: Any, corpora: Any) -> None:
    encoder = corpora["sums"].encoder
    rows = [encoder.row("1 + 2 =", "3"), encoder.row("1 + 2 + 3 =", "16")]
    ids, labels = script.collate(rows)
    decoded = [encoder.tokenizer.decode(own[own != script.IGNORED]) for own in labels]
    assert decoded == ["3<|im_end|>", "16<|im_end|>"]
    assert torch.equal(ids[labels != script.IGNORED], labels[labels != script.IGNORED])
    assert "1 + 2 =" in encoder.tokenizer.decode(ids[0][labels[0] == script.IGNORED])


def test_a_seed_decides_the_order_and_each_epoch_has_every_item(script: Any, corpora: Any, budget: Any) -> None:
    corpus = corpora["sums"]
    assert len(corpus.train) == 22
    long = replace(budget, steps=11, batch=4)
    batches = corpus.batches(0, long)
    assert [len(rows) for rows in batches] == [4] * 11
    flat = [tuple(row.ids) for rows in batches for row in rows]
    assert set(flat[:22]) == set(flat[22:]) == {tuple(row.ids) for row in corpus.train}
    assert flat[:22] != flat[22:]
    assert batches == corpus.batches(0, long) and batches != corpus.batches(1, long)


def test_the_schedule_rises_and_falls(script: Any, budget: Any) -> None:
    rates = [replace(budget, steps=40).schedule(step).item() for step in range(40)]
    assert rates[0] == pytest.approx(budget.lr / 4) and max(rates) == rates[4] == pytest.approx(budget.lr)
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.01 * budget.lr
    assert replace(budget, steps=1).schedule(0).item() > 0


def test_prepared_tasks_hold_out_what_they_say(script: Any, tmp_path: Path) -> None:
    tasks = script._tasks
    reviews, spam = (tasks.load(path) for path in tasks.prepare(tmp_path, ["reviews", "spam"]))
    for items, answers, sizes in (
        (reviews, {"positive", "negative"}, (4000, 400)),
        (spam, {"spam", "ham"}, (920, 200)),
    ):
        assert (len(items.train), len(items.test)) == sizes
        assert not {item.prompt for item in items.train} & {item.prompt for item in items.test}
        for part in items:
            for size in (100, len(part)):
                counts = {answer: [item.answer for item in part[:size]].count(answer) for answer in answers}
                assert set(counts.values()) == {size // 2}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["reviews.jsonl", "spam.jsonl"]


def test_problems_of_reasoning_gym(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = script._tasks
    start = "State the final answer to the following arithmetic problem: "

    def create_dataset(name: str, size: int, seed: int, **options: Any) -> list[dict[str, str]]:
        assert name == "chain_sum"
        return [{"question": f"{start}{i // 2} + 1 =", "answer": str(i // 2 + 1)} for i in range(size)]  # each twice

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    items = tasks.TASKS["sums"].make()
    prompts = [item.prompt for item in (*items.train, *items.test)]
    assert (len(items.train), len(items.test)) == (4000, 400) and len(set(prompts)) == 4400
    assert all(item.answer == str(int(item.prompt.removesuffix(" + 1 =")) + 1) for item in items.test)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(tasks.real_data.FetchError, match=r"\[bench\]"):
        tasks.TASKS["sums"].make()


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2"), ('{"split": "dev", "prompt": "", "answer": ""}', "line 2"), ("[]", "line 2"), ("", "held out")],
)
def test_files_that_are_none(script: Any, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text('{"split": "train", "prompt": "1", "answer": "1"}\n' + line)
    with pytest.raises(ValueError, match=message):
        script._tasks.load(path)


# --- methods --------------------------------------------------------------------------------------


def results_of(script: Any, method: str, runs: list[Any], corpora: Any, budget: Any) -> list[Any]:
    return list(script.run_method(method, tiny.model(), runs, corpora, budget, "cpu"))


def test_stack_and_peft_on_the_same_floats_are_the_same_training(script: Any, corpora: Any, budget: Any) -> None:
    """Data, order, first values, schedule, clipping, AdamW and scoring: on an unquantized base nothing differs."""
    model = tiny.model()
    runs = [script.Run("sums", 0), script.Run("sums", 1), script.Run("reviews", 0)]
    starts = {seed: script.first_values(model, seed, budget.rank) for seed in (0, 1)}
    base = ft.quantize_base_model(model, modules_not_to_quantize=".*")
    ours = list(script.run_stacked("ours", base, starts, runs, corpora, budget, "cpu"))
    theirs = results_of(script, "peft", runs, corpora, budget)
    assert [row.run for row in ours] == [row.run for row in theirs] == runs
    for mine, other in zip(ours, theirs, strict=True):
        # Sums in another order, 1e-7 each; Adam's direction, where a gradient is near zero, enlarges that.
        assert mine.train_losses == pytest.approx(other.train_losses, rel=1e-4)
        assert mine.loss == pytest.approx(other.loss, rel=1e-4)
        assert (mine.tokens, mine.trainable, mine.right) == (other.tokens, other.trainable, other.right)
    for changed in (replace(budget, lr=0.01), replace(budget, clip=1e6), replace(budget, alpha=4.0)):
        [other] = results_of(script, "peft", runs[:1], corpora, changed)
        assert other.train_losses[-1] != pytest.approx(ours[0].train_losses[-1], rel=1e-4)
    assert ours[1].train_losses[-1] != pytest.approx(ours[0].train_losses[-1], rel=1e-4)


@pytest.mark.parametrize("method", ["peft", "ours", "llm.int8", "ours-nf4"])
def test_every_method_learns(script: Any, corpora: Any, budget: Any, method: str) -> None:
    runs = [script.Run("reviews", 0), script.Run("reviews", 1)]
    rows = results_of(script, method, runs, corpora, budget)
    assert [(row.method, *row.run) for row in rows] == [(method, "reviews", 0), (method, "reviews", 1)]
    [untrained] = results_of(script, "base", runs, corpora, budget)
    shapes = [tuple(value.shape) for value in script.first_values(tiny.model(), 0, budget.rank).values()]
    outputs = [module.out_features for name, module in tiny.model().named_modules() if name.endswith("_proj")]
    trainable = sum(4 * (width + out) for (_, width), out in zip(shapes, outputs, strict=True))
    for row in rows:
        assert len(row.train_losses) == budget.steps and len(row.right) == 8
        assert row.train_losses[-1] < 0.8 * row.train_losses[0]
        assert row.loss < 0.8 * untrained.loss
        assert row.trainable == trainable
        assert row.tokens == sum(
            len(item.ids) for part in corpora["reviews"].batches(row.seed, budget) for item in part
        )
    assert rows[0].train_losses != rows[1].train_losses


def test_llm_int8_is_that_of_bitsandbytes_and_peft(script: Any) -> None:
    import bitsandbytes as bnb
    import peft

    model = script.in_llm_int8(tiny.model())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    kinds = {type(module) for name, module in wrapped.named_modules() if name.endswith(("q_proj", "down_proj"))}
    assert kinds == {peft.tuners.lora.bnb.Linear8bitLt}
    frozen = [module for module in wrapped.modules() if isinstance(module, bnb.nn.Linear8bitLt)]
    assert len(frozen) == 2 * 7 and all(layer.weight.dtype == torch.int8 for layer in frozen)


# --- the command ----------------------------------------------------------------------------------


def command(folder: Path, *more: str) -> list[str]:
    settings = ["--steps", "2", "--batch", "2", "--test", "4", "--rank", "2", "--new-tokens", "2", "--device", "cpu"]
    return ["--model", str(folder / "model"), "--data", str(folder / "tasks"), *settings, *more]


def test_parts_and_their_report(script: Any, folder: Path, tmp_path: Path, capsys: Any) -> None:
    ours, theirs, picture = (tmp_path / name for name in ("ours.json", "theirs.json", "quality.png"))
    script.main(command(folder, "--methods", "ours", "--seeds", "2", "--json", str(ours)))
    script.main(command(folder, "--methods", "base,peft", "--runs", "sums:0,reviews:1", "--json", str(theirs)))
    capsys.readouterr()
    script.main(["--report", str(ours), str(theirs), "--markdown", "--plot", str(picture)])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == [
        "",
        "---",
        "untrained",
        "PEFT, float32",
        "finetuna_func, int8",
    ]
    assert lines[0].count("|") == lines[4].count("|") == 8 and "sums accuracy" in lines[0]
    assert " ± " in lines[4] and lines[4].split("|")[2].strip().endswith("%")
    assert "steps 2, batch 2, rank 2" in printed
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and len(picture.read_bytes()) > 5000
    book = script.read_book(ours)
    assert len(book.results) == 4 and set(book.budget["tasks"]) == {"sums", "reviews"}

    content = ours.read_bytes()  # a run that is there is not run again, and one that is missing is
    script.main(command(folder, "--methods", "ours", "--seeds", "2", "--json", str(ours)))
    assert ours.read_bytes() == content
    script.main(command(folder, "--methods", "ours", "--tasks", "sums", "--seeds", "3", "--json", str(ours)))
    again = script.read_book(ours)
    assert again.results[:4] == book.results and [row.run for row in again.results[4:]] == [("sums", 2)]


def test_reports_that_would_mislead_are_refused(script: Any, folder: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    script.main(command(folder, "--methods", "base", "--tasks", "sums", "--json", str(one)))
    other.write_bytes(one.read_bytes())
    with pytest.raises(SystemExit, match=r"two results of base on sums"):
        script.main(["--report", str(one), str(other)])
    content = json.loads(one.read_text())
    changes: list[dict[str, Any]] = [{"steps": 3}, {"model": "another"}, {"tasks": {"sums": "another"}}]
    for change in changes:
        other.write_text(json.dumps(content | {"budget": content["budget"] | change, "results": []}))
        with pytest.raises(SystemExit, match=rf"different budgets.*{next(iter(change))}"):
            script.main(["--report", str(one), str(other)])
    with pytest.raises(SystemExit, match="different budgets"):
        script.main(command(folder, "--methods", "base", "--tasks", "sums", "--lr", "0.5", "--json", str(one)))
    rows = [
        script.Result(method, "sums", 0, "01", 1.0, [1.0], tokens, 5, 0.0)
        for method, tokens in (("peft", 9), ("ours", 8))
    ]
    with pytest.raises(ValueError, match="different numbers of tokens"):
        script.merged({"one": script.Book(content["budget"], [], rows)})
    strange = [content["results"][0] | change for change in ({"method": "mine"}, {"task": "chess"}, {"right": ""})]
    for wrong in ([1], *({**content, "results": [row]} for row in strange)):
        other.write_text(json.dumps(wrong))
        with pytest.raises(SystemExit, match="no file of results"):
            script.main(["--report", str(other)])


def test_the_table_has_means_spreads_and_paired_differences(script: Any) -> None:
    def row(method: str, seed: int, right: str, loss: float) -> Any:
        return script.Result(method, "sums", seed, right, loss, [], 0, 0, 0.0)

    rows = [
        row("peft", 0, "0001", 1.0),
        row("peft", 1, "0011", 3.0),
        row("ours", 1, "0111", 2.0),
        row("ours", 0, "0011", 2.0),
    ]
    titles, cells = script.table(rows)
    assert titles == ["", "sums accuracy", "sums loss", "accuracy, difference", "loss, difference"]
    # 25 and 50: standard deviation 25 / sqrt(2); differences 25 and 25 points, 1 and -1 nats: error sqrt(2) / sqrt(2).
    assert cells[0] == ["PEFT, float32", "37.5 ± 17.7 %", "2.000 ± 1.414", "", ""]
    assert cells[1] == ["finetuna_func, int8", "62.5 ± 17.7 %", "2.000 ± 0.000", "+25.00 ± 0.00", "+0.0000 ± 1.0000"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--methods", "mine"], "there are base, peft"),
        (["--tasks", ""], "there are sums"),
        (["--runs", "sums"], "TASK:SEED"),
        (["--runs", "sums:-1"], "TASK:SEED"),
        (["--steps", "0"], "at least 1"),
        (["--lr", "nan"], "above 0"),
        (["--json", "nowhere/a.json"], "no folder"),
    ],
)
def test_wrong_arguments(script: Any, wrong: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        script.arguments(wrong)
    assert message in capsys.readouterr().err


def test_a_model_or_a_folder_that_is_not_there(script: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nowhere"):
        script.main([*command(folder), "--model", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="error"):
        script.main(["--prepare", str(folder / "tasks" / "sums.jsonl")])
