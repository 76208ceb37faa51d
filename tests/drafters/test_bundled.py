"""Bundled drafters, by target: what a name means, and what is said of one that is another's."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import specrt
from specrt import builtin, targets
from specrt.cli.contenders import name_drafters
from specrt.config import ModelConfig
from specrt.draft import kinds
from specrt.draft.eesd.drafter import EesdDrafter
from specrt.draft.fspad.checkpoint import read_checkpoint
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.draft.with_lookup import WithLookup
from specrt.models.dense import dense
from specrt.targets import PackagedTarget
from specrt.types import CheckpointError
from tests.checkpoints import make_checkpoint, make_draft_checkpoint, make_exit_checkpoint
from tests.cli.test_cli import expect_one_line, run, write_tokenizer

OTHER = "other"
OF_ANOTHER = (
    r"^drafter: the bundled '{}' was made for the target {}; for {} there are: {}prompt-lookup, "
    r"recycle or a directory$"
)


@dataclass(frozen=True)
class Placed(PackagedTarget):
    """A package whose file is a directory of the test's."""

    place: Path = Path()

    def find(self) -> Path | None:
        return self.place


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of ``specrt/builtin`` with two targets, and the other one's weights."""
    folder = tmp_path_factory.mktemp("made")
    for place, layers in (("here/target", 3), (OTHER, 4)):
        make_checkpoint(
            "llama", folder / place, num_hidden_layers=layers, bos_token_id=0, eos_token_id=1
        )
        write_tokenizer(folder / place)
    make_draft_checkpoint(folder / "here/target", folder / "here/fspad")
    make_exit_checkpoint(folder / "here/target", folder / "here/eesd", 1)
    make_draft_checkpoint(folder / OTHER, folder / "here" / OTHER / "fspad", seed=1)
    make_draft_checkpoint(folder / OTHER, folder / "here" / OTHER / "eagle3", "eagle2")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in the package's place."""
    shutil.copytree(made / "here", tmp_path / "here")
    monkeypatch.setattr(builtin, "_HERE", tmp_path / "here")
    placed = Placed("a-package", "4 B", place=made / OTHER)
    monkeypatch.setattr(targets, "PACKAGED", {OTHER: placed})
    return tmp_path / "here"


def fc_of(drafter: object) -> torch.Tensor:
    if isinstance(drafter, WithLookup):
        drafter = drafter.trained
    assert isinstance(drafter, FspadDrafter)
    return dense(drafter.layer.weights.fc).float()


def test_they_are_found_where_they_lie(here: Path) -> None:
    found = {(one.target, one.name): one.path for one in builtin.drafters()}
    assert found == {
        ("builtin", "eesd"): here / "eesd",
        ("builtin", "fspad"): here / "fspad",
        (OTHER, "eagle3"): here / OTHER / "eagle3",
        (OTHER, "fspad"): here / OTHER / "fspad",
    }
    assert builtin.drafter_paths(OTHER).keys() == {"eagle3", "fspad"}
    assert kinds.bundled_names() == ["eagle3", "eesd", "fspad"]
    assert "of 'builtin': 'eesd', 'fspad'; of 'other': 'eagle3', 'fspad'" in kinds.describe_names()
    for name in kinds.bundled_names():
        kinds.check_name(name)


@pytest.mark.parametrize("drafter", ["fspad", "auto"])
def test_a_name_means_the_targets_own(here: Path, made: Path, drafter: str) -> None:
    of = {"builtin": here / "fspad", OTHER: here / OTHER / "fspad"}
    # A path is told by its architecture.
    given = {"builtin": "builtin", OTHER: OTHER, str(made / OTHER): OTHER}
    for target, name in given.items():
        engine = specrt.load(target, drafter, fold=False)
        assert isinstance(engine.drafter, WithLookup) == (drafter == "auto" and name == OTHER)
        _, tensors = read_checkpoint(of[name])
        assert torch.equal(fc_of(engine.drafter), tensors["fc.fc.weight"])
        plain = specrt.load(target).generate("hi", max_new_tokens=12, ignore_eos=True)
        said = engine.generate("hi", max_new_tokens=12, ignore_eos=True)
        assert said.token_ids == plain.token_ids


def test_what_another_target_has_is_refused_by_name(here: Path, made: Path) -> None:
    assert isinstance(specrt.load("builtin", "eesd").drafter, EesdDrafter)
    with pytest.raises(
        CheckpointError, match=OF_ANOTHER.format("eesd", "'builtin'", "'other'", "eagle3, fspad, ")
    ):
        specrt.load(OTHER, "eesd")
    with pytest.raises(
        CheckpointError, match=OF_ANOTHER.format("eagle3", "'other'", "'builtin'", "eesd, fspad, ")
    ):
        specrt.load("builtin", "eagle3")
    make_checkpoint("llama", made / "third", num_hidden_layers=2, bos_token_id=0, eos_token_id=1)
    write_tokenizer(made / "third")
    with pytest.raises(
        CheckpointError,
        match=OF_ANOTHER.format("fspad", "'builtin' and 'other'", "'third'", ""),
    ):
        specrt.load(made / "third", "fspad")


def test_what_auto_is_by_device(here: Path, made: Path) -> None:
    own = ModelConfig.from_directory(here / "target")
    other = ModelConfig.from_directory(made / OTHER)
    assert kinds.default_drafter(own) == kinds.default_drafter(own, is_gpu=True) == "fspad"
    assert kinds.default_drafter(other) == "fspad+prompt-lookup"
    assert kinds.default_drafter(other, is_gpu=True) == "fspad"
    assert name_drafters("auto,none2=none", other) == {
        "fspad+prompt-lookup": "fspad+prompt-lookup",
        "none2": "none",
    }
    assert name_drafters("auto", other, is_gpu=True) == {"fspad": "fspad"}


def test_one_that_is_not_there_is_not_offered(here: Path) -> None:
    shutil.rmtree(here / OTHER)
    assert isinstance(specrt.load(OTHER, "auto").drafter, PromptLookupDrafter)
    assert isinstance(specrt.load("builtin", "auto").drafter, FspadDrafter)
    assert OTHER not in kinds.describe_names()
    with pytest.raises(
        CheckpointError, match=OF_ANOTHER.format("fspad", "'builtin'", "'other'", "")
    ):
        specrt.load(OTHER, "fspad")
    with pytest.raises(CheckpointError, match="drafter: expected none, auto, .*, got 'eagle3'"):
        specrt.load(OTHER, "eagle3")
    shutil.rmtree(here / "fspad")
    target = ModelConfig.from_directory(builtin.target_path())
    assert kinds.default_drafter(target) == "prompt-lookup"


def test_commands_take_the_targets_own(
    here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = ("--max-new-tokens", "8")
    code, out, _ = run(capsys, "demo", "--target", OTHER, "--prompt", "hi", *few)
    assert code == 0 and "fspad" in out
    (tmp_path / "prompts.txt").write_text("hi\n")
    args = ("--drafters", "all", "--prompts", str(tmp_path / "prompts.txt"), "--repeats", "1")
    code, out, _ = run(capsys, "bench", "--target", OTHER, *args, *few, "--json")
    summaries = json.loads(out)["summaries"]
    assert code == 0
    assert [one["name"] for one in summaries] == [
        "plain", "prompt-lookup", "recycle", "eagle3", "fspad",
    ]  # fmt: skip
    place = tmp_path / "out"
    code, out, _ = run(capsys, "convert", "eagle3", str(place), "--target", OTHER)
    assert code == 0 and out.startswith("eagle2: ")
    said = run(capsys, "convert", "eesd", str(tmp_path / "no"), "--target", OTHER)
    expect_one_line(said, "the bundled 'eesd' was made for the target 'builtin'; for 'other' there")
    given = ("--record", str(tmp_path / "a"), "--prompts", str(tmp_path / "prompts.txt"))
    said = run(capsys, "replay", *given, "--target", OTHER)
    expect_one_line(said, "the bundled 'eesd' was made for the target 'builtin'; for 'other' there")


def test_info_says_whose_they_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "info", "--json")[1])["bundled"]
    assert [(one["name"], one["kind"], one["target"]) for one in found] == [
        ("target", "llama", None),
        ("eesd", "eesd", "builtin"),
        ("fspad", "fspad", "builtin"),
        ("eagle3", "eagle", OTHER),
        ("fspad", "fspad", OTHER),
    ]
    assert all(one["bytes"] > 0 for one in found)
    assert "fspad, for other" in run(capsys, "info")[1]
