"""Traces: what a chain drafter proposed at every place of given outputs, in memory and in a file.

A draft at a position is a function of the true tokens before it, whatever was drafted in the rounds
that led there. So one chain from every position of an output holds all that any rule for the draft
length could ever see, and rules can be compared without running a model (``specrt/lab/replay.py``).

A file is one JSON object a line, gzipped where its name ends in ``.gz``: a header, then a sequence
a line. Numbers of float32 have nine digits, which read back as the same float32.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from specrt.draft.length.costs import DraftCosts
from specrt.ops.draft_control import MAX_DRAFT

FORMAT_VERSION = 1
_VERSION_KEY = "specrt_trace"
_MAX_LEN = 2**31 - 1  # positions are int32
_T = TypeVar("_T")


@dataclass(frozen=True)
class TraceModels:
    """What made a trace; traces are replayed together only where all of it agrees."""

    target: str
    target_fingerprint: str
    """``config_fingerprint`` of the target."""
    drafter: str
    drafter_fingerprint: str
    """Of its checkpoint's weights."""
    exit_layer: int
    """The target's layers that the drafter shares."""
    dtype: str
    """Of the target's weights and cache."""
    max_draft: int
    """K, the longest chain."""


@dataclass(frozen=True)
class TraceHeader:
    """A trace but for its sequences."""

    models: TraceModels
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    costs: DraftCosts
    """Milliseconds, as measured where the trace was recorded."""
    slope: tuple[float, float]
    """Of the drafter's calibration head: greedy, and above temperature 0."""


@dataclass(frozen=True, eq=False)
class TraceSequence:
    """One output of T tokens and the chain drafted from each round root in it.

    Root t is the token before output position t, so row t of the arrays guesses
    ``token_ids[t], token_ids[t + 1], …``. Chains are shorter than K where the output could not
    be longer; the rest of their row is padding.

    Raises:
        ValueError: shapes do not fit, or a chain has a hole or a number that is not finite.
    """

    task: str
    index: int
    """Of the prompt among the task's."""
    seed: int
    prompt_len: int
    max_len: int
    """Prompt and output together could have been so long."""
    token_ids: tuple[int, ...]
    """``T`` tokens: the output."""
    overrun_ids: tuple[int, ...]
    """What the target would have said behind an end it chose itself, as far as a chain can reach:
    a round that passes the end may accept these, and controllers learn from them."""
    draft_tokens: npt.NDArray[np.int32]
    """``[T, K]``, padded with -1."""
    scores: npt.NDArray[np.float32]
    """``[T, K]``, logarithms of probabilities, padded with NaN."""
    evidence: npt.NDArray[np.float32]
    """``[T, K]``, of the calibration head at the trace's temperature, padded with NaN."""

    def __post_init__(self) -> None:
        shape = self.draft_tokens.shape
        if self.max_len > _MAX_LEN:
            raise ValueError(f"max_len: expected at most {_MAX_LEN}, got {self.max_len}")
        if not 1 <= self.prompt_len <= self.max_len - len(self.token_ids):
            raise ValueError(
                f"prompt_len: expected 1..max_len less the output, {self.max_len} - "
                f"{len(self.token_ids)}, got {self.prompt_len}"
            )
        if len(shape) != 2 or shape[0] != len(self.token_ids) or not self.token_ids:
            raise ValueError(
                f"draft_tokens: expected a chain for each of {len(self.token_ids)} >= 1 tokens, "
                f"got shape {list(shape)}"
            )
        is_drafted = self.draft_tokens >= 0
        if (np.diff(is_drafted.astype(np.int8), axis=1) > 0).any():
            raise ValueError("draft_tokens: expected padding at the end of a chain only")
        for name in ("scores", "evidence"):
            values = getattr(self, name)
            if values.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)}, got {list(values.shape)}")
            if not np.array_equal(np.isfinite(values), is_drafted):
                raise ValueError(f"{name}: expected a finite number for each drafted token alone")

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """``[T]``: tokens of each chain."""
        lengths: npt.NDArray[np.int64] = (self.draft_tokens >= 0).sum(axis=1)
        return lengths

    @cached_property
    def num_matching(self) -> npt.NDArray[np.int64]:
        """``[T]``: leading tokens of each chain that are the target's own."""
        count, width = self.draft_tokens.shape
        true = np.full(count + width, -2, dtype=np.int64)  # equal to no token and no padding
        known = (*self.token_ids, *self.overrun_ids)[: count + width]
        true[: len(known)] = known
        windows = np.lib.stride_tricks.sliding_window_view(true, width)[:count]
        is_right = self.draft_tokens == windows
        matching: npt.NDArray[np.int64] = np.logical_and.accumulate(is_right, axis=1).sum(axis=1)
        return matching


@dataclass(frozen=True, eq=False)
class Trace:
    """One recording."""

    header: TraceHeader
    sequences: tuple[TraceSequence, ...]


def write_trace(path: str | os.PathLike[str], trace: Trace) -> None:
    """Write a file; it is whole or not there.

    Raises:
        OSError: it cannot be written.
    """
    file = Path(path)
    header = {
        _VERSION_KEY: FORMAT_VERSION,
        **asdict(trace.header),
        "num_sequences": len(trace.sequences),
    }
    lines = [header, *map(_sequence_data, trace.sequences)]
    data = "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines).encode()
    if file.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        with suppress(OSError):  # it is gone if all went well
            partial.unlink()


def read_traces(paths: Sequence[str | os.PathLike[str]]) -> list[Trace]:
    """Read files that are to be replayed together.

    Raises:
        ValueError: a file is no trace, damaged, of an unknown version, or of other models than
            the first; names the file, the line and the key.
        OSError: it cannot be read.
    """
    traces: list[Trace] = []
    for path in paths:
        trace = read_trace(path)
        if traces:
            _check_same(paths[0], traces[0].header.models, path, trace.header.models)
        traces.append(trace)
    return traces


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read one file.

    Raises:
        ValueError, OSError: as :func:`read_traces`.
    """
    text = _read_text(Path(path))
    if not text:
        raise ValueError(f"{path}: expected a trace, got an empty file")
    lines = text.removesuffix("\n").split("\n")
    first = _parse_line(f"{path}, line 1", lines[0])
    if _VERSION_KEY not in first.data:
        raise ValueError(f'{path}: expected a trace, got a file without "{_VERSION_KEY}"')
    version = first.get(_VERSION_KEY, int)
    if version != FORMAT_VERSION:
        raise first.error(_VERSION_KEY, str(FORMAT_VERSION), str(version))
    header = _parse_header(first)
    num_sequences, num_lines = first.get("num_sequences", int), len(lines) - 1
    if num_lines != num_sequences or num_lines < 1:
        expected = "at least 1" if num_sequences < 1 else str(num_sequences)
        raise ValueError(f"{path}: expected {expected} sequences, got {num_lines}")
    sequences = tuple(
        _parse_sequence(_parse_line(f"{path}, line {number}", line), header.models.max_draft)
        for number, line in enumerate(lines[1:], start=2)
    )
    return Trace(header, sequences)


def _check_same(
    first: str | os.PathLike[str],
    expected: TraceModels,
    path: str | os.PathLike[str],
    got: TraceModels,
) -> None:
    for field in fields(TraceModels):
        ours, theirs = getattr(expected, field.name), getattr(got, field.name)
        if ours != theirs:
            raise ValueError(
                f"{path}: a trace of another model than {first}: "
                f'"{field.name}": expected {ours!r}, got {theirs!r}'
            )


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated or damaged gzip file: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a trace, got bytes that are no text") from error


def _sequence_data(sequence: TraceSequence) -> dict[str, Any]:
    data = {field.name: getattr(sequence, field.name) for field in fields(TraceSequence)}
    for name in ("draft_tokens", "scores", "evidence"):
        rows = zip(data[name].tolist(), sequence.lengths, strict=True)
        data[name] = [[_shortened(value) for value in row[:length]] for row, length in rows]
    return data


def _shortened(value: float) -> float:
    # Nine digits tell any two float32 apart, also by way of a double.
    return value if isinstance(value, int) else float(f"{value:.9g}")


@dataclass(frozen=True)
class _Object:
    """An object of the file and where it stands; what is asked of it is checked."""

    where: str
    data: Mapping[str, Any]

    def get(self, key: str, kind: type[_T]) -> _T:
        """A value of ``kind``; an int where a float is expected becomes one."""
        if key not in self.data:
            raise ValueError(f'{self.where}: no "{key}"')
        value = self.data[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:  # a bool is no int
            raise self.error(key, kind.__name__, type(value).__name__)
        return value

    def fields(self, kinds: Mapping[str, type]) -> dict[str, Any]:
        """Several values, each of its kind."""
        return {key: self.get(key, kind) for key, kind in kinds.items()}

    def inner(self, key: str) -> _Object:
        """The object under ``key``."""
        return _Object(f'{self.where}, "{key}"', self.get(key, dict))

    def numbers(self, key: str, dtype: type, values: object, limit: int | None = None) -> Any:
        """``values``, found under ``key``, as an array: ids for an integer ``dtype``."""
        is_int = issubclass(dtype, np.integer)
        most = np.iinfo(dtype).max if is_int else float(np.finfo(dtype).max)
        kinds, least = ((int,), 0) if is_int else ((int, float), -most)
        if (
            not isinstance(values, list)
            or (limit is not None and len(values) > limit)
            or not all(type(value) in kinds and least <= value <= most for value in values)
        ):
            what = "token ids" if is_int else "finite numbers"
            number = "a list of" if limit is None else f"at most {limit}"
            raise self.error(key, f"{number} {what}", f"{values!r:.40}")
        return np.array(values, dtype=dtype)

    def rows(self, key: str, dtype: type, shape: tuple[int, int]) -> npt.NDArray[Any]:
        """A list of ``shape[0]`` lists of at most ``shape[1]`` numbers, padded."""
        rows = self.get(key, list)
        if len(rows) != shape[0]:
            raise self.error(key, f"{shape[0]} rows", str(len(rows)))
        padding = -1 if issubclass(dtype, np.integer) else np.nan
        padded: npt.NDArray[Any] = np.full(shape, padding, dtype=dtype)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = self.numbers(f"{key}[{number}]", dtype, row, shape[1])
        return padded

    def make(self, kind: type[_T], **values: Any) -> _T:
        """An instance of a dataclass that checks its own fields."""
        try:
            return kind(**values)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error

    def error(self, key: str, expected: str, got: str) -> ValueError:
        return ValueError(f'{self.where}: "{key}": expected {expected}, got {got}')


def _parse_line(where: str, text: str) -> _Object:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    return _Object(where, data)


def _parse_header(line: _Object) -> TraceHeader:
    models = line.inner("models")
    names = {field.name: str for field in fields(TraceModels)}
    values = models.fields({**names, "exit_layer": int, "max_draft": int})
    if not 1 <= values["max_draft"] <= MAX_DRAFT:
        raise models.error("max_draft", f"1..{MAX_DRAFT}", str(values["max_draft"]))
    sampling = line.fields({"temperature": float, "top_k": int, "top_p": float, "min_p": float})
    if not 0.0 <= sampling["temperature"] < math.inf:
        raise line.error("temperature", "a number >= 0", str(sampling["temperature"]))
    costs = line.inner("costs")
    times = costs.fields({field.name: float for field in fields(DraftCosts)})
    slope = line.numbers("slope", np.float32, line.get("slope", list)).tolist()
    if len(slope) != 2:
        raise line.error("slope", "two numbers", str(len(slope)))
    return TraceHeader(
        models=TraceModels(**values),
        costs=costs.make(DraftCosts, **times),
        slope=(slope[0], slope[1]),
        **sampling,
    )


def _parse_sequence(line: _Object, width: int) -> TraceSequence:
    ids: dict[str, Any] = {
        key: tuple(line.numbers(key, np.int32, line.get(key, list)).tolist())
        for key in ("token_ids", "overrun_ids")
    }
    plain = line.fields({"task": str, "index": int, "seed": int, "prompt_len": int, "max_len": int})
    kinds = {"draft_tokens": np.int32, "scores": np.float32, "evidence": np.float32}
    shape = (len(ids["token_ids"]), width)
    arrays: dict[str, Any] = {key: line.rows(key, dtype, shape) for key, dtype in kinds.items()}
    return line.make(TraceSequence, **plain, **ids, **arrays)
