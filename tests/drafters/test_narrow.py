"""Drafters made narrower as they are loaded, of fewer bytes or tokens: the same text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import specrt
from specrt.draft.base import DraftParams
from specrt.draft.fspad.checkpoint import ARCHS, TOKEN_IDS, read_checkpoint
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.models.model import LlamaModel
from specrt.ops import Float8Matrix
from specrt.sampling import SamplingParams
from specrt.types import CheckpointError
from tests.checkpoints import make_draft_checkpoint, make_exit_checkpoint
from tests.cli.test_cli import expect_one_line, run
from tests.drafters.fspad_rig import make_drafter
from tests.engine.support import make_engine, prompts, sampled, texts

VOCAB = 97
GREEDY = SamplingParams(max_new_tokens=30, ignore_eos=True)
SETTINGS = {"greedy": GREEDY, "seed": sampled(1, ignore_eos=True)}
HOT = [3 * i % VOCAB for i in range(60)]
SHAPES = (None, DraftParams(5, 8, 40))


@pytest.fixture(scope="module")
def drafters(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafters")
    for arch in ARCHS:
        make_draft_checkpoint(target, folder / arch, arch)
    return folder


@pytest.fixture(scope="module")
def said(model: LlamaModel) -> dict[str, list[list[int]]]:
    """What plain decoding says."""
    return {
        name: texts(make_engine(model, max_batch=1).generate(prompts(5, VOCAB), params))
        for name, params in SETTINGS.items()
    }


NARROW: list[dict[str, Any]] = [
    {"weights": "fp8", "fold": False},
    {"weights": "fp8", "fold": True},
    {"weights": "fp8", "hot_tokens": HOT},
    {"hot_tokens": HOT},
]


CASES = [("fspad", "seed", options) for options in NARROW]
CASES += [("fspad", "greedy", NARROW[0])]
CASES += [(arch, "seed", {"weights": "fp8"}) for arch in ARCHS if arch != "fspad"]


@pytest.mark.parametrize(("arch", "setting", "options"), CASES)
def test_the_text_is_the_targets(
    model: LlamaModel,
    drafters: Path,
    said: dict[str, list[list[int]]],
    arch: str,
    setting: str,
    options: dict[str, Any],
) -> None:
    drafter = make_drafter(model, drafters / arch, **options)
    engine = make_engine(model, drafter, max_batch=3)
    accepted = 0
    for shape in SHAPES:
        results = engine.generate(prompts(5, VOCAB), SETTINGS[setting], shape)
        assert texts(results) == said[setting]
        accepted += sum(result.stats.num_accepted_tokens for result in results)
    assert accepted


# --- fp8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [False, True])
def test_what_is_streamed_has_one_byte_a_weight(
    model: LlamaModel, drafters: Path, fold: bool
) -> None:
    wide = make_drafter(model, drafters / "fspad", fold=fold).layer.weights
    head = wide.head
    drafter = make_drafter(model, drafters / "fspad", fold=fold, weights="fp8")
    narrow = drafter.layer.weights
    for name, matrix in narrow.matrices.items():
        exact = getattr(wide, name).float()
        assert isinstance(matrix, Float8Matrix), name
        largest = exact.abs().amax(1, keepdim=True)
        values = matrix.values.float() * matrix.scale[:, None]
        assert ((values - exact).abs() <= largest / 28).all(), name  # half a step of the largest
    tables = {"embed", "token_fc", "token_gate"}
    for name in tables:
        looked_up = getattr(wide, name), getattr(narrow, name)
        assert looked_up == (None, None) or torch.equal(*looked_up)
    assert head is model.weights.lm_head  # and stays what it is: the target multiplies by it
    keys, _ = drafter.cache.layer(0)
    assert narrow.dtype == wide.dtype == keys.dtype


def test_what_is_refused(model: LlamaModel, target: Path, drafters: Path, tmp_path: Path) -> None:
    make_exit_checkpoint(target, tmp_path, 1)
    only = "only FSPAD and EAGLE drafters take it"
    for drafter in (None, "none", "prompt-lookup", tmp_path):
        for options in ({"draft_weights": "fp8"}, {"hot_tokens": HOT}, {"draft_window": 4}):
            with pytest.raises(ValueError, match=f"{next(iter(options))}: {only}"):
                specrt.load(target, drafter, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="draft_weights: expected one of fp8, got 'int3'"):
        specrt.load(target, drafters / "fspad", draft_weights="int3")
    made = make_drafter(model, drafters / "fspad")
    with pytest.raises(ValueError, match="hot_tokens: goes with a drafter's name or path"):
        specrt.load(target, made, hot_tokens=HOT)


def test_the_command_line_takes_both(
    capsys: pytest.CaptureFixture[str], target: Path, drafters: Path, tmp_path: Path
) -> None:
    (tmp_path / "hot.json").write_text(json.dumps(HOT))
    args = ["generate", "--target", str(target), "--prompt", "hi", "--max-new-tokens", "8"]
    plain = run(capsys, *args, "--drafter", "none")
    args += ["--drafter", str(drafters / "fspad"), "--draft-weights", "fp8"]
    assert run(capsys, *args, "--hot-tokens", str(tmp_path / "hot.json"))[:2] == plain[:2]


# --- hot tokens -----------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path], object]] = {
    "a.json": lambda file: file.write_text(json.dumps(HOT)),
    "list.pt": lambda file: torch.save(HOT, file),
    "tensor.pt": lambda file: torch.save(torch.tensor(HOT), file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_lists_in_files(target: Path, drafters: Path, tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    drafter = specrt.load(target, drafters / "fspad", hot_tokens=tmp_path / name).drafter
    assert isinstance(drafter, FspadDrafter)
    weights = drafter.layer.weights
    assert weights.token_ids is not None and weights.token_ids.tolist() == sorted(HOT)
    assert weights.head.shape == (60, 64)


def test_convert_takes_the_first_of_a_list(
    capsys: pytest.CaptureFixture[str], target: Path, drafters: Path, tmp_path: Path
) -> None:
    WRITERS["list.pt"](tmp_path / "hot.pt")
    args = ["convert", str(drafters / "eagle2"), str(tmp_path / "out"), "--target", str(target)]
    args += ["--hot-tokens", str(tmp_path / "hot.pt")]
    code, out, err = run(capsys, *args, "--draft-vocab", "10")
    assert (code, err) == (0, "") and "drafts 10 of 97 tokens" in out
    config, tensors = read_checkpoint(tmp_path / "out")
    assert config.draft_vocab_size == 10 and tensors[TOKEN_IDS].tolist() == sorted(HOT[:10])
    args[2] = str(tmp_path / "other")
    done = run(capsys, *args, "--draft-vocab", "61")
    expect_one_line(done, f"{tmp_path / 'hot.pt'}: expected at least 61 token ids, got 60")
    done = run(capsys, *args, "--corpus", str(tmp_path / "hot.pt"))
    expect_one_line(done, "corpus, hot_tokens: expected one of them")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], r"hot_tokens: expected token ids in 0\.\.96, got none"),
        ([5, 97], r"hot_tokens: expected token ids in 0\.\.96, got 5\.\.97"),
        ([-1, 4], r"hot_tokens: expected token ids in 0\.\.96, got -1\.\.4"),
        ([1, 10**30], r"hot_tokens: expected token ids in 0\.\.96, got 1\.\.1000"),
        ([4, 7, 4], "hot_tokens: expected each token once, got 4 twice"),
        ([1.5], "hot_tokens: expected a list of token ids, got 1.5 in it"),
        ({3}, "hot_tokens: expected a list of token ids, got set"),
        ([True], "hot_tokens: expected a list of token ids"),
    ],
)
def test_lists_that_are_none(model: LlamaModel, drafters: Path, tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_drafter(model, drafters / "fspad", hot_tokens=tokens)


def test_files_that_are_none(model: LlamaModel, drafters: Path, tmp_path: Path) -> None:
    def load(file: Path) -> None:
        make_drafter(model, drafters / "fspad", hot_tokens=file)

    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "none.pt")
    broken = {"a.json": b"{3", "b.pt": b"{3", "c.pt": b"hello", "d.pt": b"\x80\x02s."}
    for name, content in broken.items():  # each is another error to who reads it
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name}: expected a list of token ids, as JSON"):
            load(tmp_path / name)
    for wrong in (torch.zeros(2, 2), torch.arange(3).to_sparse(), torch.arange(3, device="meta")):
        torch.save(wrong, tmp_path / "wrong.pt")
        with pytest.raises(ValueError, match=r"wrong\.pt: expected a list of token ids"):
            load(tmp_path / "wrong.pt")
