"""Options that are made from dataclasses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from specrt.builtin import drafter_paths
from specrt.cli.app import app
from specrt.cli.options import with_options
from specrt.cli.sampling_options import ChatSampling, SamplingOptions
from specrt.cli.train import RunOptions
from specrt.draft.kinds import drafter_names
from specrt.sampling import SamplingParams
from specrt.train.loop.options import DataOptions, EesdDataOptions, EesdOptions, FspadOptions

COMMANDS = (
    "demo", "chat", "generate", "bench", "info", "distill-data", "convert", "replay", "train",
)  # fmt: skip
NOT_OPTIONS = {"logits_processor", "report_trees"}
"""What a command line cannot say, or does not show."""
RENAMED = {
    "batch_size": "--batch",
    "accumulation_steps": "--accumulate",
    "warmup_steps": "--warmup",
}


def options(*names: str) -> dict[str, Any]:
    """The options of a command, by parameter."""
    command: Any = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]
    return {one.name: one for one in command.params}


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        (("train", "fspad"), (DataOptions, FspadOptions, RunOptions)),
        (("train", "eesd"), (EesdDataOptions, EesdOptions, RunOptions)),
        (("generate",), (SamplingOptions,)),
        (("chat",), (ChatSampling,)),
    ],
)
def test_each_field_is_an_option(command: tuple[str, ...], groups: tuple[Any, ...]) -> None:
    found = options(*command)
    for one in (field for group in groups for field in fields(group)):
        option = found[one.name]
        assert option.opts[0] == RENAMED.get(one.name, f"--{one.name.replace('_', '-')}")
        assert option.default == one.default
        assert option.rich_help_panel in ("Data", "Recipe", "Run", "Sampling")


def test_kinds_have_defaults_of_their_own_and_the_same_help() -> None:
    fspad, eesd = options("train", "fspad"), options("train", "eesd")
    changed = {
        name: (fspad[name].default, eesd[name].default)
        for name in fspad.keys() & eesd.keys()
        if fspad[name].default != eesd[name].default
    }
    assert changed == {
        "held_out": (0.02, 0.1),
        "batch_size": (4, 8),
        "lr": (5e-5, 1e-3),
        "schedule": ("linear", "cosine"),
        "clip_value": (0.5, 0.0),
        "clip_norm": (0.0, 1.0),
        "depth": (5, 8),
    }
    assert fspad["schedule"].help == "linear or cosine."
    assert fspad["save_dtype"].help == "bfloat16, float16 or float32."
    assert all(fspad[name].help == eesd[name].help for name in changed)


def test_sampling_options_are_all_there_with_the_same_defaults() -> None:
    """The command line cannot take them from the dataclass, which imports torch."""
    named = {one.name for one in fields(SamplingOptions)} - {"model_defaults"}
    assert named | NOT_OPTIONS == {one.name for one in fields(SamplingParams)}
    assert not named & NOT_OPTIONS
    assert SamplingOptions().params() == SamplingParams(stop=(), stop_token_ids=())


def test_help_names_every_drafter() -> None:
    for command in ("generate", "bench", "demo", "chat"):
        said = options(command)["drafter"].help
        assert all(f"'{name}'" in said for name in drafter_names())
        assert all(f"'{name}'" in said for name in ("auto", "none", *drafter_paths()))


def test_no_help_imports_torch() -> None:
    commands = ["", *COMMANDS, *(f"train {kind}" for kind in ("fspad", "eesd"))]
    code = (
        f"import sys; from specrt.cli import main\nfor name in {commands}:\n"
        "    assert main([*name.split(), '--help']) == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"specrt {name} " in done.stdout for name in commands if name)


@dataclass(frozen=True)
class Window:
    needed: Annotated[int, typer.Option("--need", help="Told.")]
    width: int = 3

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width: expected at least 1, got {self.width}")


def invoke(*args: str) -> Any:
    made, seen = typer.Typer(), []

    @made.command()
    @with_options
    def command(
        context: typer.Context, *, before: int = 1, window: Window, after: bool = False
    ) -> None:
        """Said of it."""
        seen.append((context.command.help, before, window, after))

    result = CliRunner().invoke(made, args)
    return seen[0] if seen else result


def test_a_dataclass_among_other_parameters() -> None:
    assert [one.default is MISSING for one in fields(Window)] == [True, False]
    given = ("--width", "5", "--need", "2", "--before", "4", "--after")
    assert invoke(*given) == ("Said of it.", 4, Window(2, 5), True)
    assert invoke("--need", "2") == ("Said of it.", 1, Window(2), False)


def test_what_a_dataclass_refuses_and_what_is_missing() -> None:
    assert str(invoke("--need", "2", "--width", "0").exception) == (
        "width: expected at least 1, got 0"
    )
    assert invoke().exit_code == 2
