"""From a path to an engine: what can be asked for, and what is said when it cannot."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import specrt
from specrt import loading
from specrt.device import Device
from specrt.draft.base import EmptyDrafter
from specrt.draft.eesd.on_device import DeviceEesdDrafter
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.engine.engine import Engine
from specrt.models.checkpoint import Checkpoint
from specrt.types import CheckpointError
from tests.checkpoints import (
    edit_config,
    make_checkpoint,
    make_draft_checkpoint,
    make_exit_checkpoint,
)


def make_target(path: Path, vocab_size: int = 97, dtype: torch.dtype = torch.float32) -> Path:
    make_checkpoint("llama", path, dtype=dtype, vocab_size=vocab_size)
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(vocab_size - 3))]
    fast = FastTokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafting model; it needs no tokenizer."""
    path = tmp_path_factory.mktemp("drafter")
    make_checkpoint("qwen2", path, num_hidden_layers=1, dtype=torch.bfloat16)
    return path


@pytest.mark.parametrize("role", ["target", "drafter"])
def test_paths_that_hold_no_model(role: str, target: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "file", "empty"):
        path = tmp_path / name
        arguments = (path,) if role == "target" else (target, path)
        with pytest.raises(CheckpointError) as caught:
            specrt.load(*arguments)
        assert str(path) in str(caught.value)


def test_a_target_that_is_no_path() -> None:
    with pytest.raises(
        TypeError, match="target: expected a path, 'builtin' or 'smollm2', got None"
    ):
        specrt.load(None)  # type: ignore[arg-type]


def test_a_drafter_of_another_vocabulary(target: Path, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, vocab_size=96)
    with pytest.raises(CheckpointError, match="without .* tokenizer .* vocabulary of 97, got 96"):
        specrt.load(target, tmp_path)


def test_a_folder_of_several_exits(target: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        make_exit_checkpoint(target, tmp_path / f"exit-{number}", number)
    with pytest.raises(CheckpointError, match="expected one of them: exit-1, exit-2"):
        specrt.load(target, tmp_path, progress=False)
    specrt.load(target, tmp_path / "exit-2", progress=False)


def test_a_drafter_of_an_unknown_kind(target: Path, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    edit_config(tmp_path, drafter="oracle")
    with pytest.raises(CheckpointError, match="oracle") as caught:
        specrt.load(target, tmp_path)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, "device: expected 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        ({"dtype": "int8"}, "dtype: expected auto or one of .*'int8'"),
        ({"dtype": torch.float64}, "dtype: .*float64"),
        ({"max_nodes": 0}, r"max_nodes: expected 1\.\.128, got 0"),
        ({"max_nodes": 129}, r"max_nodes: expected 1\.\.128, got 129"),
        ({"max_batch": 0}, "max_batch: expected at least 1, got 0"),
        ({"quantize": "int4"}, "quantize: expected one of int8, none, got 'int4'"),
        ({"activations": "half"}, "activations: expected one of split, bfloat16, float32, got"),
        ({"activations": "split"}, "activations: 'split' is of bfloat16 weights, the target's are"),
        (
            {"activations": "float32", "quantize": "int8"},
            "activations: 'float32' is of bfloat16 weights, got quantize='int8'",
        ),
    ],
)
def test_options_out_of_range(target: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        specrt.load(target, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "stored", "expected", "form"),
    [
        ("auto", torch.float32, torch.float32, "float32"),
        ("auto", torch.bfloat16, torch.bfloat16, "BF16_SPLIT"),
        ("auto", torch.float16, torch.float16, "float16"),
        ("bf16", torch.float32, torch.bfloat16, "BF16_SPLIT"),
        (torch.float16, torch.float32, torch.float16, "float16"),
        ("float32", torch.bfloat16, torch.float32, "float32"),
    ],
)
def test_dtypes(
    asked: str | torch.dtype, stored: torch.dtype, expected: torch.dtype, form: str, tmp_path: Path
) -> None:
    engine = specrt.load(make_target(tmp_path, dtype=stored), dtype=asked)
    assert engine.target.dtype == engine.cache.kv.dtype == expected
    assert engine.target.weights.form == form
    assert f"weights {form} " in repr(engine.target)


def test_drafters_by_name(target: Path, drafter: Path) -> None:
    assert isinstance(specrt.load(target).drafter, EmptyDrafter)
    assert isinstance(specrt.load(target, "none").drafter, EmptyDrafter)
    assert isinstance(specrt.load(target, "prompt-lookup").drafter, PromptLookupDrafter)
    for path in (drafter, str(drafter)):
        assert isinstance(specrt.load(target, path).drafter, SmallModelDrafter)
    own = PromptLookupDrafter(max_ngram=2)
    assert specrt.load(target, own).drafter is own


def test_every_drafter_says_the_same(target: Path, drafter: Path) -> None:
    params = specrt.SamplingParams(max_new_tokens=30, ignore_eos=True)
    outputs = [
        specrt.load(target, name, max_nodes=16).generate("w1 w2 w3 w1 w2", params)
        for name in (None, "prompt-lookup", drafter)
    ]
    assert len({tuple(output.token_ids) for output in outputs}) == 1
    assert len({output.text for output in outputs}) == 1
    assert outputs[0].text.startswith((" w", " <"))


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """What "cuda" names meanwhile: a device whose memory nobody can read, enough for all but
    running."""
    meta = torch.device("meta")
    asked = loading.parse_device
    monkeypatch.setattr(
        loading, "parse_device", lambda name: meta if name == "cuda" else asked(name)
    )
    monkeypatch.setattr(Device, "free_memory", lambda device: (2 << 30, 4 << 30))
    # From a GPU the drafter's copies of the target's tables would come back.
    read = torch.Tensor.cpu
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda t: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else read(t)
    )
    return meta


@pytest.fixture(scope="module")
def wide_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its heads are of a size that GPUs run."""
    path = make_target(tmp_path_factory.mktemp("wide"))
    make_checkpoint("llama", path, head_dim=64)
    return path


def test_a_target_on_a_gpu(
    wide_target: Path, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = []
    monkeypatch.setattr(loading, "check_rows", lambda *asked: looked_at.append(asked))
    engine = specrt.load(wide_target, device="cuda")
    assert looked_at == [(engine.target.device, torch.bfloat16)]
    assert engine.target.device is engine.cache.device and engine.cache.kv.device == gpu
    assert engine.target.dtype == engine.target.activation_dtype == torch.bfloat16
    assert engine.cache.kv.dtype == torch.bfloat16
    half = specrt.load(wide_target, device="cuda", dtype="fp16").target
    assert half.weights.layers[0].qkv.dtype == half.activation_dtype == torch.float16
    assert half.weights.layers[0].input_norm.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype: .* got float32"):
        specrt.load(wide_target, device="cuda", dtype="float32")


def test_heads_that_no_gpu_kernel_takes(
    target: Path, wide_target: Path, gpu: torch.device, tmp_path: Path
) -> None:
    assert specrt.load(target, device="cuda").cache.kv.shape[-1] == 64  # padded from 16
    make_target(tmp_path)
    make_checkpoint("llama", tmp_path, head_dim=130)
    for paths in ((tmp_path,), (wide_target, tmp_path)):
        with pytest.raises(ValueError, match="head_dim: .* the model has 130; device='cpu'"):
            specrt.load(*paths, device="cuda")


def test_a_gpu_that_is_too_small_is_told_before_anything_is_read(
    wide_target: Path, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a tensor was read"))
    words = r"no room on meta: needed .* \(weights .* \+ KV cache 2\.01 GiB .*, free 2\.00 GiB of 4"
    pages = (2 << 30) // (2 * 3 * 64 * 2 * 64 * 2)  # of three layers' two heads
    with pytest.raises(MemoryError, match=words):
        specrt.load(wide_target, device="cuda", max_cached_tokens=64 * pages + 6000)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            {"intermediate_size": 100},
            r"\.0\.mlp\.down_proj\.weight: .* eights .* \[64, 100\]",
        ),
        ({"hidden_size": 60}, r"\.0\.self_attn\.q_proj\.weight: .* got \[256, 60\]; device="),
    ],
)
def test_rows_that_do_not_begin_at_16_bytes(
    sizes: dict[str, int], words: str, target: Path, gpu: torch.device, tmp_path: Path
) -> None:
    make_target(tmp_path)
    make_checkpoint("llama", tmp_path, head_dim=64, **sizes)
    for paths in ((tmp_path,), (target, tmp_path)):
        with pytest.raises(ValueError, match=words):
            specrt.load(*paths, device="cuda")


def test_drafters_on_a_gpu(wide_target: Path, gpu: torch.device, tmp_path: Path) -> None:
    assert isinstance(specrt.load(wide_target, device="cuda").drafter, EmptyDrafter)
    for device in ("cpu", "cuda"):
        for name, kind in (("builtin", FspadDrafter), (wide_target, PromptLookupDrafter)):
            assert isinstance(specrt.load(name, "auto", device=device).drafter, kind)
    small = specrt.load(wide_target, wide_target, device="cuda").drafter
    assert isinstance(small, SmallModelDrafter)
    make_draft_checkpoint(wide_target, tmp_path / "fspad")
    engine = specrt.load(wide_target, tmp_path / "fspad", device="cuda")
    fspad = engine.drafter
    assert isinstance(fspad, FspadDrafter)
    assert fspad.layer.weights.embed.device == fspad.layer.weights.head.device == gpu
    assert fspad.cache.kv.device == gpu and fspad.cache.num_pages == engine.cache.num_pages > 0
    make_exit_checkpoint(wide_target, tmp_path / "exit", 1)
    engine = specrt.load(wide_target, tmp_path / "exit", device="cuda")
    exit_drafter = engine.drafter
    assert isinstance(exit_drafter, DeviceEesdDrafter) and exit_drafter.cache.kv.device == gpu
    assert exit_drafter.cache.num_pages == engine.cache.num_pages > 0


def test_generate_in_one_line(target: Path, drafter: Path) -> None:
    prompt = "w5 w6 w7"
    text = specrt.generate(prompt, target=str(target), max_new_tokens=12)
    engine = specrt.load(target)
    expected = engine.generate(prompt, specrt.SamplingParams(max_new_tokens=12))
    assert text == expected.text
    for name in (None, str(drafter)):
        assert specrt.generate(prompt, target=str(target), drafter=name, max_new_tokens=12) == text
    ids = expected.prompt_token_ids
    assert specrt.generate(ids, target=str(target), max_new_tokens=12) == text
    params = specrt.SamplingParams(max_new_tokens=12)
    assert specrt.generate([prompt, ids], params, target=str(target)) == [text, text]
    assert specrt.generate([], target=str(target)) == []
    with pytest.raises(ValueError, match="max_new_tokens"):
        specrt.generate(prompt, target=str(target), max_new_tokens=0)


def test_threads_that_generate_in_one_line_load_one_engine(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, loads = ["w5 w6", "w7", "w8 w9", "w1"], list[Engine]()
    load = loading.load

    def counting(*args: object, **options: object) -> Engine:
        while len(waiting) < len(asked):  # so that all have asked
            pass
        loads.append(load(*args, **options))  # type: ignore[arg-type]
        return loads[-1]

    def one_line(prompt: str) -> str:
        waiting.append(prompt)
        return str(specrt.generate(prompt, target=str(target), drafter=None, max_new_tokens=12))

    loading._cached_engine.cache_clear()
    expected = [specrt.generate(p, target=str(target), max_new_tokens=12) for p in asked]
    loading._cached_engine.cache_clear()
    monkeypatch.setattr(loading, "load", counting)
    waiting: list[str] = []
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(one_line, asked)) == expected
    assert len(loads) == 1


def test_config_of_another_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(CheckpointError, match="mixtral"):
        specrt.load(tmp_path)
