"""``specrt convert``: official drafters of every kind, and those that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import specrt
from specrt.builtin import BundledDrafter
from specrt.config import ModelConfig, config_fingerprint
from specrt.draft.fspad.checkpoint import ARCHS, EMBED, TOKEN_IDS, read_checkpoint
from tests.checkpoints import (
    edit_config,
    edit_tensors,
    make_checkpoint,
    make_draft_checkpoint,
    make_exit_checkpoint,
    make_official_draft,
    store_as_float8,
)
from tests.cli.test_cli import expect_one_line, run, write_tokenizer

KINDS = tuple(ARCHS)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target") / "little"
    make_checkpoint("llama", path, bos_token_id=0, eos_token_id=1)
    write_tokenizer(path)
    return path


def write_official(
    path: Path, target: Path, arch: str, *, dtype: torch.dtype = torch.float16, **config: Any
) -> dict[str, torch.Tensor]:
    """A directory as the authors of FSPAD and EAGLE publish them; its tensors."""
    tensors = make_official_draft(path, target, arch, dtype)
    (path / "model.safetensors").unlink()
    edit_config(path, torch_dtype="float16", **config)
    tensors[EMBED] = embedding_of(target).to(dtype)
    torch.save(tensors, path / "pytorch_model.bin")
    return tensors


def embedding_of(target: Path) -> torch.Tensor:
    return load_file(target / "model.safetensors")["model.embed_tokens.weight"]


@pytest.mark.parametrize("arch", KINDS)
def test_an_official_drafter_becomes_ours(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path, arch: str
) -> None:
    tensors = write_official(tmp_path / "src", target, arch, authors_note="hello")
    src, dst = str(tmp_path / "src"), tmp_path / "dst"
    code, out, err = run(capsys, "convert", src, str(dst), "--target", str(target))
    assert (code, err) == (0, "")
    model = ModelConfig.from_directory(target)
    config, stored = read_checkpoint(dst, model)
    assert config.arch == arch
    assert (config.target_name, config.target_fingerprint) == ("little", config_fingerprint(model))
    assert config.extra["authors_note"] == "hello"
    del tensors[EMBED]
    assert stored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert stored[key].dtype == torch.float16 and torch.equal(stored[key], tensor), key
    count = sum(tensor.numel() for tensor in tensors.values())
    assert f"{arch}: feature sampling" in out
    assert f"{count} parameters, float16" in out and "embedding is left out" in out
    assert f"written to {dst} for little" in out


def test_safetensors_in_bfloat16_without_a_bias(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    tensors = write_official(src, target, "eagle2", dtype=torch.bfloat16)
    (src / "pytorch_model.bin").unlink()
    del tensors["fc.bias"]
    save_file(tensors, src / "model.safetensors")
    code, _, err = run(capsys, "convert", str(src), str(dst), "--target", str(target))
    assert (code, err) == (0, "")
    stored = load_file(dst / "model.safetensors")
    assert stored["fc.bias"].tolist() == [0.0] * 64
    assert stored["fc.bias"].dtype == torch.bfloat16


def test_a_drafter_of_another_size_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    write_official(tmp_path / "src", target, "fspad")
    make_checkpoint("llama", tmp_path / "other", hidden_size=32, vocab_size=80)
    args = ("convert", str(tmp_path / "src"), str(tmp_path / "dst"))
    done = run(capsys, *args, "--target", str(tmp_path / "other"))
    expect_one_line(done, "hidden_size: the target has 32, this drafter 64")
    assert not (tmp_path / "dst").exists()


def test_a_misshaped_tensor_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    tensors = write_official(tmp_path / "src", target, "fspad")
    tensors["fc.fc.weight"] = tensors["fc.fc.weight"][:, :-1]
    torch.save(tensors, tmp_path / "src" / "pytorch_model.bin")
    args = ("convert", str(tmp_path / "src"), str(tmp_path / "dst"), "--target", str(target))
    expect_one_line(run(capsys, *args), "fc.fc.weight: expected [64, 128], got [64, 127]")


def test_what_is_no_drafter_and_what_is_there_already(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    def converted(src: Path, dst: Path) -> tuple[int, str, str]:
        return run(capsys, "convert", str(src), str(dst), "--target", str(target))

    expect_one_line(converted(target, tmp_path / "dst"), "no FSPAD or EAGLE drafter")
    expect_one_line(converted(tmp_path / "nowhere", tmp_path / "dst"), "no such directory")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    expect_one_line(converted(tmp_path / "adapter", tmp_path / "dst"), "is a LoRA adapter")
    make_exit_checkpoint(target, tmp_path / "exit", 1)
    expect_one_line(converted(tmp_path / "exit", tmp_path / "dst"), "EESD has no other layout")
    write_official(tmp_path / "src", target, "fspad")
    before = (tmp_path / "src" / "config.json").read_text()
    expect_one_line(converted(tmp_path / "src", tmp_path / "src"), "expected a new directory")
    assert (tmp_path / "src" / "config.json").read_text() == before


# --- the embedding --------------------------------------------------------------------------------


def converted(
    capsys: pytest.CaptureFixture[str], src: Path | str, dst: Path, target: Path, *more: str
) -> str:
    """What a conversion that must succeed prints."""
    done = run(capsys, "convert", str(src), str(dst), "--target", str(target), *more)
    assert (done[0], done[2]) == (0, "")
    return done[1]


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_embedding_is_the_targets_up_to_the_narrower_dtype(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, stored: torch.dtype, kept: torch.dtype
) -> None:
    exact = make_checkpoint("llama", tmp_path / "little").model.embed_tokens.weight.detach()

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = exact.to(stored)

    edit_tensors(tmp_path / "little", narrow)
    tensors = write_official(tmp_path / "src", tmp_path / "little", "eagle2")
    tensors[EMBED] = exact.to(kept)
    if {stored, kept} == {torch.bfloat16, torch.float16}:
        tensors[EMBED] = exact.to(stored).to(kept)
    torch.save(tensors, tmp_path / "src" / "pytorch_model.bin")
    out = converted(capsys, tmp_path / "src", tmp_path / "dst", tmp_path / "little")
    assert "embedding is left out" in out
    assert EMBED not in load_file(tmp_path / "dst" / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_embedding_of_its_own_is_kept_and_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path, dtype: torch.dtype
) -> None:
    tensors = write_official(tmp_path / "src", target, "fspad", dtype=dtype)
    tensors[EMBED][5, 7] += 0.5
    torch.save(tensors, tmp_path / "src" / "pytorch_model.bin")
    out = converted(capsys, tmp_path / "src", tmp_path / "dst", target)
    assert "its embedding differs from the target's and is kept" in out
    assert "left out" not in out
    stored = load_file(tmp_path / "dst" / "model.safetensors")[EMBED]
    assert torch.equal(stored, tensors[EMBED])
    drafter = specrt.load(target, tmp_path / "dst", fold=False).drafter
    assert torch.equal(drafter.layer.weights.embed, tensors[EMBED].float())
    converted(capsys, tmp_path / "dst", tmp_path / "again", target)  # ours may have one too
    assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")[EMBED], stored)


def test_a_copy_of_the_head_is_left_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    tensors = write_official(tmp_path / "src", target, "eagle2")
    head = load_file(target / "model.safetensors")["lm_head.weight"]
    torch.save(tensors | {"lm_head.weight": head.half()}, tmp_path / "src" / "pytorch_model.bin")
    out = converted(capsys, tmp_path / "src", tmp_path / "dst", target)
    assert "its head is left out" in out and "embedding is left out" in out
    assert "lm_head.weight" not in load_file(tmp_path / "dst" / "model.safetensors")
    torch.save(tensors | {"lm_head.weight": -head}, tmp_path / "src" / "pytorch_model.bin")
    paths = str(tmp_path / "src"), str(tmp_path / "no")
    done = run(capsys, "convert", *paths, "--target", str(target))
    expect_one_line(done, "src: lm_head.weight: differs from the target's")


def test_the_embedding_of_a_float8_target(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    little = tmp_path / "little"
    make_checkpoint("llama", little)
    tensors = write_official(tmp_path / "src", little, "eagle2", dtype=torch.float32)
    exact = store_as_float8(little)["model.embed_tokens.weight"]
    for name, embedding, said in [
        ("same", exact, "left out"),
        ("rounded", exact.bfloat16(), "left out"),
        ("before", tensors[EMBED], "is kept"),
    ]:
        torch.save(tensors | {EMBED: embedding}, tmp_path / "src" / "pytorch_model.bin")
        assert said in converted(capsys, tmp_path / "src", tmp_path / name, little), name


def test_without_an_embedding_the_targets_weights_are_not_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_checkpoint("llama", tmp_path / "little")
    tensors = write_official(tmp_path / "src", tmp_path / "little", "eagle2")
    (tmp_path / "little" / "model.safetensors").unlink()
    args = ("convert", str(tmp_path / "src"), str(tmp_path / "dst"))
    done = run(capsys, *args, "--target", str(tmp_path / "little"))
    expect_one_line(done, "little: no weights")
    del tensors[EMBED]
    torch.save(tensors, tmp_path / "src" / "pytorch_model.bin")
    out = converted(capsys, tmp_path / "src", tmp_path / "dst", tmp_path / "little")
    assert "its embedding" not in out


# --- a reduced vocabulary -------------------------------------------------------------------------


def write_corpus(path: Path, *pairs: tuple[str, str]) -> str:
    lines = [json.dumps({"prompt": prompt, "response": said}) for prompt, said in pairs]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def letters(ids: torch.Tensor) -> str:
    """Tokens as the tests' tokenizer writes them; its two special ones as < and >."""
    return "".join("<>"[i] if i < 2 else chr(30 + i) for i in ids.tolist())


def test_the_most_frequent_tokens_of_a_corpus(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    make_draft_checkpoint(target, tmp_path / "src")
    # The assistant says b five times, c three, a and d twice, ends twice; the user z nine times.
    first = write_corpus(tmp_path / "one.jsonl", ("zzzzzzzzz", "bbbbbcc"))
    second = write_corpus(tmp_path / "two.jsonl", ("yy", "caadd"))
    given = ("--corpus", first, "--corpus", second)
    expected = {1: "b", 2: "bc", 3: ">bc", 5: ">abcd", 6: ">abcdz", 7: ">abcdyz", 8: "> abcdyz"}
    shares = {1: 5 / 14, 2: 8 / 14, 3: 10 / 14, 5: 1.0, 6: 1.0, 7: 1.0, 8: 1.0}
    for size, kept in expected.items():
        dst = tmp_path / f"dst{size}"
        args = ("--draft-vocab", str(size), *given)
        out = converted(capsys, tmp_path / "src", dst, target, *args)
        config, tensors = read_checkpoint(dst, ModelConfig.from_directory(target))
        assert config.draft_vocab_size == size
        assert sorted(letters(tensors[TOKEN_IDS])) == sorted(kept.replace(" ", "<")), size
        assert f"drafts {size} of 97 tokens" in out
        assert f"they cover {100 * shares[size]:.2f}% of the corpus' 14 assistant tokens" in out


def test_a_reduced_drafter_may_be_reduced_anew_and_all_else_stays(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    tensors = make_draft_checkpoint(target, tmp_path / "src")
    corpus = write_corpus(tmp_path / "one.jsonl", ("z", "abcabcde"))
    source = tmp_path / "src"
    for size in (5, 2, 97):
        dst = tmp_path / f"dst{size}"
        converted(capsys, source, dst, target, "--draft-vocab", str(size), "--corpus", corpus)
        stored = load_file(dst / "model.safetensors")
        assert len(stored.pop(TOKEN_IDS)) == size
        assert stored.keys() == tensors.keys()
        assert all(torch.equal(stored[key], tensors[key]) for key in tensors)
        source = dst
    out = converted(capsys, tmp_path / "dst2", tmp_path / "copy", target)
    assert "drafts 2 of 97 tokens" in out and "cover" not in out
    texts = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("dst2", "copy")]
    assert texts[0] == texts[1]


def test_a_missing_bias_takes_the_dtype_of_its_matrix(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    """Not that of the token ids, which come first."""
    make_draft_checkpoint(target, tmp_path / "src")
    corpus = write_corpus(tmp_path / "one.jsonl", ("z", "abc"))
    args = ("--draft-vocab", "3", "--corpus", corpus)
    converted(capsys, tmp_path / "src", tmp_path / "small", target, *args)
    edit_tensors(tmp_path / "small", lambda tensors: tensors.pop("fc.fc.bias"))
    converted(capsys, tmp_path / "small", tmp_path / "dst", target)
    bias = load_file(tmp_path / "dst" / "model.safetensors")["fc.fc.bias"]
    assert bias.dtype == torch.float32 and not bias.any()


def test_a_bundled_drafter_has_a_name(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_draft_checkpoint(target, tmp_path / "src", "no-split")
    other = BundledDrafter("fspad", "little", tmp_path / "src")
    monkeypatch.setattr("specrt.builtin.drafters", lambda: [other])
    assert converted(capsys, "fspad", tmp_path / "dst", target).startswith("no-split: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--draft-vocab", "5"), "draft_vocab, corpus: expected both or neither, or hot_tokens"),
        (("--corpus", "CORPUS"), "draft_vocab, corpus: expected both or neither"),
        (("--draft-vocab", "0", "--corpus", "CORPUS"), "draft_vocab: expected 1..97, got 0"),
        (("--draft-vocab", "98", "--corpus", "CORPUS"), "draft_vocab: expected 1..97, got 98"),
        (("--draft-vocab", "many", "--corpus", "CORPUS"), "--draft-vocab"),
        (("--draft-vocab", "5", "--corpus", "nowhere.jsonl"), "nowhere.jsonl: No such file"),
        (("--draft-vocab", "5", "--corpus", "BROKEN"), "broken.jsonl, line 1"),
        (("--draft-vocab", "5", "--corpus", "FOREIGN"), "corpus: expected token ids below 97"),
    ],
)
def test_reductions_that_are_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    target: Path,
    args: tuple[str, ...],
    message: str,
) -> None:
    make_draft_checkpoint(target, tmp_path / "src")
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"prompt_ids": [5], "response_ids": [97]}\n')
    (tmp_path / "broken.jsonl").write_text("{\n")
    files = {
        "CORPUS": write_corpus(tmp_path / "corpus.jsonl", ("a", "b")),
        "BROKEN": str(tmp_path / "broken.jsonl"),
        "FOREIGN": str(foreign),
    }
    named = [files.get(arg, arg) for arg in args]
    src, dst = str(tmp_path / "src"), str(tmp_path / "dst")
    expect_one_line(run(capsys, "convert", src, dst, "--target", str(target), *named), message)
    assert not (tmp_path / "dst").exists()
