"""Drafters of every family: what is trained beside a target is what its engine runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import specrt
from specrt import DraftParams
from specrt.config import ModelConfig
from specrt.draft.eesd.checkpoint import ExitConfig, read_exit
from specrt.draft.eesd.model import ExitModel
from specrt.draft.fspad.checkpoint import read_checkpoint
from specrt.draft.fspad.layer import DraftLayer
from specrt.engine.engine import Engine
from specrt.models.tokenizer import load_tokenizer
from specrt.sampling import SamplingParams
from specrt.train.data.dataset import read_examples
from specrt.train.device import TrainDevice
from specrt.train.eesd.module import ExitModules, read_last_layer
from specrt.train.eesd.task import EesdTask
from specrt.train.features.frozen import load_frozen_target
from specrt.train.features.source import OnlineFeatures
from specrt.train.fspad.module import DraftModel
from specrt.train.fspad.task import FspadTask
from specrt.train.loop.options import DataOptions, EesdOptions, FspadOptions
from specrt.train.run import TrainJob, _tables, train_eesd, train_fspad
from tests.cli.test_cli import write_tokenizer
from tests.families import PROMPT, build
from tests.family_cases import CASES, VARIANTS, Case
from tests.train.support import LITTLE

# Between them: scaled, capped and biased logits, scaled embeddings and learned positions.
BESIDE = {"gemma2", "cohere", "gpt2", "granite", "phi"}
# Each arrangement of norms, both kinds, windows, a plain MLP, turned parts of heads.
WITHIN = {"gemma3_text", "cohere", "gpt2", "olmo2", "glm4"}
OPTIONS: dict[str, Any] = {
    **LITTLE,
    "max_steps": 2,
    "batch_size": 3,
    "lr": 2e-2,
    "warmup_steps": 0,
    "depth": 2,
}
GREEDY = SamplingParams(max_new_tokens=6, ignore_eos=True)
EXIT = 2


def of_families(usual: set[str]) -> pytest.MarkDecorator:
    """Every case that is run, those of other families as slow ones."""
    cases = [case for case in (*CASES, *VARIANTS) if case.is_run]
    is_usual = [case.model_type in usual and case in CASES for case in cases]
    marks = [() if usual else (pytest.mark.slow,) for usual in is_usual]
    params = [pytest.param(c, id=c.label, marks=m) for c, m in zip(cases, marks, strict=True)]
    return pytest.mark.parametrize("case", params)


def make_job(case: Case, folder: Path) -> TrainJob:
    """A random target, and texts of which the first one begins as :data:`PROMPT`."""
    build(case, folder / "target")
    write_tokenizer(folder / "target")
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 97, (20 + n,), generator=generator).tolist() for n in range(6)]
    rows = [{"prompt_ids": PROMPT, "response_ids": [5]}]
    rows += [{"prompt_ids": text[:4], "response_ids": text[4:]} for text in texts]
    data = folder / "data.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = DataOptions(max_length=64, held_out=0.2, features="online")
    return TrainJob(folder / "target", case.label, (data,), folder / "out", options)


def first_sample(job: TrainJob, taps: tuple[int, ...] = ()) -> OnlineFeatures:
    data = read_examples(job.files, load_tokenizer(job.target), max_length=64)
    assert data[0].token_ids.tolist() == [*PROMPT, 5]
    return OnlineFeatures(data, job.target, torch.float32, taps=taps)


def served(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch, kind: type, name: str, find: Callable[..., Any]
) -> torch.Tensor:
    """The first draft logits of an engine whose prompt is :data:`PROMPT`, ``[V]``."""
    found: list[torch.Tensor] = []
    inner = getattr(kind, name)

    def watched(self: Any, *args: Any, **given: Any) -> Any:
        result = inner(self, *args, **given)
        found.append(find(result, *args)[0].clone())
        return result

    def load(drafter: Path | None) -> Engine:
        return specrt.load(job.target, drafter, dtype="float32", eager=True, progress=False)

    plain = load(None).generate(PROMPT, GREEDY).token_ids
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, watched)
        engine = load(job.out)
        drafted = engine.generate(PROMPT, GREEDY, draft=DraftParams(depth=3))
    assert drafted.token_ids == plain
    return found[0]


def assert_equal(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """To the rounding of float32 sums, of logits that say something."""
    assert wanted.std() > 0.05
    assert float((got - wanted).abs().max()) < 2e-5 * float(wanted.abs().max()) + 1e-6


@of_families(BESIDE)
def test_fspad_drafts_what_it_was_trained_to(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, options = make_job(case, tmp_path), FspadOptions(**OPTIONS)
    assert train_fspad(job, options).is_done
    target = ModelConfig.from_directory(job.target)
    config, tensors = read_checkpoint(job.out, target)
    task = FspadTask(config, lambda: _tables(job, target), replace(options, noise=0.0))
    model = task.start(TrainDevice(), torch.float32)
    assert isinstance(model, DraftModel)
    model.load_state_dict(tensors)
    batch = task.collate(first_sample(job), [0], 0)
    with torch.no_grad():
        predicted, _ = model(batch.inputs, task._embed[batch.next_tokens])
        wanted = task._head.target.logits(predicted[0, -1:])[0]
    got = served(job, monkeypatch, DraftLayer, "finish", lambda result, *_: result)
    assert_equal(got, wanted)


@of_families(WITHIN)
def test_an_exit_drafts_what_it_was_trained_to(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, options = make_job(case, tmp_path), EesdOptions(**OPTIONS)
    assert train_eesd(job, options, [EXIT]).is_done
    target = ModelConfig.from_directory(job.target)
    config = read_exit(job.out, target)
    start = read_last_layer(job.target, target)
    task = EesdTask(target, [config], lambda: _tables(job, target), lambda: start, options)
    models = task.start(TrainDevice(), torch.float32)
    assert isinstance(models, ExitModules)
    models.exits[str(EXIT)].load_state_dict(load_file(job.out / "model.safetensors"))
    batch = task.collate(first_sample(job, (EXIT,)), [0], 0)
    with torch.no_grad():
        (output,) = models(batch.states[:, :, :-1])
        wanted = task._head.target.logits(output.normed[0, -1:])[0]
    got = served(job, monkeypatch, ExitModel, "_launch_head", lambda *given: given[2])
    assert_equal(got, wanted)


@of_families(set())
def test_an_exit_begins_as_the_last_layer(case: Case, tmp_path: Path) -> None:
    build(case, tmp_path)
    target = ModelConfig.from_directory(tmp_path)
    last = target.num_layers - 1
    config = ExitConfig.for_target(target, last, name="x")
    model = ExitModules([config], read_last_layer(tmp_path, target))
    ids = torch.randint(3, 97, (37,), generator=torch.Generator().manual_seed(1))
    (rows,) = load_frozen_target(tmp_path, torch.float32, taps=(last,)).features([ids])
    hidden, feature = rows.chunk(2, -1)
    (output,) = model(hidden[None, :, None])
    torch.testing.assert_close(output.normed[0], feature, rtol=1e-4, atol=1e-4)
