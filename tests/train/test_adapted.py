"""``--lora``: drafters for a target with an adapter, as if its merged weights were there."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import specrt
from tests.checkpoints import edit_tensors, make_checkpoint
from tests.cli.test_cli import run, write_tokenizer
from tests.models.test_adapted import DOWN, START, random_adapter

LAST = DOWN.replace("mlp.down_proj", "self_attn.q_proj")
FAST = ("--max-steps", "2", "--no-tensorboard", "--threads", "1", "--held-out", "0.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of two layers, an adapter of both's queries and of the head, and the two merged."""
    folder = tmp_path_factory.mktemp("adapted")
    for name in ("target", "merged"):
        sizes = {"bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64}
        make_checkpoint("llama", folder / name, **sizes)
        write_tokenizer(folder / name)
    modules = "model.layers.0.self_attn.q_proj", LAST
    adapter = load_file(random_adapter(folder / "adapter", *modules) / "adapter_model.safetensors")

    def merge(tensors: dict[str, torch.Tensor]) -> None:
        for module in modules:
            a, b = (adapter[f"{START}{module}.lora_{part}.weight"] for part in "AB")
            tensors[f"{module}.weight"] += (b @ a) * 2.0

    edit_tensors(folder / "merged", merge)
    texts = [f"{n} and {n} are {2 * n}" for n in range(8)]
    lines = [json.dumps({"prompt": text}) for text in texts]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def distilled(capsys: pytest.CaptureFixture[str], folder: Path, out: Path, *target: str) -> Path:
    given = ("--prompts", str(folder / "prompts.jsonl"), "--out", str(out))
    code, _, err = run(capsys, "distill-data", *given, "--max-new-tokens", "9", *target)
    assert code == 0, err
    return out


@pytest.mark.parametrize("kind", [("fspad",), ("eesd", "--exit-layer", "1")], ids=lambda k: k[0])
def test_what_is_trained_is_what_merged_weights_give(
    kind: tuple[str, ...],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    adapter = ("--target", str(folder / "target"), "--lora", str(folder / "adapter"))
    targets = {"adapted": adapter, "merged": ("--target", str(folder / "merged"))}
    answers, tensors = {}, {}
    for name, target in targets.items():
        file = distilled(capsys, folder, tmp_path / f"{name}.jsonl", *target)
        answers[name] = [json.loads(line) for line in file.read_text().splitlines()]
        out = tmp_path / name
        code, _, err = run(
            capsys, "train", *kind, *target, *FAST, "--data", str(file), "--out", str(out)
        )
        assert code == 0, err
        tensors[name] = load_file(out / "model.safetensors")
    texts = [[row["response_ids"] for row in rows] for rows in answers.values()]
    assert texts[0] == texts[1]
    assert all(torch.equal(tensors["adapted"][k], tensors["merged"][k]) for k in tensors["merged"])
    assert "adapter" not in json.loads((tmp_path / "merged/config.json").read_text())["target"]
    for lora, said in ((folder / "adapter", 0), (None, 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "specrt"):
            specrt.load(folder / "target", tmp_path / "adapted", lora=lora, progress=False)
        assert sum("expect fewer accepted drafts" in line for line in caplog.messages) == said


def test_answers_and_features_of_the_plain_target_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ("--target", str(folder / "target"))
    adapter = (*target, "--lora", str(folder / "adapter"))
    file = distilled(capsys, folder, tmp_path / "plain.jsonl", *target)
    given = ("--prompts", str(folder / "prompts.jsonl"), "--out", str(file))
    code, _, err = run(capsys, "distill-data", *given, "--max-new-tokens", "9", *adapter)
    assert code == 2 and "target: " in err and "an answer made with" in err
    more = ("--data", str(file), "--features", str(tmp_path / "features"))
    for number, (options, expected) in enumerate(((target, 0), (adapter, 2))):
        out = ("--out", str(tmp_path / str(number)))
        code, _, err = run(capsys, "train", "fspad", *options, *FAST, *more, *out)
        assert code == expected
    assert "features cached for another target: target_weights" in err


def test_a_converted_drafter_says_whose_adapter_it_fits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = ("--target", str(folder / "target"), "--lora", str(folder / "adapter"))
    file = distilled(capsys, folder, tmp_path / "answers.jsonl", *adapter)
    out = tmp_path / "trained"
    train = ("train", "fspad", *adapter, *FAST, "--data", str(file), "--out", str(out))
    assert run(capsys, *train)[0] == 0
    said = []
    for number, options in enumerate((adapter, adapter[:2])):
        place = tmp_path / str(number)
        code, _, err = run(capsys, "convert", str(out), str(place), *options)
        assert code == 0, err
        said.append(json.loads((place / "config.json").read_text())["target"])
    assert said[0] == said[1] == json.loads((out / "config.json").read_text())["target"]
    assert len(said[0]["adapter"]) == 16
