"""``specrt distill-data``: prompts that a model writes itself, and those that are left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import specrt
from specrt.sampling import SamplingParams
from tests.checkpoints import edit_tensors, make_checkpoint
from tests.cli.test_cli import run, write_tokenizer
from tests.cli.test_cli_distill import write

ARGS = ("--max-new-tokens", "6", "--threads", "1")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of letters that ends most texts within some tokens."""
    path = tmp_path_factory.mktemp("target") / "letters"
    make_checkpoint("llama", path, bos_token_id=0, eos_token_id=1, max_position_embeddings=512)
    write_tokenizer(path)

    def likes_to_end(tensors: Any) -> None:
        tensors["lm_head.weight"][1] *= 4

    edit_tensors(path, likes_to_end)
    return str(path)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_model_writes_prompts_and_answers_them(
    capsys: pytest.CaptureFixture[str], target: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    args = ("distill-data", "--target", target, "--out", str(out), *ARGS)
    code, _, err = run(capsys, *args, "--own-prompts", "12")
    assert code == 0, err
    written = rows(tmp_path / "out.jsonl.own-prompts")
    assert len(written) == 12
    # What stands before a user's first word, as the template tells it, and nothing of a word.
    engine = specrt.load(target, None)
    tokenizer = engine.tokenizer
    opening = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q"}], add_generation_prompt=False
    )
    opening = opening[: opening.index(tokenizer.encode("Q", add_special_tokens=False)[0])]
    for row in written:
        assert row["prompt_ids"] == opening
        sampling = SamplingParams(max_new_tokens=256, temperature=1.0, seed=row["seed"])
        assert engine.generate(opening, sampling).token_ids == row["response_ids"]
    ended = {r["response"].strip() for r in written if r["finish_reason"] == "stop"} - {""}
    assert ended
    told = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in ended]
    assert sorted(row["prompt_ids"] for row in rows(out)) == sorted(told)
    # The same command has nothing left to do; a larger number goes on.
    assert "0 answers written" in run(capsys, *args, "--own-prompts", "12")[1]
    assert run(capsys, *args, "--own-prompts", "20")[0] == 0
    more = rows(tmp_path / "out.jsonl.own-prompts")
    assert len(more) == 20
    assert more[:12] == written
    assert rows(out)[: len(told)] and len(rows(out)) > len(told)


def test_prompts_for_measuring_are_left_out(
    capsys: pytest.CaptureFixture[str], target: str, tmp_path: Path
) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen".split()  # noqa: SIM905
    near = "Now: " + " ".join(words).upper() + ", and so on"
    far = " ".join([*words[:12], "fourteen"])
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": near}, {"prompt": far})
    measured = write(
        tmp_path / "measured.jsonl", {"turns": ["what is it?", " ".join(["zero", *words])]}
    )
    out = tmp_path / "out.jsonl"
    code, _, err = run(
        capsys, "distill-data", "--target", target, "--out", str(out), *ARGS,
        "--prompts", str(prompts), "--exclude", str(measured),
    )  # fmt: skip
    assert code == 0, err
    assert "1 prompts skipped: they are for measuring, or nearly so" in err
    assert [row["prompt"] for row in rows(out)] == [far]


def test_without_prompts_or_a_template_it_is_refused(
    capsys: pytest.CaptureFixture[str], target: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out.jsonl")
    code, _, err = run(capsys, "distill-data", "--target", target, "--out", out)
    assert (code, "expected --prompts or --own-prompts, got neither" in err) == (2, True)
    bare = tmp_path / "bare"
    shutil.copytree(target, bare)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
    args = ("distill-data", "--target", str(bare), "--out", out, "--own-prompts", "2")
    code, _, err = run(capsys, *args)
    assert (code, "no chat template" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]
    code, _, err = run(capsys, *args[:-1], "0")
    assert (code, "own_prompts: expected at least 1, got 0" in err) == (2, True)
