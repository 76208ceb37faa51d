"""Benches of the CPU at real models' shapes: their files, what they plant, their figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import planted_cpu
from bench.bench_load import row
from bench.byte_tokens import BOS, EOS, byte_tokens
from bench.contenders import LLAMA_CPP, PLAIN, Output, Request
from bench.cpu_models import CPU_MODELS, TINY
from bench.generate_gguf import CpuTimed, Race
from bench.planted import Trace
from bench.random_blocks import BLOCKS, FLOATS, random_rows, row_bytes
from bench.random_checkpoint import write_checkpoint
from bench.random_target import DEVIATION
from bench.stream import Triad
from specrt import load

NUM_WEIGHTS = {"llama-1b": 1_235_746_816, "qwen-0.5b": 493_961_216, "smollm2": 134_479_872}
"""Of the models whose shapes these are, by their authors' files: norms and biases left out."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("random")
    write_checkpoint(TINY, out)
    return out


@pytest.mark.parametrize("name", CPU_MODELS)
def test_shapes_are_the_models(name: str) -> None:
    assert CPU_MODELS[name].num_weights() == NUM_WEIGHTS[name]
    share = math.gcd(4, CPU_MODELS[name].shape.num_layers)
    whole, part = CPU_MODELS[name].matrices(), CPU_MODELS[name].matrices(share)
    assert sum(n * k for n, k in part) * share == sum(n * k for n, k in whole)


def test_byte_tokens_are_distinct() -> None:
    tokens = byte_tokens(300)
    assert len(set(tokens)) == 300
    assert tokens[-2:] == [BOS, EOS]
    with pytest.raises(ValueError, match="vocab_size: expected at least 259, got 258"):
        byte_tokens(258)


@pytest.mark.parametrize("kind", [*FLOATS, *BLOCKS])
def test_random_rows_are_sane_weights(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    raw = random_rows(kind, 8, 512, seed=1)
    assert raw.shape == (8, row_bytes(kind, 512))
    weights = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.upper()])
    assert weights.shape == (8, 512)
    assert DEVIATION / 2 < weights.std() < 2 * DEVIATION
    assert np.array_equal(raw, random_rows(kind, 8, 512, seed=1))


@pytest.mark.parametrize("kind", ["q8_0", "q4_k"])
def test_random_gguf_has_every_tensor(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from bench.random_gguf import write_gguf

    write_gguf(TINY, kind, tmp_path / "a.gguf")
    tensors = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    assert len(tensors) == 2 + TINY.shape.num_layers * 9
    shapes = {one.name: tuple(reversed(one.shape.tolist())) for one in tensors}
    assert shapes["token_embd.weight"] == (512, 64)
    assert shapes["blk.1.ffn_down.weight"] == (64, 128)
    last = next(one for one in tensors if one.name == "output_norm.weight").data
    assert set(last.tolist()) == {-1.0, 1.0}


def test_planted_trees_say_what_plain_decoding_says(checkpoint: Path) -> None:
    engine = load(checkpoint, progress=False)
    cases = [planted_cpu.Case(8, 3.3, is_free=True), planted_cpu.Case(8, 3.3, is_free=False)]
    rows = planted_cpu.run(engine, cases, Request([1, 2, 3], 33, 0.0, 0), repeats=1)
    assert [row["tau"] for row in rows] == [1.0, rows[1]["tau"], rows[1]["tau"]]
    assert rows[1]["tau"] == pytest.approx(3.3, abs=0.4)


def test_a_stretch_is_the_nearest() -> None:
    trace = Trace(8, 4, [0, 0, 1, 3, 4, 2, 0, 0])
    found = planted_cpu.stretch(trace, tau=4.0, num_tokens=12)
    assert found.accept_lengths == [3, 4, 2]


def test_a_race_is_told_in_pairs() -> None:
    """Ratios are of outputs of one turn; our first token comes a round after the prompt's pass."""

    class Made:
        def __init__(self, seconds: float, said: list[int]) -> None:
            self._seconds, self._said = seconds, said

        def run(self, request: Request) -> Output:
            return Output(self._said, 4, self._seconds, 1.0, 4)

    made = {
        PLAIN: Made(2.0, [1, 2, 3, 4]),
        "ours recycle": Made(1.0, [1, 2, 5, 4]),
        "ours int8": Made(8.0, [1, 2, 5, 5]),
        LLAMA_CPP: Made(4.0, [1, 2, 9, 4]),
    }
    exact = (PLAIN, "ours recycle")
    race = Race(made, 10, {PLAIN: 100}, Triad(1024), (LLAMA_CPP,), exact)
    race.run(Request([1], 4, 0.0, 0), repeats=2)
    plain, drafted, rounded, peer = race.rows()
    assert (plain["tokens/s"], plain["vs llama.cpp"], peer["vs plain"]) == (2.0, 2.0, 0.5)
    assert (plain["first_ms"], peer["first_ms"], plain["agrees"]) == (1500.0, 1000.0, 2)
    assert (plain["differs plain"], drafted["differs plain"]) == (0, 1)
    assert rounded["differs plain"] is peer["differs plain"] is None
    assert (drafted["vs plain"], rounded["vs llama.cpp"], rounded["ms/token"]) == (2.0, 0.5, 2000.0)
    assert peer["first vs llama.cpp"] == 1.0


def test_cpu_time_is_of_what_comes_behind_the_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's pass of 3 s and 0.5 s a token, whatever else the machine does."""
    now = [0.0]

    class Made:
        def run(self, request: Request) -> Output:
            now[0] += 3.0 + 0.5 * request.max_new_tokens
            tokens = list(range(request.max_new_tokens))
            return Output(tokens, len(tokens), 99.0, 99.0, len(tokens))

    monkeypatch.setattr("bench.generate_gguf.time.process_time", lambda: now[0])
    found = CpuTimed(Made()).run(Request([1], 16, 0.0, 0))
    assert (found.rate, found.seconds, len(found.token_ids)) == (2.0, 8.0, 24)


def test_the_triad_adds() -> None:
    triad = Triad(4096)
    triad.run()
    assert triad.num_bytes == 3 * 4096
    assert torch.equal(triad._a, torch.add(triad._b, triad._c, alpha=3.0))


@pytest.mark.slow
def test_loading_is_measured(checkpoint: Path) -> None:
    found = row(str(checkpoint), {"dtype": "bfloat16"}, 1)
    assert found["seconds"] > 0
    assert found["peak MB"] > found["weights MB"]
