"""The commands on a tiny model: what they write, what they say, and that a killed run goes on as if it were not."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import finetuna_func as ft
from finetuna_func.cli import app
from finetuna_func.cli._base import open_base
from finetuna_func.cli._logs import Logs, read_log
from finetuna_func.train import Report

ROOT = Path(__file__).parents[1]
ADAM = ft.optim.adamw(1e-3)
COMMANDS = ["quantize", "train", "sweep", "eval", "generate", "merge", "export", "inspect"]


def call(*arguments: Any, code: int = 0, **options: Any) -> str:
    """Runs a command in this process; returns what it printed."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"}, **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model, its base, and a file of each format."""
    folder = tmp_path_factory.mktemp("home")
    tiny.model_folder(folder / "model")
    call("quantize", folder / "model", folder / "base", "--all")
    draw = random.Random(0)
    words = [" ".join(draw.choices(["the", "abc", "12", "he"], k=6)) for _ in range(24)]
    tiny.write_jsonl(folder / "poems.jsonl", [{"text": text} for text in words])
    tiny.write_jsonl(folder / "sums.jsonl", [{"prompt": text, "completion": "abcabc"} for text in words[:16]])
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "the the"}]}
        for text in words[:12]
    ]
    tiny.write_jsonl(folder / "chats.jsonl", chats)
    return folder


def three(home: Path) -> list[Any]:
    data = [own for name in ("poems", "sums", "chats") for own in ("--data", home / f"{name}.jsonl")]
    rates, epochs = ["--lr", 1e-2, "--lr", 2e-2, "--lr", 2e-2], ["--epochs", 2, "--epochs", 2, "--epochs", 3]
    return ["--base", home / "base", *data, *rates, *epochs, "--eval-fraction", 0.2, "--dropout", 0.1]


@pytest.fixture(scope="module")
def trained(home) -> Path:
    call("train", *three(home), "--out", home / "run", "--save-every", 3, "--rank", 2, "--rank", 4, "--rank", 8)
    return home / "run"


def tensors(run: Path) -> dict[str, dict[str, bytes]]:
    """The bytes of every tensor of every adapter."""
    files = sorted(run.rglob("adapter_model.safetensors"))
    return {f.parent.name: {k: t.numpy().tobytes() for k, t in load_file(f).items()} for f in files}


def columns(run: Path) -> list[list[str]]:
    """The log without its times."""
    return [line.cells[:-1] for line in read_log(run / "log.csv")]


# --- help and errors ------------------------------------------------------------------------------


def test_help_lists_the_commands_in_order():
    text = call("--help")
    assert [text.index(f"│ {name}") for name in COMMANDS] == sorted(text.index(f"│ {name}") for name in COMMANDS)
    assert "finetuna quantize ./SmolLM2-135M base" in text
    assert call("--version").startswith("finetuna_func ")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_has_an_example(name):
    assert f"  finetuna {name} " in call(name, "--help")


def test_without_arguments_there_is_help():
    assert "Usage" in call(code=2)
    assert "Usage" in call("train", code=2)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["quantize", "nowhere", "x"], 1, "nowhere"),
        (["train", "--out", "x"], 2, "--base: missing"),
        (["train", "--base", "BASE", "--out", "x"], 2, "--data: missing"),
        (["train", "--base", "BASE", "--data", "DATA"], 2, "--out: missing"),
        (["train", "--base", "BASE", "--data", "DATA", "--out", "HOME"], 2, "exists and is not empty; choose another"),
        (
            ["train", "--base", "nowhere", "--data", "DATA", "--out", "x"],
            1,
            "there is no such folder; finetuna quantize",
        ),
        (
            ["train", "--base", "BASE", "--data", "nothing.jsonl", "--out", "x"],
            1,
            "nothing.jsonl: there is no such file",
        ),
        (
            ["train", "--base", "BASE", "--data", "DATA", "--out", "x", "--rank", 2, "--rank", 4],
            2,
            "given 2 times for 1",
        ),
        (["train", "--base", "BASE", "--data", "DATA", "--out", "x", "--name", "a/b"], 2, "'a/b' cannot be the name"),
        (["train", "--base", "BASE", "--data", "DATA", "--out", "x", "--name", "log.csv"], 2, "cannot be the name"),
        (
            ["train", "--base", "BASE", "--data", "DATA", "--data", "DATA", "--name", "a", "--name", "A", "--out", "x"],
            2,
            "two are",
        ),
        (["train", "--base", "BASE", "--data", "DATA", "--out", "x", "--lr", "fast"], 2, "--learning-rate"),
        (["train", "--base", "BASE", "--data", "DATA", "--out", "x", "--lr", -1], 2, "--lr"),
        (["train", "--base", "BASE", "--data", "DATA", "--out", "x", "--schedule", "cos"], 2, "'cosine'"),
        (
            ["train", "--base", "BASE", "--data", "DATA", "--out", "x", "--adapt", "q_prj"],
            1,
            "--adapt: 'q_prj' matches no",
        ),
        (["train", "--base", "BASE", "--data", "DATA", "--out", "x", "--patience", 2], 2, "needs --eval-fraction"),
        (["train", "--base", "BASE", "--data", "DATA", "--out", "x", "--eval-fraction", 1], 2, "a share in"),
        (["train", "--base", "BASE", "--data", "DATA", "--out", "x", "--device", "cuda:99"], 2, "no device that torch"),
        (["train", "--base", "BASE", "--data", "DATA", "--out", "x", "--device", "gpu"], 2, "expected cpu"),
        (["train", "--base", "BASE", "--data", "DATA", "--out", "x", "--rank", 99], 1, "--rank: r=99 is larger than"),
        (["train", "--base", "BASE", "--data", "HOME", "--out", "x"], 1, "datasets cannot read it"),
        (["quantize", "MODEL", "x", "--device", "gpu"], 2, "no device that torch can use here"),
        (["quantize", "HOME", "x"], 1, "expected model.safetensors"),
        (["eval", "--base", "MODEL", "--data", "DATA", "--adapter", "RUN/poems"], 1, "was trained on base"),
        (
            ["eval", "--base", "BASE", "--data", "DATA", "--adapter", "RUN"],
            1,
            "there are RUN/chats, RUN/poems, RUN/sums",
        ),
        (["inspect", "RUN"], 1, "there are RUN/chats, RUN/poems, RUN/sums in it"),
        (["inspect", "HOME"], 1, "is not the folder of a base, a model or an adapter"),
        (["inspect", "DATA"], 1, "there is no such folder; expected one of a base, a model or an adapter"),
        (["export", "--base", "BASE", "--adapter", "RUN/poems", "--adapter", "RUN/sums", "x"], 2, "one at a time"),
        (["sweep", "--base", "BASE", "--data", "DATA", "--data", "DATA", "--out", "x"], 2, "a sweep is on one file"),
        (["sweep", "--base", "BASE", "--data", "DATA", "--out", "x", "--rank", 0], 2, "--rank"),
        (["train", "--base", "BASE", "--data", "DATA", "--out", "x", "--batch-size", 0], 2, "--batch-size"),
        (
            ["train", "--base", "BASE", "--data", "DATA", "--out", "x", "--config", "none.yaml"],
            2,
            "none.yaml cannot be read",
        ),
        (["eval", "--base", "BASE", "--data", "DATA", "--adapter", "HOME"], 1, "is not the folder of an adapter"),
        (["eval", "--base", "BASE", "--data", "DATA", "--adapter", "no"], 1, "--adapter no: there is no such folder"),
        (["generate", "--base", "BASE", "--prompt", ""], 2, "--prompt: empty"),
        (["generate", "--base", "BASE", "--prompt", "a", "--system", "b"], 2, "--system: needs --chat"),
        (["generate", "--base", "BASE", "--prompt", "a", "--top-p", 2], 2, "--top-p"),
        (["generate", "--base", "BASE", "--prompt", "a", "--top-p", 0], 1, "top_p=0.0"),
        (["inspect", "nowhere"], 1, "there is no such folder"),
        (["sweep", "--base", "BASE", "--data", "DATA", "--out", "x", "--rank", 2, "--rank", 2], 2, "there twice"),
        (
            ["generate", "--base", "BASE", "--prompt", "a", "--max-new-tokens", 256],
            1,
            "257 tokens are more than the 256",
        ),
        (["quantize", "MODEL", "BASE"], 1, "exists; choose another folder"),
        (["quantize", "MODEL", "x", "--all", "--keep", "q_proj"], 2, "contradicts --keep"),
        (["quantize", "MODEL", "x", "--scheme", "int7"], 2, "'blockwise8', 'nf4'"),
        (["quantize", "MODEL", "x", "--keep", "q_prj"], 1, "q_prj"),
    ],
)
def test_errors_name_what_is_wrong_and_leave_nothing(home, trained, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    names = {"BASE": home / "base", "DATA": home / "poems.jsonl", "HOME": home, "MODEL": home / "model"}
    names |= {"RUN": trained} | {f"RUN/{name}": trained / name for name in ("poems", "sums")}
    text = " ".join(call(*(names.get(a, a) for a in arguments), code=code).replace("│", " ").split())
    text = text.replace(str(trained), "RUN")
    assert message in text
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_faults_of_ours_are_shown_whole(home, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr("finetuna_func.cli.inspect.open_base", broken)
    with pytest.raises(KeyError, match="a fault"):
        call("inspect", home / "base")


# --- quantize -------------------------------------------------------------------------------------


def test_a_base_stands_by_itself(home, tmp_path):
    model = tiny.model_folder(tmp_path / "model", seed=3)
    text = call("quantize", model, tmp_path / "base")
    shutil.rmtree(model)
    base = open_base(tmp_path / "base", "cpu")
    assert base.fingerprint == ft.quantize_base_model(tiny.model(seed=3)).fingerprint and base.fingerprint in text
    assert "LlamaForCausalLM, 14 layers in int8" in text
    assert open_base(home / "base").fingerprint != base.fingerprint
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert (
        tokenizer.chat_template == tiny.CHATML and tokenizer("the")["input_ids"] == tiny.tokenizer()("the")["input_ids"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_model_that_asks_for_the_dtype_of_its_head(home, tmp_path):
    """Mamba casts to ``lm_head.weight.dtype``, also where the head is in 8 bits."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 272, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.2}
    MambaForCausalLM(MambaConfig(**sizes, eos_token_id=263, pad_token_id=263)).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    call("quantize", tmp_path / "model", tmp_path / "base", "--all")
    assert open_base(tmp_path / "base").skeleton.layers["lm_head"].scheme is not None
    data = ["--base", tmp_path / "base", "--data", home / "poems.jsonl"]
    call("train", *data, "--steps", 8, "--lr", 2e-2, "--out", tmp_path / "run")
    call("eval", *data, "--adapter", tmp_path / "run/poems", "--out", tmp_path / "eval.json")
    base, tuned = (own["loss"] for own in json.loads((tmp_path / "eval.json").read_text()))
    assert tuned < base - 0.3
    generate = ["generate", "--base", tmp_path / "base", "--adapter", tmp_path / "run/poems"]
    assert "poems" in call(*generate, "--prompt", "the", "--max-new-tokens", 4)


# --- train ----------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_says(home, trained):
    names = {path.name for path in trained.iterdir()} - {".lock"}
    assert names == {
        *("poems", "sums", "chats"),
        *("config.yaml", "checkpoint.safetensors", "log.csv", "curves.png", "summary.json"),
    }
    base = open_base(home / "base", "cpu")
    for name, rank in zip(("poems", "sums", "chats"), (2, 4, 8), strict=True):
        tuned = ft.load(trained / name, base)
        assert {own.config.r for own in tuned.spec.adapters} == {rank} and len(tuned.spec.adapters) == 14
        assert {own.config.alpha for own in tuned.spec.adapters} == {2 * rank}
    lines = read_log(trained / "log.csv")
    steps = {name: [line.step for line in lines if line.adapter == name] for name in ("poems", "sums", "chats")}
    # Of 24, 16 and 12 examples a fifth is held out; 2, 2 and 3 epochs; four rows a step.
    assert [max(own) for own in steps.values()] == [10, 7, 8]
    assert all(own == list(range(1, len(own) + 1)) for own in steps.values())
    summary = json.loads((trained / "summary.json").read_text())
    assert [own["status"] for own in summary] == ["finished"] * 3
    for own in summary:
        measured = [line.held_out for line in lines if line.adapter == own["name"] and line.held_out == line.held_out]
        assert own["held_out_loss"] == pytest.approx(min(measured), rel=1e-8) and len(measured) > 2
        first = next(line.loss for line in lines if line.adapter == own["name"])
        assert min(measured) < first - 0.3
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_config_file_is_the_flags(home, trained, tmp_path):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    config["out"] = str(tmp_path / "again")
    config["learning-rate"] = config.pop("learning_rate")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    call("train", "--config", tmp_path / "run.yaml")
    assert tensors(tmp_path / "again") == tensors(trained)
    # Flags win over it.
    call("train", "--config", tmp_path / "run.yaml", "--out", tmp_path / "other", "--lr", 1e-3)
    assert tensors(tmp_path / "other") != tensors(trained)
    assert yaml.safe_load((tmp_path / "other/config.yaml").read_text())["learning_rate"] == [1e-3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": oops}', "a.jsonl, line 2: not JSON: Expecting value at character 10."),
        ("", "a.jsonl: there is no example in it."),
        ('{"txt": "a"}', "a.jsonl, example 1: has the keys ['txt']; expected exactly one of"),
        ('{"messages": [{"role": "user", "content": "a"}]}', 'no message has the role "assistant"'),
        ('{"prompt": "a", "completion": ["b"]}', '"completion" is a list, expected a string'),
    ],
)
def test_data_files_that_are_refused(home, tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    for command in (["train", "--out", tmp_path / "x"], ["sweep", "--out", tmp_path / "x"], ["eval"]):
        text = call(*command, "--base", home / "base", "--data", tmp_path / "a.jsonl", code=1)
        assert message in text.replace("\n", " ") and "Traceback" not in text
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "did you mean learning_rate"),
        ("- a", "is not a list of options"),
        ("a: [", "cannot be read"),
        ("rank: many", "--rank"),
        ("resume: true", "no option"),
    ],
)
def test_config_files_that_are_refused(home, tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    text = call("train", *three(home), "--out", tmp_path / "run", "--config", tmp_path / "run.yaml", code=2)
    assert message in " ".join(text.replace("│", " ").split())


def test_small_numbers_in_yaml(home, tmp_path):
    # YAML 1.1 reads 1e-3 as a string.
    (tmp_path / "run.yaml").write_text(
        f"base: {home / 'base'}\ndata: {home / 'poems.jsonl'}\nlearning_rate: 1e-3\nsteps: 1\nrank: [2]\n"
    )
    call("train", "--config", tmp_path / "run.yaml", "--out", tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["learning_rate"] == [1e-3]


def test_a_file_twice_gets_two_names(home, tmp_path):
    data = ["--data", home / "poems.jsonl"] * 2
    call("train", "--base", home / "base", *data, "--seed", 1, "--seed", 2, "--steps", 2, "--out", tmp_path / "run")
    one, two = tensors(tmp_path / "run").items()
    assert (one[0], two[0]) == ("poems-1", "poems-2") and one[1] != two[1]


def test_training_on_datasets(home, tmp_path):
    """A folder and a parquet file train what the lines train; and the folder is known again."""
    import datasets

    lines = [json.loads(line) for line in (home / "sums.jsonl").read_text().splitlines()]
    dataset = datasets.Dataset.from_list(lines)
    dataset.save_to_disk(tmp_path / "folder")
    dataset.to_parquet(tmp_path / "file.parquet")
    data = [home / "sums.jsonl", tmp_path / "folder", tmp_path / "file.parquet"]
    options = ["--base", home / "base", *(own for path in data for own in ("--data", path)), "--steps", 2]
    call("train", *options, "--out", tmp_path / "run")
    found = tensors(tmp_path / "run")
    assert found["sums"] == found["folder"] == found["file"] and len(found) == 3
    call("train", "--out", tmp_path / "run", "--resume")
    dataset.select(range(4)).save_to_disk(tmp_path / "other")
    shutil.rmtree(tmp_path / "folder")
    (tmp_path / "other").rename(tmp_path / "folder")
    assert "the data is not what the run was begun with" in call("train", "--out", tmp_path / "run", "--resume", code=1)


def test_options_reach_the_training(home, tmp_path):
    base, data = ["--base", home / "base"], ["--data", home / "poems.jsonl"]
    options = ["--pack", "--max-length", 40, "--dora", "--rslora", "--adapt", "q_proj", "--plain", "norm", "--steps", 2]
    text = call("train", *base, *data, *options, "--out", tmp_path / "run", "--eval-data", home / "sums.jsonl")
    tuned = ft.load(tmp_path / "run/poems", open_base(home / "base", "cpu"))
    assert {a.path.rpartition(".")[2] for a in tuned.spec.adapters} == {"q_proj"}
    assert all(a.config.dora and a.config.rank_stabilized for a in tuned.spec.adapters)
    assert tuned.spec.plain == ("model.norm.weight",)
    found = re.search(r"poems +│ +(\d+) │ +[\d,]+ │ +(\d+)", text)
    assert found and int(found[1]) < 12 and int(found[2]) < 16  # of 24 and 16


def test_examples_that_are_cut_are_reported(home, tmp_path):
    base, data = ["--base", home / "base"], ["--data", home / "sums.jsonl", "--steps", 1]
    text = call("train", *base, *data, "--max-length", 14, "--out", tmp_path / "run")
    assert "sums.jsonl: " in text and "cut at 14 tokens" in text


def test_tensorboard(home, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    base, data = ["--base", home / "base"], ["--data", home / "poems.jsonl"]
    call("train", *base, *data, "--steps", 3, "--tensorboard", "--out", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    lines = read_log(tmp_path / "run/log.csv")
    assert [e.value for e in events.Scalars("loss/poems")] == pytest.approx([line.loss for line in lines])


# --- a run that is stopped ------------------------------------------------------------------------


def start(arguments: list[Any]) -> subprocess.Popen[str]:
    """Starts a command in a process of its own."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "finetuna_func.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process: subprocess.Popen[str], log: Path, lines: int) -> None:
    """Waits until the log has so many lines."""
    end = time.monotonic() + 240
    while not log.is_file() or log.read_text().count("\n") < lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_killed_run_goes_on_bitwise(home, trained, tmp_path, seed):
    draw = random.Random(seed)
    # The threads of this process, so that sums are in the same order.
    whole = start(["train", *three(home), "--out", tmp_path / "whole", "--save-every", 3])
    killed = start(["train", *three(home), "--out", tmp_path / "killed", "--save-every", 3])
    wait_for(killed, tmp_path / "killed/log.csv", lines := draw.randrange(1, 22))
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert whole.wait(240) == 0, whole.communicate()[0]
    print(f"killed at {lines} lines, {read_log(tmp_path / 'killed/log.csv')[-1:]}")
    assert not tensors(tmp_path / "killed") and len(tensors(tmp_path / "whole")) == 3
    # Half a line, and whole ones after the last checkpoint, are written again.
    with (tmp_path / "killed/log.csv").open("a") as file:
        file.write("7,poems,3.9")
    again = start(["train", "--out", tmp_path / "killed", "--resume"])
    text = again.communicate(timeout=240)[0]
    assert again.returncode == 0, text
    assert tensors(tmp_path / "killed") == tensors(tmp_path / "whole")
    files = [(tmp_path / name / "checkpoint.safetensors").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]
    assert columns(tmp_path / "killed") == columns(tmp_path / "whole")


def test_being_asked_to_end_saves_where_it_is(home, tmp_path):
    arguments = ["train", *three(home), "--out", tmp_path / "run", "--save-every", 1000]
    process = start(arguments)
    wait_for(process, tmp_path / "run/log.csv", 6)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=240)[0]
    if process.returncode:  # else it was at its end already
        assert process.returncode == 130 and "Stopped" in text
    step = read_log(tmp_path / "run/log.csv")[-1].step
    text = call(*arguments, "--resume")
    # Asked just after the lines of a step were written, it takes that step again.
    assert int(re.findall(r"Going on after step (\d+)\.", text)[0]) in (step - 1, step)
    before = tensors(tmp_path / "run")
    assert len(before) == 3 and each_step_once(tmp_path / "run")
    call("train", "--out", tmp_path / "run", "--resume")  # there is nothing left to do
    assert tensors(tmp_path / "run") == before


def test_a_step_logged_but_not_kept_is_taken_again(home, tmp_path, monkeypatch):
    arguments = ["train", *three(home), "--out", tmp_path / "run", "--save-every", 1000]

    def write(logs: Logs, report: Report, seconds: float) -> None:
        Logs.write(logs, report, seconds)
        if report.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("finetuna_func.cli._run.Logs", type("Stopping", (Logs,), {"write": write}))
        call(*arguments, code=130)
    assert read_log(tmp_path / "run/log.csv")[-1].step == 3
    assert "Going on after step 2." in call(*arguments, "--resume")
    assert each_step_once(tmp_path / "run")


def each_step_once(run: Path) -> bool:
    """Whether the log has the steps of each adapter from the first on, with no gap and no step twice."""
    lines = read_log(run / "log.csv")
    steps = [[line.step for line in lines if line.adapter == name] for name in {line.adapter for line in lines}]
    return len(steps) == 3 and all(own == list(range(1, len(own) + 1)) for own in steps)


def test_resuming_is_refused_where_it_would_be_another_run(home, tmp_path):
    data = tmp_path / "poems.jsonl"
    shutil.copy(home / "poems.jsonl", data)
    arguments = ["train", "--base", home / "base", "--data", data, "--out", tmp_path / "run", "--steps", 2]
    call(*arguments, "--resume")  # there is none, so it begins
    assert "--resume" in call(*arguments, code=2)
    text = call(*arguments, "--resume", "--lr", 0.5, code=2)
    assert "--learning-rate" in text and "was begun with [0.001], not [0.5]" in " ".join(text.replace("│", "").split())
    data.write_text(data.read_text() + '{"text": "more"}\n')
    assert "the data is not what the run was begun with" in call(*arguments, "--resume", code=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "- a", "was not written by this command"),
        ("config.yaml", "base: [", "cannot be read"),
        ("config.yaml", "base: x\nrank: [8]", "differs in"),
        ("checkpoint.safetensors", "x", "not a readable state"),
        ("log.csv", "step\nten,poems,,\n", "is not a line of a log"),
    ],
)
def test_damaged_runs_are_not_resumed(home, trained, tmp_path, name, content, message):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    if name != "config.yaml":
        config = yaml.safe_load((trained / "config.yaml").read_text())
        (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config | {"out": str(tmp_path / "run")}))
    before = tensors(tmp_path / "run")
    assert message in call("train", "--out", tmp_path / "run", "--resume", code=1).replace("\n", " ")
    assert tensors(tmp_path / "run") == before


def test_a_sweep_does_not_resume_a_training(trained):
    assert "was not written by this command" in call("sweep", "--out", trained, "--resume", code=1)


def test_texts_longer_than_the_model_has_positions(home, tmp_path):
    data = tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": "12" * 300}])
    for command in (["train", "--out", tmp_path / "x"], ["eval"]):
        text = call(*command, "--base", home / "base", "--data", data, code=1)
        assert "301 tokens are more than the 256" in text.replace("\n", " ")
    call("train", "--base", home / "base", "--data", data, "--out", tmp_path / "x", "--max-length", 256)


def test_tokens_that_the_model_does_not_know(home, tmp_path):
    shutil.copytree(home / "model", tmp_path / "model")
    own = tiny.tokenizer()
    own.add_tokens([f"<{i}>" for i in range(20)])
    own.save_pretrained(tmp_path / "model")
    call("quantize", tmp_path / "model", tmp_path / "base", "--all")
    data = tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": "the <19>"}])
    for command in (
        ["train", "--data", data, "--out", tmp_path / "x"],
        ["eval", "--data", data],
        ["generate", "--prompt", "<19>"],
    ):
        assert "but the model knows 272" in call(*command, "--base", tmp_path / "base", code=1)


def test_two_processes_do_not_share_a_run(home, trained):
    import fcntl

    with (trained / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is at work" in call("train", "--out", trained, "--resume", code=1)


# --- sweep ----------------------------------------------------------------------------------------


def test_a_sweep_is_ranked(home, tmp_path):
    grid = ["--lr", 1e-4, "--lr", 2e-2, "--rank", 2, "--rank", 4, "--seed", 0, "--seed", 5]
    arguments = ["sweep", "--base", home / "base", "--data", home / "poems.jsonl", "--out", tmp_path / "sweep"]
    text = call(*arguments, *grid, "--epochs", 2, "--batch-size", 2)
    with (tmp_path / "sweep/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and len({row["adapter"] for row in rows}) == 8
    losses = [float(row["held out"]) for row in rows]
    assert losses == sorted(losses) and losses[0] < losses[-1] - 0.3
    assert {row["rate"] for row in rows[:4]} == {"0.02"} and {row["alpha"] for row in rows} == {"4", "8"}
    order = [text.index(f" {row['adapter']} ") for row in rows]
    assert order == sorted(order)
    assert f"The best is {tmp_path / 'sweep' / rows[0]['adapter']}." in text.replace("\n", "")
    assert (tmp_path / "sweep/sweep.png").read_bytes().startswith(b"\x89PNG")
    base = open_base(home / "base", "cpu")
    tuned = ft.load(tmp_path / "sweep/lr0.02-r4-seed5", base)
    assert tuned.spec.adapters[0].config.r == 4
    # One of the grid by itself is the same training.
    single = ["--lr", 2e-2, "--rank", 4, "--seed", 5, "--epochs", 2, "--batch-size", 2, "--eval-fraction", 0.1]
    alone = ["train", "--base", home / "base", "--data", home / "poems.jsonl", "--out", tmp_path / "alone", *single]
    call(*alone)
    own = ft.load(tmp_path / "alone/poems", base)
    for name, leaf in own.params.items():
        torch.testing.assert_close(tuned.params[name], leaf, rtol=0, atol=2e-3)
    before = (tmp_path / "sweep/sweep.csv").read_bytes()
    call("sweep", "--out", tmp_path / "sweep", "--resume")
    assert (tmp_path / "sweep/sweep.csv").read_bytes() == before


def test_a_sweep_in_parts_is_the_sweep(home, tmp_path):
    """Stack after stack, killed in the second: the numbers of one stack, up to the order of its sums."""
    grid = ["--lr", 1e-4, "--lr", 1e-2, "--rank", 2, "--rank", 4, "--seed", 3, "--epochs", 2, "--dropout", 0]
    arguments = ["sweep", "--base", home / "base", "--data", home / "poems.jsonl", *grid, "--save-every", 1]
    call(*arguments, "--out", tmp_path / "whole")
    parts = [*arguments, "--at-once", 3, "--out", tmp_path / "parts"]
    process = start(parts)
    wait_for(process, tmp_path / "parts/part-2/log.csv", 4)
    process.kill()
    process.wait()
    text = call("sweep", "--out", tmp_path / "parts", "--resume")
    assert "Stack 1 of 2: 2 of 4 adapters" in text and "Going on after step" in text
    tables = []
    for name in ("whole", "parts"):
        with (tmp_path / name / "sweep.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
        lines = read_log(tmp_path / name / "log.csv")
        assert len(lines) == 4 * 11 and len({line.adapter for line in lines}) == 4
    assert [row["adapter"] for row in tables[0]] == [row["adapter"] for row in tables[1]]
    own, other = (torch.tensor([float(row["held out"]) for row in table]) for table in tables)
    torch.testing.assert_close(own, other, rtol=0, atol=1e-4)
    assert own[-1] - own[0] > 0.1
    base = open_base(home / "base", "cpu")
    for row in tables[0]:
        one, two = (ft.load(tmp_path / name / row["adapter"], base) for name in ("whole", "parts"))
        moved = 0.0
        for name, leaf in one.params.items():
            # Adam's steps are of the size of the rate, whatever the gradient's; ten of them, some turned by rounding.
            torch.testing.assert_close(two.params[name], leaf, rtol=0, atol=0.2 * float(row["rate"]))
            moved = max(moved, float(leaf.abs().max()) if name.endswith("lora_b") else 0.0)
        assert moved > 2 * float(row["rate"])
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {
        *(path.name for path in (tmp_path / "whole").iterdir() if path.name != "checkpoint.safetensors"),
        *("part-1", "part-2"),
    }
    yaml_of = yaml.safe_load((tmp_path / "parts/config.yaml").read_text())
    assert yaml_of["at_once"] == 3 and yaml.safe_load((tmp_path / "whole/config.yaml").read_text())["at_once"] == 4
    assert "--at-once" in call(*arguments, "--at-once", 0, "--out", tmp_path / "x", code=2)
    text = call(*arguments, "--at-once", 1, "--rank", 99, "--out", tmp_path / "x", code=1)
    assert "rank" in text and not (tmp_path / "x").exists()


def test_as_many_at_once_as_memory_holds(home, monkeypatch):
    from finetuna_func.cli._parts import SPARE, fitting, parts_of
    from finetuna_func.data import Sample
    from finetuna_func.train import Settings, Task

    base, row = open_base(home / "base", "cpu"), (Sample(tuple(range(64)), (True,) * 64),)
    tasks = [Task(f"{r}-{i}", [row], adapter=ft.LinearAdapterConfig(r=r)) for i in range(4) for r in (2, 8)]

    def fit(available: int | None) -> int:
        return fitting(base, tasks, Settings(batch_size=2), None, (), available=available)

    assert fit(None) == 8  # on the CPU, where memory is not asked for
    # Three adapters of the highest rank, by what a step of them takes and two copies of them and their moments.
    three = ft.stack([ft.new_finetuned(base, plain_layers=(), linear_config=ft.LinearAdapterConfig(r=8))] * 3)
    report = ft.memory_report(base, three, (3, 2, 64), tx=ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ADAM))
    # The default adapts every linear layer; `new_finetuned` the table too.
    needed = int((report.peak + 2 * report.adapters + report.optimizer) / SPARE)
    assert 2 <= fit(needed) <= 4 and fit(needed // 2) < fit(needed) < fit(2 * needed) <= 8
    with pytest.raises(MemoryError, match="this step needs"):
        fit(base.nbytes)

    asked = []

    def of_100_each(base: Any, stacked: Any, shape: Any, **options: Any) -> ft.MemoryReport:
        asked.append((shape, max(member.adapters[0].config.r for member in stacked.spec.members)))
        return ft.MemoryReport(0, 0, 0, 0, 0, 0, peak=100 * shape[0])

    monkeypatch.setattr(ft, "memory_report", of_100_each)
    for available, expected in ((99, None), (100, 1), (399, 3), (400, 4), (799, 7), (800, 8), (10**9, 8)):
        if expected is None:
            with pytest.raises(MemoryError):
                fit(int(available / SPARE))
        else:
            assert fit(-int(-available // SPARE)) == expected
    assert {shape[1:] for shape, _ in asked} == {(2, 64)} and {rank for _, rank in asked} == {8}
    assert parts_of(8, 3) == [[0, 1, 2], [3, 4, 5], [6, 7]] and parts_of(3, 8) == [[0, 1, 2]]


# --- eval, generate -------------------------------------------------------------------------------


def adapters(run: Path, *names: str) -> list[Any]:
    return [own for name in names for own in ("--adapter", run / name)]


def test_eval_is_a_matrix(home, trained, tmp_path):
    names = ("poems", "sums", "chats")
    data = [own for name in names for own in ("--data", home / f"{name}.jsonl")]
    arguments = ["eval", "--base", home / "base", *adapters(trained, *names), *data]
    text = call(*arguments, "--out", tmp_path / "eval.json")
    found = json.loads((tmp_path / "eval.json").read_text())
    assert [own["adapter"] for own in found[::3]] == ["the base", *names]
    matrix = torch.tensor([own["loss"] for own in found]).view(4, 3)
    assert matrix.argmin(0).tolist() == [1, 2, 3]
    for own in found:
        assert f"{own['loss']:.4f}" in text and own["perplexity"] == pytest.approx(
            torch.tensor(own["loss"]).double().exp()
        )
    # By hand, with the model that Hugging Face would run.
    base, tokenizer = open_base(home / "base", "cpu"), tiny.tokenizer()
    model: Any = ft.to_module(base, ft.load(trained / "sums", base))
    losses = []
    for line in (home / "sums.jsonl").read_text().splitlines():
        example = json.loads(line)
        prompt = tokenizer(example["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *tokenizer(example["completion"])["input_ids"], tokenizer.eos_token_id]])
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="none"))
    assert matrix[2, 1].item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    packed = json.loads(call(*arguments, "--json", "--pack", "--limit", 1000).partition("\n[")[2].join(["[", ""]))
    assert [own["loss"] for own in packed] == pytest.approx([own["loss"] for own in found], rel=1e-5)


def test_generate_is_what_generate_gives(home, trained):
    base, tokenizer = open_base(home / "base", "cpu"), tiny.tokenizer()
    names = ("poems", "sums", "chats")
    arguments = ["generate", "--base", home / "base", *adapters(trained, *names), "--max-new-tokens", 9, "--json"]
    out = call(*arguments, "--with-base", "--prompt", "the abc", "--prompt", "12")
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [own["adapter"] for own in found] == ["the base", *names] * 2
    tuned = {"the base": None, **{name: ft.load(trained / name, base) for name in names}}
    for own in found:
        model: Any = ft.to_module(base, tuned[own["adapter"]])
        ids = tokenizer(own["prompt"], return_tensors="pt")
        answer = model.generate(**ids, max_new_tokens=9, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert own["answer"] == tokenizer.decode(answer, skip_special_tokens=True)
    chat = json.loads(call(*arguments, "--chat", "--prompt", "the he").splitlines()[-1])
    assert chat["adapter"] == "chats" and "the" in chat["answer"]
    text = call(*arguments[:-1], input="the abc")
    assert all(f"│ {name}" in text for name in names)


def test_adapters_of_other_layers_answer_together(home, trained, tmp_path):
    base, data = ["--base", home / "base"], ["--data", home / "poems.jsonl"]
    call("train", *base, *data, "--adapt", "q_proj", "--steps", 1, "--out", tmp_path / "run", "--name", "other")
    both = [*adapters(trained, "poems"), *adapters(tmp_path / "run", "other")]
    out = call("generate", *base, *both, "--prompt", "the", "--json", "--max-new-tokens", 3)
    assert [json.loads(line)["adapter"] for line in out.splitlines()] == ["poems", "other"]
    assert "other" in call("eval", *base, *both, *data)


# --- merge, export, inspect -----------------------------------------------------------------------


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


def test_exports_are_read_by_others(home, trained, tmp_path):
    base = open_base(home / "base", "cpu")
    expected = logits_of(ft.to_module(base, ft.load(trained / "poems", base)))
    plain = logits_of(ft.to_module(base, None))
    assert (expected - plain).abs().max() > 0.1
    one = ["--base", home / "base", *adapters(trained, "poems")]
    call("export", *one, "--model", home / "model", tmp_path / "peft")
    call("export", *one, "--format", "merged", tmp_path / "merged")
    call("merge", *one, tmp_path / "same")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "same", dtype=torch.float32)
    assert torch.equal(logits_of(same), logits_of(merged))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tiny.CHATML
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "model") and config["task_type"] == "CAUSAL_LM"
    # PEFT on the float weights of the base, which is what the adapter was trained on.
    call("merge", "--base", home / "base", *adapters(trained, "sums"), "--weight", 0, tmp_path / "base")
    float_base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    torch.testing.assert_close(logits_of(float_base), plain, rtol=1e-4, atol=1e-4)
    peft = PeftModel.from_pretrained(float_base, tmp_path / "peft")
    torch.testing.assert_close(logits_of(peft), expected, rtol=1e-4, atol=1e-4)
    text = call("export", *one, "--format", "merged", tmp_path / "merged", code=1)
    assert "exists; choose another folder" in text
    assert "'int4' is none of" in call("export", *one, "--format", "merged", "--dtype", "int4", tmp_path / "x", code=2)


def test_a_weighted_merge(home, trained, tmp_path):
    base = open_base(home / "base", "cpu")
    both = ["--base", home / "base", *adapters(trained, "poems", "sums")]
    call("merge", *both, "--weight", 0.25, "--weight", -0.5, "--dtype", "float32", tmp_path / "both")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "both", dtype=torch.float32).state_dict()
    plain, poems, sums = (
        ft.merge(base, tuned) for tuned in (None, *(ft.load(trained / name, base) for name in ("poems", "sums")))
    )
    for name, leaf in plain.items():
        expected = leaf + 0.25 * (poems[name] - leaf) - 0.5 * (sums[name] - leaf)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)
    assert "--weight" in call("merge", *both, "--weight", 1, tmp_path / "x", code=2)


def test_inspect(home, trained):
    text = call("inspect", home / "base")
    base = open_base(home / "base", "cpu")
    assert base.fingerprint in text and "16 int8" in text and f"{base.nbytes:,}" in text
    assert "[0-1]" in text and "weight int8 24 × 16 768 int8" in text.replace("  ", " ")
    assert "[0-1]" not in call("inspect", home / "base", "--every")
    text = call("inspect", trained / "sums")
    values = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in text.splitlines() if line.count("│") == 3
    }
    assert values["base"] == base.fingerprint and values["rank"] == "4" and values["for PEFT"] == "yes"
    assert values["parameters"] == f"{ft.load(trained / 'sums', base).num_params:,}"


# --- screens --------------------------------------------------------------------------------------


def test_the_live_table(home, tmp_path):
    """What a terminal of 80 columns shows in the end, read off an emulated one."""
    import pty

    import pyte

    arguments = ["train", *three(home), "--out", tmp_path / "run"]
    screen, (reader, writer) = pyte.Screen(80, 40), pty.openpty()
    stream = pyte.ByteStream(screen)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "80", "LINES": "40", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "finetuna_func.cli", *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=writer, stderr=writer, stdin=subprocess.DEVNULL)
    os.close(writer)
    try:
        while block := os.read(reader, 65536):
            stream.feed(block)
    except OSError:  # the other side is closed
        pass
    assert process.wait(240) == 0
    shown = "\n".join(line.rstrip() for line in screen.display)
    print(shown)
    for name, steps in (("poems", 10), ("sums", 7), ("chats", 8)):
        assert any(f"{name} " in line and "━━━━" in line and f" {steps}/{steps} " in line for line in screen.display)
    assert "tokens/s" in shown and shown.count("━━━━") >= 3 and "Adapters, logs and curves are in" in shown
