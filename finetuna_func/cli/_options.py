"""Options that several commands share, and the config file that stands for them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer
import yaml

from finetuna_func.train import ScheduleName

Init: TypeAlias = Literal["default", "gaussian", "pissa", "olora"]

BaseOption = Annotated[
    Path | None, typer.Option("--base", help="Folder of the base, from `finetuna quantize`.", rich_help_panel="Files")
]
RequiredBase = Annotated[Path, typer.Option("--base", help="Folder of the base, from `finetuna quantize`.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where to compute, such as `cpu` or `cuda:1`. [default: cuda if there is one]")
]
AdapterOption = Annotated[list[Path], typer.Option("--adapter", help="Folder of an adapter. Repeat for several.")]


def read_config(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a YAML file, by the names of the flags.

    Args:
        path: The file.
        known: The command's options; whether each takes several values.

    Raises:
        typer.BadParameter: It cannot be read, or has an unknown name; the message lists near ones.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}", param_hint="--config") from error
    if not isinstance(content, dict):
        raise typer.BadParameter(
            f"{path} is not a list of options; expected lines such as `learning_rate: 1e-3`.", param_hint="--config"
        )
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)
            raise typer.BadParameter(
                f"{path} has {key!r}, which is no option; did you mean {', '.join(near)}?", param_hint="--config"
            )
        if value is not None:
            values[name] = value if not known[name] or isinstance(value, list) else [value]
    return values


def _use_config(ctx: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        names = {
            p.name: bool(getattr(p, "multiple", False))
            for p in ctx.command.params
            if p.name and p.name not in ("config", "resume", "help")
        }
        ctx.default_map = read_config(path, names)
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_use_config,
        help="YAML file with any of these options, under the same names; flags given beside it win.",
        rich_help_panel="Files",
    ),
]


def _option(panel: str, help: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **options)


# Those of a run, shared by `train` and `sweep`. Where a list is taken: once for all adapters, or once for each.
OutOption = Annotated[Path | None, _option("Files", "New folder for the run.", "--out")]
EvalDataOption = Annotated[
    list[Path] | None, _option("Evaluation", "File to evaluate on, in place of --eval-fraction.", "--eval-data")
]
EvalEveryOption = Annotated[
    int | None, _option("Evaluation", "Steps between evaluations. [default: ten in the longest run]", min=1)
]
PatienceOption = Annotated[
    int | None,
    _option("Evaluation", "Stop an adapter after so many evaluations without improvement. [default: never]", min=1),
]
KeepBestOption = Annotated[
    bool, _option("Evaluation", "Save each adapter as it was best on what is held out, or as it is at the end.")
]
EpochsOption = Annotated[list[float], _option("Per adapter", "How often to go through the data.", "--epochs", min=0)]
StepsOption = Annotated[
    list[int] | None, _option("Per adapter", "Steps to take, in place of --epochs.", "--steps", min=1)
]
LengthOption = Annotated[list[int], _option("Per adapter", "Most tokens in an example.", "--max-length", min=2)]
DropoutOption = Annotated[
    list[float], _option("Per adapter", "Dropout before the adapters.", "--dropout", min=0, max=1)
]
GridDropoutOption = Annotated[list[float], _option("Grid", "Dropout. Repeat for several.", "--dropout", min=0, max=1)]
AdaptOption = Annotated[
    list[str] | None,
    _option(
        "Adapters",
        "Layer to adapt: a name (`q_proj`), a path or a regex. Repeat for several. [default: every linear layer but "
        "the head]",
        "--adapt",
    ),
]
PlainOption = Annotated[
    list[str] | None, _option("Adapters", "Layer to train directly, in full. Repeat for several.", "--plain")
]
DoraOption = Annotated[bool, _option("Adapters", "DoRA: train the length of each row apart from its direction.")]
RsloraOption = Annotated[bool, _option("Adapters", "Scale by alpha / sqrt(rank) in place of alpha / rank.")]
InitOption = Annotated[Init, _option("Adapters", "First values.")]
BatchOption = Annotated[int, _option("Steps", "Rows of each adapter in one forward.", min=1)]
AccumulateOption = Annotated[int, _option("Steps", "Forwards in one step.", min=1)]
ScheduleOption = Annotated[ScheduleName, _option("Steps", "How the rate falls after its rise.")]
WarmupOption = Annotated[float, _option("Steps", "Share of the steps in which the rate rises.", min=0, max=1)]
DecayOption = Annotated[float, _option("Steps", "Decoupled weight decay.", min=0)]
ClipOption = Annotated[float, _option("Steps", "Limit of each adapter's gradient norm; `inf` for none.", min=0)]
RematOption = Annotated[
    bool, _option("Steps", "Compute activations again in the backward pass: less memory, more time.")
]
CompileOption = Annotated[bool, _option("Steps", "Compile the model's blocks: slow first steps, then faster ones.")]
PackOption = Annotated[bool, _option("Data", "Put several short examples in a row; they do not see one another.")]
CompletionOption = Annotated[
    bool, _option("Data", "Learn only completions and the assistant's turns, or every token of prompts too.")
]
AtOnceOption = Annotated[
    int | None,
    _option(
        "Steps",
        "Adapters in one stack; where there are more, stack after stack is trained. [default: all; on CUDA, as many as "
        "its memory holds]",
        min=1,
    ),
]
SaveEveryOption = Annotated[int, _option("Files", "Steps between checkpoints, from which --resume goes on.", min=1)]
TensorboardOption = Annotated[bool, _option("Files", "Write OUT/tensorboard too.")]
ResumeOption = Annotated[
    bool,
    _option(
        "Files",
        "Go on with the run in OUT, with the options it was begun with, as if it had never been stopped. If there is "
        "none, begin it.",
    ),
]
RunDevice = Annotated[
    str | None, _option("Files", "Where to compute, such as `cpu` or `cuda:1`. [default: cuda if there is one]")
]
