"""Lossless of packed weights: their own plain decoding, bit for bit, however it is drafted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import specrt
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.engine.engine import Engine
from specrt.engine.results import GenerationResult
from specrt.ops import MatrixKind, PackedMatrix
from specrt.ops.build import build_info
from specrt.sampling import SamplingParams
from tests.checkpoints import make_checkpoint, make_draft_checkpoint, make_exit_checkpoint
from tests.engine.support import prompts
from tests.gguf_files import write_gguf

BF16 = torch.bfloat16
VOCAB = 97


class Models(NamedTuple):
    """A target's directory, and drafters of it, all in bfloat16."""

    target: Path
    fspad: Path
    eesd: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Rows are whole blocks of any kind."""
    folder = tmp_path_factory.mktemp("models")
    made = Models(folder / "target", folder / "fspad", folder / "eesd")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3}
    make_checkpoint("llama", made.target, dtype=BF16, vocab_size=VOCAB, **sizes)
    make_draft_checkpoint(made.target, made.fspad, dtype=BF16)
    make_exit_checkpoint(made.target, made.eesd, 1, noise=0.05, dtype=BF16)
    write_gguf(made.target, made.target / "model.gguf")  # of it, the tokenizer
    return made


def target_of(models: Models, form: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Where a target is whose weights become ``form``, and with which options they do."""
    file = folder / "model.gguf"
    if form in ("split", "bfloat16"):
        write_gguf(models.target, file, kind="BF16")
        return file, {"activations": form}
    if form == "int8":
        write_gguf(models.target, file, kind="BF16")
        return file, {"quantize": form}
    kinds = {"attn_v": "Q6_K", "ffn_up": "Q8_0", "ffn_down": "F16"} if form == "mixed" else {}
    write_gguf(models.target, file, kind="Q4_K" if kinds else form, kinds=kinds)
    return file, {}


def answers(
    engine: Engine, batch: list[list[int]], params: SamplingParams
) -> list[GenerationResult]:
    results = engine.generate(batch, params)
    assert [result.error for result in results] == [None] * len(batch)
    return results


def texts(engine: Engine, batch: list[list[int]], params: SamplingParams) -> list[list[int]]:
    return [result.token_ids for result in answers(engine, batch, params)]


@pytest.mark.parametrize(
    "form",
    ["split", "bfloat16", "int8", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "mixed"],
)
def test_every_drafter_says_what_plain_decoding_says(
    form: str, models: Models, tmp_path: Path
) -> None:
    path, options = target_of(models, form, tmp_path)
    batch = prompts(3, VOCAB)
    greedy = SamplingParams(max_new_tokens=16, ignore_eos=True)
    seeded = SamplingParams(max_new_tokens=16, ignore_eos=True, temperature=0.8, seed=5)
    plain = specrt.load(path, progress=False, **options)
    expected = {params: texts(plain, batch, params) for params in (greedy, seeded)}
    alone = [texts(plain, [prompt], greedy)[0] for prompt in batch]
    assert expected[greedy] == alone
    for name in ("prompt-lookup", models.fspad, models.eesd):
        rule = None if name == "prompt-lookup" else "fixed-3"
        drafted = specrt.load(path, name, controller=rule, progress=False, **options)
        num_drafted = 0
        for params, wanted in expected.items():
            found = answers(drafted, batch, params)
            assert [result.token_ids for result in found] == wanted, (name, params)
            num_drafted += sum(result.stats.num_draft_tokens for result in found)
        assert num_drafted > 0, name


def test_drafters_are_packed_and_share_a_packed_head(models: Models, tmp_path: Path) -> None:
    path, options = target_of(models, "int8", tmp_path)
    fspad = specrt.load(path, models.fspad, fold=False, progress=False, **options)
    assert isinstance(fspad.drafter, FspadDrafter)
    weights = fspad.drafter.layer.weights
    assert weights.head is fspad.target.weights.lm_head
    assert weights.embed is fspad.target.weights.embed
    own = {name: m.kind for name, m in weights.matrices.items() if isinstance(m, PackedMatrix)}
    has_unit = build_info().active_isa == "amx"  # for bfloat16
    own_kind = MatrixKind.BF16_ROUNDED if has_unit else MatrixKind.INT8
    assert own == dict.fromkeys(weights.matrices, own_kind) | {"head": MatrixKind.INT8}
    reduced = specrt.load(path, models.fspad, hot_tokens=range(40), progress=False, **options)
    narrow = specrt.load(path, models.fspad, draft_weights="fp8", progress=False, **options)
    batch, params = prompts(2, VOCAB), SamplingParams(max_new_tokens=12, ignore_eos=True)
    wanted = texts(fspad, batch, params)
    assert texts(reduced, batch, params) == texts(narrow, batch, params) == wanted


def test_a_long_prompt_in_any_pieces(models: Models, tmp_path: Path) -> None:
    path, options = target_of(models, "mixed", tmp_path)
    prompt = [token % VOCAB for token in range(3, 303)]
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    engines = [
        specrt.load(path, progress=False, prefill_chunk=chunk, **options) for chunk in (512, 37)
    ]
    one, other = (texts(engine, [prompt], params) for engine in engines)
    assert one == other
