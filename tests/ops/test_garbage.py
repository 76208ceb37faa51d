"""Garbage in tables, counts, paths and ids: no crash, and no other sequence's result changes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specrt import ops
from specrt.ops.graph import CpuGraph
from specrt.ops.tree_accept import workspace_size
from specrt.sampling import SamplingParams, SamplingTable
from tests.ops.conftest import Backend
from tests.ops.garbage import CPU, Garbage
from tests.ops.garbage_calls import KERNELS, accept_arguments, pages_of
from tests.ops.garbage_kernel import BATCH, NUM_VARIANTS, VOCAB, Arguments, ints

Tensor = torch.Tensor
ROOT = Path(__file__).resolve().parents[2]
ON_GPUS = [name for name, kernel in KERNELS.items() if kernel.has_cuda_source]
NUM_PAGES = pages_of(1)[1]
RUNS = [f"{name}[cpu]" for name in KERNELS] + [f"{name}[simt]" for name in ON_GPUS]


def attacked(*arguments: str) -> dict[str, str]:
    """How each kernel's process ended: ``ok``, or where it died."""
    command = [sys.executable, "-m", "tests.ops.garbage", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stderr)  # the trace of a crash, if a test fails
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Of 300 calls of each kernel on the CPU and 24 under the shim."""
    return attacked("--cpu", "300", "--simt", "24", *KERNELS, "planted")


@pytest.mark.parametrize("run", RUNS)
def test_no_call_leaves_its_tensors(outcomes: dict[str, str], run: str) -> None:
    assert outcomes.get(run) == "ok"


def test_a_kernel_that_trusts_what_it_reads_is_found(outcomes: dict[str, str]) -> None:
    assert outcomes["planted[cpu]"].startswith("SIGSEGV in call ")


@pytest.mark.slow
def test_of_a_hundred_thousand_calls_none_leaves_its_tensors() -> None:
    assert 9000 * len(KERNELS) + 2500 * len(ON_GPUS) >= 100_000
    outcomes = attacked("--seed", "1", "--cpu", "9000", "--simt", "2500")
    assert outcomes == dict.fromkeys(RUNS, "ok")


# --- neighbours


def called(name: str, arguments: Arguments, backend: Backend) -> Arguments:
    there = {
        n: a.to(backend.device, copy=True) if isinstance(a, Tensor) else a
        for n, a in arguments.items()
    }
    KERNELS[name].call(there)
    return there


def results_of(name: str, arguments: Arguments, table: Tensor | None, seq: int) -> list[Tensor]:
    """What one sequence got, as bytes, with its pages by the right table."""
    kernel = KERNELS[name]
    found = [arguments[n][seq : seq + 1] for n in kernel.results if arguments[n] is not None]
    for n, dim in kernel.pages.items():
        assert table is not None
        found.append(arguments[n].cpu().index_select(dim, table[seq].long()))
    return [t.cpu().contiguous().view(torch.uint8) for t in found]


def check_neighbours(name: str, backend: Backend) -> None:
    kernel, near, far = KERNELS[name], Garbage(2), Garbage(3, is_far=True)
    for trial in range(4 * NUM_VARIANTS):
        rng = random.Random(trial)
        right = kernel.make(trial % NUM_VARIANTS, backend)
        wrong = kernel.make(trial % NUM_VARIANTS, backend)
        # In tables numbers of no page, so that no two sequences share one.
        for argument in kernel.own:
            # Of acceptance's sampling rows the host refuses some, where it can read them.
            is_refused = (name, argument) == ("tree_accept", "sampling")
            is_refused = is_refused and not backend.runs_cuda_source
            if right[argument] is not None and not is_refused:
                is_table = argument in ("block_table", "slots")
                (far if is_table else near).spoil(wrong[argument][1].numpy(), rng)
        expected, got = (called(name, arguments, backend) for arguments in (right, wrong))
        table = right.get("block_table")
        for seq in set(range(BATCH)) - {1}:
            pairs = zip(*(results_of(name, a, table, seq) for a in (expected, got)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), (trial, seq)


@pytest.mark.parametrize("name", ON_GPUS)
def test_neighbours_of_garbage_get_the_bits_they_always_get(backend: Backend, name: str) -> None:
    check_neighbours(name, backend)


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in ON_GPUS])
def test_neighbours_of_garbage_on_the_cpu(name: str) -> None:
    check_neighbours(name, Backend("cpu", CPU))


# --- what becomes of what


@pytest.mark.parametrize("page", [NUM_PAGES, -1, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("name", [name for name in ON_GPUS if "block_table" in KERNELS[name].own])
def test_a_page_that_the_cache_lacks_is_its_last(backend: Backend, name: str, page: int) -> None:
    results = []
    for number in (NUM_PAGES - 1, page):
        arguments = KERNELS[name].make(1, backend)
        arguments["block_table"][0, 1] = number  # of the prefix's last row and the tree's first two
        arguments = called(name, arguments, backend)
        caches = [a for n, a in arguments.items() if n in ("kv", "k_cache", "v_cache")]
        results.append([*caches, *(arguments[n] for n in KERNELS[name].results)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("length", "path"), [(-1, [0, 2]), (7, [0, 9]), (2**31 - 1, [1, 2**31 - 1])]
)
def test_slots_that_the_table_lacks_are_left_alone(
    backend: Backend, length: int, path: list[int]
) -> None:
    kv = torch.randn(1, 2, 2, 4, 1, 8).to(backend.device)
    before = kv.clone()
    table, there = ints(1, 0)[None].to(backend.device), backend.device
    kv_len = ints(length).to(there)
    ops.kv_commit(kv, table, ints(*path)[None].to(there), ints(2).to(there), kv_len)
    moved = {-1: [(1, 0, 1, 1)]}.get(length, [])
    for to_page, to_row, from_page, from_row in moved:
        before[:, :, to_page, to_row] = before[:, :, from_page, from_row]
    assert torch.equal(kv, before)
    assert kv_len.tolist() == [(length + 2 + 2**31) % 2**32 - 2**31]


def test_a_bias_of_no_token_changes_nothing() -> None:
    right = accept_arguments(0, Backend("cpu", CPU))
    wrong = right | {"bias_ids": right["bias_ids"].clone()}
    number = int(wrong["bias_ids"].argmax())
    right["bias_values"] = right["bias_values"].clone()
    wrong["bias_ids"][number] = VOCAB
    right["bias_values"][number] = 0.0
    results = [called("tree_accept", a, Backend("cpu", CPU)) for a in (right, wrong)]
    for name in ("path", "tokens", "accept_length"):
        assert torch.equal(results[0][name], results[1][name])


def test_sampling_that_changed_since_it_was_captured_fails_its_sequence_alone() -> None:
    """No workspace was given, for all were greedy."""
    a = accept_arguments(5, Backend("cpu", CPU))
    graph = CpuGraph.capture(lambda: KERNELS["tree_accept"].call(a))
    before = a["tokens"].clone()
    sampled = SamplingTable.build([SamplingParams(temperature=1.0, seed=1)], [2], VOCAB)
    a["sampling"][1] = sampled.rows[0]
    graph.launch()
    assert a["accept_length"][1] == -1 and (a["tokens"][1] == -1).all()
    assert torch.equal(a["tokens"][[0, 2]], before[[0, 2]])
    a["workspace"] = torch.zeros(1, workspace_size(VOCAB))
    KERNELS["tree_accept"].call(a)
    assert a["accept_length"][1] >= 0
