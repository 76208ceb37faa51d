"""Targets of every form in engines: with any drafter, with logits by need, on a GPU, one text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specrt.config import Form
from specrt.device import Device
from specrt.draft.base import Drafter, EmptyDrafter
from specrt.draft.eesd.checkpoint import NUM_MODES, ExitConfig, ExitWeights
from specrt.draft.eesd.drafter import EesdDrafter
from specrt.draft.eesd.launched import LaunchedEesdDrafter
from specrt.draft.eesd.model import ExitModel
from specrt.draft.fspad.checkpoint import DraftConfig
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.fspad.layer import DraftLayer
from specrt.draft.fspad.on_device import DeviceFspadDrafter
from specrt.draft.fspad.weights import pack_weights
from specrt.draft.length.control import ControlOptions
from specrt.engine import head_by_need
from specrt.engine.head_by_need import HeadByNeed
from specrt.engine.results import GenerationResult
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from tests.checkpoints import random_draft_tensors
from tests.engine.exits import COSTS
from tests.engine.support import RandomTreeDrafter, make_engine, prompts, texts
from tests.engine.test_launched import OneAfterAnother
from tests.forms import FORMS, NUM_LAYERS, VOCAB, form_config, form_weights, named_config

PROMPTS = [[(11 * i * i + 3 * i) % VOCAB for i in range(n)] for n in (50, 1, 9)]
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
PARAMS = [GREEDY, replace(GREEDY, temperature=0.8, seed=5), replace(GREEDY, max_new_tokens=7)]
ON_A_GPU = [
    "both",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("parallel", "scaled")),
    pytest.param("learned positions", marks=pytest.mark.slow),
]


def target_on(device: Device, name: str) -> LlamaModel:
    """Of heads that a GPU takes, and its dtype there."""
    config = named_config(name, num_heads=2, num_kv_heads=1, head_dim=64)
    weights = form_weights(config, dtype=torch.bfloat16)
    return LlamaModel(config, place_weights(weights, device), device)


def exit_drafter(target: LlamaModel) -> EesdDrafter:
    """Its exit is the target's last layer, so it is never wrong."""
    config = ExitConfig.for_target(target.config, NUM_LAYERS - 1, name="target")
    last = replace(target.weights, layers=target.weights.layers[-1:])
    device = target.device
    dtype = target.dtype if device.is_gpu else torch.float32
    calibration = device.zeros(NUM_MODES, target.config.hidden_size, dtype=dtype)
    weights = ExitWeights(last, calibration, device.zeros(NUM_MODES), device.zeros(NUM_MODES))
    kind = LaunchedEesdDrafter if device.is_gpu else EesdDrafter
    options = ControlOptions(kind="fixed", draft_len=3)
    return kind(ExitModel(config, weights, target), options, costs=COSTS)


def fspad_drafter(target: LlamaModel) -> FspadDrafter | DeviceFspadDrafter:
    """A random one."""
    config, device = DraftConfig.for_target(target.config, "fspad", name="target"), target.device
    weights = pack_weights(
        config,
        random_draft_tensors(config, torch.float32),
        target.weights.embed,
        target.weights.lm_head,
        target.dtype,
        device,
        head_bias=target.weights.head_bias,
    )
    form = target.config.form
    layer = DraftLayer(config, weights, device, target.ropes, target_form=form)
    return DeviceFspadDrafter(layer) if device.is_gpu else FspadDrafter(layer)


def generated(
    target: LlamaModel, drafter: Drafter | None = None, max_batch: int = 2
) -> list[GenerationResult]:
    params = PARAMS
    if target.device.is_gpu:  # which may be simulated, and slow
        params = [replace(one, max_new_tokens=5) for one in PARAMS]
    return make_engine(target, drafter, max_batch=max_batch).generate(PROMPTS, params)


def check_drafters(target: LlamaModel) -> None:
    host = OneAfterAnother() if target.device.is_gpu else EmptyDrafter()
    expected = texts(generated(target, host, max_batch=1))
    assert texts(generated(target, max_batch=3)) == expected
    by_exit = generated(target, exit_drafter(target))
    assert texts(by_exit) == expected
    assert by_exit[0].stats.tau > 2  # not 4: a text ends within a round
    assert texts(generated(target, fspad_drafter(target))) == expected


@pytest.mark.parametrize("name", FORMS)
def test_no_drafter_changes_the_text(name: str) -> None:
    check_drafters(target_on(Device(), name))


@pytest.mark.parametrize("name", ON_A_GPU)
def test_no_drafter_changes_the_text_on_a_gpu(gpu: Device, name: str) -> None:
    """In rounds of launches alone, with maxima of logits or without."""
    check_drafters(target_on(gpu, name))


def test_logits_by_need_are_changed_like_all(monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form(has_head_bias=True, logit_scale=0.5, logit_cap=4.0)
    config = form_config(form)
    target = LlamaModel(config, form_weights(config))
    params = replace(GREEDY, temperature=0.7, seed=3)
    asked = prompts(4, VOCAB)
    results = make_engine(target, max_batch=1).generate(asked, replace(params, logprobs=True))
    passes, inner = list[int](), HeadByNeed.multiply

    def multiply(self: HeadByNeed, features: torch.Tensor, wanted: list[int], begin: int) -> None:
        passes.append(len(wanted))
        inner(self, features, wanted, begin)

    monkeypatch.setattr(head_by_need, "_LEAST_BYTES", 0)
    monkeypatch.setattr(HeadByNeed, "multiply", multiply)
    answers = {tuple(p): a for p, a in zip(asked, texts(results), strict=True)}
    drafter = RandomTreeDrafter(answers, VOCAB, 20)
    engine = make_engine(target, drafter, max_batch=3, max_nodes=20)
    drafted = engine.generate(asked, replace(params, logprobs=True))
    assert texts(drafted) == texts(results) and passes
    assert [one.logprobs for one in drafted] == [one.logprobs for one in results]
