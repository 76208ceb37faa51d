"""Trace files: numbers come back exactly, and whatever is wrong with a file is said by name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specrt.draft.length.costs import DraftCosts
from specrt.lab.trace import (
    Trace,
    TraceHeader,
    TraceModels,
    TraceSequence,
    read_trace,
    read_traces,
    write_trace,
)

WIDTH = 4
MODELS = TraceModels("target", "t0", "eesd", "d0", 3, "float32", WIDTH)
COSTS = DraftCosts(1 / 3, 0.1, 2 / 7, 1.7, 0.05)
HEADER = TraceHeader(MODELS, 0.7, 40, 0.95, 0.0, COSTS, (float(np.float32(0.3)), -1.25))


def make_sequence(index: int, seed: int = 2**63) -> TraceSequence:
    """Chains of all lengths, with float32 of every size."""
    rng = np.random.default_rng(index)
    count = 9
    lengths = np.minimum(WIDTH, count - 1 - np.arange(count))
    is_drafted = np.arange(WIDTH) < lengths[:, None]
    bits = rng.integers(0, 2**32, (2, count, WIDTH), dtype=np.uint32).view(np.float32)
    numbers = np.where(np.isfinite(bits) & is_drafted, bits, np.where(is_drafted, 0.1, np.nan))
    return TraceSequence(
        task='a task, "quoted"\u2028 and ünïcode',
        index=index,
        seed=seed,
        prompt_len=5,
        max_len=5 + count,
        token_ids=tuple(rng.integers(0, 10, count).tolist()),
        overrun_ids=(1, 2, 3),
        draft_tokens=np.where(is_drafted, rng.integers(0, 10, (count, WIDTH)), -1).astype(np.int32),
        scores=numbers[0].astype(np.float32),
        evidence=numbers[1].astype(np.float32),
    )


TRACE = Trace(HEADER, tuple(make_sequence(index) for index in range(20)))


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_what_was_written_is_read(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    write_trace(file, TRACE)
    write_trace(file, TRACE)  # over an older one
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert file.read_bytes().startswith(b"\x1f\x8b") == name.endswith(".gz")
    trace = read_trace(file)
    assert trace.header == HEADER
    for one, other in zip(trace.sequences, TRACE.sequences, strict=True):
        assert same_bits(one.draft_tokens, other.draft_tokens)
        assert same_bits(one.scores, other.scores)
        assert same_bits(one.evidence, other.evidence)
        for name in ("task", "index", "seed", "prompt_len", "max_len", "token_ids", "overrun_ids"):
            assert getattr(one, name) == getattr(other, name)


def test_a_file_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a.gz", "b.gz"):
        write_trace(tmp_path / name, TRACE)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "there"
    (file / "full").mkdir(parents=True)  # a directory cannot be replaced by a file
    with pytest.raises(OSError) as failed:
        write_trace(file, TRACE)
    assert failed.value.filename == str(file)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    with pytest.raises(OSError) as failed:
        write_trace(tmp_path / "nowhere" / "a.jsonl", TRACE)
    assert failed.value.filename == str(tmp_path / "nowhere" / "a.jsonl")


def test_matching_tokens_are_those_up_to_the_first_other() -> None:
    sequence = TRACE.sequences[0]
    known = [*sequence.token_ids, *sequence.overrun_ids]
    for place, (chain, length) in enumerate(
        zip(sequence.draft_tokens, sequence.lengths, strict=True)
    ):
        right = 0
        while right < length and chain[right] == known[place + right]:
            right += 1
        assert sequence.num_matching[place] == right
    assert sequence.num_matching.max() > 0


# --- files that are no traces ---------------------------------------------------------------------


def edited(line: int, edit: Callable[[dict[str, Any]], object]) -> Callable[[list[str]], object]:
    """Change one line's object."""

    def change(lines: list[str]) -> None:
        data = json.loads(lines[line])
        edit(data)
        lines[line] = json.dumps(data)

    return change


def put(*keys: Any, value: Any) -> Callable[[dict[str, Any]], object]:
    """Put a value under a path of keys; ``...`` removes it."""

    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value
        if value is ...:
            del data[keys[-1]]

    return change


BROKEN = {
    "empty": (lambda lines: lines.clear(), "expected a trace, got an empty file"),
    "another file": (lambda lines: lines.insert(0, '{"prompt": "x"}'), '"specrt_trace"'),
    "no object": (lambda lines: lines.insert(0, "[1]"), "line 1: expected an object, got list"),
    "no JSON": (lambda lines: lines.__setitem__(2, lines[2][:40]), "line 3: not JSON"),
    "version": (edited(0, put("specrt_trace", value=2)), 'line 1: "specrt_trace": expected 1'),
    "no version": (edited(0, put("specrt_trace", value="1")), "expected int, got str"),
    "cut": (lambda lines: lines.pop(), "expected 20 sequences, got 19"),
    "nothing": (
        lambda lines: lines.__setitem__(
            slice(None), [json.dumps({**json.loads(lines[0]), "num_sequences": 0})]
        ),
        "expected at least 1 sequences, got 0",
    ),
    "no costs": (edited(0, put("costs", value=...)), 'line 1: no "costs"'),
    "cost": (edited(0, put("costs", "step", value=None)), '"costs": "step": expected float'),
    "cost < 0": (edited(0, put("costs", "step", value=-1)), 'line 1, "costs": step: expected'),
    "max_draft": (edited(0, put("models", "max_draft", value=0)), '"max_draft": expected 1..62'),
    "far": (edited(0, put("models", "max_draft", value=10**12)), '"max_draft": expected 1..62'),
    "cold": (edited(0, put("temperature", value=-1)), '"temperature": expected a number >= 0'),
    "no heat": (edited(0, put("temperature", value=float("nan"))), '"temperature": expected a'),
    "is bool": (edited(0, put("models", "exit_layer", value=True)), '"exit_layer": expected int'),
    "slope": (edited(0, put("slope", value=[1.0])), '"slope": expected two numbers, got 1'),
    "no number": (edited(0, put("slope", 0, value="x")), '"slope": expected a list of finite'),
    "task": (edited(4, put("task", value=3)), 'line 5: "task": expected str, got int'),
    "ids": (edited(4, put("token_ids", 0, value=-3)), 'line 5: "token_ids": expected a list'),
    "rows": (edited(4, put("scores", value=[])), 'line 5: "scores": expected 9 rows, got 0'),
    "wide": (
        edited(4, put("draft_tokens", 0, value=[1] * 5)),
        'line 5: "draft_tokens[0]": expected at most 4 token ids',
    ),
    "large": (edited(4, put("evidence", 1, 2, value=1e39)), 'line 5: "evidence[1]": expected'),
    "NaN": (edited(4, put("scores", 1, 2, value=float("nan"))), 'line 5: "scores[1]": expected'),
    "short": (edited(4, put("scores", 0, value=[0.5])), "line 5: scores: expected a finite number"),
    "long": (edited(4, put("scores", 8, value=[0.5])), "line 5: scores: expected a finite number"),
    "tokens": (edited(4, put("token_ids", value=[])), "line 5: "),
    "endless": (edited(4, put("max_len", value=2**31)), "line 5: max_len: expected at most"),
    "length": (edited(4, put("max_len", value=13)), "line 5: prompt_len: expected 1..max_len"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "named"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(
    tmp_path: Path, damage: Callable[[list[str]], object], named: str
) -> None:
    file = tmp_path / "a.jsonl"
    write_trace(file, TRACE)
    lines = file.read_text().splitlines()
    damage(lines)
    file.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError) as refused:
        read_trace(file)
    assert str(refused.value).startswith(str(file))
    assert named in str(refused.value)


@pytest.mark.parametrize("size", [10, 300, -10, -1])
def test_a_truncated_gzip_file_is_named(tmp_path: Path, size: int) -> None:
    file = tmp_path / "a.gz"
    write_trace(file, TRACE)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="a.gz: truncated or damaged gzip file"):
        read_trace(file)


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.gz"
    for data in (b"no gzip", gzip.compress(b"x" * 1000)[:-20] + bytes(20)):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="a.gz: truncated or damaged gzip file"):
            read_trace(file)
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="a.jsonl: expected a trace, got bytes that are no text"):
        read_trace(tmp_path / "a.jsonl")


def test_another_models_trace_is_refused(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    write_trace(ours, TRACE)
    # Other options, costs and tasks go together.
    write_trace(theirs, replace(TRACE, header=replace(HEADER, temperature=0.0, costs=COSTS)))
    assert len(read_traces([ours, theirs])) == 2
    for name, value in asdict(MODELS).items():
        other = value - 1 if isinstance(value, int) else "other"
        sequences = TRACE.sequences
        if name == "max_draft":
            cut = {part: getattr(sequences[0], part)[:, :3] for part in ARRAYS}
            sequences = (replace(sequences[0], **cut),)
        models = replace(MODELS, **{name: other})
        write_trace(theirs, Trace(replace(HEADER, models=models), sequences))
        with pytest.raises(ValueError) as refused:
            read_traces([ours, theirs])
        for said in (str(ours), str(theirs), f'"{name}"', repr(value), repr(other)):
            assert said in str(refused.value)


ARRAYS = ("draft_tokens", "scores", "evidence")


def test_a_sequence_is_checked() -> None:
    sequence = TRACE.sequences[0]
    hole = sequence.draft_tokens.copy()
    hole[0, 1] = -1
    for changes, named in (
        ({"draft_tokens": hole}, "draft_tokens: expected padding at the end"),
        ({"draft_tokens": hole[:3]}, "draft_tokens: expected a chain for each of 9"),
        ({"evidence": sequence.evidence[:, :2]}, "evidence: expected \\[9, 4\\], got \\[9, 2\\]"),
        ({"scores": np.zeros((9, 4), np.float32)}, "scores: expected a finite number"),
        ({"prompt_len": 0}, "prompt_len: expected 1..max_len"),
    ):
        with pytest.raises(ValueError, match=named):
            replace(sequence, **changes)  # type: ignore[arg-type]
