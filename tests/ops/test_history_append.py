"""Histories, stops and reports of whatever acceptance hands over, against plain Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch

from specrt import _C, ops
from specrt.ops.graph import CpuGraph
from specrt.ops.history_append import HEADER_SIZE, Ending, ReportWord, report_size
from tests.ops.conftest import Backend, OnAnotherGpu
from tests.oracles.history_append import Appended, Round, append

Tensor = torch.Tensor
SIMT_SCHEDULES = (1, 0, 2)
CPU = Backend("cpu", torch.device("cpu"))
VOCAB, POISON = 50, -77
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
HOSTILE = (INT_MIN, INT_MIN + 1, -2, -1, 0, 1, 127, 128, INT_MAX - 1, INT_MAX)


def i32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def poisoned(tensor: Tensor) -> Tensor:
    """The same in the middle of a wider one, which stays poisoned."""
    shape = (len(tensor), tensor.shape[1] + 5)
    wider = torch.full(shape, POISON, dtype=tensor.dtype, device=tensor.device)
    wider[:, 2:-3] = tensor
    return wider[:, 2:-3]


@dataclass(frozen=True)
class Batch:
    """B sequences at the end of a round: the op's arguments, in order."""

    num_nodes: Tensor
    depth: Tensor
    path: Tensor
    accept_length: Tensor
    tokens: Tensor
    logprobs: Tensor | None
    stop_ids: Tensor
    max_len: Tensor
    history: Tensor
    history_len: Tensor
    roots: Tensor
    num_path: Tensor
    report: Tensor

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> Batch:
        """Outputs poisoned, those of rows each in the middle of a wider tensor."""
        names = [f.name for f in fields(Round) if f.name not in ("logprobs", "root")]
        inputs = {name: i32([getattr(one, name) for one in rounds]) for name in names}
        logprobs, size = [one.logprobs for one in rounds], len(rounds[0].tokens)
        has_logprobs = logprobs[0] is not None
        inputs["logprobs"] = i32(logprobs).view(torch.float32) if has_logprobs else None
        inputs["history"] = poisoned(inputs["history"])
        report = torch.full((len(rounds), report_size(size, has_logprobs)), POISON)
        return cls(
            **inputs,
            roots=i32([one.root for one in rounds]),
            num_path=torch.full((len(rounds),), POISON, dtype=torch.int32),
            report=poisoned(report.int()),
        )

    def to(self, device: torch.device) -> Batch:
        """A copy, its rows as far apart."""

        def moved(tensor: Tensor) -> Tensor:
            whole = tensor if tensor._base is None else tensor._base
            there = whole.to(device, copy=True)
            return there.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        tensors = {n: t if t is None else moved(t) for n, t in vars(self).items()}
        return Batch(**tensors)

    def appended(self) -> list[Appended]:
        """As the oracle's."""
        names = "max_len", "history", "history_len", "roots", "num_path", "report"
        columns = (getattr(self, name).cpu().tolist() for name in names)
        return [Appended(*one) for one in zip(*columns, strict=True)]


def check(rounds: Sequence[Round], backend: Backend) -> list[Appended]:
    """Against plain Python; nothing around the outputs is written, and no input."""
    given = Batch.of(rounds)
    batch = given.to(backend.device)
    ops.history_append(*vars(batch).values())
    result = batch.appended()
    assert result == [append(one) for one in rounds]
    for view in (batch.history, batch.report):
        around = torch.cat([view._base[:, :2], view._base[:, -3:]], dim=1)
        assert (around == POISON).all()
    for name in ("num_nodes", "depth", "path", "accept_length", "tokens", "stop_ids"):
        assert torch.equal(getattr(batch, name).cpu(), getattr(given, name)), name
    return result


def words(one: Appended) -> dict[ReportWord, int]:
    return {word: one.report[word] for word in ReportWord}


# --- one sequence


PLAIN = Round(
    num_nodes=5, depth=[0, 1, 1, 2, 3, 9], path=[0, 1, 3, 4, -1, -1], accept_length=3,
    tokens=[9, 4, 2, 6, -1, -1], logprobs=None, stop_ids=[30, -1], max_len=20,
    history=[5, 8, 3, *[POISON] * 17], history_len=3, root=3,
)  # fmt: skip


def test_a_sequence_that_goes_on(backend: Backend) -> None:
    (one,) = check([PLAIN], backend)
    assert one.history[:8] == [5, 8, 3, 9, 4, 2, 6, POISON]
    assert (one.history_len, one.root, one.num_path) == (7, 6, 4)
    assert one.report[:HEADER_SIZE] == [5, 3, 3, 4, 0, 0, 0, 0]
    assert one.report[HEADER_SIZE:] == [9, 4, 2, 6, -1, -1, 0, 1, 3, 4, -1, -1]


@pytest.mark.parametrize(
    ("change", "taken", "ending"),
    [
        ({"stop_ids": [2, -1]}, 3, Ending.STOP_TOKEN),  # inside of the accepted path
        ({"stop_ids": [-1, 6]}, 4, Ending.STOP_TOKEN),  # the bonus token
        ({"stop_ids": [4, 9]}, 1, Ending.STOP_TOKEN),  # the first of two
        ({"stop_ids": []}, 4, Ending(0)),
        ({"stop_ids": [3]}, 4, Ending(0)),  # the root's, which is no new token
        ({"max_len": 5}, 2, Ending.MAX_LEN),
        ({"max_len": 7}, 4, Ending.MAX_LEN),
        ({"max_len": 8}, 4, Ending(0)),
        ({"max_len": 3}, 0, Ending.MAX_LEN),
        ({"max_len": 2}, 0, Ending.MAX_LEN),
        ({"max_len": INT_MAX}, 4, Ending(0)),
        ({"max_len": INT_MAX, "history": [1] * 5}, 2, Ending.MAX_LEN),
        ({"max_len": 5, "stop_ids": [4]}, 2, Ending.STOP_TOKEN | Ending.MAX_LEN),
        ({"max_len": 5, "stop_ids": [2]}, 2, Ending.MAX_LEN),  # a stop token with no room
        ({"accept_length": -1}, 0, Ending.BAD_LOGITS),
        ({"accept_length": -1, "max_len": 3}, 0, Ending.BAD_LOGITS | Ending.MAX_LEN),
        ({"accept_length": 0}, 1, Ending(0)),
        ({"accept_length": 1, "stop_ids": [2]}, 2, Ending(0)),  # behind the accepted ones
        ({"accept_length": INT_MAX, "stop_ids": [-1]}, 6, Ending(0)),  # padding stops nothing
        ({"accept_length": INT_MIN}, 0, Ending.BAD_LOGITS),
        ({"history_len": -1}, 0, Ending.MAX_LEN),
        ({"history_len": INT_MIN, "max_len": INT_MIN}, 0, Ending.MAX_LEN),
        ({"history_len": 20}, 0, Ending.MAX_LEN),
        ({"history_len": INT_MAX, "max_len": INT_MAX}, 0, Ending.MAX_LEN),
        ({"history_len": 0}, 4, Ending(0)),
        ({"history": []}, 0, Ending.MAX_LEN),
    ],
)
def test_where_a_sequence_ends(
    backend: Backend, change: dict[str, Any], taken: int, ending: Ending
) -> None:
    (one,) = check([replace(PLAIN, **change)], backend)
    assert one.num_path == one.report[ReportWord.NUM_TAKEN] == taken
    assert one.report[ReportWord.ENDING] == ending
    assert one.root == ([3, 9, 4, 2, 6, -1][taken] if taken < 6 else -1)


@pytest.mark.parametrize("num_nodes", [INT_MIN, -1, 0, 1, 4, 6, 7, INT_MAX])
def test_what_is_said_of_the_tree(backend: Backend, num_nodes: int) -> None:
    depth = [INT_MIN, 2, 1, 4, 1, INT_MAX]
    (one,) = check([replace(PLAIN, num_nodes=num_nodes, depth=depth)], backend)
    nodes = min(max(num_nodes, 0), 6)
    deepest = {0: 0, 1: 0, 4: 4, 6: 5}[nodes]
    assert words(one)[ReportWord.NUM_NODES] == nodes
    assert words(one)[ReportWord.DEEPEST] == deepest


def test_log_probabilities_are_their_bits(backend: Backend) -> None:
    bits = i32([0, INT_MIN, 0x7F800000, 0x7FA00001, -1, 1]).tolist()  # 0, -0, inf, two NaN
    (one,) = check([replace(PLAIN, logprobs=bits)], backend)
    assert len(one.report) == report_size(6, has_logprobs=True)
    assert one.report[-6:] == [*bits[:4], 0x7FC00000, 0x7FC00000]


# --- any size, any contents


def random_round(rng: random.Random, size: int, stops: int, *, has_logprobs: bool) -> Round:
    length = rng.randrange(20)
    slots = 20 + size
    return Round(
        num_nodes=rng.randint(1, size),
        depth=[rng.randrange(size) for _ in range(size)],
        path=[rng.randrange(size) for _ in range(size)],
        accept_length=rng.choice((-1, 0, size - 1, rng.randrange(size))),
        tokens=[rng.randrange(VOCAB) for _ in range(size)],
        logprobs=[rng.randrange(2**31) for _ in range(size)] if has_logprobs else None,
        stop_ids=[rng.choice((-1, rng.randrange(VOCAB))) for _ in range(stops)],
        max_len=rng.choice((slots, length + rng.randrange(size + 1))),
        history=[rng.randrange(VOCAB) for _ in range(slots)],
        history_len=length,
        root=rng.randrange(VOCAB),
    )


def spoiled(one: Round, rng: random.Random) -> Round:
    """Some of its numbers are anything."""

    def number(value: int) -> int:
        return rng.choice(HOSTILE) if rng.random() < 0.3 else value

    names = "num_nodes", "accept_length", "max_len", "history_len", "root"
    rows = "depth", "path", "tokens", "stop_ids"
    return replace(
        one,
        **{name: number(getattr(one, name)) for name in names},
        **{name: [number(value) for value in getattr(one, name)] for name in rows},
    )


@pytest.mark.parametrize("has_logprobs", [False, True])
@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 63, 64, 65, 96, 97, 127, 128])
def test_any_size(backend: Backend, size: int, has_logprobs: bool) -> None:
    for stops in (0, 1, 3):
        rng = random.Random(f"{size} {stops}")
        check(
            [random_round(rng, size, stops, has_logprobs=has_logprobs) for _ in range(6)], backend
        )


@pytest.mark.parametrize("size", [1, 5, 70, 128])
def test_any_contents(backend: Backend, size: int) -> None:
    rng = random.Random(size)
    rounds = [random_round(rng, size, 2, has_logprobs=True) for _ in range(60)]
    check([spoiled(one, rng) for one in rounds], backend)


@pytest.mark.parametrize("place", [0, 31, 32, 63, 64, 95, 96, 126, 127])
def test_a_stop_token_anywhere(backend: Backend, place: int) -> None:
    """And the same one again behind it; in the next sequence it stops nothing."""
    size = 128
    tokens = [1] * place + [7] + [1, 7] * size
    rng = random.Random(place)
    one = replace(
        random_round(rng, size, 3, has_logprobs=False),
        accept_length=size - 1, tokens=tokens[:size], stop_ids=[-1, 40, 7], max_len=INT_MAX,
    )  # fmt: skip
    stopped, other = check([one, replace(one, stop_ids=[40, -1, 8])], backend)
    assert (stopped.num_path, other.num_path) == (place + 1, size)
    assert stopped.report[HEADER_SIZE:] == other.report[HEADER_SIZE:]


@pytest.mark.parametrize(
    "end",
    [{"stop_ids": [2, -1]}, {"max_len": 5}, {"accept_length": -1}],
    ids=["stop token", "length", "bad logits"],
)
def test_a_sequence_that_has_ended_takes_nothing(backend: Backend, end: dict[str, Any]) -> None:
    """Whatever a round that was launched before the host knew of it brings."""
    batch = Batch.of([PLAIN, replace(PLAIN, **end)]).to(backend.device)
    ops.history_append(*vars(batch).values())
    ended, going_on = batch.appended()[1], batch.appended()[0]
    batch.accept_length.fill_(1)
    ops.history_append(*vars(batch).values())
    other, after = batch.appended()
    assert other.history_len == going_on.history_len + 2
    assert after.history == ended.history and after.num_path == 0
    assert (after.history_len, after.root) == (ended.history_len, ended.root)
    assert words(after)[ReportWord.NUM_TAKEN] == 0


def test_bad_logits_beside_good_ones(backend: Backend) -> None:
    rng = random.Random(1)
    rounds = [random_round(rng, 40, 1, has_logprobs=True) for _ in range(9)]
    good = [replace(one, accept_length=20, stop_ids=[-1], max_len=INT_MAX) for one in rounds]
    mixed = [replace(one, accept_length=-1) if i % 2 else one for i, one in enumerate(good)]
    results = check(mixed, backend)
    assert results[::2] == check(good, backend)[::2]
    for one, before in zip(results[1::2], mixed[1::2], strict=True):
        assert (one.history, one.root) == (before.history, before.root)
        assert set(one.report[HEADER_SIZE:]) == {-1, 0x7FC00000}


# --- where arguments lie


def test_inputs_that_are_slices(backend: Backend) -> None:
    rng = random.Random(2)
    rounds = [random_round(rng, 40, 3, has_logprobs=True) for _ in range(4)]
    batch = Batch.of(rounds).to(backend.device)
    rows = "depth", "path", "tokens", "logprobs", "stop_ids"
    wide = {name: getattr(batch, name).repeat_interleave(2, 0).repeat(1, 3) for name in rows}
    slices = {
        n: wide[n][::2, len(t[0]) : 2 * len(t[0])] for n, t in vars(batch).items() if n in rows
    }
    ops.history_append(*vars(replace(batch, **slices)).values())
    assert batch.appended() == [append(one) for one in rounds]


def test_one_set_of_stop_tokens_for_all(backend: Backend) -> None:
    rng = random.Random(3)
    rounds = [replace(random_round(rng, 20, 2, has_logprobs=False), stop_ids=[4, 9])] * 3
    batch = Batch.of(rounds).to(backend.device)
    shared = batch.stop_ids[:1].clone().expand(3, 2)
    ops.history_append(*vars(replace(batch, stop_ids=shared)).values())
    assert batch.appended() == [append(one) for one in rounds]


def test_no_sequences(backend: Backend) -> None:
    batch = Batch.of([PLAIN]).to(backend.device)
    ops.history_append(*(t if t is None else t[:0] for t in vars(batch).values()))
    assert (batch.report == POISON).all()


def test_threads_and_instruction_sets_give_the_same_bits() -> None:
    rng, threads, isa = random.Random(4), torch.get_num_threads(), _C.active_isa()
    rounds = [random_round(rng, 100, 2, has_logprobs=True) for _ in range(300)]
    expected = [append(one) for one in rounds]
    given = Batch.of(rounds)
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            for count in (1, 3):
                torch.set_num_threads(count)
                batch = given.to(CPU.device)
                ops.history_append(*vars(batch).values())
                assert batch.appended() == expected
    finally:
        torch.set_num_threads(threads)
        _C.set_isa(isa)


def test_a_captured_launch_goes_on_where_the_last_one_ended() -> None:
    batch = Batch.of([replace(PLAIN, max_len=9)])
    graph = CpuGraph.capture(lambda: ops.history_append(*vars(batch).values()))
    seen = [batch.history_len.item()]
    for tokens in ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]):
        batch.tokens.copy_(i32([tokens]))
        graph.launch()
        seen.append(batch.history_len.item())
    assert seen == [7, 9, 9]
    assert batch.history[0, :10].tolist() == [5, 8, 3, 9, 4, 2, 6, 1, 2, POISON]


def test_compiles(device: torch.device) -> None:
    batch = Batch.of([PLAIN, replace(PLAIN, stop_ids=[2, -1])])
    eager, compiled = batch.to(device), batch.to(device)
    ops.history_append(*vars(eager).values())
    function = torch.compile(ops.history_append, fullgraph=True, backend="aot_eager")
    function(*vars(compiled).values())
    assert compiled.appended() == eager.appended()


# --- errors


def arguments_of(backend: Backend) -> dict[str, Any]:
    logprobs = [0] * 6
    rounds = [replace(PLAIN, logprobs=logprobs)] * 2
    return vars(Batch.of(rounds).to(backend.device))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", torch.zeros(2, 6, dtype=torch.int64)),
        ("tokens", torch.zeros(6, 2, dtype=torch.int32).T),
        ("tokens", torch.zeros(2, 0, dtype=torch.int32)),
        ("tokens", torch.zeros(2, 129, dtype=torch.int32)),
        ("depth", torch.zeros(2, 5, dtype=torch.int32)),
        ("path", torch.zeros(3, 6, dtype=torch.int32)),
        ("logprobs", torch.zeros(2, 6, dtype=torch.int32)),
        ("num_nodes", torch.zeros(3, dtype=torch.int32)),
        ("accept_length", torch.zeros(2, 1, dtype=torch.int32)),
        ("stop_ids", torch.zeros(2, dtype=torch.int32)),
        ("stop_ids", torch.zeros(1, 2, dtype=torch.int32)),
        ("max_len", torch.zeros(2)),
        ("history", torch.zeros(2, 9, dtype=torch.int64)),
        ("history", torch.zeros(9, 2, dtype=torch.int32).T),
        ("history_len", torch.zeros(1, dtype=torch.int32)),
        ("roots", torch.zeros(2, dtype=torch.int64)),
        ("num_path", torch.zeros(3, dtype=torch.int32)),
        ("report", torch.zeros(2, report_size(6, has_logprobs=False), dtype=torch.int32)),
    ],
)
def test_a_wrong_argument_is_named(backend: Backend, name: str, value: Tensor) -> None:
    arguments = arguments_of(backend) | {name: value.to(backend.device)}
    with pytest.raises(ValueError, match=f"^{name}: expected|^{name}: the last dimension"):
        ops.history_append(**arguments)


def test_a_report_without_log_probabilities_is_smaller(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"^report: expected \[B, 8 \+ 2 N\] = \[2, 20\] int32"):
        ops.history_append(**arguments_of(backend) | {"logprobs": None})


def test_an_input_that_is_an_output_is_named() -> None:
    arguments = arguments_of(CPU)
    row, rows = torch.zeros(2, dtype=torch.int32), arguments["report"]
    for given, written, memory in (
        ("accept_length", "num_path", (row, row)),
        ("accept_length", "max_len", (row, row)),
        ("tokens", "report", (rows[:, 8:14], rows)),
        ("logprobs", "report", (rows[:, 20:].view(torch.float32), rows)),
        ("stop_ids", "history", (arguments["history"][:, :2], arguments["history"])),
    ):
        message = f"^{given}: expected memory that is not {written}'s, which is written"
        with pytest.raises(ValueError, match=message):
            ops.history_append(**arguments | dict(zip((given, written), memory, strict=True)))


@pytest.mark.parametrize("name", [f.name for f in fields(Batch) if f.name != "tokens"])
def test_tensors_on_two_devices_are_named(name: str) -> None:
    arguments = arguments_of(CPU)
    arguments[name] = OnAnotherGpu(arguments[name])
    message = f"^{name}: expected a tensor on cpu as tokens is, got one on cuda:1"
    with pytest.raises(ValueError, match=message):
        ops.history_append(**arguments)
