"""From names and directories to drafters: ours, and those of other packages' entry points."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

import specrt
from specrt.draft import kinds
from specrt.draft.base import EmptyDrafter
from specrt.draft.kind import DrafterOptions
from specrt.draft.length.control import parse_control
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.models.model import LlamaModel
from specrt.types import CheckpointError
from tests.checkpoints import (
    edit_config,
    make_checkpoint,
    make_draft_checkpoint,
    make_exit_checkpoint,
    make_official_draft,
)
from tests.engine.support import make_engine, make_model, prompts, texts

MODULE = """
from specrt.draft.base import EmptyDrafter
from specrt.draft.kind import Kind

def make(request):
    drafter = EmptyDrafter()
    drafter.made_of = request
    return drafter

def is_ours(directory):
    return (directory / "oracle.txt").exists()

def fails(request):
    raise KeyError("weights")

oracle = Kind("whatever it says", "an oracle", make, is_ours, has_control=True)
plain = Kind("plain", "nothing", make)
number = 7
refuses = lambda request: (_ for _ in ()).throw(ValueError("not for this target"))
nothing = lambda request: None
"""
POINTS = """
[specrt.drafters]
callable = foreign_drafters:make
oracle = foreign_drafters:oracle
plain = foreign_drafters:plain
number = foreign_drafters:number
fails = foreign_drafters:fails
refuses = foreign_drafters:refuses
nothing = foreign_drafters:nothing
missing = foreign_drafters:not_there
absent = no_such_package_of_drafters:make
prompt-lookup = foreign_drafters:make
small-model = foreign_drafters:make
none = foreign_drafters:make
plain+prompt-lookup = foreign_drafters:make
"""


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlamaModel:
    return make_model(checkpoint)


@pytest.fixture(scope="module")
def checkpoints(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each layout, by what it is."""
    folder = tmp_path_factory.mktemp("drafters")
    make_exit_checkpoint(checkpoint, folder / "exit", 1)
    make_draft_checkpoint(checkpoint, folder / "own")
    make_official_draft(folder / "official", checkpoint, "eagle2")
    make_checkpoint("llama", folder / "small", num_hidden_layers=1)
    return {layout: folder / layout for layout in ("exit", "own", "official", "small")}


def install(folder: Path, points: str, name: str = "foreign") -> None:
    """What pip leaves of a package that brings entry points."""
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "foreign_drafters.py").write_text(MODULE)
    install(folder, POINTS)
    monkeypatch.syspath_prepend(folder)
    return folder


def load(model: LlamaModel, name: str | Path, controller: str | None = None):  # type: ignore[no-untyped-def]
    options = DrafterOptions(control=None if controller is None else parse_control(controller))
    return kinds.load_drafter(name, model, None, options)


# --- ours -----------------------------------------------------------------------------------------


def test_a_directory_has_one_kind(checkpoints: dict[str, Path]) -> None:
    told = {
        layout: next(
            kind.name
            for kind in kinds.REGISTRY.values()
            if kind.matches is not None and kind.matches(directory)
        )
        for layout, directory in checkpoints.items()
    }
    assert told == {"exit": "eesd", "own": "fspad", "official": "fspad", "small": "small-model"}


def test_names_are_told_where_a_user_looks() -> None:
    assert specrt.load.__doc__ is not None
    names = [kind.name for kind in kinds.named_kinds()]
    assert "prompt-lookup" in names
    for name in (*names, *kinds.builtin.drafter_paths()):
        assert f'``"{name}"``' in specrt.load.__doc__
        assert repr(name) in kinds.describe_names()
        assert name in kinds.drafter_names()


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; from specrt.draft import kinds; kinds.describe_names(); kinds.drafter_names();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("name", ["lookup", "small-model", ""])
def test_what_is_no_name_is_told_the_names(model: LlamaModel, name: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"drafter: expected none, auto, prompt-lookup, .*, got '{name}'"
    ):
        load(model, name)


@pytest.mark.parametrize("layout", ["exit", "own", "official"])
def test_trained_kinds_take_a_controller(
    model: LlamaModel, checkpoints: dict[str, Path], layout: str
) -> None:
    load(model, checkpoints[layout], "fixed-4")


@pytest.mark.parametrize("name", ["small", *(kind.name for kind in kinds.named_kinds())])
def test_others_take_none(model: LlamaModel, checkpoints: dict[str, Path], name: str) -> None:
    with pytest.raises(ValueError, match="controller: only trained drafters .* got 'fixed'"):
        load(model, checkpoints.get(name, name), "fixed-4")


# --- installed ones -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["callable", "plain"])
def test_an_installed_drafter_by_name(model: LlamaModel, foreign: Path, name: str) -> None:
    drafter = load(model, name)
    assert isinstance(drafter, EmptyDrafter)
    assert drafter.made_of.target is model and drafter.made_of.directory is None
    assert texts(make_engine(model, drafter).generate(prompts(2, 97))) == texts(
        make_engine(model).generate(prompts(2, 97))
    )
    assert name in kinds.drafter_names()


def test_an_installed_drafter_by_directory(
    model: LlamaModel, foreign: Path, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    path = tmp_path / "seer"
    make_checkpoint("llama", path)
    assert isinstance(load(model, path), SmallModelDrafter)
    (path / "oracle.txt").touch()
    drafter = load(model, path, "fixed-4")  # its kind takes a controller
    assert drafter.made_of.directory == path and drafter.made_of.options.control is not None
    with pytest.raises(ValueError, match="drafter: 'oracle' needs a checkpoint"):
        load(model, "oracle")
    (path / "oracle.txt").unlink()
    edit_config(path, drafter="plain")  # says whose it is
    assert load(model, path).made_of.directory == path
    edit_config(path, drafter="absent")
    with pytest.raises(ValueError, match="'absent' .* cannot be used: ModuleNotFoundError"):
        load(model, path)
    (checkpoints["exit"] / "oracle.txt").touch()  # what is ours stays ours
    assert not isinstance(load(model, checkpoints["exit"]), EmptyDrafter)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", "ModuleNotFoundError: No module named 'no_such_package_of_drafters'"),
        ("missing", "AttributeError: .*'not_there'"),
        ("number", "expected a Kind or a callable that takes a DrafterRequest, got int"),
        ("fails", "KeyError: 'weights'"),
        ("nothing", "TypeError: its drafter: expected .*Drafter, got NoneType without start, "),
    ],
)
def test_a_broken_one_is_named_when_it_is_asked_for(
    model: LlamaModel, foreign: Path, name: str, words: str
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^drafter: '{name}' \(\S+, an entry point of foreign 1.2\) cannot be used: {words}",
    ):
        load(model, name)


def test_its_own_words_reach_the_user(model: LlamaModel, foreign: Path) -> None:
    with pytest.raises(ValueError, match="^not for this target$"):
        load(model, "refuses")


def test_our_names_stay_ours(
    model: LlamaModel, foreign: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="specrt"):
        assert isinstance(load(model, "prompt-lookup"), PromptLookupDrafter)
        assert kinds.drafter_names().count("prompt-lookup") == 1
    assert "'prompt-lookup' is specrt's own" in caplog.text
    assert "'small-model' is specrt's own" in caplog.text
    assert "'plain+prompt-lookup' is specrt's own" in caplog.text
    assert "plain+prompt-lookup" not in kinds.drafter_names()


def test_a_name_that_two_packages_bring(model: LlamaModel, foreign: Path) -> None:
    install(foreign, "[specrt.drafters]\nplain = foreign_drafters:make\n", name="other")
    with pytest.raises(ValueError, match="'plain' is brought by several packages, expected one"):
        load(model, "plain")
    assert isinstance(load(model, "callable"), EmptyDrafter)


def test_an_object_that_is_no_drafter(checkpoint: Path) -> None:
    class Half:
        taps = ()

        def propose(self, states, budget): ...  # type: ignore[no-untyped-def]

    with pytest.raises(TypeError, match="got Half without start, prefill, observe, finish"):
        specrt.load(checkpoint, Half(), progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a drafter, got the class EmptyDrafter"):
        specrt.load(checkpoint, EmptyDrafter, progress=False)  # type: ignore[arg-type]


def test_a_directory_of_a_kind_that_nobody_has(model: LlamaModel, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    edit_config(tmp_path, drafter="oracle")
    with pytest.raises(CheckpointError, match="oracle"):
        load(model, tmp_path)
