"""Decoding from end to end on a made-up GPU: the target, planted acceptance, the report."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import end_to_end_contenders, end_to_end_cuda, random_target
from bench.end_to_end_contenders import Job, Ours
from bench.end_to_end_cuda import EAGER, GRAPH, PLANTED, TRANSFORMERS, Bench, Case
from bench.fake_gpu import FakeGpu
from bench.planted import NODES, PlantedDrafter, Trace, recorded_trace
from bench.timed_steps import TimedSteps
from bench.whole_rounds import EESD, FSPAD, MAKERS, SIZES, whole_round
from specrt import ops
from specrt.device import Device
from specrt.draft.base import EmptyDrafter
from specrt.models.arena import ALIGNMENT
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights

NAME = "Llama-3-8B"


@pytest.fixture(scope="module")
def target() -> Bench:
    prompt = [(7 * i * i + i) % 500 for i in range(20)]
    return Bench(FakeGpu(), NAME, Job(prompt, num_tokens=24, repeats=1))


def arguments(save: Path | None = None) -> Any:
    return argparse.Namespace(quick=True, budget=None, save=save, model=NAME, prefix=2048)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


# --- the target -------------------------------------------------------------------------------


def test_weights_lie_as_the_loader_lays_them_out(target: Bench) -> None:
    weights, start = target.weights, target.weights.arena.data_ptr()
    order = [matrix for one in weights.layers for matrix in (one.qkv, one.o, one.gate_up, one.down)]
    order += [weights.lm_head, weights.embed]
    places = [matrix.data_ptr() - start for matrix in order]
    assert places == sorted(set(places)) and not any(place % ALIGNMENT for place in places)
    assert places[-1] + order[-1].nbytes <= weights.arena.nbytes
    assert random_target.step_bytes(weights) == places[-1]
    spread = torch.tensor([float(matrix.std()) for matrix in order])
    assert ((spread - 0.02).abs() < 1e-3).all()
    again = random_target.random_weights(target.config, "cpu", torch.float32)
    assert torch.equal(again.arena, weights.arena)


def test_transformers_run_on_the_same_memory(target: Bench) -> None:
    twin, weights = target.twin, target.weights
    assert twin.model.embed_tokens.weight.data_ptr() == weights.embed.data_ptr()
    mlp = twin.model.layers[1].mlp
    half = weights.layers[1].gate_up.nbytes // 2
    assert mlp.up_proj.weight.data_ptr() == weights.layers[1].gate_up.data_ptr() + half
    with torch.no_grad():
        logits = twin(torch.tensor([target.job.prompt])).logits
    first = int(logits[0, -1].argmax())
    assert first == target.expected.token_ids[0]
    assert float(logits[0, -1].log_softmax(-1).max()) == pytest.approx(
        target.expected.logprobs[0],
        abs=1e-4,  # type: ignore[index]
    )


def test_bytes_of_a_round(target: Bench) -> None:
    """Keys and values of two layers of two heads of 64, half way through the output."""
    kept = 2 * 2 * 64 * 2 * 2 * (20 + 12)
    assert target.round_bytes == random_target.step_bytes(target.weights) + kept


# --- planted acceptance -----------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [8, 60])
def test_as_much_is_accepted_as_was_planted(target: Bench, nodes: int) -> None:
    model = LlamaModel(target.config, target.weights)
    trace = Trace(nodes, 4, [2, 0, 4, 1, 3])
    drafter = PlantedDrafter(
        target.expected.token_ids, trace, target.config.vocab_size, model.device
    )
    ours = Ours(model, drafter, None)
    seen: list[int] = []
    propose = drafter.propose

    def counted(*args: Any) -> Any:
        tree = propose(*args)
        seen.append(int(tree.num_nodes))
        return tree

    drafter.propose = counted  # type: ignore[method-assign]
    found = ours.checked(target.job)
    assert found.token_ids == target.expected.token_ids
    assert found.logprobs == target.expected.logprobs
    # 24 tokens: 3 + 1 + 5 + 2 + 4, then 3 + 1 + 5, all of each round's.
    assert seen == [nodes] * 8 and found.num_timed == 21 and found.num_rounds == 7


def test_what_was_recorded() -> None:
    taus = []
    for nodes in sorted(NODES):
        trace = recorded_trace(nodes)
        assert trace.num_nodes == nodes and max(trace.accept_lengths) <= trace.depth < 10
        taus.append(1 + sum(trace.accept_lengths) / len(trace.accept_lengths))
    assert taus == sorted(taus) and taus[0] == pytest.approx(3.22, abs=0.01)


def test_a_trace_that_no_tree_fits() -> None:
    for trace in (Trace(5, 5, [1]), Trace(60, 6, [1])):
        with pytest.raises(ValueError, match="trace: expected depth < num_nodes < 50"):
            PlantedDrafter([], trace, 50, Device())


# --- whole rounds -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_drafters_of_the_targets_shape(target: Bench, name: str) -> None:
    """They say what plain decoding says, and what a round must read."""
    case = Case(name, nodes=SIZES.get(name, 1))
    found = target.ours(case).checked(target.job)
    assert found.token_ids == target.expected.token_ids
    assert found.logprobs == target.expected.logprobs
    assert found.reads == 0 and found.parts_ms is not None and min(found.parts_ms) > 0
    assert target.least_bytes[case][1] <= target.round_bytes


@pytest.mark.parametrize("name", MAKERS)
def test_whole_rounds_on_a_gpu(target: Bench, gpu: Device, name: str) -> None:
    """With matrices of 16 bits; nobody waits but for each round's report."""
    weights = random_target.random_weights(target.config, "cpu", torch.bfloat16)
    model = LlamaModel(target.config, place_weights(weights, gpu), gpu)
    job = Job(target.job.prompt, num_tokens=5, repeats=1)
    expected = Ours(model, EmptyDrafter(), None).checked(job)
    made = whole_round(name, model)
    found = Ours(model, made.drafter, None, made.params).checked(job)
    assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)
    # A round that is launched before the last one was read is read too.
    for one in (expected, found):
        rounds = one.num_rounds + 1
        assert one.reads in (1, (rounds + 1) / rounds)


def test_bytes_of_whole_rounds(target: Bench) -> None:
    """In rows of 4 bytes: two layers of a width of 256 and 208, four heads and two, 500 tokens."""
    made = {
        name: whole_round(name, LlamaModel(target.config, target.weights)) for name in (FSPAD, EESD)
    }
    layer, head = 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 208 * 256), 4 * 500 * 256
    assert made[EESD].draft_bytes == 5 * layer + 4 * (layer + head)
    assert made[EESD].verify_bytes == layer + head
    folded, second_output = 4 * (256 * 256 + 2 * 208 * 256), 4 * 208 * 256
    assert made[FSPAD].draft_bytes == 6 * (layer + second_output + folded + head)
    assert made[FSPAD].verify_bytes == 2 * layer + head


# --- the report -------------------------------------------------------------------------------


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end_to_end_cuda.run(arguments(tmp_path), FakeGpu())
    result = last_line(capsys)
    assert result == json.loads((tmp_path / "end_to_end_cuda.json").read_text())
    assert result["failed"] == [] and result["summary"]["not_measured"] == {}
    graph, eager, fspad, eesd, *planted, theirs = result["rows"]
    steps = [GRAPH, EAGER, EAGER, EAGER, GRAPH, EAGER, EAGER]
    assert [row["steps"] for row in result["rows"]] == steps
    assert {row["equal"] for row in (graph, eager, fspad, eesd, *planted)} == {"all bits"}
    assert eager["vs plain"] == eager["tau"] == 1
    assert all("planted; drafting not counted" in row["contender"] for row in planted)
    assert all(row["tau"] > 2 and row["nodes"] == 60 for row in planted)
    assert theirs["contender"] == TRANSFORMERS and theirs["equal"].endswith(" of 12 tokens")
    assert (fspad["nodes"], eesd["nodes"]) == (60, 5) and eesd["tau"] > 2
    for row in result["rows"]:
        assert row["ms a round"] == pytest.approx(row["ms a token"] * row["tau"])


def test_a_row_that_is_wrong_or_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked, calls = Ours.checked, []

    def last_bit(self: Ours, job: Job) -> Any:
        found = checked(self, job)
        calls.append(found)
        if len(calls) != 3:  # after plain decoding's: the first graph's
            return found
        return replace(found, logprobs=[*found.logprobs[:-1], found.logprobs[-1] + 1e-7])

    def no_memory(config: Any, weights: Any) -> Any:
        raise RuntimeError("no transformers")

    monkeypatch.setattr(Ours, "checked", last_bit)
    monkeypatch.setattr(end_to_end_cuda, "transformers_twin", no_memory)
    with pytest.raises(SystemExit, match="2 cases failed; the first: plain eager: 1 log-prob"):
        end_to_end_cuda.run(arguments(), FakeGpu())
    result = last_line(capsys)
    wrong = "1 log-probabilities have other bits"
    others = ["all bits"] * 4
    assert [row["equal"] for row in result["rows"]] == ["all bits", wrong, *others]
    assert result["failed"][1] == "transformers static eager: no transformers"


def test_other_tokens_are_counted(target: Bench) -> None:
    other = replace(target.expected, token_ids=[*target.expected.token_ids[:5], -1])
    words = end_to_end_cuda._difference(other, target.expected)
    assert words == "only the first 5 of 24 tokens are plain decoding's"


@pytest.mark.parametrize("point", [1, 4])
def test_a_gpu_that_fails(point: int) -> None:
    with pytest.raises(SystemExit, match="an illegal memory access") as left:
        end_to_end_cuda.run(arguments(), FakeGpu(point, stays_broken=True))
    assert "\n" not in str(left.value.code)


def test_what_there_is_no_room_or_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    monkeypatch.setattr(gpu, "place", replace(gpu.place, device="cuda"))
    bench = Bench(gpu, NAME, Job([1], 2, 1))
    with pytest.raises(MemoryError, match=r"needs \d+ GB, 1 are free"):
        _ = bench.weights
    compiled = Case(end_to_end_cuda.COMPILED, GRAPH)
    row, missing = end_to_end_cuda._theirs(compiled, gpu, gpu.ceilings(), bench, end=0.0)
    assert row is None and "wants 150 s of the budget" in str(missing)
    monkeypatch.setattr(end_to_end_cuda, "find_spec", lambda name: None)
    theirs = Case(TRANSFORMERS)
    _, missing = end_to_end_cuda._theirs(theirs, gpu, gpu.ceilings(), bench, end=0.0)
    assert missing == {TRANSFORMERS: "not installed"}


# --- steps as graphs --------------------------------------------------------------------------


def test_a_steps_passes_are_timed_but_its_first() -> None:
    x, weight, out = torch.ones(1, 4), torch.ones(4), torch.empty(1, 4)

    def launch() -> None:
        ops.rms_norm(x, weight, 1e-6, out=out)

    graphs = TimedSteps(torch.device("cpu"))
    for name in "aaaab":
        graphs.run(name, launch)
    assert len(graphs.take_seconds()) == 3 and graphs.take_seconds() == []
    graphs.forget()
    assert not graphs.run("a", launch) and graphs.take_seconds() == []


def test_a_pass_of_the_gpu_is_told_from_the_rest_of_a_round(
    target: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run's passes those of the rounds after the first count."""

    class Passes(TimedSteps):
        def take_seconds(self) -> list[float]:
            # The prompt's pass and 24 rounds.
            return [9.0, 9.0, *[0.002] * 23]

    passes = Passes(torch.device("cpu"))
    ours = Ours(LlamaModel(target.config, target.weights), EmptyDrafter(), passes)
    assert ours.timed(target.job).gpu_seconds == 0.002
    monkeypatch.setattr(target, "ours", lambda case: ours)
    ceilings = FakeGpu().ceilings()
    for case in (Case(PLANTED, GRAPH, 1), Case(PLANTED, EAGER, 1)):
        row, _ = end_to_end_cuda.one_case(case, FakeGpu(), ceilings, 0, bench=target, end=0.0)
        assert row is not None and row["gpu ms"] == 2
        assert row["host %"] == pytest.approx(100 * (1 - 2 / row["ms a round"]))


def test_no_text_is_made() -> None:
    tokenizer = end_to_end_contenders.NoTokenizer()
    assert tokenizer.decode([1, 2]) == ""
    with pytest.raises(ValueError, match="prompt: expected token ids"):
        tokenizer.encode("text")
